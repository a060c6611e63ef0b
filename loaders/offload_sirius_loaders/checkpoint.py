"""A checkpoint as the rest of the program sees it: a ModelSpec, where each tensor's bytes lie, and how to read them.

Nothing is copied or kept: `TensorInfo` says which bytes of which file, the caller reads them the way it likes (directly, in
pieces, many at a time) and `Checkpoint.decode` turns the bytes into numbers. Knows no file format; those are its subclasses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.spec import ModelSpec, Role

Element = Literal["F32", "F16", "BF16"]
"""What `decode` returns: float32, float16, or bfloat16 carried in uint16 (numpy has no bfloat16)."""

Decoded = Literal["F32", "F16", "BF16", "U8"]
"""An element, or U8: bytes of a packed layer, or blocks, which are left as they are."""

BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Types of GGUF files whose rows are blocks, and that are known."""

LayerPart = Literal["attention", "records"]
"""What a packed layer is stored as: its attention block, its neuron records."""

Key = tuple[int | None, Role]
"""(layer, role); the layer of embedding, head and final norm is None."""

NUMPY_OF_ELEMENT: dict[Decoded, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U8": np.uint8,
}


class ByteRange(NamedTuple):
    """Some bytes of a file."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Companion:
    """What some rows of a quantised matrix cannot be decoded without: scales, zero points, the order of the groups."""

    name: str
    """Last word of its name in the file."""
    file: Path
    offset: int
    nbytes: int
    num_rows: int
    """Rows of its own."""
    span: int
    """Stored rows of the matrix to which one row of its own belongs."""

    def range(self, first_row: int, num_rows: int) -> ByteRange:
        """What belongs to these stored rows of the matrix."""
        row_nbytes = self.nbytes // self.num_rows
        start, end = first_row // self.span, -(-(first_row + num_rows) // self.span)
        return ByteRange(self.file, self.offset + start * row_nbytes, (end - start) * row_nbytes)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor: what it is and where its bytes are. It is stored row after row: any range of stored rows is one of bytes."""

    name: str
    """Name in the file."""
    dtype: str
    """Storage type: F32, F16, BF16, a GGUF block type such as Q4_1, a way of quantising such as AWQ4, or U8 of a packed layer."""
    element: Decoded
    """Type of the numbers after decoding."""
    shape: tuple[int, ...]
    """[rows, columns] or [elements]"""
    file: Path | None
    """None: nothing is stored, `decode` computes the values (synthetic weights)."""
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int
    """Stored bytes, those of companions apart."""
    row_multiple: int = 1
    """Ranges of rows must start and end at multiples of this (rows of one head are permuted together, say)."""
    companions: tuple[Companion, ...] = ()
    """What is read along with rows, in this order behind them."""
    transposed: bool = False
    """The file has the matrix transposed: stored rows are columns of `shape`, and so they are decoded."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape as it lies in the file: what rows mean wherever ranges of them are read."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def num_rows(self) -> int:
        """Stored rows of a matrix; a vector is one row."""
        return self.stored_shape[0] if len(self.shape) > 1 else 1

    @property
    def row_nbytes(self) -> int:
        """Stored bytes of one row, those of companions apart."""
        return self.nbytes // self.num_rows

    def ranges(self, first_row: int, num_rows: int) -> list[ByteRange]:
        """What `decode` needs for these stored rows: their own bytes, then those of each companion. None where file is None."""
        if self.file is None:
            return []
        own = ByteRange(self.file, self.offset + first_row * self.row_nbytes, num_rows * self.row_nbytes)
        return [own, *(companion.range(first_row, num_rows) for companion in self.companions)]


@dataclass(frozen=True, kw_only=True)
class PackedLayers:
    """Layers that are stored byte for byte as they are held in memory, so that nothing is left to do but read them."""

    dtype: str
    """bfloat16 or float32: what is plain in them."""
    quantize: str
    """none, int8 or int4: what their matrices are."""
    quantize_group: int | None
    """Weights that share a scale; None where none do."""
    fields: Mapping[str, tuple[int, ...]]
    """Name of a tensor -> byte of the layer at which it begins, then its shape."""
    blocks: tuple[Mapping[str, str], ...]
    """Of each layer, role of a matrix -> type of the blocks that it is kept in; empty where none is."""
    parts: Mapping[tuple[int, LayerPart], TensorInfo]
    """Where each part of each layer lies, as rows of some bytes, [n, PACKED_ROW_NBYTES]."""
    quantize_head: str = "none"
    """none or int8: what the head is. Of one in int8 the tensor is bytes, [V, bytes of a row], also where the head is tied."""


PACKED_ROW_NBYTES = 64
"""What a part of a packed layer is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Where a checkpoint's tokenizer is. Exactly one of the three is set; none means that the model has no tokenizer."""

    directory: Path | None = None
    """Folder with tokenizer.json, or whatever else transformers can read."""
    gguf_metadata: Mapping[str, Any] | None = None
    """The `tokenizer.*` fields of a GGUF file."""
    num_bytes_ids: int | None = None
    """Synthetic models: token ids 0..255 are bytes, this many ids exist."""


class Checkpoint(ABC):
    """An opened checkpoint. Opening has validated every header; no weight has been read."""

    spec: ModelSpec
    path: Path | None
    """The folder or file, None for synthetic weights."""
    tokenizer: TokenizerFiles
    tensors: Mapping[Key, TensorInfo]
    """Every tensor the spec asks for, and no other; where layers are packed, those outside of layers."""
    packed: PackedLayers | None = None
    """None where layers are stored tensor by tensor."""

    @property
    def infos(self) -> list[TensorInfo]:
        """Everything that is stored."""
        return [*self.tensors.values(), *(self.packed.parts.values() if self.packed else ())]

    def in_blocks(self) -> Checkpoint:
        """The same weights, those matrices whose rows are blocks as bytes: rows of U8. Itself where there are none."""
        return self

    @abstractmethod
    def decode(self, info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """Turn the stored bytes of stored rows [first_row, first_row + num_rows) into numbers.

        raw: uint8, the bytes of info.ranges(first_row, num_rows) one behind the other, any alignment.
        Returns [num_rows, info.stored_shape[1]], or [elements] for a vector, of NUMPY_OF_ELEMENT[info.element]; may be a view of
        raw. Raises CheckpointError where the bytes contradict the headers. Thread-safe.
        """

    def read(self, layer: int | None, role: Role) -> npt.NDArray[Any]:
        """Read one whole tensor the plain way, in its shape. Raises CheckpointError when a file cannot be read to its end."""
        info = self.tensors[layer, role]
        numbers = self.decode(info, read_rows(info, 0, info.num_rows), 0, info.num_rows)
        return numbers.T if info.transposed else numbers

    def close(self) -> None:  # noqa: B027  most formats hold nothing open
        """Release what opening took. Safe to call twice."""


def read_rows(info: TensorInfo, first_row: int, num_rows: int) -> npt.NDArray[np.uint8]:
    """What `decode` needs for some stored rows, read the plain way. Raises CheckpointError when a file is too short."""
    ranges = info.ranges(first_row, num_rows)
    raw = np.empty(sum(each.nbytes for each in ranges), np.uint8)
    start = 0
    for path, offset, nbytes in ranges:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                count = file.readinto(raw[start : start + nbytes].data)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read tensor {info.name}: {error.strerror}") from error
        if count != nbytes:
            raise CheckpointError(f"{path}: tensor {info.name} ended after {count} of {nbytes} bytes; download the file again")
        start += nbytes
    return raw
