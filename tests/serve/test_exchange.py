"""One request that is being answered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from offload_sirius.config import GenerationConfig
from offload_sirius.decode.stream import TextPiece
from offload_sirius.serve.errors import ServerStoppingError
from offload_sirius.serve.exchange import Exchange
from offload_sirius.serve.mailbox import Mailbox
from offload_sirius.serve.worker import ClientLeftError, Job, Worker

PIECE = TextPiece(text="x", token_id=1, new_tokens=1, seconds=0.0)


async def forever() -> Any:
    await asyncio.sleep(1000)


async def gone() -> Any:
    return {"type": "http.disconnect"}


def exchange(mailbox: Mailbox, receive: Any) -> Exchange:
    def load() -> Any:
        raise AssertionError("nobody starts it")

    worker = Worker(load, max_queue=1)
    job = Job(client="c", prompt_ids=[1], config=GenerationConfig(), put=mailbox.put)
    worker.submit(job)
    return Exchange(worker, job, mailbox, receive)


def test_pieces_that_come_with_an_error_are_given_before_it() -> None:
    async def take() -> None:
        mailbox = Mailbox(None)
        found = exchange(mailbox, forever)
        mailbox.put(PIECE)
        mailbox.put(ServerStoppingError())
        assert await found.take() == [PIECE]
        for _ in range(2):
            with pytest.raises(ServerStoppingError):
                await found.take()
        found.end()

    asyncio.run(take())


def test_a_client_that_has_left_ends_the_job_in_the_queue() -> None:
    async def take() -> None:
        mailbox = Mailbox(None)
        found = exchange(mailbox, gone)
        with pytest.raises(ClientLeftError):
            await found.take()
        found.end()
        (event,) = await mailbox.take()
        assert isinstance(event, ClientLeftError)

    asyncio.run(take())
