"""An ensemble of a tiny model in memory, and its server without a socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import torch

from helpers.families import LORA_DROPOUT, trained_start
from pipeline.adapters.attach import attach
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.distributed.world import World
from pipeline.ensemble.ensemble import Ensemble
from pipeline.ensemble.readout import Readout
from pipeline.ensemble.rows import RowForm
from pipeline.model.load import BaseIdentity, BaseModel
from pipeline.prediction.passes import PassSettings
from pipeline.prediction.task import CausalLMTask
from pipeline.serving.app import build_app
from pipeline.serving.service import Service
from pipeline.serving.settings import Limits, ServeSettings
from pipeline.support.tiny import byte_level_tokenizer, tiny_decoder

MEMBERS = [Member(0, 0), Member(0, 3), Member(1)]
SPECS = (AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT), AdapterSpec(rank=2, alpha=8.0))
FORM = RowForm("choice", None, (" yes", " no"), False)


def tiny_ensemble(specs: tuple[AdapterSpec, ...] = SPECS) -> Ensemble:
    """Three members on a random Llama with a byte-level tokenizer: float32, no file."""
    tokenizer = byte_level_tokenizer()
    model = tiny_decoder("llama", vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=1)
    adapters = trained_start(attach(model, list(specs), "all-linear", seed=0), size=0.3)
    base = BaseModel(model, tokenizer, BaseIdentity("tiny", "tiny", None, "none", False, "float32", 0, 0))
    task = CausalLMTask(base, 64, 0.0, PassSettings(tokenizer.pad_token_id, 4096, MaskKey(7, "test")))
    readout = Readout((0, 3, None), "probability", 1.5, "choice")
    return Ensemble(task, adapters, MEMBERS, readout, FORM, World(0, 1, 0, torch.device("cpu")), "f" * 64)


class Slow:
    """Stands before an ensemble's answers: passes wait until they are let go."""

    def __init__(self, service: Service) -> None:
        self.go, self.passes = threading.Event(), list[list[str]]()
        answer = service.worker._answer

        def slow(rows: Any) -> Any:
            self.passes.append([row.id for row in rows])
            self.go.wait(20)
            return answer(rows)

        service.worker._answer = slow


class Server:
    """A service whose application is asked directly."""

    def __init__(self, ensemble: Ensemble, key: str | None = None, **limits: Any) -> None:
        self.service = Service(ensemble, "tiny", Limits(**limits))
        self.app = build_app(self.service, ServeSettings("127.0.0.1", 0, key, self.service.limits))

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        """What a coroutine finds with a client of this server."""

        async def inside() -> Any:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await work(client)

        return asyncio.run(inside())

    def post(self, path: str, json: Any = None, **more: Any) -> httpx.Response:
        """One request."""
        response: httpx.Response = self.run(lambda client: client.post(path, json=json, **more))
        return response

    def get(self, path: str, **more: Any) -> httpx.Response:
        """One request."""
        response: httpx.Response = self.run(lambda client: client.get(path, **more))
        return response
