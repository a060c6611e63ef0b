"""Weights of a model, part of them resident, the rest streamed through a ring of slots.

The link works on while head and sampler do, and the next pass finds its first layers there. Not every pass needs all of a layer,
so whoever begins one says what it takes, and what the one after it will. Satisfies the model's WeightSource. Knows no files and
no streams; those are the copier's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from offload_sirius.errors import OffloadSiriusError
from offload_sirius.kernels.matrix import Matrix
from offload_sirius.trace import Moment, Tracer
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer
from offload_sirius.weights.copiers import Copier, Transfer
from offload_sirius.weights.embedding import Embedding
from offload_sirius.weights.interrupts import interrupts_held
from offload_sirius.weights.kept import KeptStore
from offload_sirius.weights.layout import SLICES, Cargo, Part, slice_of
from offload_sirius.weights.ring import Flight, Ring

Phase = Literal["prefill", "draft", "correction", "full"]


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


class Streamer:
    """What all sources of streamed weights have: what is always there, counters, and waiting."""

    def __init__(
        self,
        *,
        copier: Copier | None,
        embedding: Embedding,
        final_norm: Tensor,
        head: Matrix,
        tracer: Tracer | None,
    ) -> None:
        """copier: None where nothing is streamed."""
        self.final_norm = final_norm
        self.head = head
        self.pass_nbytes: dict[Phase, int] = dict.fromkeys(get_args(Phase), 0)
        """Bytes of the streamed layers that were computed on, by phase."""
        self.wait_seconds = 0.0
        """Time the host has waited for layers."""
        self._copier = copier
        self._embedding = embedding
        self._phase: Phase = "full"
        self._trace = None if tracer is None else LayerTrace(tracer)

    @property
    def discarded_nbytes(self) -> int:
        """Bytes that were fetched for a pass that did not come."""
        raise NotImplementedError

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [S] on the host -> [S, D] on the device."""
        return self._embedding.rows(token_ids)

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

    def _computing(self, layer: int, what: str) -> None:
        if self._trace is not None:
            self._trace.computing(layer, what)

    def _computed(self) -> None:
        if self._trace is not None:
            self._trace.computed()

    def _wait(self, ring: Ring[Any], layer: int, what: str, transfer: Transfer) -> None:
        began = time.perf_counter()
        try:
            if self._trace is None:
                transfer.wait()
            else:
                self._trace.wait(layer, what, transfer)
        except BaseException:  # a read error, or an interruption: what is in the ring is not to be trusted
            ring.break_off()
            raise
        self.wait_seconds += time.perf_counter() - began


class WeightStreamer(Streamer):
    """Whole layers, or slices of them: some are resident, the others pass through slots."""

    def __init__(
        self,
        *,
        residents: Mapping[int, LayerBuffer],
        streamed_layers: Sequence[int],
        slots: Sequence[LayerBuffer],
        copier: Copier | None,
        embedding: Embedding,
        final_norm: Tensor,
        head: Matrix,
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
        super().__init__(copier=copier, embedding=embedding, final_norm=final_norm, head=head, tracer=tracer)
        self._residents = residents
        self._sliceable = frozenset(sliceable)
        self._kept = kept
        self._arena = arena or {}
        shared = list(slots)
        self._ring = Ring(dict.fromkeys(SLICES, streamed_layers), dict.fromkeys(SLICES, shared), self._send)
        self._front: Flight[LayerBuffer] | None = None
        self._attention_nbytes = shared[0].parts["attention"].numel() if shared else 0
        self._discarded_early_nbytes = 0
        self._early: Transfer | None = None
        """The attention block of the next layer to be sent, on its way already into the slot of the first one in the ring."""
        self._fetching: Transfer | None = None
        """What was sent for last and has not been waited for."""

    def begin(self, phase: Phase, cargo: Cargo = "records", *, following: Cargo = "records") -> None:
        """A pass begins. phase: under which its bytes are counted; cargo: what it takes of each layer; following: the same of the
        pass that will probably come next. One that was given up half-way may be followed by any other."""
        self._phase = phase
        self._ring.begin(cargo, following)
        self._let_fetched_arrive()

    def attention(self, layer: int) -> LayerBuffer:
        """The layer's attention block; blocks until it is there."""
        buffer = self._residents.get(layer)
        if buffer is None:
            if (
                self._early is not None
            ):  # a pass was given up in the middle of a layer, whose attention block is being overwritten
                self._discard_early()
                self._ring.break_off()
            self._front = self._ring.front(layer)
            buffer = self._arrived(self._front, "attention")
        self._computing(layer, "attention")
        return buffer

    def neurons(self, layer: int) -> LayerBuffer | KeptNeurons:
        """What the pass takes of the layer's neurons, or all of them; blocks until it is there.

        Of `gate` only the gates are there, unless `has_records` says that the rest is.
        """
        self._computed()
        buffer: LayerBuffer | KeptNeurons | None = self._residents.get(layer)
        if buffer is None:
            flight = self._front_of(layer)
            slot = self._arrived(flight, slice_of(flight.part))
            buffer = slot if flight.part != "kept" else slot.kept
            assert buffer is not None
        self._computing(layer, "neurons")
        return buffer

    def has_records(self, layer: int) -> bool:
        """Whether all neurons of the layer that was last asked for are on the device."""
        return layer in self._residents or self._front_of(layer).part == "records"

    def fetch(self, layer: int, neuron_ids: Tensor) -> FetchedRecords:
        """Send for up and down records of neurons, int64 [M] in host memory, of the layer whose gates are in its slot. Any that
        were fetched before are overwritten, and so is its attention block."""
        assert self._copier is not None
        flight = self._front_of(layer)
        assert flight.part == "gate", flight.part
        slot = flight.slot.of_layer(layer)
        place = slot.up_down[: len(neuron_ids)]
        self._let_fetched_arrive()
        with interrupts_held():
            self.pass_nbytes[self._phase] += place.nbytes
            self._fetching = transfer = self._copier.fetch(layer, neuron_ids, slot)
            if self._early is None and flight.slot.frees_attention:
                # While the records are computed on, nobody asks for anything, and the link would idle in every layer. Of the slot
                # the attention block has been used already.
                self._early = self._copier.start(self._ring.next_layer, "attention", flight.slot)
        return FetchedRecords(place, lambda: self._fetched(layer, transfer))

    def keep(self, layer: int, neuron_ids: Tensor) -> None:
        """From the next pass on, keep these neurons, int64 [N] in host memory, sorted, of the layer that was last asked for."""
        if layer in self._residents:
            return
        assert self._kept is not None
        self._kept.choose(layer, neuron_ids, self._arena.get(layer, self._front_of(layer).slot.of_layer(layer)))

    def release(self, layer: int) -> None:
        """The layer has been computed on: its slot goes to the next one that is not under way."""
        self._computed()
        if layer in self._residents:
            return
        with interrupts_held():  # what leaves the ring is counted
            flight = self._ring.advance()
            assert flight.layer == layer
            self.pass_nbytes[self._phase] += flight.nbytes

    @property
    def discarded_nbytes(self) -> int:
        """Bytes that were fetched for a pass that did not come."""
        return self._ring.discarded_nbytes + self._discarded_early_nbytes

    def _discard_early(self) -> None:
        """Let an attention block that was sent for early arrive, for no one."""
        assert self._early is not None
        self._discarded_early_nbytes += self._attention_nbytes
        with contextlib.suppress(OffloadSiriusError):
            self._early.wait()
        self._early = None

    def _fetched(self, layer: int, transfer: Transfer) -> None:
        self._wait(self._ring, layer, "neurons", transfer)
        self._fetching = None

    def _let_fetched_arrive(self) -> None:
        """A pass may have been given up before what it sent for was there: nothing else may be on its way to the same bytes."""
        if self._fetching is not None:
            with contextlib.suppress(OffloadSiriusError):
                self._fetching.wait()
            self._fetching = None

    def _front_of(self, layer: int) -> Flight[LayerBuffer]:
        assert self._front is not None
        assert self._front.layer == layer, (self._front.layer, layer)
        return self._front

    def _send(self, layer: int, cargo: Cargo, slot: LayerBuffer) -> Flight[LayerBuffer]:
        assert self._copier is not None
        part = slice_of(cargo) if layer in self._sliceable else "records"
        own = slot.of_layer(layer)
        # Attention first: it is computed on while the records, which are most of a layer, still arrive.
        attention = self._early or self._copier.start(layer, "attention", own)
        self._early = None
        neurons = self._copier.start(layer, part, own)
        nbytes = own.parts["attention"].numel() + own.parts[part].numel()
        return Flight(layer, cargo, part, slot, attention, neurons, nbytes)

    def _arrived(self, flight: Flight[LayerBuffer], part: Part) -> LayerBuffer:
        """The flight's slot, once the part is in it."""
        transfer = flight.attention if part == "attention" else flight.neurons
        assert transfer is not None
        self._wait(self._ring, flight.layer, part, transfer)
        return flight.slot.of_layer(flight.layer)
