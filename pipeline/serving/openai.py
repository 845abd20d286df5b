"""Requests and answers of the OpenAI-compatible routes, and the one form that every error of the server has.

What a request may say is listed here; a parameter that is not, or a value that is not offered, is refused by its name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.serving.writing import Chosen, News, Sampling

MOST_TOP = 20
"""Probabilities of so many tokens can be asked for, at most (of completions: 5, as at OpenAI)."""
SeedNumber = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Refused(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """A request's JSON object. Unknown names and converted types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    model: str | None = None
    """The id of /v1/models, if anything."""


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    """Whether the last part counts tokens."""


class WritingBody(Body):
    """What both kinds of completion take. Null is as good as nothing."""

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """0: the most probable token; None: 1."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: SeedNumber | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Not read."""
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        return Sampling(temperature, 1.0 if self.top_p is None else float(self.top_p), self.seed)

    @property
    def stops(self) -> list[str]:
        """Texts that end what is written; empty ones end nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def top(self) -> int | None:
        """So many of the most probable tokens are told; None: no probability is."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """Tokens to be written, at most; None: as many as there is room for."""
        raise NotImplementedError


class CompletionBody(WritingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    """Texts, or token ids."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]

    @property
    def top(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    @property
    def longest(self) -> int | None:
        """16 where nothing is said, as at OpenAI."""
        return 16 if self.max_tokens is None else self.max_tokens


class Part(BaseModel):
    """A part of a message: a text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatBody(WritingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def top(self) -> int | None:
        """`top_logprobs`, where `logprobs` asks for probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        """`max_completion_tokens`, which took the place of `max_tokens`."""
        return self.max_completion_tokens or self.max_tokens


def refusal(error: ValidationError | Any) -> Refused:
    """Pydantic's first complaint about a body, by the name of the parameter."""
    fault = error.errors()[0]
    path = [str(part) for part in fault["loc"] if part != "body"]
    if fault["type"] in ("json_invalid", "json_type"):
        what = fault.get("ctx", {}).get("error", fault["msg"])
        return Refused(400, f"the body is not valid JSON: {what}", None, "invalid_json")
    known = [part for part in path if part.isidentifier() and part not in ("str", "int", "Part")]
    name = known[0] if known else None
    if fault["type"] == "extra_forbidden":
        return Refused(400, f"{'.'.join(path)} is not supported", path[0], "unsupported_parameter")
    if fault["type"] == "literal_error":
        given = fault.get("input")
        shown = f" = {given!r}" if isinstance(given, str | int | float | bool) else ""
        what = f"{name}{shown:.100} is not supported: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
        return Refused(400, what, name, "unsupported_value")
    where = ".".join(path) or "the body, which must be a JSON object"
    return Refused(400, f"{where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}", name, "invalid_value")


class Answering:
    """The answer to one request for text, whole or in parts; `chat` or `text` form."""

    def __init__(self, chat: bool, model: str, fingerprint: str, prompt_tokens: int, sequences: int) -> None:
        self.chat, self._prompt_tokens = chat, prompt_tokens
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._kind = kind
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
            "system_fingerprint": fingerprint,
        }
        self.texts = [""] * sequences
        self.tokens: list[list[Chosen]] = [[] for _ in range(sequences)]
        self.ended: list[str | None] = [None] * sequences
        self._written = 0

    @property
    def done(self) -> bool:
        """Whether every sequence has ended."""
        return all(self.ended)

    def add(self, place: int, news: News) -> None:
        """What has become of one of the sequences."""
        self.texts[place] += news.text
        self.tokens[place] += news.tokens
        self.ended[place] = news.ended
        self._written += news.count

    def whole(self, top: int | None) -> dict[str, Any]:
        """The answer."""
        choices = []
        for place, text in enumerate(self.texts):
            logs = None if top is None else self._log_probs(self.tokens[place], 0)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": place, **said, "logprobs": logs, "finish_reason": self.ended[place]})
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage}

    def part(self, place: int, news: News, top: int | None, first: bool) -> dict[str, Any]:
        """An event of a stream; `add` it afterwards."""
        logs = None if top is None else self._log_probs(news.tokens, len(self.texts[place]))
        role = {"role": "assistant"} if first else {}
        said = {"delta": {**role, "content": news.text}} if self.chat else {"text": news.text}
        choice = {"index": place, **said, "logprobs": logs, "finish_reason": news.ended}
        return {**self._head, "object": f"{self._kind}.chunk" if self.chat else self._kind, "choices": [choice]}

    def last_part(self) -> dict[str, Any]:
        """The event that counts tokens."""
        return {
            **self._head, "object": f"{self._kind}.chunk" if self.chat else self._kind, "choices": [],
            "usage": self.usage,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, without counting members."""
        total = self._prompt_tokens + self._written
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._written, "total_tokens": total}

    def _log_probs(self, tokens: Sequence[Chosen], offset: int) -> dict[str, Any]:
        if self.chat:
            return {"content": [
                {**_entry(one.text, one.log_prob), "top_logprobs": [_entry(*other) for other in one.top]}
                for one in tokens
            ], "refusal": None}
        offsets = [offset]
        for one in tokens:
            offsets.append(offsets[-1] + len(one.text))
        return {
            "tokens": [one.text for one in tokens], "token_logprobs": [one.log_prob for one in tokens],
            "top_logprobs": [dict(one.top) for one in tokens], "text_offset": offsets[:-1],
        }


def _entry(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}
