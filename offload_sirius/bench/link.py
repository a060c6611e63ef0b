"""How fast this machine's links are at best: copies of every size, the disk at every queue depth, gathered neuron records.

The ceilings that a streamed pass is held against. Medians of several measurements, with their
spread. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from offload_sirius import machine
from offload_sirius.bench.gather import GatherBench, GatherRate, run_lengths
from offload_sirius.bench.spread import NUM_REPEATS, Spread, rates_of, repeated_seconds
from offload_sirius.bench.ways import PINNED_UPLOAD, WALK_NBYTES, Way, arena_nbytes, num_host_arenas, walk_nbytes, ways_of
from offload_sirius.engine.progress import Progress
from offload_sirius.errors import BudgetError
from offload_sirius.units import KIB, MIB, format_size
from offload_sirius.weights.disk_rate import file_to_read, read_seconds, reads_directly

SIZES = tuple(64 * KIB << power for power in range(0, 15, 2))
"""64 KiB, 256 KiB, ... 1 GiB: from a neuron record or two to a whole layer."""

DEPTHS = (1, 2, 4, 8, 16, 32)
"""Reads of the disk at a time."""

READ_NBYTES = 8 * MIB
"""One of them."""

DISK_SAMPLE_NBYTES = 256 * MIB
"""Read in one measurement, at most."""

FREE_SHARE = 0.5
"""Of the free memory, that buffers may take."""


@dataclass(frozen=True, kw_only=True)
class CopyRate:
    """One way at one size."""

    way: str
    nbytes: int
    """Of one copy."""
    bytes_per_second: Spread
    """Of both directions together, where both are used."""


@dataclass(frozen=True, kw_only=True)
class DepthRate:
    """The disk at one queue depth."""

    depth: int
    """Reads at a time."""
    read_nbytes: int
    bytes_per_second: Spread


@dataclass(frozen=True, kw_only=True)
class DiskRates:
    """One file, read at several queue depths."""

    path: str
    direct: bool
    """False: through the page cache, as the file system refuses O_DIRECT."""
    rates: tuple[DepthRate, ...]


@dataclass(frozen=True, kw_only=True)
class LinkReport:
    """Everything `bench link` measures."""

    device: str
    copies: tuple[CopyRate, ...]
    disk: DiskRates
    gathers: tuple[GatherRate, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_link(
    device: torch.device, sizes: Iterable[int], path: Path, progress: Progress, num_repeats: int = NUM_REPEATS
) -> LinkReport:
    """Measure. sizes: bytes of a copy, all of which fit (see fitting_sizes); path: as measure_disk takes it."""
    disk = _disk_rates(path, progress, num_repeats)  # first, as it is where a path can be wrong
    copies = _copy_rates(device, sorted(sizes), progress, num_repeats)
    gathers = _gather_rates(device, progress, num_repeats)
    return LinkReport(device=str(device), copies=copies, disk=disk, gathers=gathers)


def fitting_sizes(sizes: Iterable[int], device: torch.device) -> list[int]:
    """Those for which there is memory, half of what is free at most. Raises BudgetError where it is none."""
    sizes = sorted(sizes)
    room = int(machine.free_host_nbytes() * FREE_SHARE) // num_host_arenas(device)
    if device.type == "cuda":
        room = min(room, int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE) // 2)
    fitting = [size for size in sizes if arena_nbytes(size) <= room]
    if not fitting:
        raise BudgetError(
            f"buffers of {format_size(arena_nbytes(sizes[0]))} are needed to measure copies of {format_size(sizes[0])}, "
            f"there is room for {format_size(room)}; free some memory"
        )
    return fitting


def pinned_upload_bytes_per_second(device: torch.device) -> float:
    """The best rate at which a CUDA device can be filled from pinned memory."""
    sizes = fitting_sizes((64 * MIB, 256 * MIB), device)
    way = next(each for each in ways_of(device, sizes[-1]) if each.name == PINNED_UPLOAD)
    return max(copy_rate(way, size).bytes_per_second.median for size in sizes)


def copy_rate(way: Way, nbytes: int, num_repeats: int = NUM_REPEATS) -> CopyRate:
    """Measure one way at one size."""
    seconds = repeated_seconds(way.prepare(nbytes), num_repeats)
    rates = rates_of(way.num_directions * walk_nbytes(nbytes), seconds)
    return CopyRate(way=way.name, nbytes=nbytes, bytes_per_second=rates)


def _copy_rates(device: torch.device, sizes: list[int], progress: Progress, num_repeats: int) -> tuple[CopyRate, ...]:
    ways = ways_of(device, sizes[-1])
    each_nbytes = {size: (num_repeats + 1) * walk_nbytes(size) for size in sizes}
    progress.begin("copies", sum(each_nbytes.values()) * sum(way.num_directions for way in ways))
    try:
        rates = []
        for way in ways:
            for size in sizes:
                rates.append(copy_rate(way, size, num_repeats))
                progress.advance(way.num_directions * each_nbytes[size])
        return tuple(rates)
    finally:
        progress.end()


def _gather_rates(device: torch.device, progress: Progress, num_repeats: int) -> tuple[GatherRate, ...]:
    bench = GatherBench(device, WALK_NBYTES)
    lengths = run_lengths(bench.num_kept)
    each_nbytes = (num_repeats + 1) * bench.kept_nbytes
    progress.begin("gathered records", len(bench.ways) * len(lengths) * each_nbytes)
    try:
        rates = []
        for way in bench.ways:
            for length in lengths:
                rates.append(bench.rate(way, length, num_repeats))
                progress.advance(each_nbytes)
        return tuple(rates)
    finally:
        progress.end()


def _disk_rates(path: Path, progress: Progress, num_repeats: int) -> DiskRates:
    with file_to_read(path) as file:
        nbytes = min(file.stat().st_size, DISK_SAMPLE_NBYTES)
        progress.begin(f"reading {file}", num_repeats * len(DEPTHS) * nbytes)
        try:
            seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
            # In turn, and not one depth after the other: a disk's speed changes from minute to minute.
            for _ in range(num_repeats):
                for depth in DEPTHS:
                    seconds[depth].append(read_seconds([file], nbytes, depth, READ_NBYTES))
                    progress.advance(nbytes)
        finally:
            progress.end()
        rates = [
            DepthRate(depth=each, read_nbytes=READ_NBYTES, bytes_per_second=rates_of(nbytes, seconds[each])) for each in DEPTHS
        ]
        return DiskRates(path=str(path), direct=reads_directly(file), rates=tuple(rates))
