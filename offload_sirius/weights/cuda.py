"""Copiers that upload to a CUDA device. The only file that knows CUDA streams and events.

CudaCopier   pinned host memory -> device, on a copy stream
StagedCopier checkpoint's files -> pinned host buffers -> device

Order on the device: a slot's last use is marked by an event on the compute stream when its next copy is asked for; the copy
stream waits for that event, copies, and records another; the compute stream waits for this one before it uses the slot.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import Transfer, layer_jobs
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.layout import PARTS, Part
from offload_sirius_loaders.checkpoint import Checkpoint


def _mark() -> torch.cuda.Event:
    """An event behind everything the caller's stream has been given so far."""
    event = torch.cuda.Event()
    event.record()
    return event


class CudaTransfer:
    """A copy queued on the copy stream."""

    def __init__(self, done: torch.cuda.Event) -> None:
        self._done = done

    def wait(self) -> None:
        """Make the current stream wait; the host does not."""
        self._done.wait(torch.cuda.current_stream())


class CudaCopier:
    """Pinned host memory to the device on a stream of its own. One copy a part, so that the attention block can be computed on
    while the records still arrive."""

    def __init__(self, store: HostStore, device: torch.device) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device)
        self._timings: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []
        self._busy_seconds = 0.0
        self._peak_bytes_per_second: float | None = None
        self.nbytes_copied = 0

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        source = self._store.layer(layer).parts[part]
        return CudaTransfer(self.upload(source, slot.parts[part], last_use=_mark()))

    def upload(self, source: torch.Tensor, destination: torch.Tensor, *, last_use: torch.cuda.Event) -> torch.cuda.Event:
        """Queue one copy that begins after last_use of the destination; returns the event after it. Thread-safe."""
        # A pageable source would make the copy synchronous without a word, and the loop slow without a reason.
        assert source.is_pinned()
        began, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_event(last_use)
            began.record()
            destination.copy_(source, non_blocking=True)
            done.record()
            self.nbytes_copied += destination.numel()
            self._timings.append((began, done, destination.numel()))
            self._collect()
        return done

    def _collect(self) -> None:
        """Read the timings of copies that have ended: copies on one stream do not overlap, so their times add up."""
        while self._timings and self._timings[0][1].query():
            began, done, nbytes = self._timings.pop(0)
            seconds = began.elapsed_time(done) / 1e3
            self._busy_seconds += seconds
            if seconds:
                self._peak_bytes_per_second = max(nbytes / seconds, self._peak_bytes_per_second or 0.0)

    @property
    def busy_seconds(self) -> float:
        """See Copier."""
        with self._lock:
            self._collect()
            return self._busy_seconds

    @property
    def peak_bytes_per_second(self) -> float | None:
        """See Copier."""
        return self._peak_bytes_per_second

    def close(self) -> None:
        """See Copier."""
        self._stream.synchronize()


class QueuedTransfer:
    """A transfer whose upload is queued later, by another thread."""

    def __init__(self) -> None:
        self.queued: Future[torch.cuda.Event] = Future()

    def wait(self) -> None:
        """See Transfer. The host waits until the bytes are off the disk and the upload is queued."""
        self.queued.result().wait(torch.cuda.current_stream())


class StagedCopier:
    """The checkpoint's files to the device, through pinned host buffers of a layer's size.

    A thread takes the parts in order: it waits until a part has been read, queues its upload, and waits for that upload before
    the buffer is read into again.
    """

    def __init__(self, checkpoint: Checkpoint, readers: ReaderPool, uploads: CudaCopier, staging: Sequence[LayerBuffer]) -> None:
        self._checkpoint = checkpoint
        self._readers = readers
        self._uploads = uploads
        self._free: dict[Part, queue.SimpleQueue[LayerBuffer]] = {part: queue.SimpleQueue() for part in PARTS}
        for part_free in self._free.values():
            for buffer in staging:
                part_free.put(buffer)
        self._executors = {part: ThreadPoolExecutor(1, f"staging-{part}") for part in self._free}

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        transfer = QueuedTransfer()
        self._executors[part].submit(self._carry, layer, part, slot, _mark(), transfer)
        return transfer

    def _carry(self, layer: int, part: Part, slot: LayerBuffer, last_use: torch.cuda.Event, transfer: QueuedTransfer) -> None:
        try:
            staging = self._free[part].get()
            self._readers.submit(layer_jobs(self._checkpoint, layer, part, staging)).wait()
            done = self._uploads.upload(staging.parts[part], slot.parts[part], last_use=last_use)
            transfer.queued.set_result(done)
            # The buffer may be read into again only when the device has read it.
            done.synchronize()
            self._free[part].put(staging)
        except BaseException as error:
            if not transfer.queued.done():
                transfer.queued.set_exception(error)

    @property
    def nbytes_copied(self) -> int:
        """See Copier. Counted by the uploads, which host layers share."""
        return 0

    @property
    def busy_seconds(self) -> float:
        """See Copier. Counted by the uploads."""
        return 0.0

    @property
    def peak_bytes_per_second(self) -> float | None:
        """See Copier."""
        return self._readers.bytes_per_second

    def close(self) -> None:
        """See Copier."""
        for executor in self._executors.values():
            executor.shutdown(cancel_futures=True)
