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


def test_all_readers_are_used_first_and_each_depth_is_tried_twice() -> None:
    assert run(DepthTuner(16, 100), {16: 5, 8: 5, 4: 5, 2: 5}, 8) == [16, 16, 8, 8, 4, 4, 2, 2]


def test_the_fastest_depth_is_kept() -> None:
    tuner = DepthTuner(16, 100)
    run(tuner, {16: 50, 8: 60, 4: 80, 2: 40}, 8)
    assert tuner.depth == 4
    assert tuner.best_bytes_per_second == 80


def test_a_smaller_depth_that_is_hardly_faster_is_taken_for_chance() -> None:
    tuner = DepthTuner(16, 100)
    run(tuner, {16: 50, 8: 52, 4: 54, 2: 40}, 8)
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
    run(tuner, {16: 10, 8: 60, 4: 80, 2: 40}, 8)
    tuner.restart(1000.0)
    tuner.record(50, 1001.0)
    assert tuner.depth == 16
    busy_seconds = 1001.0
    for rate in (90, 90, 60, 60, 80, 80, 40, 40):
        busy_seconds += 100 / rate
        tuner.record(100, busy_seconds)
    assert tuner.depth == 16
