"""Gathering: which records are kept, and that every way brings exactly those."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.bench.gather import GatherBench, indices_of, kept_runs, run_lengths

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_kept", "lengths"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_runs_double_up_to_all_records(num_kept: int, lengths: list[int]) -> None:
    assert run_lengths(num_kept) == lengths


@pytest.mark.parametrize(
    ("run_length", "runs"),
    [(1, [(0, 1), (2, 3), (5, 6), (7, 8)]), (2, [(0, 2), (5, 7)]), (3, [(0, 3), (5, 6)]), (4, [(0, 4)])],
)
def test_runs_are_spread_evenly(run_length: int, runs: list[tuple[int, int]]) -> None:
    assert kept_runs(10, 4, run_length) == runs


@given(num_kept=st.integers(1, 200), odd=st.booleans(), data=st.data())
def test_of_twice_as_many_records_any_run_length_keeps_so_many_different_ones(
    num_kept: int, odd: bool, data: st.DataObject
) -> None:
    num_records = 2 * num_kept + odd
    indices = indices_of(kept_runs(num_records, num_kept, data.draw(st.integers(1, num_kept)))).tolist()
    assert len(indices) == num_kept
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < num_records


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
def test_every_way_brings_the_kept_records_in_order(device: torch.device) -> None:
    bench = GatherBench(device, 21 * 64, record_nbytes=64)
    assert (bench.num_records, bench.num_kept, bench.kept_nbytes) == (21, 10, 640)
    bench.records.copy_(torch.arange(21 * 8).view(21, 8))
    for way, prepare in bench.ways.items():
        for run_length in run_lengths(bench.num_kept):
            runs = kept_runs(bench.num_records, bench.num_kept, run_length)
            bench.kept.fill_(-1)
            prepare(runs)()
            assert torch.equal(bench.kept.cpu(), bench.records[indices_of(runs)]), (way, run_length)


def test_without_a_gpu_there_is_no_kernel_to_measure() -> None:
    assert list(GatherBench(CPU, 128, record_nbytes=64).ways) == ["gather", "runs"]


def test_a_rate_counts_the_kept_bytes() -> None:
    rate = GatherBench(CPU, 8 * 64, record_nbytes=64).rate("runs", 2, num_repeats=3)
    assert (rate.way, rate.run_length, rate.kept_nbytes) == ("runs", 2, 4 * 64)
    assert 0 < rate.bytes_per_second.lowest <= rate.bytes_per_second.median <= rate.bytes_per_second.highest
