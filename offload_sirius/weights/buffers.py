"""The bytes of a layer as tensors: fixed views into a flat buffer, on the host or on the device. Knows no files and no copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import get_args

import torch
from torch import Tensor

from offload_sirius.kernels.matrix import Matrix
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.weights.layout import FieldName, LayerLayout, Part, qkv_rows
from offload_sirius_loaders.spec import ModelSpec, Role

TRANSPOSE_ROWS = 256
"""Rows of a transposed write that are turned at once: a block stays in cache, which doubles the rate of a strided copy."""


Rows = Callable[[Tensor], Matrix]
"""[N, R], numbers or bytes of rows -> the matrix [N, K] that they are."""


def as_they_are(rows: Tensor) -> Matrix:
    """Of rows that are not quantised."""
    return rows


@dataclass(frozen=True)
class KeptNeurons:
    """Some neurons of a layer, gathered. Satisfies the model's NeuronWeights."""

    gate_records: Tensor
    """[N, R]: R numbers a row, or bytes where rows are quantised."""
    up_down: Tensor
    """[N, 2, R]"""
    rows: Rows = as_they_are
    """Reads them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the records."""
        return self.gate_records.nbytes + self.up_down.nbytes

    @property
    def gate(self) -> Matrix:
        """[N, D]"""
        return self.rows(self.gate_records)

    @property
    def up(self) -> Matrix:
        """[N, D]"""
        return self.rows(self.up_down[:, 0])

    @property
    def down(self) -> Matrix:
        """[N, D]"""
        return self.rows(self.up_down[:, 1])


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
        self.qkv = rows_of(layout, "qkv")(fields["qkv"])
        self.qkv_bias = fields.get("qkv_bias")
        self.q_norm = fields.get("q_norm")
        self.k_norm = fields.get("k_norm")
        self.output = rows_of(layout, "output")(fields["output"])
        self.output_bias = fields.get("output_bias")
        self.post_norm = fields["post_norm"]
        self.gate_records = fields["gate"]
        self.up_down = fields["up_down"]
        self.rows = rows_of(layout, "gate")
        self.gate = self.rows(self.gate_records)
        self.up = self.rows(self.up_down[:, 0])
        self.down = self.rows(self.up_down[:, 1])
        self.kept = KeptNeurons(fields["kept_gate"], fields["kept_up_down"], self.rows) if layout.kept_nbytes else None
        self._spec = spec

    def role(self, role: Role) -> Matrix:
        """The place of a checkpoint's tensor, in the shape that the checkpoint has it: down is [D, F], a transposed view.

        Where rows are quantised, down is [F, D]: a neuron's numbers are quantised together.
        """
        if role in ("q", "k", "v"):
            return self.qkv[slice(*qkv_rows(self._spec, role))]
        if role in ("q_bias", "k_bias", "v_bias"):
            assert self.qkv_bias is not None
            return self.qkv_bias[slice(*qkv_rows(self._spec, role))]
        if role == "down":
            return self.down.t() if isinstance(self.down, Tensor) else self.down
        renamed = {"o": "output", "o_bias": "output_bias"}.get(role, role)
        view = getattr(self, renamed)
        assert isinstance(view, Tensor | QuantizedRows)
        return view


def rows_of(layout: LayerLayout, name: FieldName) -> Rows:
    """How rows of a field are read."""
    num_columns = layout.fields[name].num_columns
    if num_columns is None or layout.format is None:
        return as_they_are
    return partial(QuantizedRows, width=num_columns, form=layout.format)


def kept_neurons(storage: Tensor, layout: LayerLayout, dtype: torch.dtype) -> KeptNeurons:
    """Kept neurons that lie in bytes of their own. storage: uint8 [layout.kept_nbytes], contiguous, on any device."""
    start, _ = layout.part_range("kept")
    names: tuple[FieldName, FieldName] = ("kept_gate", "kept_up_down")
    gate, up_down = (_field(storage, layout, name, dtype, start) for name in names)
    return KeptNeurons(gate, up_down, rows_of(layout, "kept_gate"))


def _field(storage: Tensor, layout: LayerLayout, name: FieldName, dtype: torch.dtype, start: int = 0) -> Tensor:
    """start: byte of the layer with which the storage begins."""
    field = layout.fields[name]
    held_as = dtype if field.num_columns is None else torch.uint8
    offset, nbytes = field.offset - start, prod(field.shape) * held_as.itemsize
    return storage[offset : offset + nbytes].view(held_as).view(field.shape)


def write_rows(place: Tensor, first_row: int, rows: Tensor, scratch: Tensor) -> None:
    """Write rows of a checkpoint's tensor to their place, converting the type; a transposed place is written in blocks.

    place: [R, C] or [R], as LayerBuffer.role gives it; rows: [n, C] or [n], with first_row + n <= R.
    scratch: uint8, room for at least one row of C, overwritten. It is the caller's to keep: a block allocated anew each time
    costs a page fault for every 4 KiB, and many threads that fault at once wait for each other in the kernel.
    """
    if place.dim() == 1 or place.stride(1) == 1:
        place[first_row : first_row + rows.shape[0]].copy_(rows)
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
