"""Tokenized training rows, kept between starts as a memory-mapped Arrow file.

An entry is named by a hash of everything that decides the tokens: rows, tokenizer, how rows are read, versions. It is
published by rename with the hash of its bytes, and made again where that no longer fits. One process of a machine
makes it while the others wait; afterwards all share its pages. The entries used longest ago go first where all together
exceed `MOST_BYTES`; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.encode import Answers, Encoded
from pipeline.data.rows import Row
from pipeline.errors import SetupError
from pipeline.fetch import alone, cache_folder
from pipeline.files import manifest_faults, publish_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODING = 3
"""Counts up with every change of how rows become tokens; 2: choices of which one begins another are closed; 3: rows
of which several answers are learnt."""
MOST_BYTES = 20 * 2**30
"""Size of all entries together, beyond which those used longest ago are removed."""
FILE = "examples.arrow"

log = logging.getLogger(__name__)


class StoredExamples(Sequence[Encoded]):
    """Examples in an Arrow file: what is not looked at is not in memory."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        with pyarrow.memory_map(str(file)) as source:
            table = pyarrow.ipc.open_file(source).read_all()
        self._columns = {name: table.column(name).chunk(0) for name in table.column_names}
        self._starts: NDArray[np.int64] = self._columns["input_ids"].offsets.to_numpy()
        self._ids, self._labels = (self._columns[name].values.to_numpy() for name in ("input_ids", "labels"))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each example."""
        return np.diff(self._starts)

    @property
    def several_answers(self) -> bool:
        """Whether several answers are learnt of some row."""
        return bool(self._columns["weights"].null_count < len(self))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        tokens = slice(int(self._starts[index]), int(self._starts[index + 1]))
        name, types, score, weights, lengths = (
            self._columns[name][index].as_py() for name in ("example", "token_types", "score", "weights", "lengths")
        )
        whole = Encoded(
            name, tuple(self._ids[tokens].tolist()), tuple(self._labels[tokens].tolist()),
            None if types is None else tuple(types), score,
        )
        return whole if weights is None else _apart(whole, weights, lengths)

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))


def lengths_of(examples: Sequence[Encoded]) -> Sequence[int]:
    """Tokens of each example, without reading those that are stored."""
    if isinstance(examples, StoredExamples):
        return examples.lengths.tolist()
    return [len(example.input_ids) for example in examples]


def has_several_answers(examples: Sequence[Encoded]) -> bool:
    """Whether several answers are learnt of some row, without reading those that are stored."""
    if isinstance(examples, StoredExamples):
        return examples.several_answers
    return any(isinstance(example, Answers) for example in examples)


def cached_examples(
    rows: Sequence[Row], encode: Callable[[Sequence[Row]], Sequence[Encoded]], tokenizer: PreTrainedTokenizerBase,
    reading: str,
) -> Sequence[Encoded]:
    """`encode(rows)`, from the cache where it has been made before.

    Args:
        encode: rows to tokens with `tokenizer`; its errors are passed on.
        reading: what else decides the tokens: how rows are read, and the longest row.
    """
    folder = cache_folder() / "tokens"
    target = folder / entry_name(rows, tokenizer, reading)
    try:
        if not manifest_faults(target):
            return _opened(target)
        with alone(target):
            if faults := manifest_faults(target):
                if target.exists():
                    log.warning("data: the cached tokens %s are damaged (%s) and made again", target.name, faults[0])
                examples = encode(rows)
                publish_folder(target, lambda aside: write_examples(examples, aside / FILE))
                remove_old(folder, keep=target)
        return _opened(target)
    except (SetupError, OSError) as error:
        log.warning("data: tokens are not kept for the next start (%s)", error)
        return encode(rows)


def entry_name(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, reading: str) -> str:
    """Hash of all that decides the tokens."""
    import tokenizers
    import transformers

    versions = f"{ENCODING} {transformers.__version__} {tokenizers.__version__}"
    digest = hashlib.sha256(f"{versions}\0{reading}\0{tokenizer_hash(tokenizer)}\0{len(rows)}\0".encode())
    for row in rows:
        digest.update(f"{row.id}\0{row.content}\0".encode())
    return digest.hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the files that `save_pretrained` writes: vocabulary, merges, special tokens, chat template."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_examples(examples: Sequence[Encoded], file: Path) -> None:
    """One Arrow IPC file with a column per field of `Encoded`, and the weight and length of each of several answers."""
    import pyarrow

    tokens = pyarrow.large_list(pyarrow.int32())
    types: dict[str, Any] = {
        "example": pyarrow.large_string(), "input_ids": tokens, "labels": tokens,
        "token_types": pyarrow.list_(pyarrow.int8()), "score": pyarrow.float64(),
    }
    columns = [pyarrow.array([getattr(e, name) for e in examples], kind) for name, kind in types.items()]
    several = [example.answers if isinstance(example, Answers) else None for example in examples]
    for kind, values in (
        (pyarrow.float64(), [told and [one.weight for one in told] for told in several]),
        (pyarrow.int32(), [told and [len(one.input_ids) for one in told] for told in several]),
    ):
        columns.append(pyarrow.array(values, pyarrow.list_(kind)))
    table = pyarrow.table(columns, names=[*types, "weights", "lengths"])
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))


def remove_old(folder: Path, keep: Path, most_bytes: int = MOST_BYTES) -> None:
    """Remove the entries used longest ago until all together have at most `most_bytes`; `keep` stays."""
    entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if sum(sizes.values()) <= most_bytes:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)  # a process that has it mapped keeps its pages
            del sizes[entry]


def _apart(whole: Encoded, weights: Sequence[float], lengths: Sequence[int]) -> Answers:
    """The answers of a row again, which are stored one behind the other."""
    told, start = [], 0
    for weight, length in zip(weights, lengths, strict=True):
        part = slice(start, start + length)
        types = None if whole.token_types is None else whole.token_types[part]
        told.append(Encoded(whole.example, whole.input_ids[part], whole.labels[part], types, weight=weight))
        start += length
    return Answers(whole.example, whole.input_ids, whole.labels, whole.token_types, told=tuple(told))


def _opened(target: Path) -> StoredExamples:
    os.utime(target)  # last use
    return StoredExamples(target / FILE)
