"""Finding the queue depth that a disk likes best."""

from __future__ import annotations

from collections.abc import Sequence

from offload_sirius.weights.depth import DepthTuner


def run(tuner: DepthTuner, rates: dict[int, float], num_windows: int) -> list[int]:
    """Read windows of 100 bytes from a disk with these bytes per second at each depth; the depths that were used."""
    return run_windows(tuner, [rates] * num_windows)


def run_windows(tuner: DepthTuner, windows: Sequence[dict[int, float]], busy_seconds: float = 0.0) -> list[int]:
    """The same of a disk that changes. Behind every change of the depth, reads that were under way end all at once."""
    used = list[int]()
    for rates in windows:
        depth = tuner.depth
        used.append(depth)
        busy_seconds += 100 / rates[depth]
        tuner.record(100, busy_seconds)
        for _ in range(depth if tuner.depth != depth else 0):
            tuner.record(90, busy_seconds := busy_seconds + 1e-3)
    return used


def test_all_readers_are_used_first_and_depths_are_tried_in_turn() -> None:
    assert run(DepthTuner(16, 100), {16: 5, 8: 5, 4: 5, 2: 5}, 8) == [16, 8, 4, 2] * 2


def test_the_fastest_depth_is_kept() -> None:
    tuner = DepthTuner(16, 100)
    run(tuner, {16: 50, 8: 60, 4: 80, 2: 40}, 12)
    assert tuner.depth == 4
    assert tuner.best_bytes_per_second == 80


def test_of_depths_that_are_about_as_fast_the_smallest_is_kept() -> None:
    tuner = DepthTuner(16, 100)
    run(tuner, {16: 54, 8: 53, 4: 52, 2: 40}, 12)
    assert tuner.depth == 4


def test_a_disk_that_becomes_slower_during_the_trials_is_no_reason_for_a_depth() -> None:
    tuner, rates = DepthTuner(16, 100), {16: 90, 8: 60, 4: 50, 2: 40}
    run_windows(tuner, [{depth: rate / slower for depth, rate in rates.items()} for slower in (1, 5) for _ in rates])
    assert tuner.depth == 16


def test_a_window_that_is_not_full_decides_nothing() -> None:
    tuner = DepthTuner(16, 100)
    tuner.record(99, 1.0)
    assert tuner.best_bytes_per_second is None
    assert tuner.depth == 16


def test_one_reader_has_one_depth() -> None:
    assert set(run(DepthTuner(1, 100), {1: 5}, 5)) == {1}


def test_trials_begin_anew_where_the_work_becomes_another() -> None:
    tuner = DepthTuner(16, 100)
    run(tuner, {16: 10, 8: 60, 4: 80, 2: 40}, 12)
    assert tuner.depth == 4
    tuner.restart(1000.0)
    for index in range(4):
        assert tuner.depth == 16
        tuner.record(90, 1000.0 + 1e-3 * index)
    run_windows(tuner, [{16: 120, 8: 60, 4: 60, 2: 40}] * 12, 1001.0)
    assert tuner.depth == 16
