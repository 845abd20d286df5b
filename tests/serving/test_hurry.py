"""Connections that never come to the point, over real sockets."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import uvicorn

from pipeline.serving.hurry import HurriedProtocol

SECONDS = 0.5
ASKED = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after a while that is longer than the head of a request may take."""
    await asyncio.sleep(2 * SECONDS)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def said(port: int, pieces: list[bytes], pause: float) -> bytes:
    """What a client is told that sends one piece after another, until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    told = asyncio.create_task(asyncio.wait_for(reader.read(), 30))
    for piece in pieces:
        if not told.done():
            writer.write(piece)
            await asyncio.wait([told], timeout=pause)
    return await told


async def ask_all() -> list[bytes]:
    """What each of the clients is told."""
    protocol: Any = partial(HurriedProtocol, seconds=SECONDS)
    config = uvicorn.Config(app, port=0, http=protocol, lifespan="off", log_level="critical", timeout_keep_alive=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    drip = [bytes([one]) for one in ASKED[:12]]
    found = await asyncio.gather(
        said(port, [], 0), said(port, drip, SECONDS / 3), said(port, [ASKED], 0),
        said(port, [ASKED[:20], ASKED[20:]], SECONDS / 10),
        said(port, [ASKED, *drip], 0.45 * SECONDS), return_exceptions=True,
    )  # fmt: skip
    server.should_exit = True
    await serving
    return [one if isinstance(one, bytes) else repr(one).encode() for one in found]


def test_heads_of_requests_that_do_not_come_are_given_up_and_answers_may_take_longer() -> None:
    silent, dripping, quick, halved, again = asyncio.run(ask_all())
    assert silent.startswith(b"HTTP/1.1 408 Request Timeout") and silent.endswith(b"\r\n\r\n")
    assert dripping == silent
    assert quick.startswith(b"HTTP/1.1 200 OK") and quick.endswith(b"ok") and halved == quick
    assert again.startswith(b"HTTP/1.1 200 OK") and again.endswith(silent), "of the second request on the connection"
