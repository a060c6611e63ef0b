"""How fast some of the neuron records of a layer come out of host memory, by how long the runs of kept ones are.

    kernel     a kernel on the GPU reads the kept records out of pinned memory by itself
    gather     the CPU gathers them into a (pinned) buffer, which is copied at once
    runs       each run of neighbours is a copy of its own

Without a GPU the last two run, memory to memory. Rates count kept bytes only. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.bench.spread import Spread, rates_of, repeated_seconds
from offload_sirius.bench.ways import Action, host_bytes
from offload_sirius.kernels.gather import gather, has_triton
from offload_sirius.units import KIB

RECORD_NBYTES = 32 * KIB
"""Up row and down column of a neuron of Llama-3-70B in bfloat16: 2 * 8192 * 2."""

KEEP = 0.5
"""Share of the records that is kept."""


@dataclass(frozen=True, kw_only=True)
class GatherRate:
    """One way at one length of runs."""

    way: str
    run_length: int
    """Kept records that lie beside each other."""
    kept_nbytes: int
    bytes_per_second: Spread


def run_lengths(num_kept: int) -> list[int]:
    """1, 2, 4, ... and all of them in one run."""
    return [*(1 << power for power in range((num_kept - 1).bit_length())), num_kept]


def kept_runs(num_records: int, num_kept: int, run_length: int) -> list[tuple[int, int]]:
    """First and last + 1 record of runs of that length, evenly spread; the last one is shorter where need be."""
    num_runs = -(-num_kept // run_length)
    starts = [index * num_records // num_runs for index in range(num_runs)]
    lengths = [min(run_length, num_kept - index * run_length) for index in range(num_runs)]
    return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]


class GatherBench:
    """A table of records in host memory, and what is kept of it brought to the device in every way there is."""

    def __init__(self, device: torch.device, table_nbytes: int, record_nbytes: int = RECORD_NBYTES) -> None:
        """table_nbytes: of all records, at least two. Takes one and a half times as much host memory."""
        on_cuda = device.type == "cuda"
        self._device = device
        self.num_records = table_nbytes // record_nbytes
        self.num_kept = int(self.num_records * KEEP)
        self.kept_nbytes = self.num_kept * record_nbytes
        # Words, not bytes: what moves is the same, and every kernel takes it.
        self.records = host_bytes(self.num_records * record_nbytes, pinned=on_cuda).view(torch.int64).view(self.num_records, -1)
        """[F, R] in host memory."""
        self._staging = host_bytes(self.kept_nbytes, pinned=on_cuda).view(torch.int64).view(self.num_kept, -1)
        self.kept = torch.empty_like(self._staging, device=device)
        """[N, R] on the device, overwritten by every way."""
        self.ways: dict[str, Callable[[list[tuple[int, int]]], Action]] = {"gather": self._gathered, "runs": self._run_by_run}
        if on_cuda and has_triton():
            self.ways["kernel"] = self._by_kernel
        """Name -> runs of kept records -> an action that brings them to the device, and returns when they are there."""

    def rate(self, way: str, run_length: int, num_repeats: int) -> GatherRate:
        """Measure one way."""
        action = self.ways[way](kept_runs(self.num_records, self.num_kept, run_length))
        seconds = repeated_seconds(action, num_repeats)
        rates = rates_of(self.kept_nbytes, seconds)
        return GatherRate(way=way, run_length=run_length, kept_nbytes=self.kept_nbytes, bytes_per_second=rates)

    def _gathered(self, runs: list[tuple[int, int]]) -> Action:
        indices = indices_of(runs)

        def copy() -> None:
            torch.index_select(self.records, 0, indices, out=self._staging)
            self.kept.copy_(self._staging, non_blocking=True)
            self._finish()

        return copy

    def _run_by_run(self, runs: list[tuple[int, int]]) -> Action:
        sources = [self.records[first:end] for first, end in runs]
        destinations = self.kept.split([end - first for first, end in runs])

        def copy() -> None:
            for here, there in zip(sources, destinations, strict=True):
                there.copy_(here, non_blocking=True)
            self._finish()

        return copy

    def _by_kernel(self, runs: list[tuple[int, int]]) -> Action:
        indices = indices_of(runs).to(self._device)

        def copy() -> None:
            gather(self.records, indices, self.kept)
            self._finish()

        return copy

    def _finish(self) -> None:
        """Everything that was queued is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def indices_of(runs: list[tuple[int, int]]) -> Tensor:
    """int64 [N], sorted."""
    return torch.cat([torch.arange(first, end) for first, end in runs])
