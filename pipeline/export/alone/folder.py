"""What a folder of an export needs to be read without its run: reading.json, tokenizer, use.py, README.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.adapters.members import Member
from pipeline.data.rows import Row
from pipeline.data.tokens import prompt_ids
from pipeline.ensemble.exported import reading_entry
from pipeline.ensemble.rows import RowForm
from pipeline.export.alone.card import model_card
from pipeline.export.alone.script import use_script
from pipeline.export.order import Exported, Loaded, ParityError, Target
from pipeline.export.served import reported_scores
from pipeline.files import write_json, write_manifest, write_text
from pipeline.model.load import resolve_model_path
from pipeline.scores.bootstrap import Floats
from pipeline.scores.ensemble import average
from pipeline.scores.temperature import apply_temperature

EXAMPLE_TOLERANCE = {"float32": 0.005}
"""Of use.py, in probability (nats, or the unit of a number): the wrong kernel of a 4-bit layer makes .02."""
COARSE_TOLERANCE = 0.05
"""In 16 bits, where PEFT multiplies adapters in another precision than we do."""


@dataclass(frozen=True)
class Form:
    """How the folders of a target are read together."""

    members: list[str]
    """Folders in export/, which are averaged."""
    draws: list[int | None]
    """Which members of the run they are."""
    weights: list[float]
    readout: Mapping[str, Any]
    """`average`, `temperature`."""
    scores: Mapping[str, Mapping[str, float]]
    """before and after the temperature -> score -> value, on test rows; empty where none are known."""
    outputs: Floats | None = None
    """(M, L, C) of the first test row, where they are not those of the run's own members."""

    @classmethod
    def of(
        cls, exported: Sequence[Exported], entries: Sequence[Mapping[str, Any]], alone: Mapping[str, Any],
        ensemble: Mapping[str, Any] | None, result: Mapping[str, Any],
    ) -> Form:
        """Of a target's exports: draws together, where there are any; else the adapter without masks.

        Args:
            entries: of the manifest, one per folder of export/.
            alone: read-out of the adapter without masks.
            ensemble: of the manifest.
            result: the report's, empty where there is none.
        """
        own = {one.member.draw: one.folder for one in exported}
        if ensemble is None or set(own) == {None}:
            name = exported[0].folder
            served = next(one for one in entries if one["folder"] == name).get("served")
            if served is not None:
                return cls([name], [None], [1.0], served.readout, served.scores, served.outputs)
            return cls([name], [None], [1.0], alone, reported_scores(result, "mean_field"))
        of_folder = {one["folder"]: one["draw"] for one in entries}
        draws = [of_folder[name] for name in ensemble["members"]]
        members = [own.get(draw, name) for draw, name in zip(draws, ensemble["members"], strict=True)]
        known = result.get("ensemble") or {}
        key = known["chosen"] if known.get("members") == draws else f"masks_{len(draws)}"
        return cls(members, draws, list(ensemble["weights"]), ensemble, reported_scores(result, key))


def stand_alone(
    loaded: Loaded, folder: Path, target: Target, exported: Sequence[Exported], form: Form
) -> dict[str, Any]:
    """Fill the folder that a target's exports share, and run its use.py: the entry of the form in the manifest.

    Args:
        folder: that is being filled, export/.
        exported: of the target, all below one folder of export/.

    Raises:
        ParityError: use.py fails, or finds another answer than we do.
    """
    root = folder / exported[0].folder.split("/")[0]
    row = loaded.splits.test[0]
    scale = form.readout["temperature"]
    reading = {
        **reading_entry(loaded.config, RowForm.of_run(loaded.config, loaded.splits)),
        "kind": row.kind, "base": loaded.content, "merged": target.merged,
        "outputs": loaded.identity.classes,
        "quantization": "none" if target.merged else loaded.identity.quantization,
        "double_quantization": loaded.identity.double_quantization,
        "unquantized": list(loaded.identity.unquantized), "compute_dtype": loaded.identity.compute_dtype,
        "max_tokens": loaded.task.max_tokens, "lead": _lead(loaded, row),
        "members": [relpath(folder / name, root) for name in form.members], "weights": list(form.weights),
        "average": form.readout["average"], "temperature": None if scale is None else float(scale["value"]),
        "order": "members are averaged; the average is divided by the temperature and normalised again",
    }  # fmt: skip
    loaded.task.base.tokenizer.save_pretrained(root)
    entry: dict[str, Any] = {"folder": root.name, "average": reading["average"], "temperature": scale}
    if target.use and row.kind != "chat":
        said = _our_outputs(loaded, row, form.draws) if form.outputs is None else form.outputs
        reading["example"] = _example(loaded, row, _read_out(said, reading))
        write_text(root / "use.py", use_script(reading, loaded.trusted))
    write_json(root / "reading.json", reading)
    loading = target.loading(loaded, exported) if target.loading is not None else _loading(reading)
    rows = {} if not loaded.result else loaded.result.get("rows", {})
    write_text(root / "README.md", model_card(target.name, loaded.config, reading, form.scores, rows, loading))
    if "example" in reading:
        entry["use"] = _run(root, reading, resolve_model_path(loaded.config.model))
    write_manifest(root)  # so that the folder can be verified wherever it is copied to
    return entry


def _lead(loaded: Loaded, row: Row) -> list[int]:
    """Special tokens before a prompt."""
    return prompt_ids(loaded.task.base.tokenizer, row.prompt)[0] if row.kind != "chat" else []


def _our_outputs(loaded: Loaded, row: Row, draws: Sequence[int | None]) -> Floats:
    """(M, L, C) of one row, in float64."""
    found = loaded.task.predict(loaded.adapters, [row], [Member(0, draw) for draw in draws])
    return found.outputs.astype(np.float64)


def _read_out(outputs: Floats, reading: Mapping[str, Any]) -> list[float]:
    """What (M, L, C) outputs of one row come to: probabilities, a number, or log-probabilities of tokens."""
    averaged = average(outputs, reading["average"], reading["weights"])
    if reading["kind"] == "choice":
        averaged = np.exp(apply_temperature(averaged, reading["temperature"] or 1.0))
    return [float(value) for value in averaged.ravel() if np.isfinite(value)]


def _example(loaded: Loaded, row: Row, values: list[float]) -> dict[str, Any]:
    dtype = loaded.task.base.identity.compute_dtype
    return {
        "prompt": row.prompt, "second": row.second,
        "choices": list(row.choices) if row.kind != "completion" else [row.completion],
        "values": values, "dtype": dtype, "tolerance": EXAMPLE_TOLERANCE.get(dtype, COARSE_TOLERANCE),
    }


def _run(root: Path, reading: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Run use.py in a clean process."""
    given = [str(Path(base).expanduser().resolve())] if not reading["merged"] and reading["base"]["files"] else []
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    done = subprocess.run(
        [sys.executable, "-I", str(root / "use.py"), *given], capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise ParityError(f"{root.name}/use.py, with transformers alone: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])["values"]
    ours = reading["example"]["values"]
    return {"max_difference": max(abs(a - b) for a, b in zip(found, ours, strict=True)), "values": found}


def _loading(reading: Mapping[str, Any]) -> str:
    argument = " BASE" if not reading["merged"] and reading["base"]["files"] else ""
    needs = "transformers" if reading["merged"] else "transformers and peft"
    if reading["quantization"] != "none":
        needs += " and bitsandbytes"
    if "example" not in reading:
        return f"With {needs}; conversations go through the tokenizer's chat template."
    return (
        f"`use.py` has the lines, with {needs} alone. `python use.py{argument}` answers the first test row and ends"
        " with an error where it finds other probabilities than were evaluated."
        + (" BASE is the folder of the base model; other weights than its own are refused." if argument else "")
    )
