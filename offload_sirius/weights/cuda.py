"""The way to a CUDA device. The only file that knows CUDA's streams, events and pinned memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_sirius.kernels.gather import gather, has_triton
from offload_sirius.trace import Tracer
from offload_sirius.weights.uploads import Event

PCI_DEVICES = Path("/sys/bus/pci/devices")

NUM_GRAPH_WARMUPS = 3
"""As torch's documentation of graphs has it."""


MOST_PINNED_NBYTES = 2 << 20
"""Of a copy that goes through pinned memory of torch's: a window's rows. A prompt's would take, and keep, as much as they are."""


@dataclass(frozen=True)
class CudaEvent:
    """A moment in the work of one device. See uploads.Event."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        """See uploads.Event: the compute stream of the device waits."""
        self.event.wait(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """See uploads.Event."""
        self.event.synchronize()


class CudaClock:
    """Moments in the work of a device as times of the host's clock. See trace.Clock."""

    def __init__(self, device: torch.device) -> None:
        """Waits for the device once, to tie the two clocks to each other."""
        self._device = device
        self._base = self._record()
        self._base.synchronize()
        self._base_seconds = time.perf_counter()

    def mark(self) -> Callable[[], float]:
        """The moment behind everything the device has been given to compute so far; asking for its time waits for it."""
        event = self._record()
        return lambda: self.seconds(event)

    def seconds(self, event: torch.cuda.Event) -> float:
        """When an event came, on the clock of time.perf_counter. Waits for it."""
        event.synchronize()
        return self._base_seconds + float(self._base.elapsed_time(event)) / 1e3

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class CudaGraphs:
    """Work of one device, recorded as graphs, each of which is one launch.

    All graphs compute in one pool of memory, in any order, as none of them keeps anything there from one launch to the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do the work a few times, and return what launches all of it again, on the same tensors: those that were there before
        have its results. Waits for the device. Raises RuntimeError where something in it cannot be captured."""
        compute = torch.cuda.current_stream(self._device)
        # Given back by this block, as a capture that fails leaves its own stream the current one.
        with torch.cuda.device(self._device), torch.cuda.stream(compute):
            self._warm_up(work, compute)
            graph = torch.cuda.CUDAGraph()
            # Other threads may copy meanwhile, and ask whether their copies are done: that is no error of this capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        replay: Callable[[], None] = graph.replay
        return replay

    def _warm_up(self, work: Callable[[], None], compute: torch.cuda.Stream) -> None:
        """Libraries set themselves up at their first calls, on the stream of the capture and not within it."""
        self._stream.wait_stream(compute)  # it reads what was computed before
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_GRAPH_WARMUPS):
                work()
        compute.wait_stream(self._stream)  # and writes what is read behind it


@dataclass(frozen=True)
class _Copy:
    """One that has been queued."""

    name: str
    began: torch.cuda.Event
    done: torch.cuda.Event
    nbytes: int


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory, or there already, on a device for its current stream. For a small one the host does not wait:
    behind layers on their way the copy has its turn late."""
    if tensor.is_cuda or tensor.nbytes > MOST_PINNED_NBYTES:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class CudaUplink:
    """Host memory to one device, on a copy stream of its own. See uploads.Uplink."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device)
        self._copies: deque[_Copy] = deque()
        self._busy_seconds = 0.0
        self._peak_bytes_per_second: float | None = None
        self._clock = CudaClock(device)
        self._tracer: Tracer | None = None
        self._registered: dict[int, int] = {}
        self.nbytes_copied = 0

    def clock(self) -> CudaClock:
        """See uploads.Uplink."""
        return self._clock

    def draw_on(self, tracer: Tracer | None) -> None:
        """See uploads.Uplink."""
        self._tracer = tracer

    def mark(self) -> CudaEvent:
        """See uploads.Uplink."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return CudaEvent(event, self._device)

    def upload(self, source: Tensor, destination: Tensor, *, last_use: Event, name: str) -> CudaEvent:
        """See uploads.Uplink."""
        return self._queue(lambda: destination.copy_(source, non_blocking=True), destination.nbytes, last_use, name)

    def gather(self, records: Tensor, neuron_ids: Tensor, destination: Tensor, *, last_use: Event, name: str) -> CudaEvent:
        """See uploads.Uplink. By a kernel that reads the rows over the link; where there is none, the host gathers them first."""
        if not (has_triton() and self.reads(records)):
            gathered = records.index_select(0, neuron_ids)
            return self.upload(gathered, destination, last_use=last_use, name=name)
        rows, place = records.flatten(1), destination.flatten(1)  # [F, R], [N, R]
        pinned_ids = neuron_ids.pin_memory()  # before the copy's time begins

        def copy() -> None:
            gather(rows, pinned_ids.to(self._device, non_blocking=True), place)

        return self._queue(copy, destination.nbytes, last_use, name)

    def _queue(self, copy: Callable[[], object], nbytes: int, last_use: Event, name: str) -> CudaEvent:
        """Have the copy stream do it once the destination's last use is over."""
        assert isinstance(last_use, CudaEvent)
        # Threads that wait for a copy sleep meanwhile: the cores are the readers'.
        began, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True, blocking=True)
        with self._lock, torch.cuda.stream(self._stream):
            # What the slot held before may still be computed on.
            self._stream.wait_event(last_use.event)
            began.record(self._stream)
            copy()
            done.record(self._stream)
            self.nbytes_copied += nbytes
            self._copies.append(_Copy(name, began, done, nbytes))
            self._collect()
        return CudaEvent(done, self._device)

    def reads(self, buffer: Tensor) -> bool:
        """See uploads.Uplink."""
        # Not torch's is_pinned, which looks at the start of a storage and not at the view.
        begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel() * buffer.element_size()
        return any(start <= begin and end <= start + nbytes for start, nbytes in self._registered.items())

    def register(self, address: int, nbytes: int) -> str | None:
        """See pinning.Registrar."""
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
        if int(status) != 0:
            runtime = torch.cuda.cudart()
            return f"CUDA error {int(status)}, {runtime.cudaGetErrorString(runtime.cudaError(int(status)))}"
        self._registered[address] = nbytes
        return None

    def unregister(self, address: int) -> None:
        """See pinning.Registrar."""
        torch.cuda.cudart().cudaHostUnregister(address)
        del self._registered[address]

    @property
    def busy_seconds(self) -> float:
        """See uploads.Uplink."""
        with self._lock:
            self._collect()
            return self._busy_seconds

    @property
    def peak_bytes_per_second(self) -> float | None:
        """See uploads.Uplink."""
        return self._peak_bytes_per_second

    def close(self) -> None:
        """See uploads.Uplink."""
        self._stream.synchronize()
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        """Read the timings of copies that have ended: copies on one stream do not overlap, so their times add up."""
        while self._copies and self._copies[0].done.query():
            copy = self._copies.popleft()
            seconds = copy.began.elapsed_time(copy.done) / 1e3
            self._busy_seconds += seconds
            if self._tracer is not None:
                began, ended = self._clock.seconds(copy.began), self._clock.seconds(copy.done)
                self._tracer.span("copy", copy.name, began, ended, bytes=copy.nbytes)
            if seconds:
                self._peak_bytes_per_second = max(copy.nbytes / seconds, self._peak_bytes_per_second or 0.0)


def numa_node_of(device: torch.device) -> int | None:
    """The NUMA node whose memory is nearest to a device; None where that is not told or makes no difference."""
    properties: Any = torch.cuda.get_device_properties(device)  # older versions of torch do not tell the place on the bus
    place: list[Any] = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    return None if None in place else numa_node_at(place[0], place[1], place[2])


def numa_node_at(domain: int, bus: int, slot: int, devices: Path = PCI_DEVICES) -> int | None:
    """The NUMA node of a place on the PCI bus; None where the kernel knows none."""
    try:
        node = int((devices / f"{domain:04x}:{bus:02x}:{slot:02x}.0" / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
