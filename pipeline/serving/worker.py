"""One thread owns the model: requests wait for it in a queue with a bound, and share its passes.

Between two passes over rows the sequences that are being written get one token each, so neither kind of request waits
for the end of the other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.data.rows import Row
from pipeline.terminal import say


class Overloaded(Exception):
    """No more requests are taken for now."""


class Channel:
    """What the thread finds for a request, on its way to the event loop that waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._found: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, found: Any) -> None:
        """Called by the thread: a part of the answer, or the exception that takes its place."""
        with suppress(RuntimeError):  # the loop has been closed: nobody waits
            self._loop.call_soon_threadsafe(self._found.put_nowait, found)

    async def get(self) -> Any:
        """The next part. Raises the exception that was put in its place."""
        found = await self._found.get()
        if isinstance(found, Exception):
            raise found
        return found


@dataclass(eq=False)
class Job:
    """A piece of work for one request."""

    channel: Channel
    cancelled: bool = field(default=False, init=False)
    """Nobody waits for it any more."""
    since: float = field(default_factory=time.monotonic, init=False)


@dataclass(eq=False)
class Classification(Job):
    """Rows to be answered."""

    rows: Sequence[Row]
    tokens: int
    """Of all of them, under one member."""


@dataclass(eq=False)
class Writing(Job):
    """A sequence to be written, which knows what it becomes of each distribution over its next token."""

    example: str
    """What its masks are keyed by where they depend on the row."""
    prompt: tuple[int, ...]
    place: int
    """Among the prompts of its request."""
    writer: Writer


class Writer(Protocol):
    """The text of one sequence."""

    def take(self, log_probs: Any) -> int | None:
        """Choose the next token by its (V,) log-probabilities; None where the sequence has ended."""

    def news(self) -> Any:
        """What can be told since it was asked last; None where that is nothing."""


class Decode(Protocol):
    """Sequences under all members, a token at a time: see `pipeline.serving.decoding`."""

    def begin(self, prompts: Sequence[tuple[str, tuple[int, ...]]]) -> Any:
        """Take sequences up behind those there are: (B', V) log-probabilities of their next tokens."""

    def step(self, tokens: Sequence[int]) -> Any:
        """One token for each sequence: (B, V) log-probabilities of what follows."""

    def keep(self, places: Sequence[int]) -> None:
        """Forget all sequences but those at `places`."""


class Worker:
    """The thread and its queue."""

    def __init__(
        self, answer: Callable[[Sequence[Row]], Sequence[Any]], decode: Decode | None, budget_tokens: int,
        waiting: int, gather_seconds: float, sequences: int,
    ) -> None:
        """Begin to work.

        Args:
            answer: rows, no two of which share an id -> their answers.
            decode: None where nothing can be written.
            budget_tokens: of rows in one pass, under one member.
            waiting: jobs that wait, at most.
            gather_seconds: for which an idle thread waits for more rows.
            sequences: written at once.
        """
        self._answer, self._decode = answer, decode
        self._budget, self._most, self._gather, self._sequences = budget_tokens, waiting, gather_seconds, sequences
        self._waiting: deque[Job] = deque()
        self._written: list[tuple[Writing, int]] = []
        """What is being written, with the last token of each; in the order of the decode's sequences."""
        self._changed = threading.Condition()
        self._closing = False
        self.passes = {"rows": 0, "tokens": 0}
        """Passes over rows, and over sequences that are written."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def writing(self) -> int:
        """Sequences that are being written."""
        return len(self._written)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a request, all or none. Raises `Overloaded`."""
        with self._changed:
            if not self.alive or len(self._waiting) + len(jobs) > self._most:
                raise Overloaded
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these: those that have not begun never will, the others end with the pass they are in."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def close(self) -> None:
        """Finish what is queued, take nothing more, end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._wait():
            self._classify(self._gathered())
            self._write(self._admitted())

    def _wait(self) -> bool:
        """Until there is something to do; False where there will be nothing more."""
        with self._changed:
            while not self._waiting and not self._written:
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _gathered(self) -> list[Classification]:
        """The rows of the next pass, oldest first: up to the budget, or one request.

        Rows of one pass have ids of their own, so a request waits for the next pass where it gives the id of another
        request's row to a different one; rows that are the same are answered once.
        """
        with self._changed:
            self._wait_for_more()
            taken: list[Classification] = []
            rows: dict[str, Row] = {}
            tokens = 0
            for job in list(self._waiting):
                if not isinstance(job, Classification):
                    continue
                if taken and tokens + job.tokens > self._budget:
                    break
                if all(rows.get(row.id, row) == row for row in job.rows):
                    rows.update((row.id, row) for row in job.rows)
                    tokens += job.tokens
                    taken.append(job)
                    self._waiting.remove(job)
            return taken

    def _wait_for_more(self) -> None:
        """While the oldest rows are young, nothing is being written and there is room in their pass."""
        def queued() -> list[Classification]:
            return [job for job in self._waiting if isinstance(job, Classification)]

        while (first := queued()) and not self._written and not self._closing:
            left = first[0].since + self._gather - time.monotonic()
            if left <= 0 or sum(job.tokens for job in first) >= self._budget:
                return
            self._changed.wait(left)

    def _classify(self, jobs: Sequence[Classification]) -> None:
        if not jobs:
            return
        rows = {row.id: row for job in jobs for row in job.rows}
        try:
            answers = dict(zip(rows, self._answer(list(rows.values())), strict=True))
            self.passes["rows"] += 1
        except Exception as error:
            _failed(jobs, error)
            return
        for job in jobs:
            job.channel.put([answers[row.id] for row in job.rows])

    def _admitted(self) -> list[Writing]:
        """Sequences that begin now."""
        with self._changed:
            taken = [job for job in self._waiting if isinstance(job, Writing)][: self._sequences - len(self._written)]
            for job in taken:
                self._waiting.remove(job)
            return taken

    def _write(self, beginning: Sequence[Writing]) -> None:
        """A token for each sequence that is being written, and the first for those that begin."""
        decode = self._decode
        if decode is None or not (self._written or beginning):
            return
        before, jobs = self._written, [job for job, _ in self._written]
        try:
            found = [*decode.step([token for _, token in before])] if before else []
            jobs += beginning
            found += [*decode.begin([(job.example, job.prompt) for job in beginning])] if beginning else []
            self.passes["tokens"] += 1
            tokens = [None if job.cancelled else job.writer.take(logs) for job, logs in zip(jobs, found, strict=True)]
            going = [place for place, token in enumerate(tokens) if token is not None]
            if len(going) < len(jobs):
                decode.keep(going)
        except Exception as error:  # what the decode holds cannot be told: all of it is given up
            self._written = []
            decode.keep([])
            _failed(jobs, error)
            return
        self._written = [(job, token) for job, token in zip(jobs, tokens, strict=True) if token is not None]
        for job in jobs:
            if (news := job.writer.news()) is not None:
                job.channel.put((job.place, news))


def _failed(jobs: Sequence[Job], error: Exception) -> None:
    """Tell who waits, and the log."""
    say(f"serve: a pass for {len(jobs)} request(s) failed: {type(error).__name__}: {error}")
    for job in jobs:
        job.channel.put(error)
