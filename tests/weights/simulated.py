"""Devices with memory of their own that exist in a test only.

SimulatedUplink  copies late and in a thread of its own; what is computed on the device is computed by the caller, at once
SimulatedDevice  one thread, two queues (compute, copies) and a scheduler that picks which goes on: any order the events allow
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload_sirius.trace import HostClock, Tracer
from offload_sirius.weights.uploads import Event

POISON = 0xFF

STEPS_AT_ONCE = 4
"""Fewer than these are carried out whenever the host has queued something."""


class FlagEvent:
    """Has come when the flag is up; whoever computes is this thread, so that waiting is the host's."""

    def __init__(self) -> None:
        self.flag = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        self.flag.wait()
        if self.error is not None:
            raise self.error

    def synchronize(self) -> None:
        self.wait()


class SimulatedUplink:
    """Refuses to pin more than max_pinned_nbytes, or (lock=True) what the system refuses to lock."""

    def __init__(self, *, max_pinned_nbytes: int | None = None, lock: bool = False, delay_seconds: float = 0.0) -> None:
        self.nbytes_copied = 0
        self.busy_seconds = 0.0
        self.peak_bytes_per_second: float | None = None
        self.pinned: dict[int, int] = {}
        self.most_pinned_nbytes = 0
        self.from_pageable_nbytes = 0
        self._max_pinned_nbytes = max_pinned_nbytes
        self._tracer: Tracer | None = None
        self._libc = ctypes.CDLL(None, use_errno=True) if lock else None
        self._delay_seconds = delay_seconds
        self._executor = ThreadPoolExecutor(1, "simulated-uplink")

    def mark(self) -> FlagEvent:
        event = FlagEvent()
        event.flag.set()  # what was computed before has been computed by the thread that asks
        return event

    def upload(self, source: Tensor, destination: Tensor, *, last_use: Event, name: str, reads: bool | None = None) -> FlagEvent:
        """reads: whether the device reads the source directly, where that is not to be looked up."""
        done = FlagEvent()
        if reads is None:
            reads = self.reads(source)
        self.from_pageable_nbytes += 0 if reads else source.nbytes
        destination.view(torch.uint8).fill_(POISON)
        self._executor.submit(self._copy, source, destination, last_use, done, name)
        return done

    def gather(self, records: Tensor, neuron_ids: Tensor, destination: Tensor, *, last_use: Event, name: str) -> FlagEvent:
        return self.upload(
            records.index_select(0, neuron_ids).view(torch.uint8),
            destination.view(torch.uint8),
            last_use=last_use,
            name=name,
            reads=self.reads(records),
        )

    def _copy(self, source: Tensor, destination: Tensor, last_use: Event, done: FlagEvent, name: str) -> None:
        try:
            last_use.synchronize()
            began = time.perf_counter()
            time.sleep(self._delay_seconds)
            with torch.inference_mode():  # the views of a pass were taken in it
                destination.copy_(source)
            seconds = time.perf_counter() - began
            self.busy_seconds += seconds
            if self._tracer is not None:
                self._tracer.span("copy", name, began, began + seconds, bytes=source.nbytes)
            self.nbytes_copied += source.nbytes
            self.peak_bytes_per_second = max(source.nbytes / seconds, self.peak_bytes_per_second or 0.0)
        except BaseException as error:
            done.error = error
        done.flag.set()

    def reads(self, buffer: Tensor) -> bool:
        address = buffer.data_ptr()
        return any(start <= address and address + buffer.nbytes <= start + nbytes for start, nbytes in self.pinned.items())

    def register(self, address: int, nbytes: int) -> str | None:
        assert not any(start < address + nbytes and address < start + length for start, length in self.pinned.items())
        if self._max_pinned_nbytes is not None and sum(self.pinned.values()) + nbytes > self._max_pinned_nbytes:
            return "simulated error 2"
        if self._libc and self._libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) != 0:
            return f"mlock: errno {ctypes.get_errno()}"
        self.pinned[address] = nbytes
        self.most_pinned_nbytes = max(self.most_pinned_nbytes, sum(self.pinned.values()))
        return None

    def unregister(self, address: int) -> None:
        nbytes = self.pinned.pop(address)
        if self._libc:
            self._libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))

    def clock(self) -> HostClock:
        return HostClock()

    def draw_on(self, tracer: Tracer | None) -> None:
        self._tracer = tracer

    def close(self) -> None:
        self._executor.shutdown()


Pick = Callable[[int], int]
"""A number below the given one: which of the queues that can go on does."""


@dataclass(eq=False)
class QueueEvent:
    """Has come when the scheduler has passed it."""

    device: SimulatedDevice
    come: bool = False

    def wait(self) -> None:
        self.device.queues["compute"].append(Operation(needs=self))

    def synchronize(self) -> None:
        self.device.run_until(self)


@dataclass(eq=False)
class Operation:
    """One entry of a queue."""

    act: Callable[[], object] | None = None
    needs: QueueEvent | None = None
    brings: QueueEvent | None = None


@dataclass
class SimulatedDevice:
    """The host only queues; queues go on whenever the scheduler likes, as far as events let them."""

    pick: Pick
    queues: dict[str, deque[Operation]] = field(default_factory=lambda: {"compute": deque(), "copies": deque()})
    nbytes_copied: int = 0
    busy_seconds: float = 0.0
    peak_bytes_per_second: float | None = None

    def mark(self) -> QueueEvent:
        event = QueueEvent(self)
        self.queues["compute"].append(Operation(brings=event))
        self.run_some()
        return event

    def upload(self, source: Tensor, destination: Tensor, *, last_use: Event, name: str) -> QueueEvent:
        assert isinstance(last_use, QueueEvent)
        done = QueueEvent(self)
        copies = self.queues["copies"]
        copies.append(Operation(needs=last_use, act=lambda: destination.view(torch.uint8).fill_(POISON)))
        copies.append(Operation(act=lambda: destination.copy_(source), brings=done))
        self.nbytes_copied += source.nbytes
        self.run_some()
        return done

    def gather(self, records: Tensor, neuron_ids: Tensor, destination: Tensor, *, last_use: Event, name: str) -> QueueEvent:
        assert isinstance(last_use, QueueEvent)
        done = QueueEvent(self)
        copies = self.queues["copies"]
        copies.append(Operation(needs=last_use, act=lambda: destination.view(torch.uint8).fill_(POISON)))
        copies.append(Operation(act=lambda: destination.copy_(records[neuron_ids]), brings=done))
        self.nbytes_copied += destination.nbytes
        self.run_some()
        return done

    def compute(self, act: Callable[[], None]) -> None:
        """Queue something that is computed on the device."""
        self.queues["compute"].append(Operation(act=act))
        self.run_some()

    def reads(self, buffer: Tensor) -> bool:
        return True

    def register(self, address: int, nbytes: int) -> str | None:
        return None

    def unregister(self, address: int) -> None:
        pass

    def clock(self) -> HostClock:
        return HostClock()

    def draw_on(self, tracer: Tracer | None) -> None:
        assert tracer is None, "this device has no time"

    def close(self) -> None:
        while self._step():
            pass
        assert not any(self.queues.values()), "the queues wait for each other for ever"

    def run_some(self) -> None:
        for _ in range(self.pick(STEPS_AT_ONCE)):
            if not self._step():
                return

    def run_until(self, event: QueueEvent) -> None:
        while not event.come:
            assert self._step(), "what is waited for never comes"

    def _step(self) -> bool:
        """Carry out one operation of any queue that can go on. False where none can."""
        able = [queue for queue in self.queues.values() if queue and (queue[0].needs is None or queue[0].needs.come)]
        if not able:
            return False
        operation = able[self.pick(len(able))].popleft()
        if operation.act is not None:
            operation.act()
        if operation.brings is not None:
            operation.brings.come = True
        return True
