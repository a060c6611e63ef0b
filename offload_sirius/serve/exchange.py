"""One request that is being answered: its job, its mailbox, and whether its client is still there.

A client that leaves, or does not read, ends its job before the next step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece
from offload_sirius.serve.errors import SlowReaderError
from offload_sirius.serve.mailbox import Event, Mailbox
from offload_sirius.serve.worker import ClientLeftError, Job, Worker

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Caches and proxies shall hand pieces on as they come."""


class Exchange:
    """From the job's submission to its end, for which `end` must be called."""

    def __init__(self, worker: Worker, job: Job, mailbox: Mailbox, receive: Receive) -> None:
        """receive: of a request whose body has been read; what is left to come is that the client leaves."""
        self._worker = worker
        self._job = job
        self._mailbox = mailbox
        self._failure: Exception | None = None
        """What has ended the job, until the pieces before it have been taken."""
        self.left = asyncio.ensure_future(_until_left(receive))
        """Done when the client has left."""

    async def take(self) -> list[Event]:
        """The next events. Raises ClientLeftError, and the exception that ended the job."""
        if self._failure is not None:
            raise self._failure
        taking = asyncio.ensure_future(self._mailbox.take())
        try:
            await asyncio.wait({taking, self.left}, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                raise ClientLeftError
            events = taking.result()
        finally:
            taking.cancel()
        if isinstance(last := events[-1], Exception):
            self._failure = last
            return events[:-1] or await self.take()
        return events

    async def result(self) -> tuple[list[TextPiece], Generation]:
        """The whole answer. Raises as take does."""
        events: list[Event] = []
        while not events or not isinstance(events[-1], Generation):
            events += await self.take()
        result = events.pop()
        assert isinstance(result, Generation)
        return [each for each in events if isinstance(each, TextPiece)], result

    @property
    def overflowed(self) -> asyncio.Event:
        """Set when the client has not read what it asked for."""
        return self._mailbox.overflowed

    def end(self, reason: Exception | None = None) -> None:
        """Leave nothing behind: the job ends where it has not."""
        self.left.cancel()
        self._worker.cancel(self._job, reason or ClientLeftError())


class EventStream(Response):
    """Server-sent events for as long as the client is there and reads."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers=STREAM_HEADERS)
        # The length is not known, and there is no body yet.
        del self.headers["content-length"]
        self._exchange = exchange
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        sending = asyncio.ensure_future(self._send(send))
        stalled = asyncio.ensure_future(self._exchange.overflowed.wait())
        try:
            await asyncio.wait({sending, stalled, self._exchange.left}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._exchange.end(SlowReaderError() if stalled.done() else None)
            sending.cancel()
            stalled.cancel()

    async def _send(self, send: Send) -> None:
        start: dict[str, Any] = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        async for each in self._events:
            await send({"type": "http.response.body", "body": each, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
