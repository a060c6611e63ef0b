"""SIGTERM ends a command as Ctrl-C does: what was opened is closed, what was half written is removed. Knows no command."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came. Unlike Ctrl-C it ends also what goes on after that."""


class Termination:
    """While it is entered, SIGTERM raises TerminatedError in the main thread; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        """Whether there was one."""
        self._before: Any = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
            self._before = signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise TerminatedError
