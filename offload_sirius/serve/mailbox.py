"""Where the thread that writes an answer leaves it for the client's coroutine. Nobody waits for a client that does not read."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece

Event = TextPiece | Generation | Exception
"""A piece of the answer; or its end, with the figures or with what went wrong."""


class Mailbox:
    """Events of one answer, at most `capacity` pieces that have not been taken. One thread puts, one coroutine takes."""

    def __init__(self, capacity: int | None) -> None:
        """Made in the event loop that takes. capacity: None where the one who takes never waits for a client."""
        self._capacity = capacity
        self._events: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self.overflowed = asyncio.Event()
        """Set when a piece had no room."""

    def put(self, event: Event) -> bool:
        """Leave an event; from any thread. False: there is no room for a piece, which is dropped. An end always has room."""
        has_room = self._capacity is None or len(self._events) < self._capacity or not isinstance(event, TextPiece)
        if has_room:
            self._events.append(event)
        # A loop that is closed has no client left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe((self._arrived if has_room else self.overflowed).set)
        return has_room

    async def take(self) -> list[Event]:
        """All there is, once there is anything."""
        # It may have been set once more for an event that was taken with the one before.
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return [self._events.popleft() for _ in range(len(self._events))]
