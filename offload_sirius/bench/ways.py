"""Ways for bytes from one memory to another, as things that can be timed. Knows neither sizes worth measuring nor statistics.

Without a GPU there is one memory, copied by one thread and by all. With one there is a link, used in one direction and in both at
once, from host memory that is pinned and from memory that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius import machine
from offload_sirius.units import MIB

WALK_NBYTES = 256 * MIB
"""Bytes that are moved in one measurement where a copy is smaller: more than any cache holds, and long enough to be timed."""

ONE_THREAD = "memory, 1 thread"
PINNED_UPLOAD = "host to device, pinned"

Action = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way. The first copy of a walk begins at the start of its memory, and each goes on where the one before has ended."""

    name: str
    num_directions: int
    """2 where as many bytes go back at the same time."""
    prepare: Callable[[int], Action]
    """Bytes of a copy -> an action that copies walk_nbytes(those) in each direction, and returns when they are there."""


def walk_nbytes(copy_nbytes: int) -> int:
    """Bytes that an action copies in each direction: one copy, or as many as fill a walk."""
    return max(copy_nbytes, WALK_NBYTES // copy_nbytes * copy_nbytes)


def arena_nbytes(largest_nbytes: int) -> int:
    """Bytes of a buffer in which copies of at most so many bytes can walk."""
    return max(largest_nbytes, WALK_NBYTES)


def num_host_arenas(device: torch.device) -> int:
    """Buffers that the ways of a device take in host memory."""
    return 4 if device.type == "cuda" else 2


def ways_of(device: torch.device, largest_nbytes: int) -> list[Way]:
    """All ways that a machine has, for copies of at most so many bytes. Their buffers live as long as they do."""
    nbytes = arena_nbytes(largest_nbytes)
    return _cuda_ways(device, nbytes) if device.type == "cuda" else host_ways(nbytes)


def host_ways(nbytes: int) -> list[Way]:
    """Memory to memory, by one thread and by all. nbytes: of a buffer."""
    source, destination = host_bytes(nbytes), host_bytes(nbytes)

    def way(name: str, num_threads: int) -> Way:
        return Way(name=name, num_directions=1, prepare=lambda nbytes: _host_copy(source, destination, nbytes, num_threads))

    num_cores = machine.physical_cores()
    return [way(ONE_THREAD, 1), *([way(f"memory, {num_cores} threads", num_cores)] if num_cores > 1 else [])]


def host_bytes(nbytes: int, *, pinned: bool = False) -> Tensor:
    """Host memory that is really there: each page has been written to."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).fill_(1)


def _host_copy(source: Tensor, destination: Tensor, nbytes: int, num_threads: int) -> Action:
    pairs = _pairs(source, destination, nbytes)

    def copy() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            for here, there in pairs:
                there.copy_(here)
        finally:
            torch.set_num_threads(before)

    return copy


def _pairs(source: Tensor, destination: Tensor, nbytes: int) -> list[tuple[Tensor, Tensor]]:
    """Views made beforehand: making one takes as long as a small copy."""
    walk = walk_nbytes(nbytes)
    return list(zip(source[:walk].split(nbytes), destination[:walk].split(nbytes), strict=True))


def _cuda_ways(device: torch.device, nbytes: int) -> list[Way]:
    """Host to device, device to host, and both, from pinned and from pageable memory."""
    on_device = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    ways = []
    for kind in ("pinned", "pageable"):
        up_from, down_to = (host_bytes(nbytes, pinned=kind == "pinned") for _ in range(2))
        up, down = (up_from, on_device[0]), (on_device[1], down_to)
        ways += [
            _cuda_way(f"host to device, {kind}", [up], device),
            _cuda_way(f"device to host, {kind}", [down], device),
            _cuda_way(f"both directions, {kind}", [up, down], device),
        ]
    return ways


def _cuda_way(name: str, routes: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Way:
    streams = [torch.cuda.Stream(device) for _ in routes]
    threads = ThreadPoolExecutor(len(routes), "copies")

    def prepare(nbytes: int) -> Action:
        queues = [
            (_pairs(source, destination, nbytes), stream) for (source, destination), stream in zip(routes, streams, strict=True)
        ]

        def copy() -> None:
            # A thread for each direction: a copy of pageable memory blocks whoever asks for it.
            list(threads.map(lambda queue: _queue_copies(*queue), queues))

        return copy

    return Way(name=name, num_directions=len(routes), prepare=prepare)


def _queue_copies(pairs: Sequence[tuple[Tensor, Tensor]], stream: torch.cuda.Stream) -> None:
    """Copy in order, and wait until the last is done."""
    with torch.cuda.stream(stream):
        for here, there in pairs:
            there.copy_(here, non_blocking=True)
    stream.synchronize()
