"""What the routes do, without HTTP: a body becomes jobs of the worker, and what the worker finds an answer."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from pipeline.data.tokens import prompt_ids
from pipeline.ensemble.ensemble import Answer, Ensemble, as_dict
from pipeline.errors import UserError
from pipeline.model.head import positions_of
from pipeline.prediction.decode import Decoder, TokenSpace
from pipeline.prediction.generation import end_tokens
from pipeline.prediction.task import CausalLMTask, Task
from pipeline.scores.abstention import Threshold
from pipeline.serving.decoding import SharedDecode
from pipeline.serving.metrics import Metrics
from pipeline.serving.openai import Answering, ChatBody, CompletionBody, Refused, WritingBody
from pipeline.serving.rows import ClassifyBody, read_rows, text_column
from pipeline.serving.settings import Limits
from pipeline.serving.worker import Channel, Classification, Job, Overloaded, Worker, Writing
from pipeline.serving.writing import News, SequenceWriter

RETRY_SECONDS = 1


class Service:
    """An ensemble with its worker."""

    def __init__(self, ensemble: Ensemble, name: str, limits: Limits, threshold: Threshold | None = None) -> None:
        """Ready to answer.

        Args:
            name: what clients call it.
            threshold: from which confidence on rows are answered; None: nothing is said about that.
        """
        self.ensemble, self.name, self.limits, self.threshold = ensemble, name, limits, threshold
        self.metrics, self.since = Metrics(), int(time.time())
        self.column = text_column(ensemble.form)
        # The worker's thread has the tokenizer: a fast one must not be used by two threads at once.
        self._tokenizer = copy.deepcopy(ensemble.task.base.tokenizer)
        self._task: Task = replace(  # type: ignore[type-var]
            ensemble.task, base=replace(ensemble.task.base, tokenizer=self._tokenizer)
        )
        passes = ensemble.task.passes
        members, decode = ensemble.members, None
        if isinstance(ensemble.task, CausalLMTask):
            space: TokenSpace = "logit" if ensemble.readout.space == "logit" else "probability"
            decode = SharedDecode(Decoder(
                ensemble.adapters, members, passes.key, passes.pad_id, space, ensemble.readout.weights
            ))
        self.worker = Worker(
            lambda rows: ensemble.answers(rows, threshold), decode, max(1, passes.budget_tokens // len(members)),
            limits.waiting, limits.gather_ms / 1000.0, limits.sequences,
        )

    @property
    def writes(self) -> bool:
        """Whether it completes texts."""
        return isinstance(self._task, CausalLMTask)

    def model_entry(self) -> dict[str, Any]:
        """Its line in /v1/models."""
        return {"id": self.name, "object": "model", "created": self.since, "owned_by": "loradrop"}

    def about(self) -> dict[str, Any]:
        """What the page shows of it."""
        form = self.ensemble.form
        return {
            "model": self.name, "members": len(self.ensemble.members), "kind": form.kind, "column": self.column,
            "choices": None if form.choices is None else [choice.strip() for choice in form.choices],
            "temperature": self.ensemble.readout.temperature, "abstention": self._abstention(),
        }

    async def classify(self, body: ClassifyBody) -> dict[str, Any]:
        """Answers to rows. Raises `Refused`."""
        self.require_model(body.model)
        if self.ensemble.readout.kind == "completion":
            what = "this model was trained on free text: it has completions, and no choices"
            raise Refused(404, what, None, "not_available")
        try:
            rows = read_rows(self.ensemble.form, body.records(self.column))
            if len(rows) > self.limits.rows:
                raise Refused(400, f"there are {len(rows)} rows, more than {self.limits.rows}", "rows", "too_many_rows")
            tokens = sum(len(self._task.probe(row)) for row in rows)
        except UserError as error:
            raise Refused(400, str(error), getattr(error, "field", None), "invalid_rows") from error
        self._require_tokens(tokens, "rows")
        job = Classification(Channel(asyncio.get_running_loop()), rows, tokens)
        self._submit([job])
        try:
            answers = await _next(job.channel, self._deadline())
        finally:
            self.worker.cancel([job])
        self.metrics.rows += len(rows)
        told = []
        for row, answer in zip(rows, answers, strict=True):
            entry = as_dict(answer)
            if isinstance(answer, Answer):
                entry["choices"] = [choice.strip() for choice in row.choices]
                if body.members:
                    entry["members"] = answer.members
            told.append(entry)
        return {
            "object": "classification", "model": self.name, "answers": told, "abstention": self._abstention(),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    async def write(self, body: CompletionBody | ChatBody) -> dict[str, Any]:
        """The whole answer to a request for text. Raises `Refused`."""
        answering, jobs, deadline = self._begun(body)
        self._submit(jobs)
        try:
            while not answering.done:
                self._note(answering, *await _next(jobs[0].channel, deadline))
        finally:
            self.worker.cancel(jobs)
        return answering.whole(body.top)

    async def stream(self, body: CompletionBody | ChatBody) -> AsyncIterator[dict[str, Any]]:
        """The parts of an answer; the jobs are queued when this returns. Raises `Refused`."""
        answering, jobs, deadline = self._begun(body)
        self._submit(jobs)  # here: what is too much is refused before an answer has begun

        async def parts() -> AsyncIterator[dict[str, Any]]:
            begun: set[int] = set()
            try:
                while not answering.done:
                    place, news = await _next(jobs[0].channel, deadline)
                    part = answering.part(place, news, body.top, place not in begun)
                    begun.add(place)
                    self._note(answering, place, news)
                    yield part
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield answering.last_part()
            finally:
                self.worker.cancel(jobs)

        return parts()

    def require_model(self, name: str | None) -> None:
        """Raises `Refused` where a client means another one."""
        if name not in (None, self.name):
            what = f"there is no model {name!r}; this server has {self.name!r}"
            raise Refused(404, what, "model", "model_not_found")

    def close(self) -> None:
        """Finish what is queued; nothing more is taken."""
        self.worker.close()

    def _begun(self, body: CompletionBody | ChatBody) -> tuple[Answering, list[Writing], float]:
        """The answer, the jobs that it waits for, and until when."""
        self.require_model(body.model)
        if not self.writes:
            raise Refused(404, "this model has a head that classifies; it writes no text", None, "not_available")
        field = "messages" if isinstance(body, ChatBody) else "prompt"
        prompts = [self._chat_prompt(body)] if isinstance(body, ChatBody) else self._prompts(body)
        if len(prompts) > self.limits.sequences:
            what = f"holds {len(prompts)} prompts, more than {self.limits.sequences}"
            raise Refused(400, f"{field} {what}", field, "too_many_prompts")
        if not prompts or not all(prompts):
            raise Refused(400, f"{field} holds no tokens", field, "invalid_value")
        most = self._new_tokens(body, max(map(len, prompts)))
        self._require_tokens(sum(len(prompt) + most for prompt in prompts), field)
        channel, tokenizer = Channel(asyncio.get_running_loop()), self.ensemble.task.base.tokenizer
        ends, jobs = end_tokens(self._tokenizer, self.ensemble.task.base.model), []
        for place, prompt in enumerate(prompts):
            sampling = body.sampling  # of several prompts each has a seed of its own
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + place)
            writer = SequenceWriter(tokenizer, prompt, sampling, most, body.stops, ends, body.top)
            name = hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]
            jobs.append(Writing(channel, name, prompt, place, writer))
        fingerprint = self.ensemble.identity[:16]
        chat, counted = isinstance(body, ChatBody), sum(map(len, prompts))
        return Answering(chat, self.name, fingerprint, counted, len(prompts)), jobs, self._deadline()

    def _prompts(self, body: CompletionBody) -> list[tuple[int, ...]]:
        vocabulary = self.ensemble.task.base.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        found: list[tuple[int, ...]] = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                lead, own = prompt_ids(self._tokenizer, prompt)
                found.append((*lead, *own))
            elif all(0 <= token < vocabulary for token in prompt):
                found.append(tuple(prompt))
            else:
                raise Refused(400, f"prompt holds a token id outside 0 to {vocabulary - 1}", "prompt", "invalid_value")
        return found

    def _chat_prompt(self, body: ChatBody) -> tuple[int, ...]:
        """As chats were rendered in training (`pipeline.data.chat`)."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise Refused(400, "the tokenizer of this model has no chat template", "messages", "not_available")
        turns = [message.plain for message in body.messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            what = f"messages are refused by the model's chat template ({error})"
            raise Refused(400, what, "messages", "invalid_value") from error
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _new_tokens(self, body: WritingBody, prompt: int) -> int:
        """Tokens that the answer may have behind a prompt of so many."""
        positions = positions_of(self.ensemble.task.base.model) or 2**31
        room = positions - prompt
        asked = body.longest or max(1, min(room, self.limits.new_tokens))
        if asked > self.limits.new_tokens:
            what = f"max_tokens = {asked} is more than the {self.limits.new_tokens} that this server writes"
            raise Refused(400, what, "max_tokens", "too_many_tokens")
        if asked > room:
            what = f"a prompt of {prompt} tokens and max_tokens = {asked} are more than the {positions} of the model"
            raise Refused(400, what, "max_tokens", "context_length_exceeded")
        return asked

    def _require_tokens(self, tokens: int, field: str) -> None:
        if tokens > self.limits.tokens:
            what = f"{field}: {tokens} tokens, with those to be written; a request may have {self.limits.tokens}"
            raise Refused(400, what, field, "too_many_tokens")

    def _submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a request. Raises `Refused` where there is no room for them."""
        try:
            self.worker.submit(jobs)
        except Overloaded as error:
            what = "too many requests are waiting; try again"
            raise Refused(503, what, None, "overloaded", {"retry-after": str(RETRY_SECONDS)}) from error
        self.metrics.accepted += 1

    def _note(self, answering: Answering, place: int, news: News) -> None:
        answering.add(place, news)
        self.metrics.tokens += news.count

    def _deadline(self) -> float:
        return time.monotonic() + self.limits.seconds

    def _abstention(self) -> dict[str, Any]:
        """What is promised of answers that are marked as such, or why nothing is."""
        if self.threshold is not None:
            confidence, risk = self.threshold.confidence, self.threshold.risk
            return {"risk": risk, "confidence": confidence, "guarantee": self.threshold.guarantee}
        export = "this is an export, which has none of the calibration rows that a risk is measured on"
        return {"reason": export if self.ensemble.run is None else "the server was started without --abstain RISK"}


async def _next(channel: Channel, deadline: float) -> Any:
    """What the worker has found next. Raises `Refused` where that takes too long, or it has failed."""
    try:
        return await asyncio.wait_for(channel.get(), max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        raise Refused(504, "the answer took too long", None, "timeout") from error
    except Exception as error:
        raise Refused(500, "the model has failed; the server's log says how", None, "failed") from error
