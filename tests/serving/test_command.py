"""What `loradrop serve` refuses before it loads anything, and who is let in."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import TemplateConfig
from pipeline.ensemble.rows import RowForm
from pipeline.errors import ConfigError
from pipeline.serving.metrics import Metrics
from pipeline.serving.rows import text_column
from pipeline.serving.settings import KEY_VARIABLE, read_settings

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_settings_come_from_options_words_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_settings(None, None, None, ["waiting=7", "seconds=2", "model.trust_remote_code=true"])
    assert (found.host, found.port, found.key, found.trusted) == ("127.0.0.1", 8000, None, True)
    assert (found.limits.waiting, found.limits.seconds) == (7, 2.0) and found.admits(None)
    for host in ("localhost", "127.0.0.2", "::1", "[::1]"):
        assert read_settings(host, 0, None, []).host == host.strip("[]")
    (tmp_path / "key").write_text(f"{KEY}\nsecond line\n")
    monkeypatch.setenv(KEY_VARIABLE, "x" * 20)
    assert read_settings("0.0.0.0", 1, str(tmp_path / "key"), []).key == KEY
    from_environment = read_settings("0.0.0.0", 1, None, [])
    assert from_environment.admits(f"bearer {'x' * 20}") and not from_environment.admits("Bearer x")
    assert not from_environment.admits(None)


@pytest.mark.parametrize(
    ("host", "port", "key", "words", "message"),
    [
        ("0.0.0.0", None, None, [], "reached from other machines, and no API key is set. Give --api-key-file"),
        ("example.org", None, None, [], "no API key"),
        (None, 70000, None, [], "--port = 70000: must be between 0 and 65535"),
        (None, None, None, ["wating=1"], "wating=1: is not read by serve. Did you mean waiting"),
        (None, None, None, ["data.path=x"], "There are waiting, gather_ms"),
        (None, None, None, ["waiting=0"], "waiting = 0: input should be greater than or equal to 1. Its meaning"),
        (None, None, None, ["seconds=no"], "seconds = "),
        (None, None, "missing", [], "--api-key-file = 'missing': cannot be read"),
        (None, None, "short", [], "must be at least 16 visible ASCII characters"),
    ],
)
def test_settings_that_are_wrong_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str | None, port: int | None, key: str | None,
    words: list[str], message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("secret\n")
    with pytest.raises(ConfigError) as caught:
        read_settings(host, port, key, words)
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_the_command_refuses_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    given = ["serve", "--run-dir", str(tmp_path)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main([*given, "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be listened at (Address already in use)" in capsys.readouterr().err
    assert main(["serve", "--run-dir", str(tmp_path / "none")]) == 2
    assert "holds neither a run nor an export" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(given) == 2
    assert 'pip install "loradrop[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "choices", "column"),
    [
        (None, ("yes", "no"), "prompt"), (None, None, None),
        (TemplateConfig(prompt="{text}\nLabel:"), ("yes", "no"), "text"),
        (TemplateConfig(prompt="{{ sentence }} is {{sentence}}"), ("yes", "no"), "sentence"),
        (TemplateConfig(prompt="{a} and {b}"), ("yes", "no"), None),
        (TemplateConfig(prompt="{a}", second="{b}"), ("yes", "no"), None),
        (TemplateConfig(prompt="{a}", choices=("x", "y")), None, "a"),
    ],
)
def test_a_text_stands_for_a_row_where_one_column_is_all_it_needs(
    template: TemplateConfig | None, choices: tuple[str, ...] | None, column: str | None
) -> None:
    assert text_column(RowForm("choice", template, choices, False)) == column


def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    for seconds in (0.005, 0.01, 0.3, 99.0):
        metrics.answer("/v1/classify", 200, seconds)
    lines = metrics.text({"waiting": ("Jobs.", 3)}, {"rows": 2}).splitlines()
    name = 'loradrop_request_seconds_bucket{route="/v1/classify",le='
    assert [line.split()[-1] for line in lines if line.startswith(name)] == ["2"] * 5 + ["3"] * 7 + ["4"]
    assert 'loradrop_request_seconds_sum{route="/v1/classify"} 99.315000' in lines
    assert {"loradrop_waiting 3", 'loradrop_passes_total{over="rows"} 2', "# TYPE loradrop_waiting gauge"} <= set(lines)
