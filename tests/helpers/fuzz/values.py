"""Nasty values, and what is done to texts and bytes."""

from __future__ import annotations

import json
import random

PATHS = (
    "", " ", ".", "..", "/", "~", "~nobody/x", "/dev/null", "/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/environ",
    "/proc/1/mem", "/etc/passwd", "../../../etc/passwd", "x" * 300, "x/" * 2500, "loop", "loop/x", "pipe", "pipe/x",
    "plain.txt", "plain.txt/x", "locked", "locked/x", "nothing", "nothing/at/all", "-", "--", "a\nb", "a\x1b[2Jb",
    "\u202egnp.exe", "bytes\udcff", "file:///etc/passwd", "C:\\x", "hub/name", "a:b:c", "*", "$(touch pwned)", "{here}",
    "embedded:", "embedded:nothing", "empty", "é" * 100,
)
"""Names of files and folders; `meet` makes those that are there."""

SCALARS = (
    "", " ", "null", "~", "true", "no", "-1", "0", "-0", "1", "1.5", "1e999", "-1e999", ".inf", "-.inf", ".nan", "nan",
    "inf", "9" * 5000, "9" * 40, "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1e308",
    "1e-320", "0x1F", "0x_", "0b_", "010", "1_000", "1:30", "1:" * 200 + "1", "2020-01-01", "2020-01-01T00:00:00Z",
    "x" * 70_000, "a b", "😀", "\x1b[31mred", "\x9b2J", "a\rb", "\u202e", '"\\e]0;title\\a"', '"\\ud83d"', '"\\0"',
    '"\\U7fffffff"', '"\\x9b2J"', "bytes\udcff", "''", '""', "'", '"', "(", "[", "]", "{", "}", "[]", "{}", "[[]]",
    "[" * 2000, "{a: " * 500, "[1, [2, [3]]]", "{a: 1, a: 2}", "{1: 2}", "{? [a] : 1}", "{<<: {a: 1}}", "!!int abc",
    "!!binary x", "!!python/object/apply:os.system [touch pwned]", "!x y", "&a [*a]", "*a", "? x", "- x", "---",
    "--- a\n--- b", "...", "|", ">", "@", "`", "%TAG", "# x", "=", "<<", "${HOME}", "$(touch pwned)", "%s%n", "{0}",
    "{prompt.__class__}", "(a+)+$", "a{99999999999}", "all-linear", "lora_dropout+" * 300, "[.nan, .inf]", "[1, 'a']",
)
"""YAML values for keys."""

JSON_TEXTS = (
    "null", "true", "-1", "0", "1.5", "1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "9" * 40, "9223372036854775808",
    "-9223372036854775809", '""', '" "', '"😀"', r'"\ud83d"', r'"\udc00 x"', r'"\u0000"', r'"\u001b[2J"', r'"\u202e"',
    r'"\u009b2J"', f'"{"x" * 100_000}"', "[]", "{}", "[[]]", '[""]', '[" a", " a"]', '[" a"]', "[1, 2]", "[null]",
    '{"a": 1}', '{"a": 1, "a": 2}', "[" * 100 + "]" * 100, "[" * 5000, '{"a":' * 5000, "[" * 5000 + "]" * 5000,
    '[{"role": "user", "content": "x"}]', '[{"role": "user"}, {"role": "assistant", "content": "y"}]', "'x'", "x", "",
    '"2020-01-01"', '"' + "9" * 5000 + '"', '"1e999"', r'"\x"', '"{prompt}"', '"<script>alert(1)</script>"',
)
"""JSON values, right and wrong."""

TEXTS = (
    "", " ", "\t", "\n", "{", "}", "{}", "{{", "}}", "{{}}", "{prompt", "{nothing}", "{prompt[0]}", "{choices[9]}",
    "{choices[" + "9" * 5000 + "]}", "{prompt.__class__}", "{prompt!r}", "{prompt:>999999999}", "{0}", "{label}", "%s",
    "\x1b[2J", "\x9b2J", "\u202e", "\ufeff", "😀", "x" * 50_000, "{prompt}" * 2000, "a\rb", "$(touch pwned)",
    "9" * 5000,
    "-1", "1e999", "nan", "<|endoftext|>", "</s>", "{" * 5000, "[" * 5000,
)
"""Texts of templates and cells."""

BYTES = (
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\xbd", b"\xc0\x80", b"\x1b[2J", b"\r", b"\n", b'"', b"'",
    b"\t", b",", b"{", b"}", b"[", b"]", b":", b"- ", b"&a ", b"*a", b"!!x ", b"\xe2\x80\xae", b"9" * 5000, b"[" * 3000,
)


def json_value(random: random.Random) -> str:
    """The text of a JSON value."""
    return random.choice(JSON_TEXTS)


def mutated(content: bytes, random: random.Random, times: int = 0) -> bytes:
    """`content` with a few parts cut, doubled, swapped, replaced."""
    for _ in range(times or random.choice((1, 1, 1, 2, 4))):
        lines, place = content.split(b"\n"), random.randrange(len(content) + 1)
        row = random.randrange(len(lines))
        match random.randrange(8):
            case 0:
                content = content[:place]
            case 1:
                content = content[:place] + random.choice(BYTES) + content[place:]
            case 2:
                content = content[:place] + bytes([random.randrange(256)]) + content[place + 1 :]
            case 3:
                content = content[:place] + content[place + random.randrange(1, 40) :]
            case 4:
                content = b"\n".join([*lines[: row + 1], *lines[row:]])
            case 5:
                content = b"\n".join([*lines[:row], b"  " + lines[row], *lines[row + 1 :]])
            case 6:
                other = random.randrange(len(lines))
                lines[row], lines[other] = lines[other], lines[row]
                content = b"\n".join(lines)
            case _:
                key, separator, _ = lines[row].partition(b":")
                lines[row] = key + separator + b" " + random.choice(SCALARS).encode("utf-8", "surrogateescape")
                content = b"\n".join(lines)
    return content


def damaged_json(content: bytes, random: random.Random) -> bytes:
    """A JSON text of which one value, key or byte is another."""
    if random.random() < 0.4:
        return mutated(content, random)
    tree = json.loads(content)
    marked, _ = _mark(tree, random)
    return json.dumps(marked).replace(json.dumps(_MARK), json_value(random), 1).encode("utf-8", "surrogatepass")


_MARK = "@@here@@"


def _mark(tree: object, random: random.Random) -> tuple[object, bool]:
    """`tree` with one value replaced by the mark."""
    if random.random() < 0.4 or not isinstance(tree, dict | list) or not tree:
        return _MARK, True
    if isinstance(tree, list):
        place = random.randrange(len(tree))
        return [_mark(value, random)[0] if i == place else value for i, value in enumerate(tree)], True
    chosen = random.choice(list(tree))
    return {key: _mark(value, random)[0] if key == chosen else value for key, value in tree.items()}, True
