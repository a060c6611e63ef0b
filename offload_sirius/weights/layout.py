"""A layer as two byte ranges, attention block and neuron records: where each tensor of a layer lies. Pure arithmetic, no torch.

    byte 0                                      attention_nbytes                                     nbytes
    | input_norm | q k v | biases | norms | o | post_norm || gate [F, D]        | up_down [F, 2, D]       |
    |<------------- attention block ------------------->||<------------- neuron records --------------->|

Every matrix of the feed-forward block lies neuron by neuron: row j of gate and record j of up_down (the up row, then the down
column) are neuron j. There are two record families rather than one record [gate | up | down], because token-wise sparsity
reads every gate row but only some up rows and down columns: so gate alone and up + down alone are contiguous reads, a kept
neuron is two runs, and a full layer is still one contiguous copy of the whole range. The down projection is transposed when a
layer is assembled, once, and never again.

Matrices in blocks of GGUF files (`offload_sirius.blocks`) lie so, too, but that a record is bytes of two lengths, and that a
neuron says which one it is, by which its codes find their factors in a table behind the attention block:

    | ... o | post_norm | down_table || gate [F, R] | number, down codes, up row, to 4 bytes [F, R'] |

The neurons that a sparse step keeps of a layer lie as those of a layer of N neurons would: in a slot, behind the attention block

    | ... attention block ... || gate [N, D] | up_down [N, 2, D] |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, get_args

from offload_sirius.blocks import BlockFormat
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
    "q",
    "k",
    "v",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "output",
    "output_bias",
    "post_norm",
    "down_table",
    "gate",
    "up_down",
    "kept_gate",
    "kept_up_down",
]

ALIGNMENT = 64
"""Every field starts at a multiple of this many bytes: a cache line, and the widest vector load."""

NUMBER_NBYTES = 4
"""A neuron's number in a record."""

PAGE_NBYTES = 4096
"""Layers in host memory start at a page: memory is pinned by pages, and a page can be pinned only once."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One tensor as the model sees it."""

    offset: int
    """Bytes from the start of the layer."""
    shape: tuple[int, ...]
    """Of numbers, or of bytes."""
    is_bytes: bool = False
    """Rows are quantised or blocks, a table, or records of those."""
    num_columns: int | None = None
    """Numbers in a row that is quantised or blocks; None of others."""
    form: WeightFormat | BlockFormat | None = None
    """How they are written there."""


@dataclass(frozen=True, kw_only=True)
class RecordForm:
    """What a record of bytes has: the neuron's number where it has codes, codes or numbers of its down column, its up row."""

    width: int
    """D"""
    element_nbytes: int
    up: BlockFormat | None
    """None: plain numbers."""
    down: BlockFormat | None

    @property
    def down_range(self) -> tuple[int, int]:
        """First and last + 1 byte."""
        if self.down is None:
            return 0, self.width * self.element_nbytes
        return NUMBER_NBYTES, NUMBER_NBYTES + self.down.column_nbytes(self.width)

    @property
    def up_range(self) -> tuple[int, int]:
        """First and last + 1 byte."""
        start = self.down_range[1]
        return start, start + (self.width * self.element_nbytes if self.up is None else self.up.row_nbytes(self.width))

    @property
    def nbytes(self) -> int:
        """All of it: numbers of any type begin where they may."""
        return align(self.up_range[1], NUMBER_NBYTES)


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Where everything lies in the bytes of one layer.

    All layers of a model have the same layout, unless their matrices are in different blocks. Then each has its own, `by_layer`,
    and this one, of the larger blocks of each matrix, is what a slot has room for: no layer has a larger attention block or more
    of any neuron.
    """

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
    gate_nbytes: int = 0
    """A gate row."""
    format: WeightFormat | None = None
    """Of matrices; None where they are plain numbers, as norms and biases always are, or blocks."""
    blocks: Mapping[Role, BlockFormat] = field(default_factory=dict)
    """Matrices that are blocks; others are plain."""
    record: RecordForm | None = None
    """None where an up row and a down column are alike."""
    num_table_neurons: int = 0
    """F of the model: what the table of a down projection in blocks is for, of however many neurons the layer is."""
    num_weights: int = 0
    """Of matrices."""
    by_layer: tuple[LayerLayout, ...] = ()
    """Empty where all layers are alike."""

    def layer(self, layer: int) -> LayerLayout:
        """That of a layer."""
        return self.by_layer[layer] if self.by_layer else self

    def total(self, nbytes_of: Callable[[LayerLayout], int], layers: Collection[int]) -> int:
        """The sum of something over layers."""
        if not self.by_layer:
            return nbytes_of(self) * len(layers)
        return sum(nbytes_of(self.by_layer[layer]) for layer in layers)

    def mean(self, nbytes_of: Callable[[LayerLayout], int]) -> int:
        """The mean of something over all layers, for what a pass takes."""
        return sum(map(nbytes_of, self.by_layer)) // len(self.by_layer) if self.by_layer else nbytes_of(self)

    @property
    def nbytes(self) -> int:
        """Bytes of a whole layer, alignment included."""
        return self.attention_nbytes + self.records_nbytes

    @property
    def neuron_nbytes(self) -> int:
        """A neuron's gate row, up row and down column."""
        return self.gate_nbytes + self.record_nbytes

    @property
    def mean_nbytes(self) -> int:
        """Bytes of a layer, part by part the mean where layers differ."""
        return self.mean(lambda each: each.attention_nbytes) + self.mean(lambda each: each.records_nbytes)

    def of(self, spec: ModelSpec, num_kept: int = 0) -> LayerLayout:
        """The same layer with other neurons; where layers differ, the same of each."""
        own = layer_layout(spec, self.element_nbytes, num_kept, self.format, self.blocks, self.num_table_neurons)
        if not self.by_layer:
            return own
        others = {id(each): each.of(spec, num_kept) for each in distinct(self.by_layer)}
        return _room_for(own, tuple(others[id(each)] for each in self.by_layer))

    @property
    def frees_attention(self) -> bool:
        """Whether another layer's attention block may come into a slot while the neurons of this one are computed on.

        Not where there is a table of the down projection in it, nor where layers differ and another's may be larger.
        """
        return "down_table" not in self.fields and not self.by_layer

    @property
    def unpacks(self) -> bool:
        """Whether any matrices are other than plain numbers."""
        return self.format is not None or bool(self.blocks)

    @property
    def nbytes_per_weight(self) -> float:
        """Bytes that an element of a matrix takes, its share of scales included."""
        if self.blocks:
            return self.mean(lambda each: each.nbytes) / self.num_weights
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

    def file_range(self, part: Part, *, packed: bool) -> tuple[int, int]:
        """The same of attention block or records, as they come from a file: there the table of a down projection is in one with
        the codes, so that it is read with the records. Parts of a packed layer are those of memory."""
        table = self.fields.get("down_table")
        end = self.attention_nbytes if packed or table is None else table.offset
        return (0, end) if part == "attention" else (end, self.nbytes)

    @property
    def staging(self) -> LayerLayout:
        """Of a buffer through which layers come from a file: one's attention block beside the records of any other, tables with
        them."""
        if not self.by_layer:
            return self
        starts = ((each, each.file_range("records", packed=False)[0]) for each in self.by_layer)
        return replace(self, records_nbytes=max(self.records_nbytes, *(each.nbytes - start for each, start in starts)))

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
    spec: ModelSpec,
    element_nbytes: int,
    num_kept: int = 0,
    weight_format: WeightFormat | None = None,
    blocks: Mapping[Role, BlockFormat] | None = None,
    num_table_neurons: int | None = None,
) -> LayerLayout:
    """Lay out a layer of the model with elements of the given size, its matrices in the given format.

    num_kept: neurons that a sparse step keeps of each layer; 0 where that is no fixed set. blocks: matrices that are blocks, in
    place of a format for all. num_table_neurons: F of the model, where spec has fewer.
    """
    assert num_kept <= spec.ffn_width, (num_kept, spec.ffn_width)
    assert weight_format is None or not blocks
    shapes = _Shapes(spec, element_nbytes, weight_format, blocks or {}, num_table_neurons or spec.ffn_width)
    fields: dict[FieldName, Field] = {}
    attention_nbytes = shapes.place(fields, shapes.attention(), 0)
    end = shapes.place(fields, shapes.neurons("gate", "up_down", spec.ffn_width), attention_nbytes)
    kept = shapes.neurons("kept_gate", "kept_up_down", num_kept) if num_kept else {}
    kept_end = shapes.place(fields, kept, attention_nbytes)
    return LayerLayout(
        element_nbytes=element_nbytes,
        fields=fields,
        attention_nbytes=attention_nbytes,
        records_nbytes=end - attention_nbytes,
        kept_nbytes=kept_end - attention_nbytes,
        num_neurons=spec.ffn_width,
        record_nbytes=shapes.nbytes(fields["up_down"]) // spec.ffn_width,
        gate_nbytes=shapes.nbytes(fields["gate"]) // spec.ffn_width,
        format=weight_format,
        blocks=shapes.blocks,
        record=shapes.record,
        num_table_neurons=shapes.num_table_neurons,
        num_weights=sum(prod(shape) for shape in spec.layer_roles().values() if len(shape) > 1),
    )


def model_layout(
    spec: ModelSpec,
    element_nbytes: int,
    num_kept: int = 0,
    weight_format: WeightFormat | None = None,
    blocks_by_layer: Sequence[Mapping[Role, BlockFormat]] = (),
) -> LayerLayout:
    """Lay out the layers of a model, whose matrices are in one format, or in these blocks; see `layer_layout`."""

    def layout_of(blocks: Mapping[Role, BlockFormat]) -> LayerLayout:
        return layer_layout(spec, element_nbytes, num_kept, weight_format, blocks)

    kinds = {tuple(sorted(blocks.items())): blocks for blocks in blocks_by_layer} or {(): {}}
    if len(kinds) == 1:
        return layout_of(next(iter(kinds.values())))
    layouts = {kind: layout_of(blocks) for kind, blocks in kinds.items()}
    largest = {role: _largest([blocks.get(role) for blocks in kinds.values()]) for role in spec.layer_roles()}
    by_layer = tuple(layouts[tuple(sorted(blocks.items()))] for blocks in blocks_by_layer)
    return _room_for(layout_of({role: form for role, form in largest.items() if form is not None}), by_layer)


def _room_for(envelope: LayerLayout, by_layer: tuple[LayerLayout, ...]) -> LayerLayout:
    """The envelope of these layers, its attention block as large as any: larger blocks may have the smaller table."""
    attention_nbytes = max(each.attention_nbytes for each in (envelope, *by_layer))
    moved = attention_nbytes - envelope.attention_nbytes
    fields = {
        name: replace(field, offset=field.offset + moved) if field.offset >= envelope.attention_nbytes else field
        for name, field in envelope.fields.items()
    }
    return replace(envelope, attention_nbytes=attention_nbytes, fields=fields, by_layer=by_layer)


def _largest(forms: Sequence[BlockFormat | None]) -> BlockFormat | None:
    """The one that takes most bytes; plain numbers take more than any."""
    blocks = [form for form in forms if form is not None]
    return max(blocks, key=lambda form: form.bits_per_weight) if len(blocks) == len(forms) else None


def distinct(layouts: Sequence[LayerLayout]) -> list[LayerLayout]:
    """Each once."""
    return list({id(each): each for each in layouts}.values())


def part_of(role: Role) -> Part:
    """The part of the layer in which a tensor of the checkpoint ends up."""
    return "records" if role in ("gate", "up", "down") else "attention"


def qkv_rows(spec: ModelSpec, role: Role) -> tuple[int, int]:
    """First and last + 1 row of q, k or v (or of their biases) in the fused qkv matrix [(H + 2K)E, D]."""
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    starts = {"q": 0, "k": q_rows, "v": q_rows + kv_rows}
    start = starts[role[0]]
    return start, start + (q_rows if role[0] == "q" else kv_rows)


@dataclass(frozen=True)
class _Shapes:
    """The tensors of a layer, without their places."""

    spec: ModelSpec
    element_nbytes: int
    weight_format: WeightFormat | None
    blocks: Mapping[Role, BlockFormat]
    num_table_neurons: int

    @property
    def record(self) -> RecordForm | None:
        """See LayerLayout."""
        up, down = self.blocks.get("up"), self.blocks.get("down")
        if up is None and down is None:
            return None
        return RecordForm(width=self.spec.width, element_nbytes=self.element_nbytes, up=up, down=down)

    def attention(self) -> dict[FieldName, Field]:
        """In order. Queries, keys and values are one matrix where they are alike."""
        spec, q_rows, kv_rows = self.spec, self.spec.num_heads * self.spec.head_dim, self.spec.num_kv_heads * self.spec.head_dim
        shapes: dict[FieldName, Field] = {"input_norm": self._vector(spec.width)}
        if len({self.blocks.get(role) for role in ("q", "k", "v")}) == 1:
            shapes["qkv"] = self._matrix("q", q_rows + 2 * kv_rows, spec.width)
        else:
            shapes["q"] = self._matrix("q", q_rows, spec.width)
            shapes |= {"k": self._matrix("k", kv_rows, spec.width), "v": self._matrix("v", kv_rows, spec.width)}
        if spec.qkv_bias:
            shapes["qkv_bias"] = self._vector(q_rows + 2 * kv_rows)
        if spec.qk_norm:
            shapes |= {"q_norm": self._vector(spec.head_dim), "k_norm": self._vector(spec.head_dim)}
        shapes["output"] = self._matrix("o", spec.width, q_rows)
        if spec.output_bias:
            shapes["output_bias"] = self._vector(spec.width)
        shapes["post_norm"] = self._vector(spec.width)
        if (down := self.blocks.get("down")) is not None:
            shapes["down_table"] = Field(offset=0, shape=down.table_shape(self.num_table_neurons, spec.width), is_bytes=True)
        return shapes

    def neurons(self, gate: FieldName, up_down: FieldName, count: int) -> dict[FieldName, Field]:
        """Gate rows, and records, of so many."""
        if self.record is None:
            records = self._matrix("up", count, 2, self.spec.width)
        else:
            records = Field(offset=0, shape=(count, self.record.nbytes), is_bytes=True)
        return {gate: self._matrix("gate", count, self.spec.width), up_down: records}

    def place(self, fields: dict[FieldName, Field], shapes: Mapping[FieldName, Field], offset: int) -> int:
        """Append fields one after another, aligned; returns the aligned end."""
        for name, each in shapes.items():
            fields[name] = replace(each, offset=offset)
            offset = align(offset + self.nbytes(each))
        return offset

    def nbytes(self, each: Field) -> int:
        """Bytes of a field."""
        return prod(each.shape) * (1 if each.is_bytes else self.element_nbytes)

    def _vector(self, length: int) -> Field:
        """Never quantised."""
        return Field(offset=0, shape=(length,))

    def _matrix(self, role: Role, *shape: int) -> Field:
        form = self.weight_format or self.blocks.get(role)
        if form is None:
            return Field(offset=0, shape=shape)
        *rows, num_columns = shape
        return Field(offset=0, shape=(*rows, form.row_nbytes(num_columns)), is_bytes=True, num_columns=num_columns, form=form)


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Round up to a multiple of the alignment."""
    return -(-nbytes // alignment) * alignment
