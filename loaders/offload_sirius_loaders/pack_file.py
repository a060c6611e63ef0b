"""One file of a packed model: safetensors, each tensor at a block of the disk, and a checksum for every few MiB. Knows no models.

    | length | header | spaces || tensor | padding | tensor | padding | ... |
    byte 0                      data: a multiple of 4096, as is where each tensor begins

Padding is listed as tensors of its own, because the format allows no gaps. Checksums are zlib's CRC-32, each of 4 MiB of data.
They find damage, though not malice, at 1.3 GB/s a core, and stand in the header's `__metadata__`; the index seals the header.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.shard import BITS_OF_DTYPE, LENGTH_NBYTES, StoredTensor, read_shard

BLOCK_NBYTES = 4096
"""Reads past the page cache start and end at multiples of a disk's block, which is at most this."""

CHECKED_NBYTES = 4 << 20
"""Data that share a checksum."""

CHECK_THREADS = 4
"""Threads that compare checksums: neither reading nor computing one holds the interpreter's lock."""

PADDING = "padding."
"""Names of padding begin so."""

PARTIAL_SUFFIX = ".partial"
CHECKSUMS = "crc32"
"""Field of `__metadata__`: eight hexadecimal digits each, one behind the other."""


@dataclass(frozen=True, kw_only=True)
class OutTensor:
    """One tensor as it is written."""

    name: str
    dtype: str
    """As the format calls it."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape) * BITS_OF_DTYPE[self.dtype] // 8

    @property
    def padding_nbytes(self) -> int:
        """Up to the next block."""
        return -self.nbytes % BLOCK_NBYTES


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What the index knows of a file: that it is the one that was written, as far as can be seen without reading all of it."""

    nbytes: int
    """Of the whole file."""
    head_nbytes: int
    """Bytes from its start that the checksum is of: the header, or of a small file all."""
    crc32: int

    def check(self, path: Path) -> None:
        """Raises CheckpointError where the file is not that one."""
        try:
            nbytes = path.stat().st_size
            if nbytes != self.nbytes:
                raise CheckpointError(f"{path}: has {nbytes} bytes, {self.nbytes} were written; pack the model again")
            with path.open("rb") as file:
                head = file.read(self.head_nbytes)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: is missing; pack the model again") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if zlib.crc32(head) != self.crc32:
            raise CheckpointError(
                f"{path}: its first {self.head_nbytes} bytes are not those that were written; pack the model again"
            )


@dataclass(frozen=True, kw_only=True)
class PackFile:
    """A file whose header has been read."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    """Without padding."""
    head_nbytes: int
    """Where the data begin."""
    nbytes: int
    checksums: tuple[int, ...]
    notes: Mapping[str, str]
    """What else the header says."""

    @property
    def data_nbytes(self) -> int:
        """What has checksums."""
        return self.nbytes - self.head_nbytes

    @property
    def num_pieces(self) -> int:
        """Stretches of data with a checksum each."""
        return len(self.checksums)

    def piece(self, index: int) -> tuple[int, int]:
        """First and last + 1 byte in the file."""
        start = self.head_nbytes + index * CHECKED_NBYTES
        return start, min(start + CHECKED_NBYTES, self.nbytes)

    def is_whole(self, index: int) -> bool:
        """Read a piece and compare its checksum. Raises CheckpointError where it cannot be read."""
        start, end = self.piece(index)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return zlib.crc32(file.read(end - start)) == self.checksums[index]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error

    def damage(self, index: int) -> str:
        """What a broken piece is, in words."""
        start, end = self.piece(index)
        inside = [name for name, tensor in self.tensors.items() if tensor.offset < end and start < tensor.end]
        return f"{self.path.name}: {' and '.join(inside) or 'padding'}, bytes {start} to {end - 1}"


def damaged_pieces(files: Sequence[PackFile], on_bytes: Callable[[int], None]) -> list[tuple[PackFile, int]]:
    """Read all data and compare every checksum: the pieces that are not as they were written, by file and index.

    on_bytes: called with what has been read, by several threads. Raises CheckpointError where something cannot be read.
    """
    pieces = [(file, index) for file in files for index in range(file.num_pieces)]

    def is_whole(piece: tuple[PackFile, int]) -> bool:
        file, index = piece
        whole = file.is_whole(index)
        start, end = file.piece(index)
        on_bytes(end - start)
        return whole

    executor = ThreadPoolExecutor(CHECK_THREADS, "check")
    try:
        return [piece for piece, whole in zip(pieces, executor.map(is_whole, pieces), strict=True) if not whole]
    finally:
        executor.shutdown(cancel_futures=True)


def write_file(
    path: Path, contents: Sequence[tuple[OutTensor, Iterable[memoryview]]], notes: Mapping[str, str] | None = None
) -> None:
    """Write tensors, each from its bytes piece by piece. The file appears under its name when all of it is on the disk.

    Raises OSError. What was begun is removed, except where the process is killed.
    """
    tensors = [tensor for tensor, _ in contents]
    num_checksums = -(-sum(tensor.nbytes + tensor.padding_nbytes for tensor in tensors) // CHECKED_NBYTES)
    head_nbytes = len(_head(tensors, [0] * num_checksums, notes or {}))
    partial = partial_of(path)
    checksums = _Checksums()
    try:
        with partial.open("wb") as file:
            file.seek(head_nbytes)
            for tensor, chunks in contents:
                written = 0
                # One at a time: the next may be made in the memory of the one before.
                for chunk in chain(chunks, [memoryview(bytes(tensor.padding_nbytes))]):
                    file.write(chunk)
                    checksums.add(chunk)
                    written += len(chunk)
                assert written == tensor.nbytes + tensor.padding_nbytes, (tensor, written)
            file.seek(0)
            file.write(_head(tensors, checksums.all, notes or {}))
            file.flush()
            os.fsync(file.fileno())
            # Out of the page cache: whoever verifies is to read the disk, and what others have there is worth more.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # gone already where all went well


def write_small_file(path: Path, content: bytes) -> None:
    """The same of a file without tensors. Raises OSError."""
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_file(path: Path) -> PackFile:
    """Read and check the header. Raises CheckpointError."""
    stored = read_shard(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_NBYTES), "little")
        header = JsonObject.parse(file.read(length), f"{path}: header")
        nbytes = os.fstat(file.fileno()).st_size
    head_nbytes = LENGTH_NBYTES + length
    notes = _notes(header)
    digits = notes.pop(CHECKSUMS, "")
    num_checksums = -(-(nbytes - head_nbytes) // CHECKED_NBYTES)
    try:
        checksums = tuple(int(digits[start : start + 8], 16) for start in range(0, len(digits), 8))
    except ValueError:
        checksums = ()
    if len(digits) != 8 * num_checksums or len(checksums) != num_checksums:
        raise header.error(f"has no checksums of {num_checksums} pieces; pack the model again")
    return PackFile(
        path=path,
        tensors={name: tensor for name, tensor in stored.items() if not name.startswith(PADDING)},
        head_nbytes=head_nbytes,
        nbytes=nbytes,
        checksums=checksums,
        notes=notes,
    )


def seal_of(path: Path, head_nbytes: int | None = None) -> Seal:
    """The seal of a file as it is. head_nbytes: None for all of it. Raises OSError."""
    with path.open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        head = file.read(nbytes if head_nbytes is None else head_nbytes)
    return Seal(nbytes=nbytes, head_nbytes=len(head), crc32=zlib.crc32(head))


def partial_of(path: Path) -> Path:
    """Where this process writes a file before it has its name."""
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")


def is_partial(path: Path) -> bool:
    """Whether a file was being written."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL_SUFFIX)


def replace_file(partial: Path, path: Path) -> None:
    """Give a file that is on the disk its name, and put that on the disk, too."""
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Checksums:
    """Of data that come in pieces of any size."""

    def __init__(self) -> None:
        self._finished: list[int] = []
        self._current = 0
        self._count = 0

    def add(self, data: memoryview) -> None:
        while len(data):
            piece = data[: CHECKED_NBYTES - self._count]
            self._current = zlib.crc32(piece, self._current)
            self._count += len(piece)
            if self._count == CHECKED_NBYTES:
                self._finished.append(self._current)
                self._current = self._count = 0
            data = data[len(piece) :]

    @property
    def all(self) -> list[int]:
        """Each, the last one of what there is of its piece."""
        return [*self._finished, self._current] if self._count else self._finished


def _head(tensors: Sequence[OutTensor], checksums: Sequence[int], notes: Mapping[str, str]) -> bytes:
    """Everything in front of the data. As long for any checksums."""
    metadata = {**notes, CHECKSUMS: "".join(f"{checksum:08x}" for checksum in checksums)}
    fields: dict[str, Any] = {"__metadata__": metadata}
    cursor = 0
    for tensor in tensors:
        fields[tensor.name] = _entry(tensor.dtype, tensor.shape, cursor, tensor.nbytes)
        cursor += tensor.nbytes
        if tensor.padding_nbytes:
            fields[PADDING + tensor.name] = _entry("U8", (tensor.padding_nbytes,), cursor, tensor.padding_nbytes)
            cursor += tensor.padding_nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_NBYTES + len(text)) % BLOCK_NBYTES)
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text


def _entry(dtype: str, shape: tuple[int, ...], start: int, nbytes: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}


def _notes(header: JsonObject) -> dict[str, str]:
    found = header.fields.get("__metadata__")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
