"""Pinning: buffers of host memory that a device may read directly, registered one after the other while others fill them.

Registering locks the pages of a buffer that exists already, so the arena has exactly the size of what is in it. It goes on in a
thread of its own beside the readers, and ends at the first buffer that the driver refuses: what is left stays pageable and takes
a slower way. Knows no driver; that is the registrar's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from offload_sirius.weights.layout import PAGE_NBYTES, align


class Registrar(Protocol):
    """Whose device shall read the memory."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Lock whole pages and make them known to the device. Returns None, or why that could not be done."""

    def unregister(self, address: int) -> None:
        """Undo `register`."""


@dataclass(frozen=True, kw_only=True)
class PinReport:
    """What came of it."""

    num_pinned: int
    """Buffers, counted from the first."""
    pinned_nbytes: int
    pageable_nbytes: int
    reason: str | None
    """Why the first of the others was refused; None where all are pinned."""

    def __add__(self, other: PinReport) -> PinReport:
        """Both together, with the first reason."""
        return PinReport(
            num_pinned=self.num_pinned + other.num_pinned,
            pinned_nbytes=self.pinned_nbytes + other.pinned_nbytes,
            pageable_nbytes=self.pageable_nbytes + other.pageable_nbytes,
            reason=self.reason or other.reason,
        )


class Pinning:
    """Buffers being registered, in order. Each starts at a page, and no two share one."""

    def __init__(self, buffers: Sequence[Tensor], registrar: Registrar) -> None:
        """Begin. buffers: uint8, contiguous, in host memory."""
        self._buffers = list(buffers)
        self._registrar = registrar
        self._num_pinned = 0
        self._reason: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="pinning", daemon=True)
        self._thread.start()

    def wait(self) -> PinReport:
        """Block until each buffer is registered or one was refused."""
        self._thread.join()
        return PinReport(
            num_pinned=self._num_pinned,
            pinned_nbytes=sum(buffer.numel() for buffer in self._buffers[: self._num_pinned]),
            pageable_nbytes=sum(buffer.numel() for buffer in self._buffers[self._num_pinned :]),
            reason=self._reason,
        )

    def close(self) -> None:
        """Unregister all; one that is being registered is waited for. Nothing may be on its way to the device. Safe to call
        twice."""
        self._closing = True
        self._thread.join()
        for buffer in self._buffers[: self._num_pinned]:
            self._registrar.unregister(buffer.data_ptr())
        self._num_pinned = 0
        self._buffers.clear()  # or they would keep their memory

    def _run(self) -> None:
        for buffer in self._buffers:
            if self._closing:
                return
            assert buffer.data_ptr() % PAGE_NBYTES == 0, buffer.data_ptr()
            try:
                self._reason = self._registrar.register(buffer.data_ptr(), align(buffer.numel(), PAGE_NBYTES))
            except Exception as error:  # a driver's own way to refuse
                self._reason = " ".join(str(error).split()) or type(error).__name__
            if self._reason is not None:
                return
            self._num_pinned += 1
