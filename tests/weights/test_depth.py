"""Finding the queue depth that a disk likes best."""

from __future__ import annotations

from offload_sirius.weights.depth import DepthTuner


def run(tuner: DepthTuner, rates: dict[int, float], num_windows: int) -> list[int]:
    """Read windows of 100 bytes from a disk with these bytes per second at each depth; the depths that were used."""
    busy_seconds, used = 0.0, []
    for _ in range(num_windows):
        used.append(tuner.depth)
        busy_seconds += 100 / rates[tuner.depth]
        tuner.record(100, busy_seconds)
    return used


def test_all_readers_are_used_first_and_depths_are_tried_in_turn() -> None:
    assert run(DepthTuner(16, 100), {16: 5, 8: 5, 4: 5, 2: 5}, 12) == [16, 8, 4, 2] * 3


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
    tuner, busy_seconds = DepthTuner(16, 100), 0.0
    for slower in (1, 3, 9):
        for rate in (90, 60, 50, 40):
            busy_seconds += 100 * slower / rate
            tuner.record(100, busy_seconds)
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
    tuner.restart(1000.0)
    tuner.record(50, 1001.0)
    assert tuner.depth == 16
    busy_seconds = 1001.0
    for rate in (120, 60, 60, 40) * 3:
        busy_seconds += 100 / rate
        tuner.record(100, busy_seconds)
    assert tuner.depth == 16
