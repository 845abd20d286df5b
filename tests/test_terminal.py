"""What people see while something works."""

from __future__ import annotations

import io

import pytest

from pipeline.terminal import Progress, duration, say


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
