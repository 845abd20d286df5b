"""`python -m pipeline.stages STAGE --run-dir DIR`: what every process that a stage starts runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.distributed.worker import stage_main
from pipeline.stages.table import STAGES, TRUST


def main(argv: list[str] | None = None) -> int:
    """Do the stage's work in this process; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.stages")
    parser.add_argument("stage", choices=[name for name, stage in STAGES.items() if stage.processes != "none"])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument(TRUST, action="store_true", dest="trusted", help="code that comes with the model may run")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the DeepSpeed launcher")
    arguments = parser.parse_args(argv)
    stage = STAGES[arguments.stage]

    def work(run_dir: Path) -> None:  # loaded inside: a library that cannot be imported is a failure of the stage
        if stage.loads_model:
            stage.load()(run_dir, trusted=arguments.trusted)
        else:
            stage.load()(run_dir)

    return stage_main(stage.name, work, arguments.run_dir, in_world=stage.processes == "all")


if __name__ == "__main__":
    raise SystemExit(main())
