"""The routes: HTTP in, HTTP out. What they mean stands in `pipeline.serving.service`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pipeline import __version__
from pipeline.serving.guard import Guard
from pipeline.serving.metrics import CONTENT_TYPE
from pipeline.serving.openai import ChatBody, CompletionBody, Refused, refusal
from pipeline.serving.rows import ClassifyBody
from pipeline.serving.service import Service
from pipeline.serving.settings import ServeSettings

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
"""The page loads nothing, and talks to nobody but this server."""
GONE = 499
"""Nobody reads it: the client has gone away."""


def build_app(service: Service, settings: ServeSettings) -> Guard:
    """The ASGI application of one service, which it closes when the server ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # FastAPI's own pages of documentation load scripts from elsewhere; /openapi.json is for tools.
    app = FastAPI(title="loradrop", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_probes(app, service)

    @app.post("/v1/classify")
    async def classify(body: ClassifyBody, request: Request) -> Response:
        """Calibrated probabilities of each row's choices."""
        return await _while_wanted(request, service.classify(body))

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        """A text goes on, token by token of the members' average distribution."""
        return await _written(service, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """The next turn of a conversation."""
        return await _written(service, body, request)

    routes = tuple(path for route in app.routes if (path := getattr(route, "path", None)))
    return Guard(app, settings, service.metrics, routes)


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """A page to try it."""
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    @app.get("/healthz")
    async def alive() -> Response:
        """The process answers."""
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def ready() -> Response:
        """The model answers."""
        up = service.worker.alive
        return PlainTextResponse("ready\n" if up else "not ready\n", 200 if up else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        worker = service.worker
        gauges: dict[str, tuple[str, float]] = {
            "waiting": ("Jobs that wait for a pass.", worker.waiting),
            "writing": ("Sequences that are being written.", worker.writing),
            "members": ("Members of the ensemble.", len(service.ensemble.members)),
            "ready": ("Whether the model answers.", worker.alive),
        }
        return Response(service.metrics.text(gauges, worker.passes), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [service.model_entry()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The one model by its name."""
        service.require_model(name)
        return service.model_entry()

    @app.get("/v1/about")
    async def about() -> dict[str, Any]:
        """What rows it answers, and how."""
        return service.about()


def _add_errors(app: FastAPI) -> None:
    """Every error in one form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, refusal(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        shown = Refused(error.status_code, str(error.detail), None, None, error.headers)
        return await refused(request, shown)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, Refused(500, "the server has failed; its log says how", None, "failed"))


async def _written(service: Service, body: CompletionBody | ChatBody, request: Request) -> Response:
    if not body.stream:
        return await _while_wanted(request, service.write(body))
    parts = await service.stream(body)

    async def events() -> AsyncIterator[str]:
        try:
            async for part in parts:
                yield f"data: {json.dumps(part)}\n\n"
        except Refused as error:  # the status has been sent
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def _while_wanted(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """What `work` finds; a client that goes away first ends it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(task.result()) if task.done() else Response(status_code=GONE)
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Until the client has gone away; its whole body has come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
