"""The bytes of a layer as tensors: fixed views into a flat buffer, on the host or on the device. Knows no files and no copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import get_args

import torch
from torch import Tensor

from offload_sirius.blocks import BlockFormat
from offload_sirius.kernels.blocks import BlockRows, NeuronRows
from offload_sirius.kernels.matrix import Matrix, Stack
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.kernels.rows import put_rows
from offload_sirius.weights.layout import NUMBER_NBYTES, FieldName, LayerLayout, Part, RecordForm, distinct, qkv_rows
from offload_sirius_loaders.spec import ModelSpec, Role

TRANSPOSE_ROWS = 256
"""Rows of a transposed write that are turned at once: a block stays in cache, which doubles the rate of a strided copy."""


Rows = Callable[[Tensor], Matrix]
"""[N, R], numbers or bytes of rows -> the matrix [N, K] that they are."""


def as_they_are(rows: Tensor) -> Matrix:
    """Of rows that are not quantised."""
    return rows


@dataclass(frozen=True)
class RecordReader:
    """Gate rows and records of a layer's neurons, wherever they lie, as matrices."""

    gate: Rows = as_they_are
    """Reads gate rows, [N, R] -> [N, D]."""
    rows: Rows = as_they_are
    """Reads up rows and down columns where those are alike."""
    record: RecordForm | None = None
    """None where they are."""
    dtype: torch.dtype = torch.float32
    """Of what is plain in a record that is bytes."""
    table: Tensor | None = None
    """Of the layer's down projection, where that is blocks."""

    def up(self, records: Tensor) -> Matrix:
        """[N, 2, R] or [N, R] -> [N, D]"""
        if self.record is None:
            return self.rows(records[:, 0])
        part = records[:, slice(*self.record.up_range)]
        return part.view(self.dtype) if self.record.up is None else BlockRows(part, self.record.width, self.record.up)

    def down(self, records: Tensor) -> Matrix:
        """[N, 2, R] or [N, R] -> [N, D]"""
        if self.record is None:
            return self.rows(records[:, 1])
        part = records[:, slice(*self.record.down_range)]
        if self.record.down is None:
            return part.view(self.dtype)
        assert self.table is not None
        numbers = records[:, :NUMBER_NBYTES].view(torch.int32)[:, 0]
        return NeuronRows(numbers, part, self.table, self.record.width, self.record.down)


PLAIN_READER = RecordReader()


@dataclass(frozen=True)
class KeptNeurons:
    """Some neurons of a layer, gathered. Satisfies the model's NeuronWeights."""

    gate_records: Tensor
    """[N, R]: R numbers a row, or bytes where rows are quantised."""
    up_down: Tensor
    """[N, 2, R], or bytes of records [N, R]"""
    reader: RecordReader = PLAIN_READER

    @property
    def nbytes(self) -> int:
        """Bytes of the records."""
        return self.gate_records.nbytes + self.up_down.nbytes

    @property
    def gate(self) -> Matrix:
        """[N, D]"""
        return self.reader.gate(self.gate_records)

    @property
    def up(self) -> Matrix:
        """[N, D]"""
        return self.reader.up(self.up_down)

    @property
    def down(self) -> Matrix:
        """[N, D]"""
        return self.reader.down(self.up_down)

    def read_by(self, reader: RecordReader) -> KeptNeurons:
        """The same, of the layer that the reader is of."""
        return KeptNeurons(self.gate_records, self.up_down, reader)


class LayerBuffer:
    """One layer's bytes, and every way to look at them. Built once: making a view costs microseconds that a step does not have.

    Satisfies the model's AttentionWeights and NeuronWeights, with all neurons; `kept` is the same place holding some of them.
    """

    def __init__(self, storage: Tensor, spec: ModelSpec, layout: LayerLayout, dtype: torch.dtype) -> None:
        """storage: uint8 [layout.nbytes], contiguous, on any device."""
        assert storage.dtype == torch.uint8, storage.dtype
        assert storage.numel() == layout.nbytes, (storage.numel(), layout.nbytes)
        self.storage = storage
        self.parts: dict[Part, Tensor] = {part: storage[slice(*layout.part_range(part))] for part in get_args(Part)}
        fields = {name: _field(storage, layout, name, dtype) for name in layout.fields}
        self.input_norm = fields["input_norm"]
        self.qkv = _joined(layout, fields)
        self.qkv_bias = fields.get("qkv_bias")
        self.q_norm = fields.get("q_norm")
        self.k_norm = fields.get("k_norm")
        self.output = rows_of(layout, "output")(fields["output"])
        self.output_bias = fields.get("output_bias")
        self.post_norm = fields["post_norm"]
        self.gate_records = fields["gate"]
        self.up_down = fields["up_down"]
        self.reader = reader_of(layout, dtype, fields.get("down_table"))
        self.gate = self.reader.gate(self.gate_records)
        self.up = self.reader.up(self.up_down)
        self.down = self.reader.down(self.up_down)
        self.kept = KeptNeurons(fields["kept_gate"], fields["kept_up_down"], self.reader) if layout.kept_nbytes else None
        self._spec = spec
        self.frees_attention = layout.frees_attention
        self._layout = layout
        self._dtype = dtype
        self._staged: dict[tuple[int, bool], LayerBuffer] = {}
        self._by_layout = {id(each): LayerBuffer(storage[: each.nbytes], spec, each, dtype) for each in distinct(layout.by_layer)}

    def of_layer(self, layer: int) -> LayerBuffer:
        """The same place as that layer has it: itself, unless layers differ and it is for any of them."""
        return self.of_layout(self._layout.layer(layer))

    def of_layout(self, layout: LayerLayout) -> LayerBuffer:
        """The same, as that layout, its own or of one of its layers, has it."""
        return self._by_layout.get(id(layout), self)

    def staged(self, layer: int, *, packed: bool) -> LayerBuffer:
        """The same place as that layer has it on its way from a file: what is read as its attention block ends where that of any
        other layer does, so that it may be read while another's records are here."""
        own = self._layout.layer(layer)
        if own is self._layout:
            return self
        found = self._staged.get((id(own), packed))
        if found is None:
            start = self._layout.attention_nbytes - own.file_range("attention", packed=packed)[1]
            found = LayerBuffer(self.storage[start:][: own.nbytes], self._spec, own, self._dtype)
            self._staged[id(own), packed] = found
        return found

    def file_part(self, part: Part, *, packed: bool) -> Tensor:
        """The bytes of attention block or records as they come from a file, see LayerLayout.file_range."""
        return self.storage[slice(*self._layout.file_range(part, packed=packed))]

    def role(self, role: Role) -> Matrix:
        """The place of a checkpoint's tensor, in the shape that the checkpoint has it: down is [D, F], a transposed view.

        Where rows are quantised or blocks, down is [F, D]: a neuron's numbers are together.
        """
        if role in ("q", "k", "v"):
            if isinstance(self.qkv, tuple):
                return self.qkv[("q", "k", "v").index(role)]
            return self.qkv[slice(*qkv_rows(self._spec, role))]
        if role in ("q_bias", "k_bias", "v_bias"):
            assert self.qkv_bias is not None
            return self.qkv_bias[slice(*qkv_rows(self._spec, role))]
        if role == "down":
            return self.down.t() if isinstance(self.down, Tensor) else self.down
        renamed = {"o": "output", "o_bias": "output_bias"}.get(role, role)
        view = getattr(self, renamed)
        assert isinstance(view, Tensor | QuantizedRows | BlockRows)
        return view


def _joined(layout: LayerLayout, fields: Mapping[FieldName, Tensor]) -> Stack:
    """Queries, keys and values."""
    if "qkv" in fields:
        return rows_of(layout, "qkv")(fields["qkv"])
    names: tuple[FieldName, ...] = ("q", "k", "v")
    return tuple(rows_of(layout, name)(fields[name]) for name in names)


def rows_of(layout: LayerLayout, name: FieldName) -> Rows:
    """How rows of a field are read."""
    form, num_columns = layout.fields[name].form, layout.fields[name].num_columns
    if form is None or num_columns is None:
        return as_they_are
    if isinstance(form, BlockFormat):
        return partial(BlockRows, width=num_columns, form=form)
    return partial(QuantizedRows, width=num_columns, form=form)


def reader_of(layout: LayerLayout, dtype: torch.dtype, table: Tensor | None = None) -> RecordReader:
    """How neurons are read. table: of the down projection, where that has one and the layer is known."""
    return RecordReader(rows_of(layout, "gate"), rows_of(layout, "up_down"), layout.record, dtype, table)


def kept_neurons(storage: Tensor, layout: LayerLayout, dtype: torch.dtype) -> KeptNeurons:
    """Kept neurons that lie in bytes of their own, of any layer: `read_by` says of which.

    storage: uint8 [layout.kept_nbytes], contiguous, on any device.
    """
    start, _ = layout.part_range("kept")
    names: tuple[FieldName, FieldName] = ("kept_gate", "kept_up_down")
    gate, up_down = (_field(storage, layout, name, dtype, start) for name in names)
    return KeptNeurons(gate, up_down, reader_of(layout, dtype))


def _field(storage: Tensor, layout: LayerLayout, name: FieldName, dtype: torch.dtype, start: int = 0) -> Tensor:
    """start: byte of the layer with which the storage begins."""
    field = layout.fields[name]
    held_as = torch.uint8 if field.is_bytes else dtype
    offset, nbytes = field.offset - start, prod(field.shape) * held_as.itemsize
    return storage[offset : offset + nbytes].view(held_as).view(field.shape)


def write_rows(place: Tensor, first_row: int, rows: Tensor, scratch: Tensor) -> None:
    """Write rows of a checkpoint's tensor to their place, converting the type; torch writes a transposed place in blocks.

    place: [R, C] or [R], as LayerBuffer.role gives it; rows: [n, C] or [n], with first_row + n <= R.
    scratch: uint8, room for at least one row of C, overwritten. It is the caller's to keep: a block allocated anew each time
    costs a page fault for every 4 KiB, and many threads that fault at once wait for each other in the kernel.
    """
    own = place[first_row : first_row + rows.shape[0]]
    if put_rows(*((own, rows) if own.dim() == 2 else (own[None], rows[None]))):
        return
    if own.dim() == 1 or own.stride(1) == 1:
        own.copy_(rows)
        return
    by_neuron, width = place.t(), rows.shape[1]
    step = min(TRANSPOSE_ROWS, scratch.numel() // (width * place.element_size()))
    assert step > 0, (scratch.numel(), width)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]  # [s, C]
        nbytes = part.numel() * place.element_size()
        turned = scratch[:nbytes].view(place.dtype).view(width, part.shape[0])  # [C, s]
        turned.copy_(part.t())
        by_neuron[:, first_row + start : first_row + start + part.shape[0]].copy_(turned)
