"""Ways to bring a part of a layer into a slot, behind one protocol: the link. Knows no order of layers.

HostCopier   host memory -> memory, by a thread; the only one that brings slices of layers
DiskCopier   checkpoint's files -> memory, by reader threads
TieredCopier host layers and slices by one of these, disk layers by another
PacedCopier  any of them, no faster than a set rate: the emulated link

Those that upload to a device with memory of its own are in uploads.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.trace import Tracer
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer
from offload_sirius.weights.disk import Fill, Job, ReaderPool, tensor_jobs
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.kept import KeptStore, gather_neurons, gather_rows
from offload_sirius.weights.layout import Part, part_of
from offload_sirius.weights.pieces import packed_part
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.spec import Role


class Transfer(Protocol):
    """A part of a layer on its way into a slot."""

    def wait(self) -> None:
        """Return when the part may be computed on: when its bytes are there (CPU), or when the current stream has been made to
        wait for them (CUDA). Raises WeightReadError when they cannot be had."""


class Counters(Protocol):
    """What a link has carried."""

    @property
    def nbytes_copied(self) -> int:
        """Bytes that have been put in slots, counted where they are copied."""

    @property
    def busy_seconds(self) -> float:
        """Time in which at least one transfer was under way."""

    @property
    def peak_bytes_per_second(self) -> float | None:
        """Fastest rate seen or set; None before anything was measured."""


class Copier(Counters, Protocol):
    """Brings parts of layers into slots, in the order it is asked."""

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Transfer:
        """Begin to overwrite that part of the slot; returns at once. The slot's last use must be over (CPU) or queued on the
        current stream (CUDA)."""

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> Transfer:
        """Begin to overwrite the first M up and down records of the slot with those of the given neurons, int64 [M] in host
        memory; returns at once. As `start` otherwise."""

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons) -> Transfer:
        """The same of whole neurons, int64 [N] in host memory or None for all, into their place."""

    def close(self) -> None:
        """End threads. Transfers under way are finished first."""


class BusyMeter:
    """Bytes, the time in which at least one transfer was under way, and the best rate of one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open = 0
        self._since = 0.0
        self._busy_seconds = 0.0
        self.nbytes = 0
        self.peak_bytes_per_second: float | None = None

    @property
    def busy_seconds(self) -> float:
        """Busy time until now."""
        with self._lock:
            return self._busy_seconds + (time.perf_counter() - self._since if self._num_open else 0.0)

    def open(self) -> float:
        """A transfer begins. Returns the time."""
        now = time.perf_counter()
        with self._lock:
            if self._num_open == 0:
                self._since = now
            self._num_open += 1
        return now

    def close(self, nbytes: int, seconds: float | None = None) -> None:
        """A transfer has ended; seconds, where given, are its own and count towards the best rate."""
        with self._lock:
            self._num_open -= 1
            self.nbytes += nbytes
            if self._num_open == 0:
                self._busy_seconds += time.perf_counter() - self._since
            if seconds:
                self.peak_bytes_per_second = max(nbytes / seconds, self.peak_bytes_per_second or 0.0)


def trace_copy(tracer: Tracer | None, layer: int, part: str, nbytes: int, began: float, ended: float) -> None:
    """A part has crossed the link, or will have: times are the host's."""
    if tracer is not None:
        tracer.span("copy", f"layer {layer} {part}", began, ended, layer=layer, part=part, bytes=nbytes)


class FutureTransfer:
    """A transfer carried out by a thread of an executor."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """See Transfer."""
        self._future.result()


class HostCopier:
    """Host memory to memory, in order, by one thread: what a link does on a machine that has none."""

    def __init__(self, store: HostStore, kept: KeptStore | None = None, tracer: Tracer | None = None) -> None:
        """kept: None where no fixed set of neurons is kept."""
        self._store = store
        self._kept = kept
        self._tracer = tracer
        self._meter = BusyMeter()
        self._executor = ThreadPoolExecutor(1, "copier", initializer=torch.set_num_threads, initargs=(1,))

    @property
    def nbytes_copied(self) -> int:
        """See Copier."""
        return self._meter.nbytes

    @property
    def busy_seconds(self) -> float:
        """See Copier."""
        return self._meter.busy_seconds

    @property
    def peak_bytes_per_second(self) -> float | None:
        """See Copier."""
        return self._meter.peak_bytes_per_second

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        copy = self._copy_kept if part == "kept" else self._copy
        nbytes = slot.parts[part].numel()
        return self._submit(layer, part, nbytes, lambda: copy(layer, part, slot))

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        place = slot.up_down[: len(neuron_ids)]
        records = self._store.layer(layer).up_down
        return self._submit(layer, "neurons", place.nbytes, lambda: gather_rows(records, neuron_ids, place))

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons) -> Transfer:
        """See Copier."""
        source = self._store.layer(layer)
        return self._submit(layer, "neurons", place.nbytes, lambda: gather_neurons(source, neuron_ids, place))

    def _submit(self, layer: int, what: str, nbytes: int, copy: Callable[[], None]) -> Transfer:
        return FutureTransfer(self._executor.submit(self._carry, layer, what, nbytes, copy))

    def _carry(self, layer: int, what: str, nbytes: int, copy: Callable[[], None]) -> None:
        began = self._meter.open()
        copy()
        ended = time.perf_counter()
        self._meter.close(nbytes, ended - began)
        trace_copy(self._tracer, layer, what, nbytes, began, ended)

    def _copy(self, layer: int, part: Part, slot: LayerBuffer) -> None:
        slot.parts[part].copy_(self._store.layer(layer).parts[part])

    def _copy_kept(self, layer: int, part: Part, slot: LayerBuffer) -> None:
        assert self._kept is not None
        assert slot.kept is not None
        gathered = self._kept.place(layer)
        if gathered is not None:
            slot.parts[part].copy_(gathered)
        else:
            gather_neurons(self._store.layer(layer), self._kept.ids(layer), slot.kept)

    def close(self) -> None:
        """See Copier."""
        self._executor.shutdown(cancel_futures=True)


def layer_jobs(checkpoint: Checkpoint, layer: int, part: Part, buffer: LayerBuffer) -> list[Job]:
    """Everything there is to read of a part of a layer, each tensor with its place in the buffer: none that is to be quantised.

    Of a packed layer the bytes of the part are read as they are.
    """
    if checkpoint.packed is not None:
        info = packed_part(checkpoint.packed, layer, part)
        return tensor_jobs(info, buffer.parts[part].view(info.shape))
    jobs: list[Job] = []
    roles: list[Role] = [role for role in checkpoint.spec.layer_roles() if part_of(role) == part]
    for role in roles:
        jobs += tensor_jobs(checkpoint.tensors[layer, role], buffer.role(role))
    return jobs


class DiskCopier:
    """The checkpoint's own files to memory, by reader threads that assemble the layer as they read."""

    def __init__(self, checkpoint: Checkpoint, readers: ReaderPool, tracer: Tracer | None = None) -> None:
        self._checkpoint = checkpoint
        self._readers = readers
        self._tracer = tracer
        self._meter = BusyMeter()

    @property
    def nbytes_copied(self) -> int:
        """See Copier."""
        return self._meter.nbytes

    @property
    def busy_seconds(self) -> float:
        """See Copier."""
        return self._meter.busy_seconds

    @property
    def peak_bytes_per_second(self) -> float | None:
        """See Copier. The readers' own measure, in stored bytes."""
        return self._readers.bytes_per_second

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Fill:
        """See Copier."""
        self._meter.open()
        part_nbytes = slot.parts[part].numel()
        fill = self._readers.submit(layer_jobs(self._checkpoint, layer, part, slot))
        fill.when_over(lambda: self._over(fill, layer, part, part_nbytes))
        return fill

    def _over(self, fill: Fill, layer: int, part: Part, nbytes: int) -> None:
        self._meter.close(nbytes)
        trace_copy(self._tracer, layer, part, nbytes, fill.began, time.perf_counter())

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> Transfer:
        """See Copier. Never asked: only packed files have a neuron's records in one piece, and single reads take too long."""
        raise AssertionError(f"layer {layer} is on disk")

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons) -> Transfer:
        """See Copier. Never asked, as `fetch`."""
        raise AssertionError(f"layer {layer} is on disk")

    def close(self) -> None:
        """See Copier. The readers belong to who made them."""


class TieredCopier:
    """Each layer by the copier of the tier in which it lives; kept neurons, which are in host memory, by the host's."""

    def __init__(self, tiers: Mapping[int, Copier], host: Copier) -> None:
        """tiers: layer -> its copier."""
        self._tiers = tiers
        self._host = host
        self._copiers = list(dict.fromkeys((*tiers.values(), host)))

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        return (self._host if part == "kept" else self._tiers[layer]).start(layer, part, slot)

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        return self._tiers[layer].fetch(layer, neuron_ids, slot)

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons) -> Transfer:
        """See Copier."""
        return self._tiers[layer].gather(layer, neuron_ids, place)

    @property
    def nbytes_copied(self) -> int:
        """See Copier."""
        return sum(copier.nbytes_copied for copier in self._copiers)

    @property
    def busy_seconds(self) -> float:
        """See Copier. The tiers are different links; the busiest one is the answer."""
        return max(copier.busy_seconds for copier in self._copiers)

    @property
    def peak_bytes_per_second(self) -> float | None:
        """See Copier: of the slowest tier, as it is the one that is waited for."""
        return min((rate for copier in self._copiers if (rate := copier.peak_bytes_per_second)), default=None)

    def close(self) -> None:
        """See Copier."""
        for copier in self._copiers:
            copier.close()


class PacedTransfer:
    """A transfer that may not end before its time."""

    def __init__(self, inner: Transfer, due: float) -> None:
        self._inner = inner
        self._due = due

    def wait(self) -> None:
        """See Transfer."""
        self._inner.wait()
        if (left := self._due - time.perf_counter()) > 0:
            time.sleep(left)


class PacedCopier:
    """Another copier at a set rate. The emulated link carries one transfer at a time: each begins when it is asked for, or when
    the one before has ended, and lasts its bytes over the rate."""

    def __init__(self, inner: Copier, bytes_per_second: float, tracer: Tracer | None = None) -> None:
        """tracer: none for `inner` then, as only one of the two is the link."""
        self._inner = inner
        self._bytes_per_second = bytes_per_second
        self._tracer = tracer
        self._free_at = 0.0
        self._busy_seconds = 0.0

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        due = self._due(layer, part, slot.parts[part].numel())
        return PacedTransfer(self._inner.start(layer, part, slot), due)

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> Transfer:
        """See Copier."""
        due = self._due(layer, "neurons", slot.up_down[: len(neuron_ids)].nbytes)
        return PacedTransfer(self._inner.fetch(layer, neuron_ids, slot), due)

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons) -> Transfer:
        """See Copier."""
        due = self._due(layer, "neurons", place.nbytes)
        return PacedTransfer(self._inner.gather(layer, neuron_ids, place), due)

    def _due(self, layer: int, what: str, nbytes: int) -> float:
        """When a transfer that is asked for now may end."""
        seconds = nbytes / self._bytes_per_second
        begins = max(self._free_at, time.perf_counter())
        self._free_at = begins + seconds
        self._busy_seconds += seconds
        trace_copy(self._tracer, layer, what, nbytes, begins, self._free_at)
        return self._free_at

    @property
    def nbytes_copied(self) -> int:
        """See Copier."""
        return self._inner.nbytes_copied

    @property
    def busy_seconds(self) -> float:
        """See Copier: what has been asked for, less what is still to come."""
        return self._busy_seconds - max(self._free_at - time.perf_counter(), 0.0)

    @property
    def peak_bytes_per_second(self) -> float | None:
        """The set rate."""
        return self._bytes_per_second

    def close(self) -> None:
        """See Copier."""
        self._inner.close()
