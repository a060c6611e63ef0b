"""The suite for machines with a GPU: that its commands exist, that it survives what they do, and what it runs without one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from offload_sirius.cli.app import app

ROOT = Path(__file__).parents[1]
RESIDENT = "resident drafts, 70B int8-sized, 24 GiB"


@pytest.fixture(scope="module")
def suite() -> Iterator[ModuleType]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "tools" / "gpu_suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def options_of(command: list[str]) -> set[str]:
    """Flags of a command of the program or of a script."""
    if command[1] == "-m":
        found = typer.main.get_command(app)
        for word in command[3:5]:
            found = found.commands[word]  # type: ignore[attr-defined]
        return {option for parameter in found.params for option in parameter.opts}
    shown = subprocess.run([*command[:2], "--help"], capture_output=True, text=True, check=True)
    return {word.rstrip(",") for word in shown.stdout.split() if word.startswith("--")}


def test_every_part_is_a_command_with_flags_that_exist(suite: ModuleType) -> None:
    known: dict[tuple[str, ...], set[str]] = {}
    for part in suite.PARTS:
        command = list(part.command)
        key = tuple(command[:5]) if command[1] == "-m" else tuple(command[:2])
        known.setdefault(key, options_of(command))
        assert {word for word in command[2:] if word.startswith("--")} <= known[key], part.name


def test_the_files_with_gpu_tests_are_those_it_names(suite: ModuleType) -> None:
    marked = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.gpu" in file.read_text(encoding="utf-8")
    }
    assert marked - {"tests/test_gpu_suite.py"} == set(suite.GPU_TESTS)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("print('{}')", "KeyError"),
        ("print('no json')", "its last line is no JSON"),
        ("import sys; sys.exit('broken')", "exit status 1: broken"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_a_part_that_fails_is_a_row_that_says_so(suite: ModuleType, program: str, found: str, tmp_path: Path) -> None:
    part = suite.Part(
        name="part", command=(sys.executable, "-c", program), judge=suite.judge_ratio(most=1), needs_cuda=False, limit_seconds=1.0
    )
    outcome = suite.run_part(part, has_cuda=False, seconds_left=100.0, folder=tmp_path)
    assert outcome.held is False
    assert found in outcome.found


def test_what_falls_short_does_not_hold(suite: ModuleType) -> None:
    figures = {"link_share": 0.96, "seconds": {"median": 1.0}, "pinned_nbytes": 100, "pageable_nbytes": 0, "pass_nbytes": 100}
    assert suite.judge_stream(0.95)(figures)[0]
    assert not suite.judge_stream(0.97)(figures)[0]
    assert not suite.judge_stream(0.95, most_pinned=1.02)(figures | {"pinned_nbytes": 103})[0]
    assert not suite.judge_stream(0.95, most_pinned=1.02)(figures | {"pageable_nbytes": 1})[0]


def test_resident_passes_that_take_longer_than_their_bytes_do_not_hold(suite: ModuleType) -> None:
    figures = {"is_recorded": True, "draft_ratio": 1.3, "launched_ratio": 2.0, "correction_ratio": 1.04}
    assert suite.judge_hot_passes(figures)[0]
    for worse in ({"is_recorded": False}, {"draft_ratio": 1.36}, {"correction_ratio": 1.06}):
        assert not suite.judge_hot_passes(figures | worse)[0]


def test_products_that_are_too_slow_for_one_token_or_for_many_do_not_hold(suite: ModuleType) -> None:
    rows = [{"num_tokens": 1, "share": 0.7}, {"num_tokens": 1, "share": 0.9}, {"num_tokens": 64, "share": 0.6}]
    assert suite.judge_products({"rows": rows})[0]
    for slower in ({"num_tokens": 1, "share": 0.69}, {"num_tokens": 64, "share": 0.59}):
        assert not suite.judge_products({"rows": [*rows, slower]})[0]
    assert not suite.judge_products({"rows": rows[:2]})[0], "nothing is known of many tokens"


def test_scripted_drafts_that_bring_something_over_the_link_do_not_hold(suite: ModuleType) -> None:
    row = {"acceptance": 0.8, "draft_nbytes": 0, "draft_seconds": 0.02, "correction_seconds": 0.5, "tokens_per_second": 5.25}
    held, found = suite.judge_scripted({"rows": [row]})
    assert held
    assert found == "a draft step 20.0 ms, a correction 0.500 s; tokens/s: 5.2 at 80% of drafted tokens standing"
    assert not suite.judge_scripted({"rows": [row, row | {"draft_nbytes": 1}]})[0]


def test_the_part_of_products_measures_a_small_matrix_without_a_gpu(suite: ModuleType, tmp_path: Path) -> None:
    [part] = [part for part in suite.PARTS if part.judge is suite.judge_products]
    command = (*part.command, "--device", "cpu", "--rows", "512", "--width", "256")
    rows = suite.figures_of(command, 120.0, tmp_path)["rows"]
    assert [(row["what"], row["num_tokens"]) for row in rows] == 2 * [("linear", 1), ("down", 1), ("linear", 64), ("down", 64)]
    # Integers, scales, zeros, padding to 16 bytes.
    int8, int4 = 512 * (256 + 4 * 2 + 8), 512 * (128 + 2 * 2 + 2 + 10)
    assert [round(row["bytes_per_second"] * row["seconds"]) for row in rows] == 4 * [int8] + 4 * [int4]


def test_products_without_a_gpu_are_one_line(suite: ModuleType) -> None:
    ran = subprocess.run(suite.script("gpu_products")[:2], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: no CUDA device; this question is about kernels of a GPU\n"


def test_the_part_of_scripted_acceptance_measures_a_small_shape_without_a_gpu(suite: ModuleType, tmp_path: Path) -> None:
    [part] = [part for part in suite.PARTS if part.judge is suite.judge_scripted]
    small = {suite.SEVENTY: "synthetic:small?dtype=F32", "24GiB": "60MiB"}
    command = (*(small.get(word, word) for word in part.command), "--device", "cpu", "--link-gbps", "0.5")
    figures = suite.figures_of(command, 120.0, tmp_path)
    assert suite.judge_scripted(figures)[0]
    windows = {row["acceptance"]: row["aal"] for row in figures["rows"]}
    assert list(windows) == [0.8, 0.9, 0.95]
    for acceptance, aal in windows.items():
        scripted = (1 - acceptance**16) / (1 - acceptance)
        assert 6 * scripted - 1 < 6 * aal <= 6 * scripted + 0.01, "six windows give whole tokens"
    cold = 8 * (688 - figures["num_hot"]) * 3 * (128 + 2 * 2 + 2 + 10)
    assert figures["rows"][0]["correction_nbytes"] == cold


def test_the_part_of_resident_passes_measures_a_small_shape_without_a_gpu_and_leaves_its_trace(
    suite: ModuleType, tmp_path: Path
) -> None:
    [part] = [part for part in suite.PARTS if part.judge is suite.judge_hot_passes]
    small = {f"{suite.SEVENTY}?layers=40": "synthetic:small?dtype=F32", "24GiB": "60MiB"}
    command = (*(small.get(word, word) for word in part.command), "--device", "cpu", "--link-gbps", "0.5")
    figures = suite.figures_of(command, 120.0, tmp_path)
    neurons = json.loads((tmp_path / "gpu-suite-resident-drafts.trace.json").read_text())["traceEvents"]
    assert any("cold neurons" in event["name"] for event in neurons)
    assert figures["is_recorded"] is False
    assert figures["cold_nbytes"] == 8 * 344 * 3 * 256 * 4
    held, found = suite.judge_hot_passes(figures)
    assert not held, "on a CPU nothing is recorded"
    assert found.startswith("a draft takes ")


def test_resident_passes_without_a_gpu_and_without_a_link_are_one_line(suite: ModuleType) -> None:
    command = [*suite.script("hot_passes")[:2], "--device", "cpu"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: no CUDA device: give --link-gbps, and a small --model, to emulate the link of one\n"


def test_an_answer_that_is_not_mode_full_s_does_not_hold(suite: ModuleType) -> None:
    rows = [{"name": "full", "accept": None, "num_identical": 2}, {"name": "griffin", "accept": "exact", "num_identical": 2}]
    assert suite.judge_exact({"num_prompts": 2, "rows": rows})[0]
    assert not suite.judge_exact({"num_prompts": 2, "rows": [rows[0], rows[1] | {"num_identical": 1}]})[0]
    assert not suite.judge_exact({"num_prompts": 2, "rows": rows[:1]})[0]


def test_growth_the_paper_s_table_and_quality_hold_as_their_figures_say(suite: ModuleType) -> None:
    held = {"what": "tree", "found": "1.02", "holds": True}
    assert suite.judge_scale({"held": [held]}) == (True, "tree: 1.02")
    assert not suite.judge_scale({"held": [held, held | {"holds": False}]})[0]
    # 15 drafts of 0.5884 of a pass and one pass give 15 tokens at 0.6551 each.
    paper = {"group": "paper", "name": "sirius, the paper's AAL", "ratio_to_full": 0.674, "window": 16, "aal": 15.0}
    hot = {"group": "int4 on the card", "name": "hot set, the paper's AAL", "ratio_to_full": 0.1}
    assert suite.judge_paper({"table": {"rows": [paper, hot]}})[0]
    assert not suite.judge_paper({"table": {"rows": [paper | {"ratio_to_full": 0.676}, hot]}})[0]
    assert not suite.judge_paper({"table": {"rows": [paper, hot | {"ratio_to_full": 0.31}]}})[0]
    rows = [{"accept": None, "identical": {"value": 0.0}}, {"accept": "exact", "identical": {"value": 1.0}}]
    assert suite.judge_quality({"rows": rows})[0]
    assert not suite.judge_quality({"rows": [*rows, {"accept": "exact", "identical": {"value": 0.9}}]})[0]
    assert not suite.judge_quality({"rows": rows[:1]})[0]


def test_a_part_that_is_run_again_leaves_the_others_of_the_same_gpu_in_the_file(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"graphs": True, "link": True}

    def run_part(part: Any, *_: Any) -> Any:
        return suite.Outcome(name=part.name, held=held[part.name], found="", seconds=1.0, figures=None)

    def verdicts(*names: str, gpu: str | None = None) -> dict[str, bool | None]:
        facts = {"date": "2026-11-26", "machine": {"gpu": gpu}, "versions": {"commit": "abc"}}
        monkeypatch.setattr(suite, "machine_facts", lambda: facts)
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path), "--only", *names])
        suite.main()
        [file] = tmp_path.iterdir()
        return {part["name"]: part["held"] for part in json.loads(file.read_text())["parts"]}

    monkeypatch.setattr(suite, "run_part", run_part)
    assert verdicts("graphs", "link") == {"link": True, "graphs": True}
    held["link"] = False
    assert verdicts("link") == {"link": False, "graphs": True}
    held["link"] = None
    assert verdicts("link") == {"link": False, "graphs": True}, "what is left out says nothing new"
    assert verdicts("link", gpu="another") == {"link": None}


def test_without_a_gpu_its_parts_are_left_out_and_the_others_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_suite.py"), "--out", str(tmp_path), "--only", "graphs", RESIDENT]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert ran.returncode == 0, ran.stderr
    [file] = tmp_path.iterdir()
    assert [part["held"] for part in json.loads(file.read_text())["parts"]] == [None, None]
    assert ran.stdout.count("left out: no CUDA device") == 2
