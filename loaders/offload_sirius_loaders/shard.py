"""The header of one .safetensors file: which tensors it holds and where. Knows nothing of models.

The format: 8 bytes little-endian length, that many bytes of JSON, then the tensors' bytes without gaps. Everything the header
says is checked against itself and the size of the file before any of it is used.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.shown import short

LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000
"""The limit of the safetensors library."""
MAX_RANK = 16
"""Most dimensions believed."""
LONGEST_NAME = 500
"""Characters of a tensor's name that are believed."""
BITS_OF_DTYPE = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
}
"""Every storage type of the format; which of them can be run is decided elsewhere."""
GIT_LFS_START = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a .safetensors file, row after row."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.nbytes


def read_shard(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one file, whose weights are not read. Raises CheckpointError where file and header disagree."""
    try:
        with path.open("rb") as file:
            file_nbytes = os.fstat(file.fileno()).st_size
            text = _header_text(file, file_nbytes, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    data_start = LENGTH_NBYTES + len(text)
    header = JsonObject.parse(text, f"{path}: header")
    tensors = {
        name: _stored_tensor(name, entry, data_start, path) for name, entry in header.fields.items() if name != "__metadata__"
    }
    _check_layout(tensors, data_start, file_nbytes, path)
    return tensors


def _header_text(file: BinaryIO, file_nbytes: int, path: Path) -> bytes:
    start = file.read(len(GIT_LFS_START))
    if start == GIT_LFS_START:
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if file_nbytes < LENGTH_NBYTES:
        raise CheckpointError(
            f"{path}: has {file_nbytes} bytes, a safetensors file has at least {LENGTH_NBYTES}; download it again"
        )
    header_nbytes = int.from_bytes(start[:LENGTH_NBYTES], "little")
    if header_nbytes > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"{path}: is not a safetensors file: its header would have {header_nbytes} bytes, the limit is {MAX_HEADER_NBYTES}"
        )
    if LENGTH_NBYTES + header_nbytes > file_nbytes:
        end = LENGTH_NBYTES + header_nbytes
        raise CheckpointError(f"{path}: its header ends at byte {end}, the file has {file_nbytes}; download the file again")
    file.seek(LENGTH_NBYTES)
    return file.read(header_nbytes)


def _stored_tensor(name: str, entry: Any, data_start: int, path: Path) -> StoredTensor:
    # A name with control characters, or thousands of others, would break the one line of every message that names it.
    can_be_shown = name.isprintable() and len(name) <= LONGEST_NAME
    where = f"{path}: tensor {name if can_be_shown else short(name)}"
    if not can_be_shown or not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by {short(entry)}; a printable name and an object are needed")
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS_OF_DTYPE:
        raise CheckpointError(f"{where} has dtype {short(dtype)}; known are {', '.join(BITS_OF_DTYPE)}")
    if shape is None or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where} has shape {short(entry.get('shape'))}; at most {MAX_RANK} whole numbers are needed")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {short(entry.get('data_offsets'))}; first byte and end are needed")
    nbytes, num_bits = offsets[1] - offsets[0], math.prod(shape) * BITS_OF_DTYPE[dtype]
    if nbytes * 8 != num_bits:
        raise CheckpointError(f"{where} has {nbytes} bytes, {dtype} {shape} needs {num_bits // 8}; download the file again")
    return StoredTensor(file=path, dtype=dtype, shape=tuple(shape), offset=data_start + offsets[0], nbytes=nbytes)


def _counts(value: Any) -> list[int] | None:
    """A list of whole numbers that are not negative, else None."""
    is_counts = isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)
    return value if is_counts else None


def _check_layout(tensors: dict[str, StoredTensor], data_start: int, file_nbytes: int, path: Path) -> None:
    """The tensors must follow each other from the end of the header to the end of the file, without gap or overlap."""
    cursor = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].end)):
        if tensor.offset != cursor:
            fault = "overlaps the tensor before it" if tensor.offset < cursor else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {name} {fault}: it starts at byte {tensor.offset}, {cursor} is needed; download the file again"
            )
        if tensor.end > file_nbytes:
            raise CheckpointError(
                f"{path}: tensor {name} ends at byte {tensor.end}, the file has {file_nbytes}; download the file again"
            )
        cursor = tensor.end
    if cursor != file_nbytes:
        raise CheckpointError(f"{path}: its tensors end at byte {cursor}, the file has {file_nbytes}; download the file again")
