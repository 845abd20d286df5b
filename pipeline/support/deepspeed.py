"""`python -m pipeline.support.deepspeed`: which DeepSpeed set-ups train which bases, found out and never looked up.

ds_configs/ file × base × compute dtype × activation checkpointing × processes. Each cell trains a tiny random model by
the training stage's own function. It is `tested` where every trained tensor got a gradient, and losses, gradient norms
and Adam's first moments equal those of plain training (ZeRO-0, one process, one batch without accumulation); `refused`
with the error that the trainer gives, or `FAILED`. Cells of one process count share one process group.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, load_config
from pipeline.config.deepspeed import DS_CONFIG_FOLDERS, shards_parameters
from pipeline.config.launch import LaunchConfig
from pipeline.distributed.launcher import launcher_command, launcher_environment, run_stage
from pipeline.errors import UserError
from pipeline.files import read_json, read_json_lines, write_json
from pipeline.plan.preflight import check_inputs
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.paths import RunPaths, step_name
from pipeline.support.tiny import write_tiny_data, write_tiny_model

BASES = ("nf4", "int8", "none")
PROCESSES = (1, 2)
STEPS = 3
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 1e-1)}
"""compute dtype -> relative tolerance of losses and gradient norms, and of Adam's first moments taken together.
The moments are linear in the gradients: a wrong scale shows in them, as it does not in losses."""
CELLS, OUTCOMES = "cells.json", "outcomes.jsonl"


@dataclass(frozen=True)
class Cell:
    """One set-up."""

    deepspeed: str
    base: str
    dtype: str
    checkpointing: bool
    processes: int
    micro_batch: int = 2
    method: str = "lora_dropout"

    @property
    def name(self) -> str:
        """Of its run folder."""
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def reference(self) -> Cell:
        """What its losses and gradients must equal."""
        return Cell("zero0", self.base, self.dtype, False, 1, 8, self.method)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    cell: Cell
    status: str
    """`trained` (not yet compared), `tested`, `refused` or `FAILED`."""
    detail: str = ""
    curve: tuple[float, ...] = ()
    """Loss and gradient norm of every step."""
    deviation: tuple[float, float] = (0.0, 0.0)
    """Largest relative deviation from the reference: of a loss or a gradient norm; of the first moments."""


def all_cells(files: Sequence[str]) -> list[Cell]:
    """Every combination, and the references they are held against.

    bfloat16 where it decides the adapters' own precision: under ZeRO-3. Elsewhere they are fp32 in any case.
    """
    cells = [
        Cell(file, base, dtype, checkpointing, processes)
        for processes in PROCESSES
        for file in files
        for dtype in (TOLERANCE if shards_parameters(file) else ["float32"])
        for base in BASES
        for checkpointing in (False, True)
    ]
    return [*dict.fromkeys(cell.reference for cell in cells), *cells]


def cell_config(cell: Cell, folder: Path) -> RunConfig:
    """The run that a cell is."""
    return load_config(
        None,
        [
            f"model.path={folder / 'model'}", f"model.quantization={cell.base}", f"model.compute_dtype={cell.dtype}",
            f"data.path={folder / 'rows.jsonl'}", "data.train_rows=32", "data.validation_rows=11",
            "data.calibration_rows=8", "data.test_rows=8", "data.max_tokens=32", "adapter.rank=4",
            f"adapter.method={cell.method}",
            f"train.max_steps={STEPS}", f"train.validate_every_steps={STEPS}", f"train.checkpoint_every_steps={STEPS}",
            "train.global_batch=8", f"train.micro_batch={cell.micro_batch}", "train.learning_rate=0.01",
            "train.max_gradient_norm=1000000", f"train.deepspeed={cell.deepspeed}",
            f"train.activation_checkpointing={str(cell.checkpointing).lower()}", "evaluate.batch_tokens=48",
        ],
    )  # fmt: skip


def run_cells(folder: Path) -> None:
    """What every launched process does: train the cells of cells.json one after the other, noting each outcome."""
    from pipeline.stages.train import train_run

    cells = [Cell(**entry) for entry in read_json(folder / CELLS)]
    for cell in cells:
        outcome = Outcome(cell, "trained")
        try:
            config = cell_config(cell, folder)
            check_inputs(config)
            train_run(config, folder / cell.name)
            outcome = replace(outcome, curve=tuple(_curve(folder / cell.name)))
        except UserError as error:
            outcome = Outcome(cell, "refused", str(error))
        except Exception as error:  # the table is the place where it belongs
            outcome = Outcome(cell, "FAILED", f"{type(error).__name__}: {error}".splitlines()[0])
        if os.environ.get("RANK", "0") == "0":
            with (folder / OUTCOMES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")


def run_matrix(cells: Sequence[Cell], folder: Path) -> list[Outcome]:
    """Train all cells, a process group per process count, and compare them with their references."""
    write_tiny_model(folder / "model")
    write_tiny_data(folder / "rows.jsonl")
    found: dict[Cell, Outcome] = {}
    for processes in sorted({cell.processes for cell in cells}):
        part = [cell for cell in cells if cell.processes == processes]
        launch = LaunchConfig(processes=processes)
        (folder / OUTCOMES).unlink(missing_ok=True)
        write_json(folder / CELLS, [asdict(cell) for cell in part])
        try:
            command = [sys.executable, "-m", "pipeline.support.deepspeed", "--run-dir", str(folder)]
            if processes > 1:  # a process alone needs no launcher, which costs two more starts
                command = launcher_command(["pipeline.support.deepspeed"], folder, launch)
        except UserError as error:  # more processes than GPUs
            found |= {cell: Outcome(cell, "refused", str(error)) for cell in part}
            continue
        print(f"{processes} process{'es' if processes > 1 else ''}: {len(part)} cells …", file=sys.stderr, flush=True)
        with contextlib.redirect_stderr(io.StringIO()):  # what each run says about itself; the log has it
            run_stage(command, folder / f"matrix-{processes}.log", folder, "matrix", launcher_environment(launch))
        found |= {outcome.cell: outcome for outcome in _read_outcomes(folder / OUTCOMES)}
    missing = Outcome(cells[0], "FAILED", "the processes ended before this cell")
    return [_compared(found.get(cell, replace(missing, cell=cell)), found, folder) for cell in cells]


def _compared(outcome: Outcome, found: dict[Cell, Outcome], folder: Path) -> Outcome:
    if outcome.status != "trained":
        return outcome
    reference = found.get(outcome.cell.reference)
    if reference is None or reference.status != "trained":
        return replace(outcome, status="FAILED", detail=f"its reference {outcome.cell.reference.name} did not train")
    silent, deviation = _moment_deviation(folder / outcome.cell.name, folder / reference.cell.name)
    curve = max(abs(a - b) / abs(b) for a, b in zip(outcome.curve, reference.curve, strict=True))
    outcome = replace(outcome, deviation=(curve, deviation))
    if silent:
        return replace(outcome, status="FAILED", detail=f"no gradient reached {', '.join(silent[:3])}")
    allowed = TOLERANCE[outcome.cell.dtype]
    if not (curve <= allowed[0] and deviation <= allowed[1]):
        shown, wanted = f"{curve:.1e} and {deviation:.1e}", f"{allowed[0]:g} and {allowed[1]:g}"
        detail = f"losses (or gradient norms) and moments deviate by {shown}; allowed are {wanted}"
        return replace(outcome, status="FAILED", detail=detail)
    return replace(outcome, status="tested")


def _moment_deviation(run: Path, reference: Path) -> tuple[list[str], float]:
    """Trained tensors whose first moment is zero or not finite, and the distance of all moments from the reference."""
    import torch
    from safetensors.torch import load_file

    def moments(folder: Path) -> dict[str, Any]:
        state = load_file(RunPaths(folder).checkpoints / step_name(STEPS) / "state.safetensors")
        return {name.removeprefix("exp_avg/"): t for name, t in sorted(state.items()) if name.startswith("exp_avg/")}

    own, other = moments(run), moments(reference)
    silent = [name for name in other if name not in own or not float(own[name].norm()) > 0]
    if silent:
        return silent, float("nan")
    a, b = (torch.cat([values[name].flatten() for name in other]) for values in (own, other))
    return [], float((a - b).norm() / b.norm())


def _curve(run: Path) -> Iterator[float]:
    for row in read_metrics(RunPaths(run).metrics, train=["loss", "gradient_norm"]):
        if row["kind"] == "train":
            yield from (row["loss"], row["gradient_norm"])


def _read_outcomes(path: Path) -> Iterator[Outcome]:
    for row in read_json_lines(path):
        yield Outcome(Cell(**row["cell"]), row["status"], row["detail"], tuple(row["curve"]))


def format_table(outcomes: Sequence[Outcome]) -> str:
    """A row per file, base and precision; a column per process count and checkpointing; then each refusal once."""
    columns = [(p, c) for p in PROCESSES for c in (False, True)]
    heads = [f"{p} proc{'s' if p > 1 else ''}{', ckpt' if c else ''}" for p, c in columns]
    lines = [f"{'file':<16}{'base':<7}{'compute':<10}" + "".join(f"{head:<16}" for head in heads)]
    table: dict[tuple[str, str, str], dict[tuple[int, bool], Outcome]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        if cell.micro_batch == Cell.micro_batch:
            row = table.setdefault((cell.deepspeed, cell.base, cell.dtype), {})
            row[cell.processes, cell.checkpointing] = outcome
    for (file, base, dtype), row in sorted(table.items()):
        statuses = (row[column].status if column in row else "-" for column in columns)
        lines.append(f"{file:<16}{base:<7}{dtype:<10}" + "".join(f"{status:<16}" for status in statuses))
    counts = ", ".join(f"{sum(o.status == s for o in outcomes)} {s}" for s in ("tested", "refused", "FAILED"))
    lines += ["", f"{counts} (references included). Largest deviation from plain training:"]
    for dtype, (loss, moment) in TOLERANCE.items():
        tested = [o.deviation for o in outcomes if o.status == "tested" and o.cell.dtype == dtype]
        if tested:
            worst = max(a for a, _ in tested), max(b for _, b in tested)
            lines.append(f"  {dtype}: losses and gradient norms {worst[0]:.1e} (allowed {loss:g}),")
            lines[-1] += f" first moments {worst[1]:.1e} (allowed {moment:g})"
    reasons = dict.fromkeys(f"{o.status}: {o.detail}" for o in outcomes if o.status in ("refused", "FAILED"))
    return "\n".join([*lines, *(f"- {reason}" for reason in reasons)])


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a cell failed."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.support.deepspeed", description=description)
    files = sorted(path.stem for path in DS_CONFIG_FOLDERS[0].glob("*.json"))
    parser.add_argument("--file", action="append", choices=files, help="only these files of ds_configs/")
    parser.add_argument("--run-dir", type=Path, help="given to the launched processes")
    parser.add_argument("--local_rank", type=int, help="given by the DeepSpeed launcher")
    arguments = parser.parse_args(argv)
    if arguments.run_dir is not None:
        run_cells(arguments.run_dir)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_matrix(all_cells(arguments.file or files), Path(folder))
    print(format_table(outcomes))
    return int(any(outcome.status == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
