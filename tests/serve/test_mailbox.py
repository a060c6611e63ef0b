"""Events from one thread to one coroutine."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from offload_sirius.decode.stream import TextPiece
from offload_sirius.serve.mailbox import Event, Mailbox

from .scripted import generation


def piece(number: int) -> TextPiece:
    return TextPiece(text=str(number), token_id=number, new_tokens=number, seconds=0.0)


def test_events_arrive_once_each_in_order_and_never_none_of_them() -> None:
    async def take() -> list[Event]:
        mailbox = Mailbox(None)
        with ThreadPoolExecutor(1) as pool:
            putting = pool.submit(lambda: [mailbox.put(piece(number)) for number in range(2000)])
            taken: list[Event] = []
            while len(taken) < 2000:
                events = await mailbox.take()
                assert events
                taken += events
            assert all(putting.result())
        return taken

    assert asyncio.run(take()) == [piece(number) for number in range(2000)]


def test_an_event_that_was_taken_with_the_one_before_is_not_waited_for_in_vain() -> None:
    async def take() -> list[list[Event]]:
        mailbox = Mailbox(None)
        first = asyncio.ensure_future(mailbox.take())
        await asyncio.sleep(0)
        mailbox.put(piece(1))
        await asyncio.sleep(0)  # the one who takes is about to, and finds two
        mailbox.put(piece(2))
        second = asyncio.ensure_future(asyncio.wait_for(_after(first, mailbox), timeout=20))
        await asyncio.sleep(0.01)
        mailbox.put(piece(3))
        return [await first, await second]

    async def _after(first: asyncio.Future[list[Event]], mailbox: Mailbox) -> list[Event]:
        await first
        return await mailbox.take()

    assert asyncio.run(take()) == [[piece(1), piece(2)], [piece(3)]]


def test_pieces_beyond_the_capacity_are_refused_and_an_end_never_is() -> None:
    async def overflow() -> list[Event]:
        mailbox = Mailbox(2)
        assert [mailbox.put(piece(number)) for number in range(3)] == [True, True, False]
        assert mailbox.put(generation(2, "interrupted"))
        await asyncio.wait_for(mailbox.overflowed.wait(), timeout=20)
        return await mailbox.take()

    assert asyncio.run(overflow()) == [piece(0), piece(1), generation(2, "interrupted")]


def test_a_loop_that_has_ended_does_not_disturb_the_one_who_writes() -> None:
    async def make() -> Mailbox:
        return Mailbox(None)

    assert asyncio.run(make()).put(piece(0))
