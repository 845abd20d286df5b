"""Rows divided among their owners: train, validation, calibration, test.

- The order of rows is that of SHA-256(seed, question): it depends neither on the order in the file nor on
  the sizes asked for. Test is taken first, then calibration, validation and train, so the test rows stay
  the same whatever the training size, and a smaller training split is contained in a larger one.
- A split with a file of its own is taken from that file, whole unless its size is given; one without from the train
  file, of which it gets a share where its size is not given.
- Rows with the same question never sit in two splits, nor do rows of one file with the same unit; repeated rows are
  dropped, and their number logged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from pipeline.config import DataConfig
from pipeline.data.read import read_file
from pipeline.data.rows import Row
from pipeline.data.shapes.reading import read_sources
from pipeline.data.sources import SPLITS, Source, head_rows, local_files, open_records, rows_of
from pipeline.errors import DataError

EVALUATED_SPLITS = SPLITS[1:]
"""All but train: those that members predict and a report reads."""
TAKING_ORDER = ("test", "calibration", "validation", "train")
SHARES = {"test": 2, "calibration": 1, "validation": 1, "train": 6}
"""Tenths of the rows, where a split has neither a file nor a size of its own."""
MOST_DRAWN = {"test": 400, "calibration": 200, "validation": 200}
"""Rows beyond which a drawn split does not grow."""
LEAST_DRAWN = 2
"""Rows that a split must get by itself: neither a temperature nor a best step is told by one."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Disjoint rows per owner, in the order in which they are used."""

    train: list[Row]
    validation: list[Row]
    calibration: list[Row]
    test: list[Row]
    fingerprint: str
    """SHA-256 over split names, row ids and texts: equal rows, equal fingerprint."""
    repeated: int = 0
    """Rows dropped because an earlier one of the same file has the same text."""
    leaked: int = 0
    """Rows dropped because the file of a later stage holds their question."""


def load_splits(config: DataConfig) -> Splits:
    """Read `config.path` and divide its rows.

    With `config.streaming` only the first rows of the train split are read, `head_rows`: splits without a file of
    their own are drawn from them, and `Splits.train` is a sample, what they leave.

    Raises:
        DataError: a fault in the data, or too few rows for `data.*_rows`.
    """
    files: dict[str, list[Row]] = {}
    sources = read_sources(config)
    for source in sources:
        for split, records in open_records(source, config.streaming).items():
            first = head_rows(config) if config.streaming and split == "train" else None
            files.setdefault(split, []).extend(rows_of(source, records, f"{source.path} ({split})", first)[0])
    refuse_mixed(files)
    splits = divide(files, config.model_copy(update={"train_rows": None}) if config.streaming else config)
    splits = with_training_rows(weighted(splits, sources), config)
    if splits.repeated:
        log.warning("data: dropped %d repeated rows (same text; the first of each is kept)", splits.repeated)
    if splits.leaked:
        log.warning("data: dropped %d rows whose question the file of a later stage holds too", splits.leaked)
    return splits


def refuse_mixed(files: Mapping[str, Sequence[Row]]) -> None:
    """Refuse a split whose sources bring rows of different kinds. Raises `DataError`."""
    for split, rows in files.items():
        other = next((row for row in rows if row.kind != rows[0].kind), None)
        if other is not None:
            raise DataError(
                "data.sources", None, f"bring {rows[0].kind} and {other.kind} rows (such as {other.id}) for {split}",
                "Keep one kind, or give a source a template that makes it so.",
            )


def weighted(splits: Splits, sources: Sequence[Source]) -> Splits:
    """The training rows as often as the weights of their sources say; a part of a time by the rows' names."""
    weights = {source.prefix: source.weight for source in sources if source.field != "data.evaluation.path"}
    if set(weights.values()) == {1.0}:
        return splits
    train: list[Row] = []
    for row in splits.train:
        weight = weights[row.id.partition("/")[0] + "/"]
        chance = int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8]) / 2**64
        times = int(weight) + (chance < weight % 1.0)
        train += [row if copy == 0 else replace(row, id=f"{row.id}#{copy + 1}") for copy in range(times)]
    if not train:
        raise DataError("data.sources", None, "leave no training row", "Raise a weight.")
    parts = {split: getattr(splits, split) for split in SPLITS} | {"train": train}
    return replace(splits, train=train, fingerprint=_fingerprint(parts))


def with_training_rows(splits: Splits, config: DataConfig) -> Splits:
    """With the rows of `config.train_path`, where it is given, in place of the training rows; rows whose question or
    unit another split owns are left out, and counted as leaked.

    Raises:
        DataError: faults of that file, no row that is left, or rows of another kind.
    """
    if config.train_path is None:
        return splits
    source = Source(config.train_path, None, {"train": "train"}, "data.train_path")
    files = local_files(source)["train"]
    rows, _ = rows_of(source, chain.from_iterable(map(read_file, files)), config.train_path)
    others = [row for split in EVALUATED_SPLITS for row in getattr(splits, split)]
    questions, units = {row.question for row in others}, {row.unit for row in others} - {None}
    train = [row for row in rows if row.question not in questions and row.unit not in units]
    if not train:
        what = "holds no row that the other splits do not own"
        raise DataError(source.field, source.path, what, "Give other rows.")
    if train[0].kind != others[0].kind:
        what = f"holds {train[0].kind} rows, and {others[0].kind} rows are evaluated"
        raise DataError(source.field, source.path, what, "Keep one kind.")
    parts = {split: getattr(splits, split) for split in SPLITS} | {"train": train}
    leaked = splits.leaked + len(rows) - len(train)
    return replace(splits, train=train, fingerprint=_fingerprint(parts), leaked=leaked)


def sample(rows: Sequence[Row], most: int | None, seed: int) -> tuple[list[Row], str]:
    """At most `most` rows of a source that has no training rows, and their fingerprint: taken as a split is, each text
    once, rows of a unit together."""
    taken = _take(_pools({"test": rows}, seed)[0]["test"], most)
    return taken, _fingerprint({"also": taken})


def divide(files: Mapping[str, Sequence[Row]], config: DataConfig) -> Splits:
    """Splits of the configured sizes out of rows that are already read.

    Args:
        files: split -> its rows; `train` is always there and feeds the splits that are not.

    Raises:
        DataError: too few rows, naming `data.*_rows` and how many there are.
    """
    pools, repeated, leaked = _pools(files, config.seed)
    sizes = {split: sum(map(len, pool)) for split, pool in pools.items()}
    questions = {split: len(pool) for split, pool in pools.items()}
    taken: dict[str, list[Row]] = {}
    asked = _asked(files, sizes["train"], config)
    for split in TAKING_ORDER:
        source = split if split in pools else "train"
        taken[split] = _take(pools[source], asked[split])
        if len(taken[split]) < (asked[split] or 1):
            raise _too_few(split, source, sizes[source], questions[source], files, config)
    return Splits(**taken, fingerprint=_fingerprint(taken), repeated=repeated, leaked=leaked)


def _asked(files: Mapping[str, Sequence[Row]], there: int, config: DataConfig) -> dict[str, int | None]:
    """Split -> rows wanted; None: all that are there. `there` are the distinct rows of the train file.

    Raises:
        DataError: so few rows that a share of them would be none.
    """
    asked: dict[str, int | None] = {split: getattr(config, f"{split}_rows") for split in TAKING_ORDER}
    drawn = [split for split in MOST_DRAWN if split not in files]
    open_sizes = [split for split in drawn if asked[split] is None]
    free = there - sum(asked[split] or 0 for split in (*drawn, "train"))
    parts = _parts(open_sizes, asked)
    for split in open_sizes:
        asked[split] = min(MOST_DRAWN[split], free * SHARES[split] // parts)
    if open_sizes and min(asked[split] or 0 for split in open_sizes) < LEAST_DRAWN:
        raise _too_small(there, drawn, open_sizes, asked, config)
    return asked


def _parts(open_sizes: Sequence[str], asked: Mapping[str, int | None]) -> int:
    """Of how many parts `SHARES` are: of all rows, or, where the training rows are counted, of what these leave."""
    return sum(SHARES.values()) if asked["train"] is None else sum(SHARES[split] for split in open_sizes)


def _too_small(
    there: int, drawn: Sequence[str], open_sizes: Sequence[str], asked: Mapping[str, int | None], config: DataConfig
) -> DataError:
    parts = _parts(open_sizes, asked)
    fixed = sum(asked[split] or 0 for split in (*drawn, "train") if split not in open_sizes)
    least = fixed + -(-LEAST_DRAWN * parts // min(SHARES[split] for split in open_sizes))
    by_hand = " ".join(f"data.{split}_rows=1" for split in open_sizes)
    said = f", or say how few will do: {by_hand}" if there > fixed + len(open_sizes) else ""
    return DataError(
        "data.path", config.path, f"holds {there} distinct rows, too few to draw {_and(drawn)} from: each needs"
        f" {LEAST_DRAWN} or more of its own, because one row tells nothing",
        f"Give at least {least} rows, or a folder with a file for each split{said}.",
    )


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _pools(files: Mapping[str, Sequence[Row]], seed: int) -> tuple[dict[str, list[list[Row]]], int, int]:
    """(split with a file -> its groups of rows with one question or unit, in the order of taking from the end;
    rows dropped as repeated; rows dropped as leaked)."""
    pools: dict[str, list[list[Row]]] = {}
    owners: set[str] = set()
    repeated = leaked = 0
    for split in (s for s in TAKING_ORDER if s in files):
        groups: dict[str, list[Row]] = {}
        seen: set[str] = set()
        for row in files[split]:
            identity = _without_label(row)
            if row.question in owners:
                leaked += 1
            elif identity in seen:
                repeated += 1
            else:
                seen.add(identity)
                groups.setdefault(row.question, []).append(row)
        owners |= groups.keys()
        groups = _whole_units(groups, seed)
        pools[split] = [groups[q] for q in sorted(groups, key=lambda q: _place(seed, q), reverse=True)]
    return pools, repeated, leaked


def _whole_units(questions: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Questions whose rows have a unit in common, also by way of others, as one group under the first unit's name."""
    first: dict[str, str] = {}  # unit -> one that it hangs together with, itself at the end of the chain

    def root(unit: str) -> str:
        while first.setdefault(unit, unit) != unit:
            first[unit] = unit = first[first[unit]]
        return unit

    units = {question: [row.unit for row in rows if row.unit is not None] for question, rows in questions.items()}
    if not any(units.values()):
        return questions
    for named in units.values():
        for one, other in pairwise(named):
            low, high = sorted((root(one), root(other)))
            first[high] = low
    groups: dict[str, list[Row]] = {}
    for question in sorted(questions, key=lambda q: _place(seed, q)):  # in no file's order
        name = f"unit\0{root(units[question][0])}" if units[question] else question
        groups.setdefault(name, []).extend(questions[question])
    return groups


def _without_label(row: Row) -> str:
    """Two rows that differ only in label or score are the same text: one of the answers is wrong."""
    return repr((row.prompt, row.second, row.choices, row.completion, row.messages))


def _place(seed: int, question: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{question}".encode()).digest()


def _take(pool: list[list[Row]], wanted: int | None) -> list[Row]:
    """Remove groups from the end of `pool` until there are `wanted` rows (None: all); what is left of the
    last group belongs to no other split and is given up."""
    rows: list[Row] = []
    while pool and (wanted is None or len(rows) < wanted):
        rows.extend(pool.pop())
    return rows[:wanted]


def _too_few(
    split: str, source: str, there: int, questions: int, files: Mapping[str, Sequence[Row]], config: DataConfig
) -> DataError:
    wanted = getattr(config, f"{split}_rows")
    field = f"data.{split}_rows"
    if source == split and split != "train":
        return DataError(field, wanted, f"the {split} file has {there} distinct rows", f"Set {field}={there} or less.")
    fed = [s for s in TAKING_ORDER if s == "train" or s not in files]
    asked = " + ".join(f"{getattr(config, f'{s}_rows') or 'at least 1'} {s}" for s in fed)
    whole = "units" if any(row.unit for rows in files.values() for row in rows) else "prompts"
    constraint = f"{there} distinct rows (with {questions} different {whole}) are too few for {asked}"
    if questions < len(fed):
        return DataError(field, wanted, constraint, f"Give at least {len(fed)} rows with different {whole}.")
    share = max(1, questions // (len(fed) + 1))
    settings = " ".join(f"data.{s}_rows={share}" for s in fed if s != "train")
    rest = "data.train_rows=null" if config.train_rows is not None else ""
    return DataError(field, wanted, constraint, f"Set fewer, for example: {' '.join(filter(None, (settings, rest)))}")


def _fingerprint(splits: Mapping[str, Sequence[Row]]) -> str:
    digest = hashlib.sha256()
    for split in sorted(splits):
        digest.update(f"{split}\0{len(splits[split])}\0".encode())
        for row in splits[split]:
            digest.update(f"{row.id}\0{row.content}\0".encode())
    return digest.hexdigest()
