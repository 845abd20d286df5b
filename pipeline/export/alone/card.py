"""The model card beside an export: README.md, with the front matter that hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.adapter import KIND_NAMES
from pipeline.config.data import DataConfig
from pipeline.errors import one_line

SHOWN = ("accuracy", "nll", "ece", "brier", "perplexity", "pearson", "spearman", "rmse")
NAMES = {"nll": "NLL", "ece": "ECE", "rmse": "RMSE"}
HINTS = {
    "adapter": "One adapter, read without masks: one pass per row.",
    "draws": "Mask draws of one adapter, each a LoRA of its own: one pass per row and draw, averaged.",
    "merged": "The adapter merged into the base's own weights: no adapter, no quantization, one pass per row. This is"
    " not the base that was trained and evaluated on; scores and temperature were measured again on these weights.",
    "merged_dequantized": "The adapter merged into the 4-bit weights that it was trained on, dequantized: the same"
    " model as the adapter on its 4-bit base, without needing bitsandbytes.",
    "gguf": "The adapter without masks as llama.cpp's LoRA file; `merged.gguf`, where it is, has the base in it.",
    "vllm": "The adapter, and its draws where there are any, with one rank and one scaling, for vLLM.",
    "sglang": "The adapter, and its draws where there are any, with one rank and one scaling, for SGLang.",
}
"""Form -> what its card says first."""


def model_card(
    form: str, config: RunConfig, reading: Mapping[str, Any], scores: Mapping[str, Any], rows: Mapping[str, int],
    loading: str,
) -> str:
    """Markdown.

    Args:
        form: of export.forms.
        reading: content of reading.json.
        scores: before and after (temperature) -> score -> value, on test rows; empty where nothing was reported.
        rows: split -> how many rows; empty likewise.
        loading: how it is loaded: lines of Markdown.
    """
    base, merged = reading["base"], reading["merged"]
    title = one_line(f"{KIND_NAMES[config.adapter.kind]} on {base['name']}")
    front = ["---", f"library_name: {'transformers' if merged else 'peft'}"]
    if not base["files"]:
        front.append(f"base_model: {base['name']}")
    if base["license"]:
        front.append(f"license: {base['license'].lower()}")
    front += ["tags:", "- lora", "- loradrop", "---"]
    quantized = "not quantized" if reading["quantization"] == "none" else f"quantized to {reading['quantization']}"
    hashes = [f"`{name}` sha256 `{sha256}`" for name, sha256 in base["files"].items()]
    sections = [
        *front, "", f"# {title}: {form}", "", HINTS.get(form, ""), "",
        "## What it was made from", "",
        f"- **Base**: {one_line(base['name'])}" + (f", commit `{base['commit']}`" if base["commit"] else ""),
        *[f"  - {line}" for line in hashes],
        f"  - {base['get']}",
        *[f"  - {line}" for line in [base.get("note")] if line],
        f"  - As it is served: {quantized}, computing in {reading['compute_dtype']}.",
        f"- **Licence** of the base: {base['license'] or 'not known here: see where the base comes from'}. That of the"
        " data holds for what was learnt from them, too.",
        f"- **Method**: {_method(config)}.",
        f"- **Data**: {_data(config.data)}; {_rows(rows)}kind: {reading['kind']}.",
        "", "## Scores on test rows", "", *_scores(scores), "",
        "## How it is read", "", *_reading(reading), "",
        "## How to load", "", loading, "",
        "## Intended use", "",
        f"Rows like those of its data ({_data(config.data)}), in the same template and with the same answers. The"
        " probabilities are calibrated for such rows; on others neither they nor the scores above promise"
        " anything.", "",
        "## Limits", "",
        "- A small adapter on a general base: what the base gets wrong about people and the world, this does, too.",
        "- Scores are those of one training on one set of test rows; the report of the run has their intervals.",
        *([] if merged else ["- On another base, or the same one quantized otherwise, it is another model."]),
    ]  # fmt: skip
    return "\n".join(sections) + "\n"


def _method(config: RunConfig) -> str:
    adapter = config.adapter
    name = adapter.method if isinstance(adapter.method, str) else "dropout on " + ", ".join(
        site.position for site in adapter.resolved_method().sites
    )
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else ", ".join(adapter.target_modules)
    size = f"rank {adapter.rank}, alpha {adapter.alpha:g}"
    return one_line(f"{KIND_NAMES[adapter.kind]} of {size}, on {targets}; dropout: {name}")


def _data(data: DataConfig) -> str:
    """Names without folders: where things lay on a machine is nobody else's business."""
    found = [part if part.startswith("embedded:") else PurePath(part).name for part in data.path.split(" + ")]
    return one_line(" + ".join(f"`{name}`" for name in found))


def _rows(rows: Mapping[str, int]) -> str:
    return "".join(f"{count} rows of {name}, " for name, count in rows.items())


def _scores(scores: Mapping[str, Any]) -> list[str]:
    before, after = scores.get("before", {}), scores.get("after", {})
    shown = [name for name in SHOWN if name in before]
    if not shown:
        return ["None: no report was made of exactly these members before they were exported."]
    head = ["| score | as predicted | under the temperature |", "|---|---|---|"]
    return head + [
        f"| {NAMES.get(name, name)} | {before[name]:.3f} | {f'{after[name]:.3f}' if name in after else '-'} |"
        for name in shown
    ]


def _reading(reading: Mapping[str, Any]) -> list[str]:
    """Sentences about template, choices, averaging and temperature."""
    lines = [f"- `reading.json` has the prompt template, and a row that was written out by it (`example`). {CUT}"]
    if reading["choices"]:
        lines.append("- Answers: " + ", ".join(f"`{one_line(choice)}`" for choice in reading["choices"]) + ".")
    if reading["kind"] == "choice" and reading["outputs"] is None:
        how = {"sum": "", "per_token": ", divided by its tokens", "per_character": ", divided by its characters"}
        lines.append(
            "- A choice is scored by the log-probability of its text behind the prompt"
            f"{how[reading['choice_score']]}; scores are normalised over the choices of the row."
        )
    if len(reading["weights"]) > 1:
        weights = ", ".join(f"{weight:.3g}" for weight in reading["weights"])
        space = {"probability": "probabilities", "logit": "log-probabilities", "value": "numbers"}[reading["average"]]
        lines.append(f"- {len(reading['weights'])} members: their {space} are averaged, with the weights {weights}.")
    if reading["temperature"] is not None:
        lines.append(
            f"- Temperature {reading['temperature']:.4g}: log-probabilities (of the average, where there are members)"
            " are divided by it and normalised again. Averages come first, the temperature second."
        )
    return lines


CUT = "A prompt that is too long loses its beginning."
