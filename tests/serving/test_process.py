"""The command as a process: real sockets, a real run, SIGTERM in the middle of its work."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helpers import ROOT

from pipeline.adapters.members import MaskKey
from pipeline.config import RunConfig
from pipeline.data.splits import load_splits
from pipeline.ensemble.ensemble import Answer, Ensemble
from pipeline.run_folder.paths import RunPaths

CLIENTS = 12


@contextmanager
def served(run: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, address) of a server of a run on this machine."""
    command = [sys.executable, "-m", "pipeline.cli", "serve", "--run-dir", str(run), "--port", "0", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        assert process.stderr is not None
        said = ""
        while (found := re.search(r"at (http://\S+)/", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, found.group(1)
    finally:
        process.kill()
        process.wait()


def next_tokens(ensemble: Ensemble, ids: list[int]) -> np.ndarray:
    """(V,) float64: the members' mean, each in a pass of its own over the whole sequence."""
    found = []
    for member in ensemble.members:
        plan = ensemble.adapters.plan([member], 1, MaskKey(1000, "test"))
        with ensemble.adapters.axis.active(plan), torch.no_grad():
            logits = ensemble.adapters.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        found.append(logits.double().softmax(-1).numpy())
    return np.mean(found, axis=0)


@pytest.mark.slow
def test_a_server_answers_as_predict_does_and_loses_nothing_when_it_is_stopped(
    finished_run: tuple[RunPaths, RunConfig]
) -> None:
    paths, config = finished_run
    splits = load_splits(config.data)
    rows = [{"id": row.id, "prompt": row.prompt, "choices": list(row.choices)} for row in splits.test[:24]]
    ensemble = Ensemble.load(paths.root)
    expected = {answer.id: answer for answer in ensemble.predict(rows, abstain=0.9)}
    with served(paths.root, "--abstain", "0.9") as (process, address):
        said = httpx.post(f"{address}/v1/classify", json={"rows": rows}, timeout=60).json()
        for answer in said["answers"]:
            same(answer, expected[answer["id"]])
        assert said["abstention"]["risk"] == 0.9

        asked = {"prompt": rows[0]["prompt"], "max_tokens": 4, "temperature": 0, "logprobs": 1}
        choice = httpx.post(f"{address}/v1/completions", json=asked, timeout=60).json()["choices"][0]
        ids = list(ensemble.task.base.tokenizer(rows[0]["prompt"])["input_ids"])
        for log_prob in choice["logprobs"]["token_logprobs"]:
            probabilities = next_tokens(ensemble, ids)
            assert log_prob == pytest.approx(np.log(probabilities.max()), abs=1e-4)
            ids.append(int(probabilities.argmax()))

        answered, refused = asyncio.run(stopped_in_the_middle(process, address, rows, expected))
        assert process.stderr is not None
        closing = process.stderr.read()
        assert process.wait(60) == 0, closing
    accepted = int(re.search(r"stopped; (\d+) requests were accepted", closing).group(1))  # type: ignore[union-attr]
    assert accepted == answered + 2 and answered >= CLIENTS and refused == CLIENTS


def same(answer: dict[str, Any], expected: Any) -> None:
    assert isinstance(expected, Answer)
    np.testing.assert_allclose(answer["probabilities"], expected.probabilities, rtol=0, atol=1e-6)
    assert answer["mutual_information"] == pytest.approx(expected.mutual_information, abs=1e-6)
    assert answer["answered"] is expected.answered


async def stopped_in_the_middle(
    process: subprocess.Popen[str], address: str, rows: list[dict[str, Any]], expected: dict[str, Any]
) -> tuple[int, int]:
    """(requests answered whole, clients that were not let in any more): SIGTERM while all clients ask on and on."""
    answered = 0

    async def client(number: int) -> None:
        nonlocal answered
        async with httpx.AsyncClient(timeout=60) as http:
            for turn in range(1000):
                row = rows[(number + turn) % len(rows)]
                try:
                    response = await http.post(f"{address}/v1/classify", json={"rows": row})
                except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
                    return  # not let in: nothing of it was accepted, as the server's count shows
                assert response.status_code == 200, response.text
                same(response.json()["answers"][0], expected[row["id"]])
                answered += 1

    clients = [asyncio.ensure_future(client(number)) for number in range(CLIENTS)]
    while answered < CLIENTS:
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*clients)
    return answered, len(clients)
