"""The guard against ratios that become worse: what is recorded, what is compared with which record, and what fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = {"cpu": "a cpu", "cores": 2}
ELSEWHERE = {"cpu": "another", "cores": 2}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    import quick

    yield quick
    sys.path.remove(folder)


@pytest.fixture
def quick(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """On a machine of a known name, with records in a folder of its own."""
    facts = {"date": "2026-11-20", "machine": HERE}
    monkeypatch.setattr(module, "machine_facts", lambda: facts)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


Run = Callable[..., int]


@pytest.fixture
def run(quick: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Its main, with one part that measures these ratios one after the other."""

    def main(*flags: str, ratios: list[float], portable: bool = True) -> int:
        left = iter(ratios)

        def measure() -> Iterator[object]:
            return iter([quick.Measured(name="ratio", ratio=next(left), ceiling=1.0, portable=portable)])

        monkeypatch.setattr(quick, "PARTS", {"part": quick.Part(measure=measure, names=("ratio",))})
        monkeypatch.setattr(sys, "argv", ["quick.py", *flags])
        status = int(quick.main())
        assert next(left, None) is None, "all were asked for"
        return status

    return main


def write_record(folder: Path, date: str, machine: dict[str, object], median: float) -> None:
    ratio = {"median": median, "spread": 0.1, "runs": [median], "ceiling": 1.0}
    (folder / f"quick-{date}.json").write_text(json.dumps({"ratios": {"ratio": ratio}, "machine": machine}))


def test_a_record_has_the_median_and_the_distance_of_the_runs(run: Run, tmp_path: Path) -> None:
    assert run("--record", "--runs", "3", ratios=[2.0, 2.3, 2.1]) == 0
    [file] = tmp_path.iterdir()
    assert file.name == "quick-2026-11-20.json"
    ratio = json.loads(file.read_text())["ratios"]["ratio"]
    assert ratio["median"] == 2.1
    assert ratio["spread"] == pytest.approx(0.3)
    assert ratio["runs"] == [2.0, 2.3, 2.1]


def test_runs_that_hardly_differ_have_two_percent_of_spread(quick: ModuleType) -> None:
    one = {"ratio": quick.Measured(name="ratio", ratio=2.0, ceiling=1.0)}
    assert quick.recorded([one, one])["ratio"].spread == pytest.approx(0.04)


def test_worse_by_more_than_the_spread_fails_if_it_is_worse_twice(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path, "2026-11-19", HERE, 1.0)
    assert run(ratios=[0.5]) == 0, "better"
    assert run(ratios=[1.09]) == 0, "within the spread"
    assert run(ratios=[1.2, 1.05]) == 0, "a moment of the machine"
    capsys.readouterr()
    assert run(ratios=[1.2, 1.3]) == 1
    found = capsys.readouterr().out
    assert "ratio                    1.200, recorded 1.000 +- 0.100, at best 1.000: WORSE\n" in found
    assert "1 of 1 ratios are worse than recorded\n" in found


def test_the_newest_record_of_this_machine_counts(quick: ModuleType, tmp_path: Path) -> None:
    for date, machine, median in (("2026-11-17", HERE, 1.0), ("2026-11-18", HERE, 2.0), ("2026-11-19", ELSEWHERE, 3.0)):
        write_record(tmp_path, date, machine, median)
    (tmp_path / "quick-2026-11-20.partial.json").write_text("{}")
    path, ratios, same = quick.newest_record(tmp_path, HERE)
    assert (path.name, ratios["ratio"].median, same) == ("quick-2026-11-18.json", 2.0, True)


def test_beside_a_record_of_another_machine_only_ratios_of_the_link_fail(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path, "2026-11-19", ELSEWHERE, 1.0)
    assert run(ratios=[1.2, 1.3]) == 1
    assert run(ratios=[1.2], portable=False) == 0
    found = capsys.readouterr().out
    assert "recorded in quick-2026-11-19.json: another machine; only ratios that a link bounds can fail\n" in found
    assert "at best 1.000: another machine\n" in found


def test_what_was_not_recorded_does_not_fail(
    run: Run, quick: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quick-2026-11-19.json").write_text(json.dumps({"ratios": {}, "machine": HERE}))
    assert run(ratios=[9.0]) == 0
    assert "not recorded" in capsys.readouterr().out


def test_what_was_recorded_and_cannot_be_measured_fails_and_no_record_is_kept_without_it(
    quick: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Iterator[object]:
        raise quick.ConfigError("there is none")
        yield

    part = quick.Part(measure=absent, names=("ratio", "new"))
    monkeypatch.setattr(quick, "PARTS", {"part": part, "other": part})
    write_record(tmp_path, "2026-11-19", HERE, 1.0)
    monkeypatch.setattr(sys, "argv", ["quick.py", "--only", "part"])
    assert quick.main() == 1
    found = capsys.readouterr().out
    assert "part: not measured: there is none\n" in found
    assert "ratio: recorded, and NOT MEASURED\n" in found
    assert "new: recorded" not in found
    for flags, error in (([], "not measured, so nothing is recorded: ratio, new"), (["--only", "part"], "leaves out other;")):
        monkeypatch.setattr(sys, "argv", ["quick.py", "--record", *flags])
        assert quick.main() == 2
        assert error in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_runs_that_differ_much_are_warned_of(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--record", "--runs", "2", ratios=[1.0, 1.4]) == 0
    assert "warning: ratio: its runs are 33% apart; record it again on a quiet machine\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no quick-????-??-??.json to compare with; make one with --record"),
        ("{}", "is no record of ratios (KeyError); remove it, or make one with --record"),
        ("no json", "is no record of ratios (JSONDecodeError); remove it, or make one with --record"),
    ],
)
def test_without_a_record_there_is_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, found: str
) -> None:
    if content is not None:
        (tmp_path / "quick-2026-11-19.json").write_text(content)
    assert run(ratios=[]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith(f"{found}\n")
    assert error.count("\n") == 1


def test_a_small_shape_is_recorded_and_compared(quick: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quick, "SHAPE", "synthetic:tiny")
    monkeypatch.setattr(quick, "NUM_PASSES", 2)
    monkeypatch.setattr(quick, "PARTS", {"drafts": quick.PARTS["drafts"]})
    monkeypatch.setattr(sys, "argv", ["quick.py", "--record", "--runs", "1"])
    assert quick.main() == 0
    result = json.loads((tmp_path / "quick-2026-11-20.json").read_text())
    assert list(result["ratios"]) == ["tree of 64", "draft step", "forced drafts"]
    # Attention blocks and half of the neurons in 15 steps, all in one: of the bytes of 15.2 tokens. Norms are in both.
    layer, kept = 2 * (64 + 64 * 128 + 64 * 64 + 64 + 3 * 176 * 64), 2 * (64 + 64 * 128 + 64 * 64 + 64 + 3 * 88 * 64)
    assert result["ratios"]["forced drafts"]["ceiling"] == pytest.approx((15 * kept + layer) / 15.2 / layer)
