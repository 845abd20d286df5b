"""What a configuration needs and gets: its settings, the model, the rows, and what the tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config import RunConfig
from pipeline.data.check import at_hand
from pipeline.data.encode import encode_training
from pipeline.data.rows import Row
from pipeline.data.sources import SPLITS
from pipeline.data.splits import Splits, load_splits
from pipeline.data.tokens import following_ids
from pipeline.doctor.finding import Finding
from pipeline.errors import ErrorList, UserError, one_line
from pipeline.hub import check_model_at_hand
from pipeline.model.embedded import embedded_folder, is_embedded
from pipeline.model.kind import base_sizes, model_kind
from pipeline.model.load import load_tokenizer
from pipeline.plan.preflight import check_inputs
from pipeline.plan.request import Request
from pipeline.plan.resolve import resolve_new, resolve_saved
from pipeline.run_folder.paths import RunPaths

TRIED_ROWS = 200
"""Of the training split: rows that become tokens."""
LISTED = 8
"""Label words that are shown."""


def configuration_findings(request: Request) -> list[Finding]:
    """Settings first: without them nothing else can be looked at; then model and rows, each by itself."""
    found: list[Finding] = []
    config = tried(found, "configuration", lambda: resolved(request))
    if config is None:
        return found
    found.append(Finding("configuration", "ok", f"{config.model.path} on {config.data.path}"))
    tokenizer = tried(found, "model", lambda: look_at_model(config, found))
    splits = tried(found, "data", lambda: look_at_data(config, found))
    if tokenizer is not None:
        tried(found, "tokenizer", lambda: look_at_tokens(config, tokenizer, splits.train if splits else [], found))
    return found


def tried(found: list[Finding], check: str, look: Callable[[], Any]) -> Any:
    """What `look` returns; None where it finds a fault, which is then a finding under the section that it names."""
    try:
        return look()
    except UserError as error:
        if isinstance(error, ErrorList):
            found.append(Finding(check, "FAIL", one_line(str(error)), "Mend the rows named"))
            return None
        shown = "" if error.value is None else f" = {one_line(str(error.value))}"
        section = error.field.partition(".")[0]
        name = section if section in ("model", "data") else check
        found.append(Finding(name, "FAIL", one_line(f"{error.field}{shown}: {error.constraint}"), error.remedy))
    return None


def resolved(request: Request) -> RunConfig:
    """The configuration that a training, or a run folder's later stages, would have. Raises `UserError`."""
    saved = request.run_dir is not None and request.source is None and RunPaths(request.run).config.exists()
    config = resolve_saved(request, "doctor") if saved else resolve_new(request, "doctor")
    return check_inputs(config)


def look_at_model(config: RunConfig, found: list[Finding]) -> Any:
    """Its tokenizer; None where it is fetched at the first start. Raises `UserError`."""
    path = config.model.path
    if is_embedded(path) and embedded_folder(path) is None:
        found.append(Finding("model", "note", f"{path} is fetched with pip at the first start"))
        return None
    check_model_at_hand(path, config.model.revision)
    kind, sizes = model_kind(config.model), base_sizes(config.model)
    width = f", hidden size {sizes[0]}" if sizes else ""
    tokenizer = load_tokenizer(config.model)
    found.append(Finding("model", "ok", f"{path}: {kind}{width}, {len(tokenizer):,} tokens"))
    return tokenizer


def look_at_data(config: RunConfig, found: list[Finding]) -> Splits | None:
    """Its rows; None where the embedded ones are fetched at the first start. Raises `UserError`."""
    if is_embedded(config.data.path) and not at_hand(config.data):
        found.append(Finding("data", "note", f"{config.data.path} is fetched with pip at the first start"))
        return None
    splits = load_splits(config.data)
    sizes = ", ".join(f"{len(getattr(splits, split)):,} {split}" for split in SPLITS)
    found.append(Finding("data", "ok", f"{splits.train[0].kind if splits.train else 'no'} rows: {sizes}"))
    return splits


def look_at_tokens(config: RunConfig, tokenizer: Any, rows: Sequence[Row], found: list[Finding]) -> None:
    """Pad token, chat template, label words. Raises `UserError`."""
    found.append(pad_token(tokenizer))
    kind = rows[0].kind if rows else ""
    if kind == "chat":
        found.append(chat_template(tokenizer))
        if found[-1].state == "FAIL":
            return
    if not rows or model_kind(config.model) == "classifier":
        return
    for row in rows[:TRIED_ROWS]:
        encode_training(row, tokenizer, config.data.max_tokens)
    if kind == "choice":
        found.append(label_words(tokenizer, rows))


def pad_token(tokenizer: Any) -> Finding:
    """Rows of one pass are padded with it; `load_tokenizer` has put the end token in its place where there is none."""
    if tokenizer.pad_token_id is None:
        remedy = 'Set "pad_token" in the model\'s tokenizer_config.json to one of its special tokens'
        return Finding("pad token", "FAIL", "the tokenizer has neither a pad nor an end token", remedy)
    same = ", which is the end token: padding is masked by position" if (
        tokenizer.pad_token_id == tokenizer.eos_token_id) else ""
    return Finding("pad token", "ok", f"{tokenizer.pad_token!r}{same}")


def chat_template(tokenizer: Any) -> Finding:
    """Chat rows are rendered by it."""
    if getattr(tokenizer, "chat_template", None):
        return Finding("chat template", "ok", "the tokenizer has one")
    remedy = "Give an instruction-tuned model, or put chat_template.jinja beside its tokenizer"
    return Finding("chat template", "FAIL", "rows are chats, and the tokenizer has no chat template", remedy)


def label_words(tokenizer: Any, rows: Sequence[Row]) -> Finding:
    """Whether the model can tell the answers of a row apart, and how many tokens each takes."""
    words = list(dict.fromkeys(choice for row in rows[:TRIED_ROWS] for choice in row.choices))
    tokens = dict(zip(words, following_ids(tokenizer, words), strict=True))
    unknown = [word for word, ids in tokens.items() if tokenizer.unk_token_id in ids]
    if unknown:
        told = f"{unknown[0]!r} holds text that is not in the model's vocabulary"
        return Finding("label words", "FAIL", told, "Set data.template.choices to words the model knows")
    for row in rows[:TRIED_ROWS]:
        seen: dict[tuple[int, ...], str] = {}
        for choice in row.choices:
            other = seen.setdefault(tuple(tokens[choice]), choice)
            if other != choice:
                told = f"{other!r} and {choice!r} are the same tokens to the model"
                return Finding("label words", "FAIL", told, "Set data.template.choices to words that differ")
    listed = ", ".join(f"{word!r} {len(ids)}" for word, ids in list(tokens.items())[:LISTED])
    more = f" and {len(tokens) - LISTED} more" if len(tokens) > LISTED else ""
    return Finding("label words", "ok", one_line(f"tokens of each: {listed}{more}"))
