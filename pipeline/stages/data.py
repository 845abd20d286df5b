"""`loradrop data`: real rows as the model will see them, and what their lengths mean. Only a tokenizer is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig, RunConfig, TrainConfig
from pipeline.data.encode import (
    IGNORE_INDEX,
    AnswerTooLong,
    Encoded,
    encode_candidates,
    first_named,
    supervised_share,
)
from pipeline.data.encode_classifier import encode_answered, output_count, refuse_for_causal
from pipeline.data.rows import Row
from pipeline.data.sampler import length_sorted_chunks
from pipeline.data.sources import SPLITS
from pipeline.data.splits import Splits, load_splits
from pipeline.errors import EXIT_OK
from pipeline.model.kind import model_kind
from pipeline.model.load import load_tokenizer
from pipeline.plan.preflight import check_inputs, read_fetched
from pipeline.plan.request import Request
from pipeline.plan.resolve import resolve_new, resolve_saved
from pipeline.run_folder.paths import RunPaths
from pipeline.terminal import one_line, printable
from pipeline.training.loader import open_loader

COUNTED_ROWS = 20_000
"""Rows of a split that are tokenized for the table."""
UNBOUNDED = 2**31
SUPERVISED, MASKED = "bold green", "dim"
PLAIN_MARKS = ("«", "»")
"""Around supervised text where there is no colour."""


@dataclass(frozen=True)
class Look:
    """One row as it will be seen."""

    row: Row
    encoded: Encoded | None
    """None where data.max_tokens cannot hold the answer: training and evaluation refuse such a row."""
    needed: int
    """Tokens that the whole row would take."""

    @property
    def truncated(self) -> bool:
        """Whether the beginning of its prompt is cut off."""
        return self.encoded is not None and self.needed > len(self.encoded.input_ids)


def show(request: Request) -> int:
    """Print rows of the configured data, or of a run's where its folder is given.

    Raises:
        UserError: something to mend in the configuration or the data.
    """
    saved = request.run_dir is not None and request.source is None and RunPaths(request.run).config.exists()
    config = resolve_saved(request, "data") if saved else resolve_new(request, "data")
    config = read_fetched(check_inputs(config))
    show_data(config, max(0, request.rows))
    return EXIT_OK


def show_data(config: RunConfig, rows: int, console: Console | None = None) -> None:
    """Print `rows` rows of every split, then one line of figures per split.

    Raises:
        DataError, ConfigError: as training would, for whatever concerns the data; answers that are too long are counted
            instead.
    """
    console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
    splits = load_splits(config.data)
    tokenizer = load_tokenizer(config.model)
    look = look_of(splits, tokenizer, config.data.max_tokens, model_kind(config.model))
    looks = {split: [look(row) for row in getattr(splits, split)[:COUNTED_ROWS]] for split in SPLITS}
    for split in SPLITS:
        for number, seen in enumerate(looks[split][:rows], start=1):
            name = one_line(seen.row.id)
            console.rule(Text(f"{split} {number} of {len(getattr(splits, split))} · {name}"), align="left")
            console.print(row_text(seen, tokenizer, marks=console.color_system is None))
    if rows:
        console.rule(style=MASKED)
    encoded = {split: [one.encoded for one in seen if one.encoded is not None] for split, seen in looks.items()}
    padding = {split: evaluation_padding(rows, config.evaluate.batch_tokens) for split, rows in encoded.items()}
    padding["train"] = training_padding(encoded["train"], config.train, config.adapter, config.data.max_tokens)
    console.print(figures_table(looks, splits, padding))
    for line in remarks(looks, config.data.max_tokens):
        console.print(Text(line))


def look_of(splits: Splits, tokenizer: Any, longest: int, kind: str) -> Callable[[Row], Look]:
    """How a row is encoded for a model of this kind: its right answer, as in training.

    Raises:
        DataError: rows that a model of this kind cannot read.
    """
    rows = [row for split in SPLITS for row in getattr(splits, split)]
    if kind == "classifier":
        output_count(rows)

        def as_class(row: Row) -> Look:
            needed = len(encode_answered(row, tokenizer, UNBOUNDED).input_ids)
            return Look(row, encode_answered(row, tokenizer, longest), needed)

        return as_class
    refuse_for_causal(rows)

    def as_tokens(row: Row) -> Look:
        whole = encode_candidates(row, tokenizer, UNBOUNDED)
        right = row.label or 0
        needed = len(whole[right].input_ids)
        if max(len(answer.input_ids) for answer in whole) <= longest:
            return Look(row, whole[right], needed)
        try:
            return Look(row, encode_candidates(row, tokenizer, longest)[right], needed)
        except AnswerTooLong:
            return Look(row, None, needed)

    return as_tokens


def row_text(look: Look, tokenizer: Any, marks: bool) -> Text:
    """The row as printable text: its tokens, supervised ones coloured (or between « and »), below it what has none.

    Args:
        marks: there is no colour: write marks around what is supervised.
    """
    if look.encoded is None:
        return Text(f"(its answer does not fit data.max_tokens; the row takes {look.needed} tokens)", style="red")
    text = Text()
    if look.truncated:
        text.append(f"[{look.needed - len(look.encoded.input_ids)} tokens cut off] ", style="yellow")
    in_class = (look.row.label is not None or look.row.score is not None) and look.encoded.labels[0] != IGNORE_INDEX
    labels = [IGNORE_INDEX] * len(look.encoded.labels) if in_class else look.encoded.labels
    for piece, supervised in pieces(look.encoded.input_ids, labels, tokenizer):
        shown = printable(piece).join(PLAIN_MARKS) if marks and supervised else printable(piece)
        text.append(shown, style=SUPERVISED if supervised else MASKED)
    if in_class and look.row.label is not None:
        answer = printable(look.row.choices[look.row.label].strip())
        text.append("\nclass: ", style=MASKED).append(answer, style=SUPERVISED)
    if look.row.score is not None:
        text.append("\nscore: ", style=MASKED).append(f"{look.row.score:g}", style=SUPERVISED)
    others = [choice for index, choice in enumerate(look.row.choices) if index != look.row.label]
    if others:
        listed = " | ".join(repr(choice) for choice in others[:8]) + (" | …" if len(others) > 8 else "")
        text.append(f"\nother choices: {listed}", style=MASKED)
    return text


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """The row cut where supervision begins or ends: (text, whether it is supervised).

    A piece is what its tokens add to the text before them, because tokenizers write a token in the middle of a text
    otherwise than alone.
    """
    found: list[tuple[str, bool]] = []
    begin, before = 0, ""
    supervised = [label != IGNORE_INDEX for label in labels]
    for end in range(1, len(ids) + 1):
        if end < len(ids) and supervised[end] == supervised[begin]:
            continue
        whole = _decoded(tokenizer, ids[:end])
        added = whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, ids[begin:end])
        found.append((added, supervised[begin]))
        begin, before = end, whole
    return found


def figures_table(looks: dict[str, list[Look]], splits: Splits, padding: Mapping[str, float]) -> Table:
    """One line per split: rows, tokens, supervised share, lengths, truncated rows, padding of its batches."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("split", no_wrap=True)
    for name in ("rows", "tokens", "supervised", "min", "median", "95 %", "max", "cut", "refused", "padding"):
        table.add_column(name, justify="right", no_wrap=True)
    for split, seen in looks.items():
        encoded = [look.encoded for look in seen if look.encoded is not None]
        lengths = sorted(len(row.input_ids) for row in encoded)
        refused, cut = len(seen) - len(encoded), sum(look.truncated for look in seen)
        cells = [split, f"{len(getattr(splits, split)):,}", f"{sum(lengths):,}"]
        if lengths:
            share = f"{sum(row.supervised for row in encoded) / sum(lengths):.1%}"
            quantiles = [str(lengths[round(q * (len(lengths) - 1))]) for q in (0.0, 0.5, 0.95, 1.0)]
            cells += [share, *quantiles, str(cut), str(refused), f"{padding[split]:.1%}"]
        table.add_row(*cells)
    return table


def training_padding(
    encoded: Sequence[Encoded], train: TrainConfig, adapter: AdapterConfig, max_tokens: int
) -> float:
    """What a pass of padded rows computes for padding and fillers ÷ all that it computes, one epoch, one process.

    Training lays rows end to end where the model, which is not loaded here, allows it.
    """
    if not encoded:
        return 0.0
    loader = open_loader(train, max_tokens, encoded, AdapterSpec.from_config(adapter, train.max_steps))
    steps = range(-(-(loader.rows or 0) // train.global_batch))
    micros = [micro for step in steps for micro in loader.of_step(step).micros]
    return 1.0 - sum(micro.tokens for micro in micros) / sum(micro.places for micro in micros)


def evaluation_padding(encoded: Sequence[Encoded], batch_tokens: int) -> float:
    """The same for the passes of an evaluation by one member."""
    lengths = [len(row.input_ids) for row in encoded]
    chunks = length_sorted_chunks(lengths, batch_tokens)
    padded = sum(len(chunk) * max(lengths[index] for index in chunk) for chunk in chunks)
    return 1.0 - sum(lengths) / padded if padded else 0.0


def remarks(looks: dict[str, list[Look]], max_tokens: int) -> list[str]:
    """What the figures do not say by themselves.

    Raises:
        DataError: no training token is supervised.
    """
    train = [look.encoded for look in looks["train"] if look.encoded is not None]
    if train:
        supervised_share(train)
    lines = []
    needed = max((look.needed for seen in looks.values() for look in seen), default=0)
    if refused := [look.row.named for seen in looks.values() for look in seen if look.encoded is None]:
        lines.append(
            f"refused: answers that data.max_tokens={max_tokens} cannot hold ({first_named(refused)}); training would"
            f" stop. data.max_tokens={needed} holds every row whole."
        )
    elif any(look.truncated for seen in looks.values() for look in seen):
        lines.append(f"cut: rows that lose the beginning of their prompt; data.max_tokens={needed} holds every row.")
    if any(len(seen) == COUNTED_ROWS for seen in looks.values()):
        lines.append(f"tokens and lengths: the first {COUNTED_ROWS:,} rows of each split.")
    return lines


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
