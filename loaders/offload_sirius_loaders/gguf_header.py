"""The header of a GGUF file: its metadata as plain Python values, and where each tensor's bytes lie.

Knows the container and nothing of its content: no architecture, no tokenizer, no numbers. Type names and block sizes are those
of the `gguf` package. The reading is done here because that package's reader does not check the counts it is given (a damaged
file makes it loop or fail anywhere), keeps the file mapped, and takes seconds for the vocabulary of a large model.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.shown import short

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
LONGEST_NAME = 500
"""Characters; the format's own limit is 64 for tensors and 65535 for fields, which none comes near."""
_DOWNLOAD_AGAIN = "download the file again"

_SCALARS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as the file lists it."""

    name: str
    dtype: str
    """Name in GGMLQuantizationType, such as Q4_1."""
    shape: tuple[int, ...]
    """Slowest dimension first, [rows, columns]: the reverse of the order in the file."""
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Everything in a GGUF file that is not weights. Every tensor lies inside the file."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers, booleans, strings, and lists of one of them."""
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header. Raises CheckpointError for anything but a complete little-endian file of version 2 or 3."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(f"{path}: not a GGUF file, it does not start with GGUF; give a .gguf file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _Cursor:
    """Reads little-endian values one after another and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = len(_MAGIC)

    def bytes(self, nbytes: int) -> bytes:
        end = self.position + nbytes
        if end > len(self.data):
            raise self.error(f"the header reaches to byte {end:,}, the file has {len(self.data):,}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def uint32(self) -> int:
        return int(struct.unpack("<I", self.bytes(4))[0])

    def uint64(self) -> int:
        return int(struct.unpack("<Q", self.bytes(8))[0])

    def string(self) -> str:
        try:
            return self.bytes(self.uint64()).decode()
        except UnicodeDecodeError:
            raise self.error(f"the text before byte {self.position:,} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """One metadata value of the given GGUFValueType."""
        if kind != GGUFValueType.ARRAY:
            return self._values(kind, 1)[0]
        item_kind, count = self.uint32(), self.uint64()
        return self._values(item_kind, count)

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise self.error(f"a metadata value before byte {self.position:,} has the unknown type {kind}")
        values: list[Any] = np.frombuffer(self.bytes(count * scalar.itemsize), scalar).tolist()
        return values

    def error(self, found: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {found}; {_DOWNLOAD_AGAIN}")


def _parse(cursor: _Cursor) -> GgufHeader:
    _check_version(cursor)
    num_tensors, num_fields = cursor.uint64(), cursor.uint64()
    metadata = _read_named(cursor, num_fields, "metadata field", lambda _: cursor.value(cursor.uint32()))
    listed = _read_named(cursor, num_tensors, "tensor", lambda name: _read_tensor(cursor, name))
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.error(f"general.alignment is {short(alignment)}, it must be a positive number")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {name: _placed(cursor, tensor, data_start) for name, tensor in listed.items()}
    return GgufHeader(path=cursor.path, metadata=metadata, tensors=tensors)


def _check_version(cursor: _Cursor) -> None:
    version = cursor.uint32()
    # A version is a small number, so that zeros in the low half mean that the bytes come in the other order.
    if version and not version & 0xFFFF:
        raise CheckpointError(f"{cursor.path}: a big-endian GGUF file; convert it to little-endian with gguf-convert-endian")
    if version not in _VERSIONS:
        raise CheckpointError(f"{cursor.path}: GGUF version {version}, versions 2 and 3 are known; convert the model again")


def _read_named(cursor: _Cursor, count: int, what: str, read: Callable[[str], _T]) -> dict[str, _T]:
    named: dict[str, _T] = {}
    for _ in range(count):
        name = cursor.string()
        if not name.isprintable():
            raise cursor.error(f"the name of a {what} before byte {cursor.position:,} is not printable")
        if len(name) > LONGEST_NAME:
            raise cursor.error(f"the name of a {what} before byte {cursor.position:,} has more than {LONGEST_NAME} characters")
        if name in named:
            raise cursor.error(f"{what} {name} stands in the header twice")
        named[name] = read(name)
    return named


def _read_tensor(cursor: _Cursor, name: str) -> StoredTensor:
    """The offset of what is returned still counts from the start of the data."""
    num_dimensions = cursor.uint32()
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name} has {num_dimensions} dimensions, 1 to {_MAX_DIMENSIONS} are possible")
    shape = tuple(reversed([cursor.uint64() for _ in range(num_dimensions)]))
    dtype = _type_name(cursor, name, cursor.uint32())
    block_size, block_nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    if not all(shape) or shape[-1] % block_size:
        raise cursor.error(f"tensor {name} has shape {list(shape)}, type {dtype} needs rows of a multiple of {block_size}")
    nbytes = math.prod(shape) // block_size * block_nbytes
    return StoredTensor(name=name, dtype=dtype, shape=shape, offset=cursor.uint64(), nbytes=nbytes)


def _type_name(cursor: _Cursor, tensor: str, number: int) -> str:
    try:
        return str(GGMLQuantizationType(number).name)
    except ValueError:
        raise CheckpointError(
            f"{cursor.path}: tensor {tensor} has the unknown type number {number}; upgrade the gguf package, or quantize again"
        ) from None


def _placed(cursor: _Cursor, tensor: StoredTensor, data_start: int) -> StoredTensor:
    offset = data_start + tensor.offset
    end, file_nbytes = offset + tensor.nbytes, len(cursor.data)
    if end > file_nbytes:
        raise cursor.error(f"tensor {tensor.name} ends at byte {end:,}, the file has {file_nbytes:,}")
    return StoredTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, offset=offset, nbytes=tensor.nbytes)
