"""JSON, JSON lines, CSV, TSV and Parquet rows with a part replaced; folders of splits; what is no file."""

from __future__ import annotations

import bz2
import datetime
import gzip
import io
import json
import lzma
from random import Random
from typing import Any

from helpers.fuzz.case import Case, Item
from helpers.fuzz.material import ROWS, SETTINGS, row
from helpers.fuzz.values import TEXTS, json_value, mutated

SPLITS = ("train", "validation", "calibration", "test")
CUT = ("", "x", "\ud83d", "\x1b[2J", "\x00", " " * 3)


def make(random: Random) -> Case:
    name, content = random.choice((_jsonl, _jsonl, _json, _table, _table, _parquet, _parquet))(random)
    if random.random() < 0.15:
        content = mutated(content, random)
    if name != "rows.parquet" and random.random() < 0.1:
        name, content = _packed(name, content, random)
    place = name
    items = [Item(name, "bytes", content)]
    match random.randrange(20):
        case 0:
            items = [Item(name, "fifo")]
        case 1:
            items = [Item(name, "link", random.choice((b"/dev/zero", b"loop", b"/proc/self/environ")))]
        case 2:
            items = [Item(name, "sparse", b"1099511627776")]
        case 3:
            items = [Item(name, "folder")]
        case 4 | 5:
            suffix = name.partition(".")[2]
            place = "rows"
            items = [Item(f"rows/{split}.{suffix}", "bytes", content) for split in SPLITS[: random.randrange(1, 5)]]
        case 6:
            place = random.choice((f"{name}\x1b[2J", f"bytes\udcff.{name}", f"a\nb.{name}", f"{'x' * 200}.{name}"))
            items = [Item(place, "bytes", content)]
    shown = json.dumps(place) if place.isprintable() is False and "\udcff" not in place else place
    return Case("data_files", ("--dry-run", "train", "--run-dir", "run", *SETTINGS, f"data.path={shown}"), tuple(items))


def _packed(name: str, content: bytes, random: Random) -> tuple[str, bytes]:
    """Compressed, half of them torn or under another name."""
    end, packed = random.choice((
        (".gz", gzip.compress(content, mtime=0)), (".bz2", bz2.compress(content)), (".xz", lzma.compress(content)),
    ))
    if random.random() < 0.3:
        packed = mutated(packed, random)
    return name + (end if random.random() < 0.8 else random.choice((".gz", ".bz2", ".xz", ".zst"))), packed


def _damaged_row(random: Random, number: int) -> str:
    """The JSON text of a row of which a value, a key, or everything is another."""
    found = {key: json.dumps(value) for key, value in row(number).items()}
    if random.random() < 0.2:
        found |= {random.choice(("id", "second", "score", "completion", "messages", "references", "extra")): '"x"'}
    match random.randrange(6):
        case 0:
            return json_value(random)
        case 1:
            del found[random.choice(list(found))]
        case 2:
            found[random.choice(TEXTS)] = json_value(random)
        case _:
            found[random.choice(list(found))] = json_value(random)
    text = ", ".join(f"{json.dumps(key)}: {value}" for key, value in found.items())
    if random.random() < 0.1:
        text += f', "prompt": {json_value(random)}'
    return f"{{{text}}}"


def _rows_text(random: Random) -> list[str]:
    rows = [json.dumps(row(i)) for i in range(ROWS)]
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(ROWS)
        rows[place] = _damaged_row(random, place)
    return rows


def _jsonl(random: Random) -> tuple[str, bytes]:
    return "rows.jsonl", "".join(f"{line}\n" for line in _rows_text(random)).encode("utf-8", "surrogatepass")


def _json(random: Random) -> tuple[str, bytes]:
    text = f"[{', '.join(_rows_text(random))}]" if random.random() < 0.8 else json_value(random)
    return "rows.json", text.encode("utf-8", "surrogatepass")


def _table(random: Random) -> tuple[str, bytes]:
    """Columns prompt, completion; TSV has no quoting."""
    tab = random.random() < 0.4
    separator = "\t" if tab else ","
    lines = [["prompt", "completion"]] + [[f"prompt {i}", f"answer {i}"] for i in range(ROWS)]
    for _ in range(random.choice((1, 2, 4))):
        cells = lines[random.choice((0, random.randrange(ROWS)))]
        match random.randrange(4):
            case 0:
                cells[random.randrange(len(cells))] = random.choice(TEXTS)
            case 1:
                cells.append(random.choice(TEXTS))
            case 2 if len(cells) > 1:
                cells.pop()
            case _:
                cells[0] = random.choice(('"', '"a', 'a"b', '""', "prompt", "completion", '"a\nb"', "\0"))
    text = "".join(separator.join(cells) + "\n" for cells in lines)
    return f"rows.{'tsv' if tab else 'csv'}", text.encode("utf-8", "surrogatepass")


def _parquet(random: Random) -> tuple[str, bytes]:
    """One column of another type, one too many, or the file itself cut or changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row(i) for i in range(ROWS)]
    columns: list[tuple[str, Any]] = [(name, pa.array([one[name] for one in rows])) for name in rows[0]]
    match random.randrange(5):
        case 0 | 1:
            name = random.choice(("extra", "id", "second", "prompt", "label", "\x1b[2J", ""))
            columns.append((name, _column(random)))
        case 2 | 3:
            place = random.randrange(len(columns))
            columns[place] = columns[place][0], _column(random)
    buffer = io.BytesIO()
    table = pa.table([column for _, column in columns], names=[name for name, _ in columns])
    pq.write_table(table, buffer, row_group_size=random.choice((1, 7, 1000)))
    content = buffer.getvalue()
    match random.randrange(6):
        case 0:
            content = content[: random.randrange(len(content))]
        case 1:
            place = random.randrange(len(content))
            content = content[:place] + bytes([random.randrange(256)]) + content[place + 1 :]
    return "rows.parquet", content


def _column(random: Random) -> Any:
    import pyarrow as pa

    when = datetime.datetime(2020, 1, 1)
    bad = pa.array([b"\xff\xfe"] * ROWS).cast(pa.binary()).view(pa.string())
    return random.choice((
        lambda: bad,
        lambda: pa.array([b"\xff"] * ROWS),
        lambda: pa.array([when] * ROWS),
        lambda: pa.array([2**62] * ROWS, pa.timestamp("us")),
        lambda: pa.array([2**62] * ROWS, pa.timestamp("ns", tz="Nowhere/Land")),
        lambda: pa.array([2**31 - 1] * ROWS, pa.date32()),
        lambda: pa.array([2**62] * ROWS, pa.duration("us")),
        lambda: pa.array([2**64 - 1] * ROWS, pa.uint64()),
        lambda: pa.array([None] * ROWS),
        lambda: pa.array([float("nan")] * ROWS),
        lambda: pa.array([{"a": [1]}] * ROWS),
        lambda: pa.array([[None]] * ROWS),
        lambda: pa.array([[" a", None]] * ROWS),
        lambda: pa.array([[("a", 1), ("a", 2)]] * ROWS, pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(["\x1b[2J"] * ROWS).dictionary_encode(),
        lambda: pa.array([True] * ROWS),
        lambda: pa.array(["x" * 100_000] * ROWS),
        lambda: pa.array([10**30] * ROWS, pa.decimal128(38)),
    ))()
