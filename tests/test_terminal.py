"""What people see while something works."""

from __future__ import annotations

import io
import re

import pytest

from pipeline.errors import DataError, ErrorList, StageFailed
from pipeline.terminal import Progress, duration, one_line, printable, say


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 s"), (0.2, "1 s"), (75, "75 s"), (350, "6 min"), (4800, "1 h 20 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_go_where_they_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    say("told")
    say("silent", enabled=False)
    say("elsewhere", stream=stream)
    assert capsys.readouterr() == ("", "told\n") and stream.getvalue() == "elsewhere\n"


def test_without_a_terminal_progress_has_a_first_and_a_last_line() -> None:
    stream = io.StringIO()
    progress = Progress(3, 0, enabled=True, stream=stream, every_seconds=60.0)
    for done in (1, 2, 3):
        progress.show(done, ["loss 1.0"])
    lines = stream.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 1/3", "step 3/3"] and "loss 1.0" in lines[0]
    assert lines[-1].endswith("0 s left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_rewrites_itself_within_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (40, 24))
    stream = Terminal()
    progress = Progress(20, 2, enabled=True, stream=stream, unit="row")
    for done in (3, 12):
        progress.show(done, [f"loss {done}.5", "a note that is longer than the terminal is wide"])
    progress.close()
    shown = [part for part in re.split(r"[\r\n]|\x1b\[A", stream.getvalue()) if part.strip()]
    assert any(part.startswith("row 3/20 ") and "loss 3.5" in part for part in shown)
    assert any(part.startswith("row 12/20 ") and "loss 12.5" in part for part in shown)
    assert max(map(len, shown)) <= 40 and stream.getvalue().count("\n") == 1


def test_where_nothing_is_to_be_shown_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    progress = Progress(2, 0, enabled=False, stream=stream)
    progress.show(1, ["loss"])
    progress.close()
    assert stream.getvalue() == ""


HOSTILE = "a\x1b[2Jb\x07\x9b1m\r\u202egnp.exe\u2066\ud83d\x7f\u2028é中👍🏽"
SHOWN = r"a\x1b[2Jb\x07\x9b1m\x0d\u202egnp.exe\u2066\ud83d\x7f\u2028" + "é中👍🏽"


def test_what_rules_a_terminal_is_shown_instead() -> None:
    assert printable(f"{HOSTILE}\n\tx") == f"{SHOWN}\n\tx"
    assert one_line("a\n\tb\x1b") == r"a\n\tb\x1b"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printable("".join(map(chr, range(0x300)))))


def test_nothing_that_is_said_or_shown_as_progress_reaches_the_terminal_raw() -> None:
    stream = io.StringIO()
    say(HOSTILE, stream=stream)
    Progress(1, 0, enabled=True, stream=stream).show(1, [f"{HOSTILE}\nforged"])
    said, progress = stream.getvalue().splitlines()
    assert said == SHOWN and rf"{SHOWN}\nforged" in progress
    terminal = Terminal()
    Progress(1, 0, enabled=True, stream=terminal).show(1, [f"{HOSTILE}\nforged"])
    assert "\x1b[2J" not in terminal.getvalue() and "\nforged" not in terminal.getvalue()


def test_errors_show_control_characters_of_names_values_and_texts() -> None:
    error = DataError(f"{HOSTILE}\nforged: 3", HOSTILE, f"is wrong ({HOSTILE})", "Mend it.")
    assert str(error).startswith(SHOWN + r"\nforged: 3 = ") and len(str(error).splitlines()) == 1
    for text in (str(error), str(ErrorList([error, error])), str(StageFailed(HOSTILE))):
        assert text == printable(text) and r"\x1b[2J" in text
    assert len(str(ErrorList([error, error])).splitlines()) == 2  # a line each
