"""`loradrop serve` under load: answers per second, median and 99th percentile, wrong and lost answers.

    PYTHONPATH=. python benchmarks/serving.py                                # a tiny model, 200 clients, two minutes
    PYTHONPATH=. python benchmarks/serving.py --run-dir runs/mine --clients 50 --seconds 60

Each client asks again as soon as it is answered: rows of the test split, and every tenth time for a completion. Answers
are compared with those of `Ensemble.predict`, completions with what the server writes when nobody else asks. At the
end the server gets SIGTERM while all clients go on; what it has accepted must have been answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipeline.data.splits import load_splits
from pipeline.ensemble.ensemble import Answer, Ensemble
from pipeline.run_folder.paths import RunPaths, load_saved
from pipeline.support.tiny import write_tiny_data, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PROMPTS, ROWS = 8, 64
WRITTEN = 8
"""Tokens of a completion."""


@dataclass
class Seen:
    """What clients have seen."""

    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    cut: int = 0
    """Connections that ended without an answer: before the signal each is a lost answer."""


def tiny_run(folder: Path) -> Path:
    """The export of a tiny model with 8 draws, whatever validation chose: a minute."""
    model, rows = write_tiny_model(folder / "model"), write_tiny_data(folder / "rows.jsonl", 300)
    settings = [
        f"model.path={model}", f"data.path={rows}", "data.train_rows=64", "data.validation_rows=40",
        "data.calibration_rows=80", "data.test_rows=60", "data.max_tokens=64", "train.max_steps=6",
        "train.global_batch=8", "train.micro_batch=4", "train.learning_rate=0.01", "train.validate_every_steps=3",
        "ensemble.size=8", "adapter.rank=4", "evaluate.bootstrap_samples=200", "model.compute_dtype=float32",
        "launch.processes=1",
    ]
    draws = ["export.draws=8", "export.forms=[draws]"]
    for stage, words in (("train", settings), ("evaluate", []), ("report", []), ("export", draws)):
        command = [sys.executable, "-m", "pipeline.cli", stage, "--run-dir", str(folder / "run"), *words]
        subprocess.run(command, check=True, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL)
    return RunPaths(folder / "run").export


def questions(run: Path) -> list[tuple[str, dict[str, Any], Any]]:
    """(path, body, what must be answered; None: not known yet)."""
    ensemble = Ensemble.load(run)
    paths = RunPaths(run if RunPaths(run).config.exists() else run.parent)
    test = load_splits(load_saved(paths.config).data).test
    rows = [{"id": row.id, "prompt": row.prompt, "choices": list(row.choices)} for row in test[:ROWS]]
    known = [answer.probabilities for answer in ensemble.predict(rows) if isinstance(answer, Answer)]
    asked = {"max_tokens": WRITTEN, "temperature": 0, "logprobs": 0}
    return [
        *(("/v1/classify", {"rows": row}, answer) for row, answer in zip(rows, known, strict=True)),
        *(("/v1/completions", {"prompt": row["prompt"], **asked}, None) for row in rows[:PROMPTS]),
    ]


class Client:
    """One connection that is kept, by asyncio alone: a library would take more time than the server."""

    def __init__(self, address: str) -> None:
        self._host, self._port = urlsplit(address).hostname, urlsplit(address).port

    async def open(self) -> Client:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, JSON)."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        self._writer.write(head.encode() + b"\r\n\r\n" + content)
        await self._writer.drain()
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = re.search(r"content-length: (\d+)", answer)
        assert length is not None, answer
        return int(answer.split()[1]), json.loads(await self._reader.readexactly(int(length.group(1))))


def is_right(said: Any, expected: Any) -> bool:
    """Probabilities to 1e-6; of a completion the same tokens, with log-probabilities to 1e-4."""
    if "answers" in said:
        return bool(np.allclose(said["answers"][0]["probabilities"], expected, rtol=0, atol=1e-6))
    found, known = (one["choices"][0] for one in (said, expected))
    logs = [one["logprobs"]["token_logprobs"] for one in (found, known)]
    return found["text"] == known["text"] and bool(np.allclose(*logs, rtol=0, atol=1e-4))


async def load(process: subprocess.Popen[str], address: str, asked: list[Any], clients: int, seconds: float) -> Seen:
    """All clients until `seconds` have gone, and on until the server has stopped."""
    alone = await Client(address).open()
    asked = [(path, body, known or (await alone.post(path, body))[1]) for path, body, known in asked]
    seen, ends = Seen(), time.monotonic() + seconds

    async def client(number: int) -> None:
        client, turn = await Client(address).open(), number
        while True:
            turn += 1
            place = turn % (len(asked) - PROMPTS) if turn % 10 else len(asked) - 1 - turn // 10 % PROMPTS
            path, body, expected = asked[place]
            began = time.monotonic()
            try:
                status, said = await client.post(path, body)
            except (ConnectionError, asyncio.IncompleteReadError):
                seen.cut += time.monotonic() < ends
                return
            seen.seconds[path].append(time.monotonic() - began)
            seen.statuses[status] += 1
            seen.wrong += status != 200 or not is_right(said, expected)

    running = [asyncio.ensure_future(client(number)) for number in range(clients)]
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*running)
    return seen


def measure(run: Path, clients: int, seconds: float, words: list[str]) -> int:
    """Print the table; 1 where an answer was wrong or lost."""
    asked = questions(run)
    command = [sys.executable, "-m", "pipeline.cli", "serve", "--run-dir", str(run), "--port", "0", *words]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while (at := re.search(r"at (http://\S+)/", said)) is None:
            line = process.stderr.readline()
            if not line:
                sys.exit(said)
            said += line
        try:
            seen = asyncio.run(load(process, at.group(1), asked, clients, seconds))
        except BaseException:
            process.kill()
            raise
        closing = process.stderr.read()
        code = process.wait()
    accepted = re.search(r"(\d+) requests were accepted", closing)
    assert accepted is not None, closing
    answered = sum(seen.statuses.values())
    lost = int(accepted.group(1)) - PROMPTS - answered + seen.statuses[503]
    print(f"{clients} clients, {seconds:g} s; {said.splitlines()[-1]}\n")
    print("| route | answers | per second | p50 | p99 | longest |\n|---|---|---|---|---|---|")
    for path, times in sorted(seen.seconds.items()):
        p50, p99 = np.percentile(times, [50, 99])
        rate = len(times) / seconds
        print(f"| {path} | {len(times)} | {rate:.1f} | {p50:.3f} s | {p99:.3f} s | {max(times):.3f} s |")
    print(f"\nstatuses {dict(seen.statuses)}, wrong {seen.wrong}, cut off before the signal {seen.cut}")
    print(f"accepted and not answered {lost}; exit code {code}")
    return int(bool(seen.wrong or seen.cut or lost or code))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, help="a causal model's run, or its export (default: of a tiny one)")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("words", nargs="*", metavar="key=value", help="of `loradrop serve`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run_dir or tiny_run(Path(folder))
        return measure(run, given.clients, given.seconds, given.words)


if __name__ == "__main__":
    sys.exit(main())
