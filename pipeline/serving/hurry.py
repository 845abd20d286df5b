"""uvicorn's protocol with an end to its patience: by itself it waits for the head of a request for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class HurriedProtocol(H11Protocol):
    """Of a connection: after `seconds` without a whole head of a request it is answered 408 and closed.

    The time runs from when the connection is made, and from the first byte of each further request; between requests
    uvicorn's own `timeout_keep_alive` does.
    """

    def __init__(self, *, seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self.seconds = seconds
        self.deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self.deadline = self.loop.call_later(self.seconds, self.give_up)

    def data_received(self, data: bytes) -> None:
        """Stop waiting where the head is there; begin where another has begun."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self.stop_waiting()
        elif self.deadline is None and self.conn.trailing_data[0]:
            self.deadline = self.loop.call_later(self.seconds, self.give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self.stop_waiting()
        super().connection_lost(exc)

    def stop_waiting(self) -> None:
        """Whatever comes now may take its time."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def give_up(self) -> None:
        """Close the connection."""
        if not self.transport.is_closing():
            self.transport.write(TOO_SLOW)
            self.transport.close()
