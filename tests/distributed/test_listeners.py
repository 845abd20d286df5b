"""What a training and an evaluation listen on, beside what SECURITY.md says about it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.listeners import Listener, allowed, watch


def test_the_allow_list_is_read_from_the_document() -> None:
    assert allowed(Listener("gcs_server", "127.0.0.1")) and allowed(Listener("ray::IDLE", "127.0.0.1"))
    assert not allowed(Listener("gcs_server", "::")) and not allowed(Listener("sshd", "127.0.0.1"))


@pytest.mark.slow
def test_a_training_and_an_evaluation_listen_on_the_loopback_interface(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    """Two processes, through the command."""
    command = [sys.executable, "-m", "pipeline.cli"]
    for stage, words in (("train", tiny_settings), ("evaluate", [])):
        words = [*words, "launch.processes=2", "--run-dir", str(tmp_path / "run")]
        watched = watch([*command, stage, *words], 400, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert watched.code == 0, watched.output
        assert watched.seen, "two processes meet somewhere"
        assert not {one for one in watched.seen if not allowed(one)}, watched.seen
        assert not watched.outside
