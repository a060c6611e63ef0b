"""How fast a path can be read at best: plain O_DIRECT reads of one file at several queue depths. Assembles nothing.

The ceiling that streaming from disk is held against, and what `doctor` reports.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload_sirius.errors import ConfigError
from offload_sirius.units import MIB, format_size
from offload_sirius.weights.disk import DirectFile, read_buffers
from offload_sirius.weights.pieces import BLOCK_NBYTES

QUEUES = ((2, 8 * MIB), (3, 4 * MIB), (4, 2 * MIB), (8, 8 * MIB), (16, 16 * MIB), (32, 4 * MIB))
"""(reads at a time, bytes each)"""

SAMPLE_NBYTES = 512 * MIB
SMALLEST_FILE_NBYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class DiskRate:
    """The best rate found, and how."""

    path: Path
    bytes_per_second: float
    depth: int
    """Reads at a time."""
    read_nbytes: int
    """Bytes each."""
    direct: bool
    """False: the file system refuses O_DIRECT, and what is in the page cache was read from there."""


def measure_disk(path: Path, sample_nbytes: int = SAMPLE_NBYTES) -> DiskRate:
    """Read a file, the largest one below a folder, or (where there is none worth it) a temporary one. Raises ConfigError."""
    with file_to_read(path) as file_path:
        nbytes = min(file_path.stat().st_size, sample_nbytes)
        seconds = {queue: read_seconds([file_path], nbytes, *queue) for queue in QUEUES}
        depth, read_nbytes = min(QUEUES, key=lambda queue: seconds[queue])
        return DiskRate(
            path=file_path,
            bytes_per_second=nbytes / seconds[depth, read_nbytes],
            depth=depth,
            read_nbytes=read_nbytes,
            direct=reads_directly(file_path),
        )


def reads_directly(path: Path) -> bool:
    """Whether the file system lets the page cache be passed by."""
    file = DirectFile(path)
    try:
        file.read(0, 1, read_buffers(1, 3 * BLOCK_NBYTES)[0])
        return file.direct
    finally:
        file.close()


def read_seconds(paths: list[Path], nbytes: int, depth: int, read_nbytes: int) -> float:
    """Seconds for reading the first nbytes of some files, one after the other, with `depth` reads of read_nbytes at a time.

    Nothing is done with the bytes. Raises ConfigError where the files have fewer.
    """
    files = [DirectFile(path) for path in paths]
    try:
        reads = _reads(files, nbytes, read_nbytes)
        return _read_all(reads, depth, read_nbytes)
    finally:
        for file in files:
            file.close()


def _reads(files: list[DirectFile], nbytes: int, read_nbytes: int) -> list[tuple[DirectFile, int, int]]:
    reads, left = [], nbytes
    for file in files:
        size = min(file.path.stat().st_size, left)
        reads += [(file, offset, min(read_nbytes, size - offset)) for offset in range(0, size, read_nbytes)]
        left -= size
    if left:
        raise ConfigError(f"{files[0].path} and its like have {nbytes - left} bytes, {nbytes} are to be read")
    return reads


def _read_all(reads: list[tuple[DirectFile, int, int]], depth: int, read_nbytes: int) -> float:
    remaining = iter(reads)
    lock = threading.Lock()
    buffers = read_buffers(depth, read_nbytes + 2 * BLOCK_NBYTES)

    def run(buffer: memoryview) -> None:
        while True:
            with lock:
                read = next(remaining, None)
            if read is None:
                return
            file, offset, nbytes = read
            file.read(offset, nbytes, buffer)

    threads = [threading.Thread(target=run, args=(buffer,)) for buffer in buffers]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


@contextmanager
def file_to_read(path: Path) -> Iterator[Path]:
    """See measure_disk. A temporary file is gone at the end."""
    found = _existing(path)
    if found is not None:
        yield found
        return
    with _temporary_file(path) as temporary:
        yield temporary


def _existing(path: Path) -> Path | None:
    """The file itself, or the largest one of a folder where it is worth it. Raises ConfigError."""
    try:
        if path.is_dir():
            files = [each for each in path.iterdir() if each.is_file()]
            largest = max(files, key=lambda each: each.stat().st_size, default=None)
            return largest if largest is not None and largest.stat().st_size >= SMALLEST_FILE_NBYTES else None
        if path.stat().st_size == 0:
            raise ConfigError(f"--path {path}: the file is empty; give one of some MB, or a folder on the disk to measure")
        return path
    except OSError as error:
        raise ConfigError(f"--path {path}: {error.strerror}; give a file or a folder on the disk to measure") from error


@contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    block = b"\xa5" * (8 * MIB)
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".offload-sirius-")  # noqa: SIM115  closed below
        for _ in range(SAMPLE_NBYTES // 2 // len(block)):
            file.write(block)
        file.flush()
    except OSError as error:
        raise ConfigError(
            f"--path {folder}: {format_size(SAMPLE_NBYTES // 2)} cannot be written to measure it: {error.strerror}; "
            "name a large file there"
        ) from error
    with file:
        yield Path(file.name)
