"""Which layer is in which slot, and when: a ring of slots through which the streamed layers pass, in order, again and again.

While one slot is computed on, the others fill with the layers that follow. The order wraps: behind the last layer comes the
first one of the next pass, so the link works on while the head and the sampler do, and the next pass finds its first layers
there. Not every pass needs all of a layer, so whoever begins one says what it takes, and what the one after it will. Satisfies
the model's WeightSource. Knows no files and no streams; those are the copier's.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from offload_sirius.errors import OffloadSiriusError
from offload_sirius.trace import Moment, Tracer
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer
from offload_sirius.weights.copiers import Copier, Transfer
from offload_sirius.weights.embedding import Embedding
from offload_sirius.weights.kept import KeptStore
from offload_sirius.weights.layout import Cargo, Part

Phase = Literal["prefill", "draft", "correction", "full"]


@dataclass(frozen=True)
class Flight:
    """A layer on its way into a slot, or there."""

    layer: int
    cargo: Cargo
    """Of the pass."""
    part: Cargo
    """Of the layer, which may bring more than the pass takes."""
    slot: LayerBuffer
    attention: Transfer
    neurons: Transfer

    @property
    def nbytes(self) -> int:
        """What crosses the link."""
        return self.slot.parts["attention"].numel() + self.slot.parts[self.part].numel()


@dataclass(frozen=True)
class FetchedRecords:
    """Up and down records of some neurons, on their way into the slot of their layer."""

    place: Tensor
    """[M, 2, D]"""
    arrive: Callable[[], None]

    def wait(self) -> Tensor:
        """The records [M, 2, D], once they are there. They stay until more are fetched, or the layer is released."""
        self.arrive()
        return self.place


class LayerTrace:
    """Turns what a model asks a source for into spans: what it waited for, and what it computed between two requests."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._computing: tuple[int, str, Moment] | None = None

    def wait(self, layer: int, part: str, transfer: Transfer) -> None:
        """Wait for a part."""
        began = self._tracer.clock.mark()
        transfer.wait()
        self._tracer.span("wait", f"layer {layer} {part}", began, self._tracer.clock.mark(), layer=layer, part=part)

    def computing(self, layer: int, what: str) -> None:
        """The model has what it asked for and computes on it from now on."""
        self._computing = layer, what, self._tracer.clock.mark()

    def computed(self) -> None:
        """The model asks for something else: what it computed is done, or queued on the device."""
        if self._computing is not None:
            layer, what, began = self._computing
            self._tracer.span("compute", f"layer {layer} {what}", began, self._tracer.clock.mark(), layer=layer)
            self._computing = None


class WeightStreamer:
    """Weights of a model, part of them resident, the rest streamed through slots."""

    def __init__(
        self,
        *,
        residents: Mapping[int, LayerBuffer],
        streamed_layers: Sequence[int],
        slots: Sequence[LayerBuffer],
        copier: Copier | None,
        embedding: Embedding,
        final_norm: Tensor,
        head: Tensor,
        tracer: Tracer | None = None,
        sliceable: Collection[int] = (),
        kept: KeptStore | None = None,
        arena: Mapping[int, LayerBuffer] | None = None,
    ) -> None:
        """copier: None where nothing is streamed. Nothing is copied before the first layer is asked for.

        sliceable: streamed layers of which slices can cross the link alone; kept: where kept neurons are gathered;
        arena: layers in host memory, from where a device with memory of its own has them gathered.
        """
        assert not streamed_layers or (len(slots) >= 2 and copier is not None)
        self.final_norm = final_norm
        self.head = head
        self.pass_nbytes: dict[Phase, int] = dict.fromkeys(get_args(Phase), 0)
        """Bytes of the streamed layers that were computed on, by phase."""
        self.discarded_nbytes = 0
        """Bytes that were fetched for a pass that did not come."""
        self.wait_seconds = 0.0
        """Time the host has waited for layers."""
        self._residents = residents
        self._streamed = list(streamed_layers)
        self._slots = list(slots)
        self._copier = copier
        self._embedding = embedding
        self._sliceable = frozenset(sliceable)
        self._kept = kept
        self._arena = arena or {}
        self._ring: deque[Flight] = deque()
        self._early: Transfer | None = None
        """The attention block of the next layer to start, on its way already into the slot of the first one in the ring."""
        self._fetching: Transfer | None = None
        """What was sent for last and has not been waited for."""
        self._next = 0
        self._broken_off = False
        self._phase: Phase = "full"
        self._cargo: Cargo = "records"
        self._following: Cargo = "records"
        self._starting: Cargo = "records"
        """Of the pass whose layers are being sent for: this one's, and behind the last layer the following one's."""
        self._trace = None if tracer is None else LayerTrace(tracer)

    def begin(self, phase: Phase, cargo: Cargo = "records", *, following: Cargo = "records") -> None:
        """A pass begins. phase: under which its bytes are counted; cargo: what it takes of each layer; following: the same of the
        pass that will probably come next. One that was given up half-way may be followed by any other."""
        self._phase, self._cargo, self._following = phase, cargo, following
        # As many slots as streamed layers: all of this pass is under way, and the first slot that is free is for the next one.
        self._starting = cargo if self._next else following

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [S] on the host -> [S, D] on the device."""
        return self._embedding.rows(token_ids)

    def attention(self, layer: int) -> LayerBuffer:
        """The layer's attention block; blocks until it is there."""
        buffer = self._residents.get(layer)
        if buffer is None:
            if not self._has(layer):
                self._restart_at(layer)
            buffer = self._arrived(self._ring[0], "attention")
        if self._trace is not None:
            self._trace.computing(layer, "attention")
        return buffer

    def neurons(self, layer: int) -> LayerBuffer | KeptNeurons:
        """What the pass takes of the layer's neurons, or all of them; blocks until it is there.

        Of `gate` only the gates are there, unless `has_records` says that the rest is.
        """
        if self._trace is not None:
            self._trace.computed()
        buffer: LayerBuffer | KeptNeurons | None = self._residents.get(layer)
        if buffer is None:
            flight = self._ring[0]
            assert flight.layer == layer
            slot = self._arrived(flight, flight.part)
            buffer = slot if flight.part != "kept" else slot.kept
            assert buffer is not None
        if self._trace is not None:
            self._trace.computing(layer, "neurons")
        return buffer

    def has_records(self, layer: int) -> bool:
        """Whether all neurons of the layer that was last asked for are on the device."""
        return layer in self._residents or self._ring[0].part == "records"

    def fetch(self, layer: int, neuron_ids: Tensor) -> FetchedRecords:
        """Send for up and down records of neurons, int64 [M] in host memory, of the layer whose gates are in its slot. Any that
        were fetched before are overwritten, and so is its attention block."""
        assert self._copier is not None
        flight = self._ring[0]
        assert (flight.layer, flight.part) == (layer, "gate"), (flight.layer, flight.part, layer)
        place = flight.slot.up_down[: len(neuron_ids)]
        self.pass_nbytes[self._phase] += place.nbytes
        self._let_fetched_arrive()
        self._fetching = transfer = self._copier.fetch(layer, neuron_ids, flight.slot)
        if self._early is None:
            # While the records are computed on, nobody asks for anything, and the link would idle in every layer. Of the slot the
            # attention block has been used already.
            self._early = self._copier.start(self._streamed[self._next], "attention", flight.slot)
        return FetchedRecords(place, lambda: self._fetched(layer, transfer))

    def keep(self, layer: int, neuron_ids: Tensor) -> None:
        """From the next pass on, keep these neurons, int64 [N] in host memory, sorted, of the layer that was last asked for."""
        if layer in self._residents:
            return
        assert self._kept is not None
        self._kept.choose(layer, neuron_ids, self._arena.get(layer, self._ring[0].slot))

    def release(self, layer: int) -> None:
        """The layer has been computed on: its slot goes to the next one that is not under way."""
        if self._trace is not None:
            self._trace.computed()
        if layer in self._residents:
            return
        flight = self._ring.popleft()
        assert flight.layer == layer
        self.pass_nbytes[self._phase] += flight.nbytes
        self._start(flight.slot)

    @property
    def copied_nbytes(self) -> int:
        """Bytes the link has carried, prefetches included."""
        return self._copier.nbytes_copied if self._copier else 0

    @property
    def busy_seconds(self) -> float:
        """Time in which the link has carried something."""
        return self._copier.busy_seconds if self._copier else 0.0

    @property
    def peak_bytes_per_second(self) -> float | None:
        """The link's best rate, where it is known."""
        return self._copier.peak_bytes_per_second if self._copier else None

    def close(self) -> None:
        """Finish what is under way and end the copier's threads."""
        if self._copier is not None:
            self._copier.close()

    def _start(self, slot: LayerBuffer) -> None:
        assert self._copier is not None
        layer, cargo = self._streamed[self._next], self._starting
        self._next = (self._next + 1) % len(self._streamed)
        if self._next == 0:
            self._starting = self._following
        part: Cargo = cargo if layer in self._sliceable else "records"
        # Attention first: it is computed on while the records, which are most of a layer, still arrive.
        attention = self._early or self._copier.start(layer, "attention", slot)
        self._early = None
        neurons = self._copier.start(layer, part, slot)
        self._ring.append(Flight(layer, cargo, part, slot, attention, neurons))

    def _has(self, layer: int) -> bool:
        """Whether what this pass takes of the layer is what comes next. It is not where a pass was given up, least of all in the
        middle of a layer whose attention block is being overwritten."""
        if self._broken_off or self._early is not None or not self._ring:
            return False
        return (self._ring[0].layer, self._ring[0].cargo) == (layer, self._cargo)

    def _restart_at(self, layer: int) -> None:
        """The first layer ever, or a pass that was given up half-way: let what is under way arrive, and begin at the layer."""
        for flight in self._ring:
            self.discarded_nbytes += flight.nbytes
            for transfer in (flight.attention, flight.neurons):
                with contextlib.suppress(OffloadSiriusError):  # whoever asked for that layer was told; this pass reads it again
                    transfer.wait()
        self._ring.clear()
        self._discard_early()
        self._let_fetched_arrive()
        self._broken_off = False
        self._next = self._streamed.index(layer)
        self._starting = self._cargo
        for slot in self._slots:
            self._start(slot)

    def _discard_early(self) -> None:
        """Let an attention block that was sent for early arrive, for no one."""
        if self._early is not None:
            self.discarded_nbytes += self._slots[0].parts["attention"].numel()
            with contextlib.suppress(OffloadSiriusError):
                self._early.wait()
            self._early = None

    def _arrived(self, flight: Flight, part: Part) -> LayerBuffer:
        """The flight's slot, once the part is in it."""
        self._wait(flight.layer, part, flight.attention if part == "attention" else flight.neurons)
        return flight.slot

    def _fetched(self, layer: int, transfer: Transfer) -> None:
        self._wait(layer, "neurons", transfer)
        self._fetching = None

    def _let_fetched_arrive(self) -> None:
        """A pass may have been given up before what it sent for was there: nothing else may be on its way to the same bytes."""
        if self._fetching is not None:
            with contextlib.suppress(OffloadSiriusError):
                self._fetching.wait()
            self._fetching = None

    def _wait(self, layer: int, what: str, transfer: Transfer) -> None:
        began = time.perf_counter()
        try:
            if self._trace is None:
                transfer.wait()
            else:
                self._trace.wait(layer, what, transfer)
        except BaseException:  # a read error, or an interruption: what is in the ring is not to be trusted
            self._broken_off = True
            raise
        self.wait_seconds += time.perf_counter() - began
