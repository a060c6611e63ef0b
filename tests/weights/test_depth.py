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
    assert run(DepthTuner(16, 100), {16: 5, 8: 5, 4: 5}, 6) == [16, 16, 8, 8, 4, 4]


def test_the_fastest_depth_is_kept() -> None:
    tuner = DepthTuner(16, 100)
    run(tuner, {16: 50, 8: 80, 4: 40}, 6)
    assert tuner.depth == 8
    assert tuner.best_bytes_per_second == 80


def test_a_smaller_depth_that_is_hardly_faster_is_taken_for_chance() -> None:
    tuner = DepthTuner(16, 100)
    run(tuner, {16: 50, 8: 54, 4: 40}, 6)
    assert tuner.depth == 16


def test_a_window_that_is_not_full_decides_nothing() -> None:
    tuner = DepthTuner(16, 100)
    tuner.record(99, 1.0)
    assert tuner.best_bytes_per_second is None
    assert tuner.depth == 16


def test_one_reader_has_one_depth() -> None:
    assert set(run(DepthTuner(1, 100), {1: 5}, 5)) == {1}
