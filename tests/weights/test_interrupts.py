from __future__ import annotations

import signal
from collections.abc import Iterator
from threading import Thread
from types import FrameType

import pytest

from offload_sirius.weights.interrupts import interrupts_held

BOTH = (signal.SIGINT, signal.SIGTERM)


class Came(KeyboardInterrupt):
    """By the signal of that number."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[object]]:
    """Both signals raise; those that do are set again at the end."""

    def come(number: int, _: FrameType | None) -> None:
        raise Came(int(number))

    before = [signal.signal(number, come) for number in BOTH]
    yield [come, come]
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


def interrupted(*numbers: int) -> list[str]:
    """What is done of a block within which these come."""
    done = list[str]()
    try:
        with interrupts_held():
            for number in numbers:
                signal.raise_signal(number)
            done.append("noted")
        done.append("went on")
    except Came as error:
        done.append(str(error))
    return done


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_within_comes_at_the_end(number: int, handlers: list[object]) -> None:
    assert interrupted(number) == ["noted", str(Came(int(number)))]
    assert [signal.getsignal(each) for each in BOTH] == handlers


@pytest.mark.parametrize("numbers", [BOTH, BOTH[::-1], (signal.SIGTERM, signal.SIGTERM)])
def test_of_several_signals_sigterm_comes_once(numbers: tuple[int, ...], handlers: list[object]) -> None:
    assert interrupted(*numbers) == ["noted", str(Came(int(signal.SIGTERM)))]
    assert [signal.getsignal(each) for each in BOTH] == handlers


def test_an_error_within_leaves_the_handlers_as_they_were(handlers: list[object]) -> None:
    with pytest.raises(ValueError, match="broken"), interrupts_held():
        raise ValueError("broken")
    assert [signal.getsignal(each) for each in BOTH] == handlers


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert interrupted(signal.SIGINT) == ["noted", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_block_without_signals_goes_on(handlers: list[object]) -> None:
    assert interrupted() == ["noted", "went on"]
    assert [signal.getsignal(each) for each in BOTH] == handlers


def test_another_thread_sets_no_handlers(handlers: list[object]) -> None:
    found = list[object]()

    def enter() -> None:
        with interrupts_held():
            found.extend(signal.getsignal(each) for each in BOTH)

    thread = Thread(target=enter)
    thread.start()
    thread.join()
    assert found == handlers
