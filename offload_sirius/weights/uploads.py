"""Uploads to a device that has memory of its own, from wherever a layer is. Knows no driver: that is the uplink's.

UplinkCopier  the Copier: each layer by the route of the place where it lives
PinnedRoute   host memory that the device reads directly: one copy a part
ChunkRoute    host memory that could not be pinned: through a few chunks that could
DiskRoute     the checkpoint's files, assembled in buffers of a layer's size
SliceRoute    kept neurons and single records out of host memory

Order on the device: a slot's last use is marked behind the work that used it when its next copy is asked for; the copy waits for
that mark and leaves another; what is computed on the slot waits for this one. The host waits for neither.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.trace import Clock, Tracer
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer
from offload_sirius.weights.copiers import Counters, Transfer, layer_jobs
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.kept import KeptStore
from offload_sirius.weights.layout import PARTS, Part
from offload_sirius.weights.mapping import map_memory
from offload_sirius.weights.pinning import Pinning, PinReport, Registrar
from offload_sirius.weights.plan import CHUNK_NBYTES, NUM_CHUNKS
from offload_sirius_loaders.checkpoint import Checkpoint

COPY_THREADS = 4
"""Threads that copy to chunks: one does not keep up with a fast link."""


class Event(Protocol):
    """A moment in the device's work."""

    def wait(self) -> None:
        """What is computed from now on waits for it. The host does not."""

    def synchronize(self) -> None:
        """Block the host until it has come."""


class Uplink(Registrar, Counters, Protocol):
    """The way to a device with memory of its own. Thread-safe."""

    def mark(self) -> Event:
        """The moment behind everything the device has been given to compute so far."""

    def upload(self, source: Tensor, destination: Tensor, *, last_use: Event, name: str) -> Event:
        """Queue one copy that begins after last_use of the destination; returns the moment after it.

        From a pageable source the host waits for the copy, so that only threads which may wait hand one over. name: for traces.
        """

    def gather(self, records: Tensor, neuron_ids: Tensor, destination: Tensor, *, last_use: Event, name: str) -> Event:
        """As `upload`, of the given rows, int64 [N] in host memory, of records [F, ...] -> destination [N, ...]."""

    def reads(self, buffer: Tensor) -> bool:
        """Whether the device reads this host memory directly."""

    def clock(self) -> Clock:
        """Gives the moments of what the device computes."""

    def draw_on(self, tracer: Tracer | None) -> None:
        """Draw every copy from now on; None draws none."""

    def close(self) -> None:
        """Wait for what is under way."""


class Route(Protocol):
    """A way from where layers live to the device."""

    def start(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event) -> Transfer:
        """Begin to overwrite that part of the slot once its last use is over; returns at once."""

    @property
    def bytes_per_second(self) -> float | None:
        """What it can do at best, where something but the uplink limits it and has been measured."""

    def close(self) -> None:
        """End threads. What is under way is finished first."""


class UplinkCopier:
    """Layers to a device with memory of its own, each by its route; kept neurons and single records by one for slices."""

    def __init__(self, routes: Mapping[int, Route], uplink: Uplink, slices: SliceRoute | None = None) -> None:
        """routes: layer -> its route. slices: None where only whole layers are asked for."""
        self._routes = routes
        self._slices = slices
        self._distinct = list(dict.fromkeys(routes.values()))
        self._uplink = uplink

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        route: Route | SliceRoute | None = self._slices if part == "kept" else self._routes[layer]
        assert route is not None
        return route.start(layer, part, slot, self._uplink.mark())

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        assert self._slices is not None
        return self._slices.fetch(layer, neuron_ids, slot, self._uplink.mark())

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons) -> Transfer:
        """See Copier."""
        assert self._slices is not None
        return self._slices.gather(layer, neuron_ids, place, self._uplink.mark())

    @property
    def nbytes_copied(self) -> int:
        """See Copier."""
        return self._uplink.nbytes_copied

    @property
    def busy_seconds(self) -> float:
        """See Copier."""
        return self._uplink.busy_seconds

    @property
    def peak_bytes_per_second(self) -> float | None:
        """See Copier: of the slowest way, as it is the one that is waited for."""
        rates = (self._uplink.peak_bytes_per_second, *(route.bytes_per_second for route in self._distinct))
        return min((rate for rate in rates if rate), default=None)

    def close(self) -> None:
        """See Copier."""
        for route in self._distinct:
            route.close()
        self._uplink.close()


class EventTransfer:
    """A transfer whose copy has been queued."""

    def __init__(self, done: Event) -> None:
        self._done = done

    def wait(self) -> None:
        """See Transfer."""
        self._done.wait()


class PinnedRoute:
    """Straight from the arena. One copy a part, so that the attention block can be computed on while the records still arrive."""

    def __init__(self, store: HostStore, layers: Sequence[int], uplink: Uplink) -> None:
        # From a pageable source each copy would wait for the device without a word, and the loop be slow without a reason.
        assert all(uplink.reads(store.layer(layer).storage) for layer in layers)
        self._store = store
        self._uplink = uplink

    def start(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event) -> Transfer:
        """See Route."""
        source = self._store.layer(layer).parts[part]
        return EventTransfer(self._uplink.upload(source, slot.parts[part], last_use=last_use, name=f"layer {layer} {part}"))

    @property
    def bytes_per_second(self) -> float | None:
        """See Route."""
        return None

    def close(self) -> None:
        """See Route."""


class SliceRoute:
    """Slices of layers out of host memory: kept neurons, gathered already or on the way, and single records."""

    def __init__(self, store: HostStore, kept: KeptStore, uplink: Uplink) -> None:
        self._store = store
        self._kept = kept
        self._uplink = uplink

    def start(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event) -> Transfer:
        """See Route. part: kept."""
        assert part == "kept", part
        name, gathered = f"layer {layer} {part}", self._kept.place(layer)
        if gathered is not None:
            return EventTransfer(self._uplink.upload(gathered, slot.parts[part], last_use=last_use, name=name))
        source, place, neuron_ids = self._store.layer(layer), slot.kept, self._kept.ids(layer)
        assert place is not None
        self._uplink.gather(source.gate_records, neuron_ids, place.gate_records, last_use=last_use, name=name)
        # What is queued on the link later is done later: the second event stands for both.
        done = self._uplink.gather(source.up_down, neuron_ids, place.up_down, last_use=last_use, name=name)
        return EventTransfer(done)

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer, last_use: Event) -> Transfer:
        """See Copier.fetch."""
        records, place = self._store.layer(layer).up_down, slot.up_down[: len(neuron_ids)]
        name = f"layer {layer} neurons"
        return EventTransfer(self._uplink.gather(records, neuron_ids, place, last_use=last_use, name=name))

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons, last_use: Event) -> Transfer:
        """See Copier.gather."""
        source, name = self._store.layer(layer), f"layer {layer} neurons"
        for records, rows in ((source.gate_records, place.gate_records), (source.up_down, place.up_down)):
            if neuron_ids is None:
                done = self._uplink.upload(records, rows, last_use=last_use, name=name)
            else:
                done = self._uplink.gather(records, neuron_ids, rows, last_use=last_use, name=name)
        return EventTransfer(done)


class QueuedTransfer:
    """A transfer whose copy is queued later, by another thread."""

    def __init__(self) -> None:
        self.queued: Future[Event] = Future()

    def wait(self) -> None:
        """See Transfer. The host waits until the bytes are where the device reads them and the copy is queued."""
        self.queued.result().wait()


class Chunks:
    """A few buffers through which memory passes that could not be pinned: while one is uploaded, the next is copied to.

    Thread-safe. Buffers that cannot be pinned either still serve; the driver then copies once more.
    """

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink
        self._lock = threading.Lock()
        buffers = torch.frombuffer(map_memory(NUM_CHUNKS * CHUNK_NBYTES), dtype=torch.uint8).split(CHUNK_NBYTES)
        self._pinning = Pinning(buffers, uplink)
        self._buffers: deque[tuple[Tensor, Event | None]] = deque((buffer, None) for buffer in buffers)

    @property
    def report(self) -> PinReport:
        """What could be pinned of them; blocks until that is known."""
        return self._pinning.wait()

    def upload(self, source: Tensor, destination: Tensor, *, last_use: Event, name: str) -> Event:
        """As Uplink.upload, piece by piece; the host waits until the last piece has been copied to its chunk."""
        with self._lock:
            done = last_use
            for piece, place in zip(source.split(CHUNK_NBYTES), destination.split(CHUNK_NBYTES), strict=True):
                done = self._upload_piece(piece, place, last_use, name)
            return done

    def measure(self, source: Tensor) -> float:
        """Bytes a second of copying to a chunk; the second time, when its pages are there."""
        with self._lock:
            chunk, piece = self._buffers[0][0][: source.numel()], source[:CHUNK_NBYTES]
            chunk.copy_(piece)
            began = time.perf_counter()
            chunk.copy_(piece)
            return piece.numel() / (time.perf_counter() - began)

    def close(self) -> None:
        """Wait for what is under way, unpin, and give the buffers back. Safe to call twice."""
        with self._lock:
            for _, done in self._buffers:
                if done is not None:
                    done.synchronize()
            self._buffers.clear()
        self._pinning.close()

    def _upload_piece(self, piece: Tensor, place: Tensor, last_use: Event, name: str) -> Event:
        chunk, uploaded = self._buffers[0]  # the one that was used longest ago
        if uploaded is not None:
            uploaded.synchronize()  # the device may still be reading it
        filled = chunk[: piece.numel()]
        filled.copy_(piece)
        done = self._uplink.upload(filled, place, last_use=last_use, name=name)
        self._buffers.rotate(-1)
        self._buffers[-1] = (chunk, done)
        return done


class ChunkRoute:
    """From host memory that is not pinned, through chunks, by a thread."""

    def __init__(self, store: HostStore, layers: Sequence[int], chunks: Chunks) -> None:
        """layers: those that come this way, at least one, already filled."""
        self._store = store
        self._chunks = chunks
        self._executor = ThreadPoolExecutor(1, "chunks", initializer=torch.set_num_threads, initargs=(COPY_THREADS,))
        self._bytes_per_second = self._executor.submit(chunks.measure, store.layer(layers[0]).storage).result()

    def start(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event) -> Transfer:
        """See Route."""
        transfer = QueuedTransfer()
        self._executor.submit(self._carry, layer, part, slot, last_use, transfer)
        return transfer

    @property
    def bytes_per_second(self) -> float:
        """See Route: the rate of copying to a chunk."""
        return self._bytes_per_second

    def close(self) -> None:
        """See Route."""
        self._executor.shutdown(cancel_futures=True)

    def _carry(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event, transfer: QueuedTransfer) -> None:
        try:
            source = self._store.layer(layer).parts[part]
            done = self._chunks.upload(source, slot.parts[part], last_use=last_use, name=f"layer {layer} {part}")
            transfer.queued.set_result(done)
        except BaseException as error:
            transfer.queued.set_exception(error)


class DiskRoute:
    """The checkpoint's files to the device, through host buffers of a layer's size.

    A thread a part takes layers in order: it waits until the part has been read, queues its upload, and waits for that upload
    before the buffer is read into again. A buffer may have the attention block of one layer and the records of another.
    """

    def __init__(self, checkpoint: Checkpoint, readers: ReaderPool, way: Uplink | Chunks, staging: Sequence[LayerBuffer]) -> None:
        """way: the uplink itself where staging is pinned, else the chunks."""
        self._checkpoint = checkpoint
        self._readers = readers
        self._way = way
        self._free: dict[Part, queue.SimpleQueue[LayerBuffer]] = {part: queue.SimpleQueue() for part in PARTS}
        for part_free in self._free.values():
            for buffer in staging:
                part_free.put(buffer)
        self._executors = {part: ThreadPoolExecutor(len(staging), f"staging-{part}") for part in self._free}

    def start(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event) -> Transfer:
        """See Route."""
        transfer = QueuedTransfer()
        self._executors[part].submit(self._carry, layer, part, slot, last_use, transfer)
        return transfer

    @property
    def bytes_per_second(self) -> float | None:
        """See Route: what the readers have seen, in stored bytes."""
        return self._readers.bytes_per_second

    def close(self) -> None:
        """See Route."""
        for executor in self._executors.values():
            executor.shutdown(cancel_futures=True)

    def _carry(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event, transfer: QueuedTransfer) -> None:
        staging = self._free[part].get()
        try:
            packed = self._checkpoint.packed is not None
            own = staging.staged(layer, packed=packed)
            self._readers.submit(layer_jobs(self._checkpoint, layer, part, own)).wait()
            read, place = (buffer.file_part(part, packed=packed) for buffer in (own, slot))
            done = self._way.upload(read, place, last_use=last_use, name=f"layer {layer} {part}")
            transfer.queued.set_result(done)
            done.synchronize()  # the buffer may be read into again only when the device has read it
        except BaseException as error:
            if not transfer.queued.done():
                transfer.queued.set_exception(error)
        finally:
            self._free[part].put(staging)
