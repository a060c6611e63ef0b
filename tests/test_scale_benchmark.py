"""Fits of how costs grow, what must hold of them, and a run of the script on small shapes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.rates import assumed_cpu_rates


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    import scale

    yield scale
    sys.path.remove(folder)


def point(scale: ModuleType, **changes: Any) -> Any:
    """Of a sweep of layers, as predicted, but for what is given."""
    known: dict[str, Any] = {
        "sweep": "layers",
        "setting": "link",
        "what": "token",
        "size": 4,
        "nbytes": 100,
        "seconds": 1.0,
        "all_seconds": [1.0, 1.0],
        "predicted_seconds": 1.0,
        "link_share": 1.0,
        "num_disturbed": 0,
    }
    return scale.Point(**known | changes)


@given(exponent=st.floats(-3, 3), factor=st.floats(1e-6, 1e3))
def test_a_power_law_is_found_again(scale: ModuleType, exponent: float, factor: float) -> None:
    sizes = [1.0, 3.0, 10.0]
    found = scale.power_law(sizes, [[factor * size**exponent] * 2 for size in sizes])
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert found.largest_residual < 1e-6


def test_the_exponents_of_single_rounds_are_the_interval(scale: ModuleType) -> None:
    found = scale.power_law([1, 2, 4], [[1, 1, 1], [2, 1, 4], [4, 1, 16]])
    assert (found.lowest, found.exponent, found.highest) == pytest.approx((0, 1, 2))


def test_a_line_is_found_again_and_its_worst_point_said(scale: ModuleType) -> None:
    found = scale.line([0, 1, 100], [[5], [7], [205]])
    assert (found.fixed, found.slope) == pytest.approx((5, 2))
    assert found.largest_residual < 1e-9
    assert scale.line([1, 2, 3], [[1], [1], [2]]).largest_residual > 0.1


def test_beyond_the_first_point_a_fixed_part_is_gone_and_noise_is_left_out(scale: ModuleType) -> None:
    sizes, runs = scale.beyond_first([2, 3, 4, 6], [[7.0, 7.2], [7.1, 9.0], [11.0, 11.0], [15.0, 15.0]])
    assert sizes == [2, 4]
    assert runs == [pytest.approx([3.9, 3.9]), pytest.approx([7.9, 7.9])]


def test_bytes_that_cost_more_than_their_share_do_not_hold(scale: ModuleType) -> None:
    def held(exponent: float, most: int = 800) -> bool:
        points = [
            point(scale, sweep=sweep, nbytes=nbytes, all_seconds=[nbytes**exponent])
            for sweep, nbytes in (("layers", 100), ("layers", 400), ("width", most))
        ]
        return bool(scale.linear_in_bytes(points).holds)

    assert held(1.0)
    assert not held(1.06)
    assert not held(0.94)
    assert not held(1.0, most=700), "over seven times"
    assert scale.linear_in_bytes([point(scale)]) is None


def test_trees_are_compared_turn_by_turn_and_must_have_the_same_bytes(scale: ModuleType) -> None:
    one = point(scale, sweep="nodes", size=1, all_seconds=[1.0, 2.0, 1.0])
    tree = point(scale, sweep="nodes", size=64, all_seconds=[1.1, 2.2, 1.5])
    assert scale.flat_in_nodes([one, tree]).holds
    assert not scale.flat_in_nodes([one, point(scale, sweep="nodes", size=64, all_seconds=[1.11, 2.22, 1.0])]).holds
    assert not scale.flat_in_nodes([one, point(scale, sweep="nodes", size=64, nbytes=101, all_seconds=[1.0, 2.0, 1.0])]).holds


def test_a_prediction_that_is_too_short_or_too_long_does_not_hold(scale: ModuleType) -> None:
    for predicted, holds in ((0.86, True), (1.14, True), (0.84, False), (1.16, False)):
        assert scale.as_planned([point(scale), point(scale, predicted_seconds=predicted)]).holds is holds


def test_small_shapes_are_measured_and_kept(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "measured_rates", lambda *_, **__: assumed_cpu_rates(2))
    out = tmp_path / "scale.json"
    sizes = ["--width", "128", "--passes", "1", "--quick", "--link-gbps", "2"]
    only = ["context", "layers", "window", "nodes", "batch"]
    monkeypatch.setattr(sys, "argv", ["scale.py", "--device", "cpu", "--out", str(out), *sizes, "--only", *only])
    assert scale.main() in (0, 1), "what must hold may not, of so small shapes"
    result = json.loads(out.read_text())
    assert list(tmp_path.iterdir()) == [out], "nothing unfinished is left"

    def nbytes(sweep: str, what: str) -> dict[float, int]:
        return {each["size"]: each["nbytes"] for each in result["points"] if (each["sweep"], each["what"]) == (sweep, what)}

    layers = nbytes("layers", "token")
    assert list(layers) == [4, 16, 32]
    assert [each / layers[4] for each in layers.values()] == [1, 4, 8]
    full, verified = nbytes("batch", "full step"), nbytes("nodes", "correction")
    assert set(full.values()) == set(verified.values()) == set(nbytes("nodes", "full step").values())
    assert len(set(full.values())) == 1, "as many answers and nodes as there are take the same bytes"
    windows, corrections = nbytes("window", "window"), nbytes("window", "correction")
    assert set(corrections.values()) == set(full.values())
    draft = windows[2] - corrections[2]
    assert [windows[size] - corrections[size] for size in (8, 32)] == [7 * draft, 31 * draft]
    assert {each["sweep"] for each in result["fits"]} == set(only)
    assert "a tree of 64 nodes" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_one_line(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scale.py", "--device", "cuda:99"])
    assert scale.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda:99")
    assert error.count("\n") == 1


def test_no_measurements_of_a_point_are_refused(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scale.py", "--passes", "0"])
    assert scale.main() == 2
    assert capsys.readouterr().err == "error: --passes is 0; give 1 or more\n"
