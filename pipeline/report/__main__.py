"""`python -m pipeline.report --run-dir DIR`."""

from pathlib import Path

from pipeline.distributed.worker import stage_main
from pipeline.report import write_report
from pipeline.run_folder.paths import RunPaths, update_status


def _report(run_dir: Path) -> None:
    write_report(run_dir)
    update_status(RunPaths(run_dir), "report", "done")


if __name__ == "__main__":
    raise SystemExit(stage_main("report", _report))
