"""Packed folders without torch: layers are bytes that anybody can make again. As a program it is killed where that is asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.pack_file import OutTensor
from offload_sirius_loaders.pack_index import PackJob
from offload_sirius_loaders.pack_writer import PackWriter

MODEL = "synthetic:tiny?layers=2&dtype=F32"
JOB = PackJob(
    source=MODEL,
    fingerprint="0123",
    dtype="float32",
    quantize="int8",
    quantize_group=64,
    fields={"gate": (4096, 3, 5)},
    attention_nbytes=4096 + 64,
    records_nbytes=5 << 20,
)
CHUNK_NBYTES = 1 << 20


def content_of(name: str, tensor: OutTensor) -> bytes:
    """The bytes of a tensor in a file, of any other file different ones."""
    seed = sum(map(ord, name + tensor.name))
    return np.random.default_rng(seed).integers(0, 256, tensor.nbytes, np.uint8).tobytes()


def chunks(content: bytes) -> Iterator[memoryview]:
    """In pieces that are not those of checksums."""
    for start in range(0, len(content), CHUNK_NBYTES):
        yield memoryview(content)[start : start + CHUNK_NBYTES]


def write_pack(directory: Path, job: PackJob = JOB, checkpoint: Checkpoint | None = None) -> list[str]:
    """Write it, or what is missing; returns the names of the files with tensors that were written."""
    writer = PackWriter(directory, job, checkpoint or open_checkpoint(MODEL))
    try:
        writer.resume(lambda nbytes: None)
        missing = writer.missing
        for name in missing:
            writer.write(name, [chunks(content_of(name, tensor)) for tensor in writer.tensors(name)], {"about": name})
        writer.finish()
    finally:
        writer.close()
    return missing


def files_of(directory: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _killed_at(number: int, call: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
    """The call, in front of which the process ends when it is the one of that number, without a chance to tidy up."""

    def counted(*arguments: Any, **named: Any) -> Any:
        if count[0] == number:
            os._exit(9)
        count[0] += 1
        return call(*arguments, **named)

    return counted


if __name__ == "__main__":
    numbered = [0]
    for name in ("fsync", "replace", "mkdir", "unlink"):
        setattr(os, name, _killed_at(int(sys.argv[2]), getattr(os, name), numbered))
    chunks = _killed_at(int(sys.argv[2]), chunks, numbered)
    write_pack(Path(sys.argv[1]))
    print(numbered[0])  # noqa: T201
