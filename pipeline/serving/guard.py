"""What stands before the application: who may ask, how large a body may be, how long it may take to come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pipeline.serving.metrics import Metrics
from pipeline.serving.openai import Refused
from pipeline.serving.settings import ServeSettings

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
OPEN = ("/", "/healthz", "/readyz")
"""Routes for which nobody has to show the key: the page, which asks for it, and probes."""


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics, routes: tuple[str, ...]) -> None:
        self.app, self.settings, self.metrics, self.routes = app, settings, metrics, routes

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Refuse, or hand on with the whole body; count either way."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def noting(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
            await send(event)

        try:
            try:
                body = await self._admitted(scope, receive)
            except Refused as refused:
                await _refuse(refused, noting)
            else:
                if body is not None:
                    await self.app(scope, _replayed(body, receive), noting)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.answer(route, status, time.monotonic() - began)

    async def _admitted(self, scope: Event, receive: Receive) -> bytes | None:
        """The body of a request that may go on; None where its client has gone away. Raises `Refused`."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] not in OPEN and not self.settings.admits(headers.get(b"authorization")):
            what = "show the API key of this server as `Authorization: Bearer KEY`"
            raise Refused(401, what, None, "invalid_api_key", {"www-authenticate": "Bearer"})
        limits = self.settings.limits
        declared = headers.get(b"content-length", "0")
        if not declared.isdecimal() or int(declared) > limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(limits.body_seconds):
                return await self._body(receive)
        except TimeoutError as error:
            what = f"the body has not come within {limits.body_seconds:g} seconds"
            raise Refused(408, what, None, "slow_body", {"connection": "close"}) from error

    async def _body(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while (event := await receive())["type"] == "http.request":
            body += event.get("body", b"")
            if len(body) > self.settings.limits.body_bytes:
                raise self._too_large()
            if not event.get("more_body", False):
                return bytes(body)
        return None

    def _too_large(self) -> Refused:
        what = f"the body has more than {self.settings.limits.body_bytes:,} bytes"
        return Refused(413, what, None, "body_too_large", {"connection": "close"})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, and then whatever the client does next: go away."""
    told = False

    async def replay() -> Event:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(refused: Refused, send: Send) -> None:
    body = json.dumps(refused.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": listed})
    await send({"type": "http.response.body", "body": body})
