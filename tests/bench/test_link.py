"""The report on a machine's links: that every figure is there, and what does not fit into memory is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_sirius import machine
from offload_sirius.bench.link import DEPTHS, SIZES, fitting_sizes, measure_link
from offload_sirius.engine import NoProgress
from offload_sirius.errors import BudgetError
from offload_sirius.units import GIB, KIB, MIB

CPU = torch.device("cpu")


class WatchedProgress(NoProgress):
    """Adds up what it was told."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.done: list[int] = []

    def begin(self, what: str, total_nbytes: int) -> None:
        self.begun.append(total_nbytes)
        self.done.append(0)

    def advance(self, nbytes: int) -> None:
        self.done[-1] += nbytes


def test_sizes_go_from_64_kib_to_1_gib() -> None:
    assert (SIZES[0], SIZES[-1], len(SIZES)) == (64 * KIB, GIB, 8)


def test_every_figure_is_measured_and_told_as_progress(short_walks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: 2)
    (tmp_path / "file").write_bytes(bytes(100_000))
    progress = WatchedProgress()
    report = measure_link(CPU, [64 * KIB, 512 * KIB], tmp_path / "file", progress, num_repeats=2)
    assert [(rate.way, rate.nbytes) for rate in report.copies] == [
        (f"memory, {threads}", nbytes) for threads in ("1 thread", "2 threads") for nbytes in (64 * KIB, 512 * KIB)
    ]
    assert [rate.depth for rate in report.disk.rates] == list(DEPTHS)
    num_kept = short_walks // (32 * KIB) // 2
    assert [(rate.way, rate.run_length) for rate in report.gathers] == [
        (way, length) for way in ("gather", "runs") for length in (1, 2, num_kept)
    ]
    rates: list[Any] = [*report.copies, *report.disk.rates, *report.gathers]
    for rate in rates:
        assert 0 < rate.bytes_per_second.lowest <= rate.bytes_per_second.median <= rate.bytes_per_second.highest
    assert progress.done == progress.begun
    assert progress.begun[1] == 2 * 3 * (short_walks + 512 * KIB)
    assert (report.device, report.disk.path) == ("cpu", str(tmp_path / "file"))


def test_sizes_for_which_there_is_no_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_host_nbytes", lambda: 2 * GIB)
    assert fitting_sizes(SIZES, CPU) == [64 * KIB << power for power in range(0, 13, 2)]
    assert fitting_sizes([512 * MIB, 513 * MIB], CPU) == [512 * MIB]


def test_a_machine_without_room_for_the_smallest_is_told_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_host_nbytes", lambda: 512 * MIB)
    with pytest.raises(BudgetError) as caught:
        fitting_sizes([64 * KIB], CPU)
    assert str(caught.value) == (
        "buffers of 256.00 MiB are needed to measure copies of 64.00 KiB, there is room for 128.00 MiB; free some memory"
    )
