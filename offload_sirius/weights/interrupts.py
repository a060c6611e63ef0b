"""Holds Ctrl-C and SIGTERM back for a moment, where what was begun must also be noted. Knows nothing of what that is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_held() -> Iterator[None]:
    """What Ctrl-C and SIGTERM do happens at the end of the block, not within; of both SIGTERM's. Only the main thread is ever
    interrupted; others pass."""
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    # None: set by what is not Python, and could not be set again.
    if threading.current_thread() is not threading.main_thread() or interrupt is None or terminate is None:
        yield
        return
    came = set[int]()

    def hold(number: int, _: FrameType | None) -> None:
        came.add(number)

    try:
        signal.signal(signal.SIGINT, hold)
        signal.signal(signal.SIGTERM, hold)
        yield
    finally:
        try:
            signal.signal(signal.SIGINT, interrupt)
        finally:  # also where a further Ctrl-C comes right now
            signal.signal(signal.SIGTERM, terminate)
        if came:
            signal.raise_signal(signal.SIGTERM if signal.SIGTERM in came else signal.SIGINT)
