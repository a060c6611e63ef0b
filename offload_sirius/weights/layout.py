"""A layer as two byte ranges, attention block and neuron records: where each tensor of a layer lies. Pure arithmetic, no torch.

    byte 0                                      attention_nbytes                                     nbytes
    | input_norm | q k v | biases | norms | o | post_norm || gate [F, D]        | up_down [F, 2, D]       |
    |<------------- attention block ------------------->||<------------- neuron records --------------->|

Every matrix of the feed-forward block lies neuron by neuron: row j of gate and record j of up_down (the up row, then the down
column) are neuron j. There are two record families rather than one record [gate | up | down], because token-wise sparsity
reads every gate row but only some up rows and down columns: so gate alone and up + down alone are contiguous reads, a kept
neuron is two runs, and a full layer is still one contiguous copy of the whole range. The down projection is transposed when a
layer is assembled, once, and never again.

The neurons that a sparse step keeps of a layer lie as those of a layer of N neurons would: in a slot, behind the attention block

    | ... attention block ... || gate [N, D] | up_down [N, 2, D] |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, get_args

from offload_sirius.quantization import WeightFormat
from offload_sirius_loaders.spec import ModelSpec, Role

Part = Literal["attention", "records", "gate", "kept"]
"""What crosses the link at once. gate: of all neurons, without their up rows and down columns. kept: some neurons, whole."""

PARTS: tuple[Part, ...] = ("attention", "records")
"""Those that make up a layer."""

Slice = Literal["records", "kept", "gate"]
"""What crosses the link of a layer's neurons: all; those that are kept; the gates, and single records as they are fetched. Layers
of which no slice can cross alone bring all their records in any pass."""

Cargo = Literal["records", "kept", "gate", "hot", "cold"]
"""What a pass takes: a slice; or of layers that are partly on the device what is there, which moves nothing, or the rest."""

SLICES: tuple[Slice, ...] = get_args(Slice)

FieldName = Literal[
    "input_norm",
    "qkv",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "output",
    "output_bias",
    "post_norm",
    "gate",
    "up_down",
    "kept_gate",
    "kept_up_down",
]

ALIGNMENT = 64
"""Every field starts at a multiple of this many bytes: a cache line, and the widest vector load."""

PAGE_NBYTES = 4096
"""Layers in host memory start at a page: memory is pinned by pages, and a page can be pinned only once."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One tensor as the model sees it."""

    offset: int
    """Bytes from the start of the layer."""
    shape: tuple[int, ...]
    """Of numbers; where rows are quantised, of their bytes."""
    num_columns: int | None = None
    """Numbers in a quantised row; None where it is not quantised."""


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Where everything lies in the bytes of one layer. All layers of a model have the same layout."""

    element_nbytes: int
    fields: Mapping[FieldName, Field]
    """Those of kept neurons overlie the records: a slot holds the ones or the others."""
    attention_nbytes: int
    records_nbytes: int
    kept_nbytes: int = 0
    """Of the neurons that a sparse step keeps; 0 where it keeps all, or other ones for every token."""
    num_neurons: int = 0
    """F"""
    record_nbytes: int = 0
    """An up row and a down column: what is fetched of a neuron whose gate is there."""
    format: WeightFormat | None = None
    """Of matrices; None where they are plain numbers, as norms and biases always are."""

    @property
    def nbytes(self) -> int:
        """Bytes of a whole layer, alignment included."""
        return self.attention_nbytes + self.records_nbytes

    @property
    def neuron_nbytes(self) -> int:
        """A neuron's gate row, up row and down column."""
        return self.record_nbytes * 3 // 2

    def of(self, spec: ModelSpec, num_kept: int = 0) -> LayerLayout:
        """A layer of another shape whose weights are held as these are."""
        return layer_layout(spec, self.element_nbytes, num_kept, self.format)

    @property
    def nbytes_per_weight(self) -> float:
        """Bytes that an element of a matrix takes, its share of scales included."""
        return self.element_nbytes if self.format is None else self.format.bits_per_weight / 8

    @property
    def host_nbytes(self) -> int:
        """Bytes that a layer takes in host memory: whole pages."""
        return align(self.nbytes, PAGE_NBYTES)

    @property
    def kept_host_nbytes(self) -> int:
        """Bytes that the kept neurons of a layer take in host memory: whole pages."""
        return align(self.kept_nbytes, PAGE_NBYTES)

    def part_range(self, part: Part) -> tuple[int, int]:
        """First and last + 1 byte of a part, from the start of the layer."""
        if part == "attention":
            return 0, self.attention_nbytes
        sizes = {"records": self.records_nbytes, "gate": self._gate_nbytes, "kept": self.kept_nbytes}
        return self.attention_nbytes, self.attention_nbytes + sizes[part]

    @property
    def _gate_nbytes(self) -> int:
        return self.fields["up_down"].offset - self.fields["gate"].offset

    def part_nbytes(self, part: Part) -> int:
        """Bytes that cross the link for one part of a layer."""
        start, stop = self.part_range(part)
        return stop - start


def slice_of(cargo: Cargo) -> Slice:
    """The cargo, which is a slice."""
    assert cargo != "hot"
    assert cargo != "cold"
    return cargo


def layer_layout(
    spec: ModelSpec, element_nbytes: int, num_kept: int = 0, weight_format: WeightFormat | None = None
) -> LayerLayout:
    """Lay out a layer of the model with elements of the given size, its matrices in the given format.

    num_kept: neurons that a sparse step keeps of each layer; 0 where that is no fixed set.
    """
    assert num_kept <= spec.ffn_width, (num_kept, spec.ffn_width)
    fields: dict[FieldName, Field] = {}
    place = partial(_place, fields, element_nbytes=element_nbytes, weight_format=weight_format)
    attention_nbytes = place(_attention_shapes(spec), 0)
    end = place(_record_shapes(spec), attention_nbytes)
    kept_end = place(_kept_shapes(spec, num_kept), attention_nbytes)
    row_nbytes = spec.width * element_nbytes if weight_format is None else weight_format.row_nbytes(spec.width)
    return LayerLayout(
        element_nbytes=element_nbytes,
        fields=fields,
        attention_nbytes=attention_nbytes,
        records_nbytes=end - attention_nbytes,
        kept_nbytes=kept_end - attention_nbytes,
        num_neurons=spec.ffn_width,
        record_nbytes=2 * row_nbytes,
        format=weight_format,
    )


def part_of(role: Role) -> Part:
    """The part of the layer in which a tensor of the checkpoint ends up."""
    return "records" if role in ("gate", "up", "down") else "attention"


def qkv_rows(spec: ModelSpec, role: Role) -> tuple[int, int]:
    """First and last + 1 row of q, k or v (or of their biases) in the fused qkv matrix [(H + 2K)E, D]."""
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    starts = {"q": 0, "k": q_rows, "v": q_rows + kv_rows}
    start = starts[role[0]]
    return start, start + (q_rows if role[0] == "q" else kv_rows)


def _attention_shapes(spec: ModelSpec) -> dict[FieldName, tuple[int, ...]]:
    q_rows = spec.num_heads * spec.head_dim
    qkv = q_rows + 2 * spec.num_kv_heads * spec.head_dim
    shapes: dict[FieldName, tuple[int, ...]] = {"input_norm": (spec.width,), "qkv": (qkv, spec.width)}
    if spec.qkv_bias:
        shapes["qkv_bias"] = (qkv,)
    if spec.qk_norm:
        shapes |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    shapes["output"] = (spec.width, q_rows)
    if spec.output_bias:
        shapes["output_bias"] = (spec.width,)
    return shapes | {"post_norm": (spec.width,)}


def _record_shapes(spec: ModelSpec) -> dict[FieldName, tuple[int, ...]]:
    return {"gate": (spec.ffn_width, spec.width), "up_down": (spec.ffn_width, 2, spec.width)}


def _kept_shapes(spec: ModelSpec, num_kept: int) -> dict[FieldName, tuple[int, ...]]:
    if num_kept == 0:
        return {}
    return {"kept_gate": (num_kept, spec.width), "kept_up_down": (num_kept, 2, spec.width)}


def _place(
    fields: dict[FieldName, Field],
    shapes: Mapping[FieldName, tuple[int, ...]],
    offset: int,
    *,
    element_nbytes: int,
    weight_format: WeightFormat | None,
) -> int:
    """Append fields one after another, aligned; returns the aligned end. Vectors are never quantised."""
    for name, shape in shapes.items():
        if weight_format is None or len(shape) == 1:
            fields[name] = Field(offset=offset, shape=shape)
            nbytes = prod(shape) * element_nbytes
        else:
            *rows, num_columns = shape
            fields[name] = Field(offset=offset, shape=(*rows, weight_format.row_nbytes(num_columns)), num_columns=num_columns)
            nbytes = prod(fields[name].shape)
        offset = align(offset + nbytes)
    return offset


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Round up to a multiple of the alignment."""
    return -(-nbytes // alignment) * alignment
