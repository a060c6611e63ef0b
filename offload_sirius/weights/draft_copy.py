"""A quantised copy of attention blocks and neurons stays on the device for drafts; the layers themselves pass through slots.

    on the device for good   the copy of each layer: attention block and N neurons, a layer of N neurons in a format of its own
    slots                    whole layers as the target holds them, in every pass but draft steps

A draft step moves nothing, and while it computes the link fills the slots with the first layers of the coming correction. A
correction shares nothing with the drafts, so it brings every layer whole and computes what the plain model computes, to the bit.
Where not all neurons are copied, one that takes a place of the copy is quantised out of the slot in which its layer passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from offload_sirius.kernels.matrix import Matrix
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.trace import Tracer
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import Copier
from offload_sirius.weights.embedding import Embedding
from offload_sirius.weights.interrupts import interrupts_held
from offload_sirius.weights.layout import Cargo
from offload_sirius.weights.quant import quantise_rows
from offload_sirius.weights.ring import Flight, Ring
from offload_sirius.weights.streamer import Phase, Streamer

WEIGHTS_AT_ONCE = 1 << 20
"""Weights that are taken out of a layer at once to be quantised: a few MiB in float32."""


class CopyStreamer(Streamer):
    """Weights of which the device has a quantised copy. Satisfies the model's WeightSource: in draft steps with the copy."""

    def __init__(
        self,
        *,
        copies: Mapping[int, LayerBuffer],
        slots: Sequence[LayerBuffer],
        copier: Copier,
        embedding: Embedding,
        final_norm: Tensor,
        head: Matrix,
        overlap: bool = True,
        tracer: Tracer | None = None,
    ) -> None:
        """copies: of every layer. overlap: fetch for a pass before it begins. Nothing is copied before it is asked for."""
        super().__init__(copier=copier, embedding=embedding, final_norm=final_norm, head=head, tracer=tracer)
        self._copies = copies
        self._link = copier
        self._overlap = overlap
        self.corrects = True
        """Whether corrections follow drafts: else there is nothing to fetch for."""
        self._ring: Ring[LayerBuffer] = Ring({"records": sorted(copies)}, {"records": slots}, self._send, wraps=overlap)
        self._drafts = False
        self._front: Flight[LayerBuffer] | None = None

    def begin(self, phase: Phase, cargo: Cargo, *, following: Cargo = "records") -> None:
        """A pass begins. cargo: `hot` for one on the copy, else `records`. following: as for WeightStreamer; what passes is the
        same whatever comes."""
        self._phase, self._drafts = phase, cargo == "hot"
        self._ring.begin("records", "records")
        if self._drafts and self._overlap and self.corrects:
            self._ring.fill()  # the link works while the draft computes

    def attention(self, layer: int) -> LayerBuffer:
        """The layer's attention block, or the copy of it, once it is there."""
        if self._drafts:
            buffer = self._copies[layer]
        else:
            self._front = self._ring.front(layer)
            assert self._front.attention is not None
            self._wait(self._ring, layer, "attention", self._front.attention)
            buffer = self._front.slot
        self._computing(layer, "attention")
        return buffer

    def neurons(self, layer: int) -> LayerBuffer:
        """All neurons of the layer, or those that are copied, once they are there."""
        self._computed()
        buffer = self._copies[layer] if self._drafts else self._passing(layer)
        self._computing(layer, "neurons")
        return buffer

    def copy(self, layer: int, places: Tensor, neuron_ids: Tensor) -> None:
        """Quantise neurons of the layer that passes into places of the copy, int64 [k] each, on the device."""
        copy_neurons(self._passing(layer), neuron_ids, self._copies[layer], places)

    def release(self, layer: int) -> None:
        """The layer has been computed on: its slot goes to the next one that is not under way."""
        self._computed()
        if not self._drafts:
            with interrupts_held():  # what leaves the ring is counted
                self.pass_nbytes[self._phase] += self._ring.advance().nbytes

    @property
    def discarded_nbytes(self) -> int:
        """Bytes that were fetched for a pass that did not come."""
        return self._ring.discarded_nbytes

    def _passing(self, layer: int) -> LayerBuffer:
        """The slot of the layer that passes, once its neurons are there."""
        assert self._front is not None
        assert self._front.layer == layer, (self._front.layer, layer)
        self._wait(self._ring, layer, "records", self._front.neurons)
        return self._front.slot

    def _send(self, layer: int, cargo: Cargo, slot: LayerBuffer) -> Flight[LayerBuffer]:
        attention = self._link.start(layer, "attention", slot)
        neurons = self._link.start(layer, "records", slot)
        nbytes = slot.parts["attention"].numel() + slot.parts["records"].numel()
        return Flight(layer, cargo, cargo, slot, attention, neurons, nbytes)


def copy_layer(layer: LayerBuffer, copy: LayerBuffer, on_weights: Callable[[int], None]) -> None:
    """Fill a layer of the copy: vectors as they are, matrices quantised, of the neurons the first ones. On any devices.

    on_weights: is told of the matrices' weights as they are quantised.
    """
    for name in ("input_norm", "qkv_bias", "q_norm", "k_norm", "output_bias", "post_norm"):
        vector, place = getattr(layer, name), getattr(copy, name)
        if vector is not None:
            place.copy_(vector)
    assert not isinstance(layer.qkv, tuple), "layers in blocks are not copied"
    assert not isinstance(copy.qkv, tuple), copy.qkv
    for matrix, rows in ((layer.qkv, copy.qkv), (layer.output, copy.output)):
        _copy_rows(matrix, None, rows, None, on_weights)
    for matrix, rows in zip(_neurons_of(layer), _neurons_of(copy), strict=True):
        _copy_rows(matrix[: len(rows)], None, rows, None, on_weights)


def num_weights(copy: LayerBuffer) -> int:
    """Weights of the matrices of a layer of the copy."""
    assert not isinstance(copy.qkv, tuple), copy.qkv
    matrices = (copy.qkv, copy.output, *_neurons_of(copy))
    return sum(len(rows) * rows.width for rows in matrices if isinstance(rows, QuantizedRows))


def copy_neurons(layer: LayerBuffer, neuron_ids: Tensor, copy: LayerBuffer, places: Tensor) -> None:
    """Quantise neurons of a layer into places of the copy, int64 [k] each, on their device."""
    for matrix, rows in zip(_neurons_of(layer), _neurons_of(copy), strict=True):
        _copy_rows(matrix, neuron_ids, rows, places, lambda _: None)


def _neurons_of(layer: LayerBuffer) -> tuple[Matrix, Matrix, Matrix]:
    return layer.gate, layer.up, layer.down


def _copy_rows(
    matrix: Matrix, ids: Tensor | None, copy: Matrix, places: Tensor | None, on_weights: Callable[[int], None]
) -> None:
    """Rows of a matrix, some at a time, into those of the copy. ids, places: None for all, in order."""
    assert isinstance(copy, QuantizedRows), copy
    step = max(1, WEIGHTS_AT_ONCE // copy.width)
    for start in range(0, len(copy) if places is None else len(places), step):
        part = slice(start, start + step)
        taken = _taken(matrix, None if ids is None else ids[part], part)
        quantised = quantise_rows(taken, copy.form).to(copy.rows.device)
        if places is None:
            copy.rows[part].copy_(quantised)
        else:
            copy.rows.index_copy_(0, places[part], quantised)
        on_weights(taken.numel())


def _taken(matrix: Matrix, ids: Tensor | None, part: slice) -> Tensor:
    """Rows of a matrix as numbers: those with the given ids, else a range of them."""
    if isinstance(matrix, QuantizedRows):
        rows = matrix[part].rows if ids is None else matrix.rows.index_select(0, ids)
        return QuantizedRows(rows, matrix.width, matrix.form).dequantised()
    assert isinstance(matrix, Tensor), "layers in blocks are not copied"
    return matrix[part] if ids is None else matrix.index_select(0, ids)
