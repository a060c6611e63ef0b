"""Some neurons of layers stay on the device, the others pass through slots: what is where, and how they change places.

    on the device for good   attention block and N hot neurons of each hot layer: a layer of N neurons, as `layout.py` has it
    slots while prefilling   all F neurons of a layer, from which the hot ones are copied
    slots after that         the F - N cold ones: as they are fewer bytes, more slots of the same memory

A draft step moves nothing. While it computes, the link fills the slots with the cold neurons that the coming correction begins
with. A neuron that becomes hot is copied out of the slot in which it passes, into the place of one that becomes cold, of which
host memory has all bytes anyway: the exchange costs no bytes of the link.

Where the device has no room for that much of every layer, the others pass, too: in a draft step attention block and hot neurons,
else attention block and all neurons, hot ones first. Their slots hold whole layers and are the same in every pass, so that one
pass is followed by the next without a gap. Of such a layer only the numbers of hot neurons change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.kernels.matrix import Matrix
from offload_sirius.trace import Tracer
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer
from offload_sirius.weights.copiers import Copier
from offload_sirius.weights.embedding import Embedding
from offload_sirius.weights.interrupts import interrupts_held
from offload_sirius.weights.kept import gather_neurons
from offload_sirius.weights.layout import Cargo
from offload_sirius.weights.ring import Flight, Ring
from offload_sirius.weights.streamer import Phase, Streamer

EXCHANGED_AT_ONCE = 256
"""Neurons for which there is a copy on the device beside their two places."""

SWAPPED_AT_ONCE = EXCHANGED_AT_ONCE // 2
"""Pairs of neurons that change places at once: there is a copy of both."""


@dataclass(frozen=True)
class HotSlot:
    """Room for what passes of a layer."""

    neurons: Mapping[Cargo, KeptNeurons]
    """By what passes: `records` [F], `hot` [N], `cold` [F - N]. A slot that has room for all has the cold ones behind the hot."""
    layer: LayerBuffer | None = None
    """The same room, with one for the attention block before it; None where that does not pass."""
    by_layer: tuple[HotSlot, ...] = ()
    """The same room as each layer has it; empty where layers are alike."""

    def of_layer(self, layer: int) -> HotSlot:
        """The same room as that layer has it."""
        return self.by_layer[layer] if self.by_layer else self


def whole_slot(layer: LayerBuffer, num_hot: int) -> HotSlot:
    """A slot for whole layers."""
    records = KeptNeurons(layer.gate_records, layer.up_down, layer.reader)
    hot = KeptNeurons(layer.gate_records[:num_hot], layer.up_down[:num_hot], layer.reader)
    cold = KeptNeurons(layer.gate_records[num_hot:], layer.up_down[num_hot:], layer.reader)
    return HotSlot({"records": records, "hot": hot, "cold": cold}, layer)


class HotStreamer(Streamer):
    """Weights of which layers are partly resident, all of them or some.

    Satisfies the model's WeightSource in passes that prefill or draft. One that needs all neurons asks for a layer's two halves.
    """

    def __init__(
        self,
        *,
        layers: Mapping[int, LayerBuffer],
        streamed_layers: Sequence[int],
        slots: Mapping[Cargo, Sequence[HotSlot]],
        copier: Copier,
        embedding: Embedding,
        final_norm: Tensor,
        head: Matrix,
        overlap: bool = True,
        tracer: Tracer | None = None,
    ) -> None:
        """layers: each hot layer's attention block and room for its hot neurons; streamed_layers: those of which nothing is
        resident. slots: for passes that bring `records` and `cold`, and for `hot` where there are streamed layers. overlap: fetch
        for a pass before it begins. Nothing is copied before it is asked for.
        """
        super().__init__(copier=copier, embedding=embedding, final_norm=final_norm, head=head, tracer=tracer)
        self._layers = layers
        self._link = copier
        self._ids: dict[int, Tensor] = {}
        """Hot neurons by their places, then cold ones, int64 [F] in host memory. Replaced, never changed: what is on its way was
        asked for by them."""
        everything = sorted([*layers, *streamed_layers])
        passing: dict[Cargo, Sequence[int]] = {"records": everything, "cold": everything}
        if streamed_layers:
            passing["hot"] = sorted(streamed_layers)
        self._passing = {cargo: frozenset(each) for cargo, each in passing.items()}
        self._overlap = overlap
        self.corrects = True
        """Whether corrections follow drafts: else there is nothing to fetch for."""
        self._ring = Ring(passing, slots, self._send, wraps=overlap)
        self._cargo: Cargo = "records"
        self._front: Flight[HotSlot] | None = None

    def begin(self, phase: Phase, cargo: Cargo, *, following: Cargo = "cold") -> None:
        """A pass begins. cargo: `records` where hot neurons are chosen, `hot` where no others are needed, `cold` where all are.

        following: as for WeightStreamer.
        """
        self._phase, self._cargo = phase, cargo
        self._ring.begin(self._moving(cargo), self._moving(following))
        if cargo == "hot" and self._overlap and self.corrects:
            self._ring.fill()  # the link works while the draft computes

    def attention(self, layer: int) -> LayerBuffer:
        """The layer's attention block, once it is there."""
        if self._passes(layer):
            self._front = self._ring.front(layer)
        buffer = self._layers.get(layer) or self._attention_arrived(layer)
        self._computing(layer, "attention")
        return buffer

    def neurons(self, layer: int) -> LayerBuffer | KeptNeurons:
        """In a pass that chooses, all neurons of the layer, once they are there; else the hot ones."""
        self._computed()
        if self._cargo == "records":
            neurons: LayerBuffer | KeptNeurons = self._passing_neurons(layer, "records")
        else:
            neurons = self._layers.get(layer) or self._arrived(layer).neurons["hot"]
        self._computing(layer, "neurons")
        return neurons

    def cold_neurons(self, layer: int) -> KeptNeurons:
        """The others, once they are there: neuron i is the one that `choose` or `exchange` was told of as the i-th cold one."""
        assert self._cargo == "cold", self._cargo
        self._computed()
        cold = self._passing_neurons(layer, "cold")
        self._computing(layer, "cold neurons")
        return cold

    def choose(self, layer: int, hot_ids: Tensor, cold_ids: Tensor) -> None:
        """From now on these neurons of the layer that passes are hot, int64 [N], and these cold, int64 [F - N]; on the device."""
        if layer in self._layers:
            gather_neurons(self._arrived(layer).neurons["records"], hot_ids, self._hot(layer))
        self._ids[layer] = torch.cat((hot_ids.to("cpu"), cold_ids.to("cpu")))

    def exchange(self, layer: int, hot_places: Tensor, cold_places: Tensor, cold_ids: Tensor) -> None:
        """Copy cold neurons of the layer that passes into places of hot ones, int64 [k] each.

        cold_ids: those that are cold then, int64 [F - N], in the order in which they shall arrive from now on. All on the device.
        """
        if layer in self._layers:
            hot, cold = self._hot(layer), self._arrived(layer).neurons["cold"]
            # A piece at a time: a prompt that was unlike its answer may have half of a layer change places.
            for to, source in zip(hot_places.split(EXCHANGED_AT_ONCE), cold_places.split(EXCHANGED_AT_ONCE), strict=True):
                hot.gate_records.index_copy_(0, to, cold.gate_records.index_select(0, source))
                hot.up_down.index_copy_(0, to, cold.up_down.index_select(0, source))
        before, num_hot = self._ids[layer], len(self._ids[layer]) - len(cold_ids)
        now = before.clone()
        now[hot_places.to("cpu")] = before[num_hot + cold_places.to("cpu")]
        now[num_hot:] = cold_ids
        self._ids[layer] = now

    def swap(self, layer: int, places: Tensor, other_places: Tensor) -> None:
        """Have hot neurons of the layer in some places and in others, int64 [k] each, on the device, change places."""
        if layer in self._layers:
            hot = self._hot(layer)
            # Copies of both: half as many at a time.
            for some, others in zip(places.split(SWAPPED_AT_ONCE), other_places.split(SWAPPED_AT_ONCE), strict=True):
                to, source = torch.cat((some, others)), torch.cat((others, some))
                hot.gate_records.index_copy_(0, to, hot.gate_records.index_select(0, source))
                hot.up_down.index_copy_(0, to, hot.up_down.index_select(0, source))
        before, there, other = self._ids[layer], places.to("cpu"), other_places.to("cpu")
        now = before.clone()
        now[there], now[other] = before[other], before[there]
        self._ids[layer] = now

    def release(self, layer: int) -> None:
        """The layer has been computed on: its slot goes to the next one that is not under way."""
        self._computed()
        if self._passes(layer):
            with interrupts_held():  # what leaves the ring is counted
                self.pass_nbytes[self._phase] += self._ring.advance().nbytes

    @property
    def discarded_nbytes(self) -> int:
        """Bytes that were fetched for a pass that did not come."""
        return self._ring.discarded_nbytes

    def _hot(self, layer: int) -> KeptNeurons:
        buffer = self._layers[layer]
        return KeptNeurons(buffer.gate_records, buffer.up_down, buffer.reader)

    def _moving(self, cargo: Cargo) -> Cargo:
        """What passes in such a pass, or, where nothing does, in the next one in which anything does."""
        return cargo if cargo in self._passing else "cold"

    def _passes(self, layer: int) -> bool:
        """Whether anything of the layer passes in this pass."""
        return layer in self._passing.get(self._cargo, ())

    def _front_of(self, layer: int) -> Flight[HotSlot]:
        assert self._front is not None
        assert self._front.layer == layer, (self._front.layer, layer)
        return self._front

    def _attention_arrived(self, layer: int) -> LayerBuffer:
        flight = self._front_of(layer)
        buffer = flight.slot.of_layer(layer).layer
        assert flight.attention is not None
        assert buffer is not None
        self._wait(self._ring, layer, "attention", flight.attention)
        return buffer

    def _arrived(self, layer: int) -> HotSlot:
        """Its slot, once the layer's neurons are there."""
        flight = self._front_of(layer)
        self._wait(self._ring, layer, flight.part, flight.neurons)
        return flight.slot.of_layer(layer)

    def _passing_neurons(self, layer: int, cargo: Cargo) -> KeptNeurons:
        """Those in its slot, once they are there. What a hot layer needs to read them is resident."""
        neurons = self._arrived(layer).neurons[cargo]
        return neurons.read_by(self._layers[layer].reader) if layer in self._layers else neurons

    def _send(self, layer: int, cargo: Cargo, slot: HotSlot) -> Flight[HotSlot]:
        own = slot.of_layer(layer)
        if layer in self._layers:
            part, attention, nbytes = cargo, None, 0
        else:
            assert own.layer is not None
            part = "records" if cargo == "cold" else cargo
            attention = self._link.start(layer, "attention", own.layer)
            nbytes = own.layer.parts["attention"].numel()
        place = own.neurons[part]
        neurons = self._link.gather(layer, self._ids_of(layer, cargo, len(place.gate_records)), place)
        return Flight(layer, cargo, part, slot, attention, neurons, nbytes + place.nbytes)

    def _ids_of(self, layer: int, cargo: Cargo, count: int) -> Tensor | None:
        """Which neurons pass: the first of those in places, or the last; None for all by their numbers."""
        if cargo == "records":
            return None
        ids = self._ids[layer]
        return ids[:count] if cargo == "hot" else ids[-count:]
