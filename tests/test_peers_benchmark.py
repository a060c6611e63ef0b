"""The comparison with other systems: its arithmetic, what it makes of processes that fail, and its table with scripted ones."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from offload_sirius.cli import main
from offload_sirius_loaders import open_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
    names = ("children", "peer_table", "peer_ways", "peer_models", "peer_environments", "peers", "a_third", "gguf_copy")
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = before


def options_of(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    options: argparse.Namespace = scripts["peers"].arguments()
    return options


class Processes:
    """In place of real ones: what each system prints, and how it fails."""

    def __init__(self, children: ModuleType) -> None:
        self.children = children
        self.commands: list[str] = []
        self.no_pack: str | None = None
        self.seconds = {"--mode full": 1.0, "--mode sirius": 3.0, "run_llama_cpp": 1.5, "run_airllm": 5.0, "run_accelerate": 0.1}

    def run(self, command: tuple[str, ...], **settings: Any) -> Any:
        words = " ".join(command)
        self.commands.append(words)
        if "--memory" in command and int(command[command.index("--memory") + 1]) > 500:
            return self.child(None, "killed for want of memory")
        if "pack" in command and self.no_pack is not None:
            return self.child(None, self.no_pack)
        if "pack" in command:
            Path(command[command.index("--out") + 1]).write_bytes(bytes(55))
            return self.child({}, None)
        if "--split" in command:
            Path(command[command.index("--shards") + 1]).write_bytes(bytes(77))
            return self.child({}, None)
        seconds = next(seconds for name, seconds in self.seconds.items() if name in words)
        if "-m" in command:
            return self.child(generated(seconds, num_new=4, nbytes=3 * 4096), None)
        figures = {"ids": [7, 8, 1, 9], "load_seconds": 2.0, "ttft_seconds": 0.5, "seconds_per_token": seconds}
        return self.child(figures | {"read_bytes_per_token": 11.0, "versions": {"peer": "1"}}, None)

    def child(self, figures: dict[str, Any] | None, error: str | None) -> Any:
        return self.children.Child(
            figures=figures,
            error=error,
            seconds=9.0,
            cpu_seconds=8.0,
            read_nbytes=100,
            resident_peak_nbytes=200,
            cgroup_peak_nbytes=None,
        )


def generated(seconds: float, *, num_new: int, nbytes: int) -> dict[str, Any]:
    """What `generate --json` says of them."""
    return {
        "token_ids": [7, 8, 9, 9][:num_new],
        "new_tokens": num_new,
        "load_seconds": 0.25,
        "ttft_seconds": 0.5,
        "decode_seconds": seconds * (num_new - 1),
        "link": {"bytes": {"draft": 0, "correction": 0, "full": nbytes}},
        "plan": {"disk_layers": [0, 1], "host_layers": [], "kept_layers": []},
    }


def test_a_table_has_a_row_of_each_system_the_floor_and_why_one_is_missing(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processes = Processes(scripts["children"])
    for name in ("peer_table", "peer_ways"):
        monkeypatch.setattr(scripts[name], "run_child", processes.run)
    monkeypatch.setattr(scripts["peer_table"], "drop_page_cache", lambda: False)
    monkeypatch.setattr(scripts["peer_table"], "read_seconds", lambda files, nbytes, depth, read_nbytes: nbytes / 4096 + depth)

    def refuse(name: str, folder: Path) -> Path:
        raise scripts["peer_environments"].NotInstalledError("pip could not install it: no such release")

    monkeypatch.setattr(scripts["peer_ways"], "interpreter", refuse)
    words = ["--model", "synthetic:tiny", "--limit", "none", "--rounds", "2", "--new-tokens", "4", "--folder", str(tmp_path)]
    words += ["--environment", f"accelerate={sys.executable}", f"airllm={sys.executable}", "--gguf", "model.gguf"]
    kept: list[dict[str, Any]] = []
    table = scripts["peer_table"].memory_table(options_of(scripts, monkeypatch, *words), kept.append)

    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == [
        "raw reads",
        "ours, full",
        "ours, full, packed",
        "ours, sirius",
        "accelerate, disk offload",
        "AirLLM",
        "transformers, all in memory",
        "llama.cpp, mmap",
    ]
    assert rows["raw reads"]["all_seconds_per_token"] == [3.0, 3.0], "one page a token, two reads at a time"
    assert rows["ours, full"]["all_ratios_to_floor"] == [1 / 3, 1 / 3]
    assert rows["ours, sirius"]["ratio_to_full"] == 3.0
    assert rows["accelerate, disk offload"]["note"] == "keeps 0% of the limit in memory", "the shares above were killed"
    assert rows["AirLLM"]["written_bytes"] == 77
    assert rows["AirLLM"]["first_equal_ids"] == 2
    assert rows["transformers, all in memory"]["capped"] is False
    assert rows["llama.cpp, mmap"]["error"] == "not installed: pip could not install it: no such release"
    assert rows["ours, full, packed"]["written_bytes"] == 55
    assert len(kept[-1]["rows"]) == 8, "what is known is kept after each round"
    assert table["promises"] == {
        "ours, full answered every time": True,
        "ours, full within 1.15 of the raw reads": True,
        "ours, full faster than accelerate, disk offload": False,
        "ours, full faster than AirLLM": True,
    }
    json.dumps(table)
    scripts["peer_table"].table_text(table["rows"])


def test_the_floor_reads_as_many_bytes_as_mode_full_in_the_way_that_is_usually_fastest(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, asked = scripts["peer_table"], list[tuple[int, int]]()
    seconds = {
        (2, 8): iter([9.0, 1.0, 9.0]),
        (4, 2): iter([4.0, 5.0, 4.0, 3.0, 5.0, 5.0, 5.0, 5.0, 6.0, 7.0, 7.0]),
        (32, 4): iter([4.5, 4.5, 4.5]),
    }

    def read_seconds(files: list[Path], nbytes: int, *queue: int) -> float:
        assert nbytes == 7
        asked.append((queue[0], queue[1]))
        return next(seconds[queue[0], queue[1]])

    monkeypatch.setattr(table, "read_seconds", read_seconds)
    monkeypatch.setattr(table, "QUEUES", tuple(seconds))
    floors = table.Floors()
    answer = scripts["peer_ways"].Answer(ids=[1, 2, 3], first_token_seconds=1.0, seconds_per_token=2.0, read_nbytes_per_token=7.0)
    floors.choose([], answer)
    assert floors.queue == (4, 2)
    del asked[:]
    good = table.Run(child=Processes(scripts["children"]).child({}, None), answer=answer)
    num_asked = list[int]()

    def run() -> Any:
        num_asked.append(len(asked))
        return good

    assert floors.measured([], run) is good
    assert num_asked == [2, 4], "a token less than there are; once more, as the first reads were faster than those behind"
    assert (floors.around, floors.seconds, floors.num_disturbed) == ([(5.0, 5.5)], [5.25], 1)
    failed = replace(good, answer=None)
    assert floors.measured([], lambda: failed) is failed, "what fails is not asked again"


def test_a_system_that_fails_later_keeps_what_it_had_and_is_not_asked_again(scripts: dict[str, ModuleType]) -> None:
    table, ways = scripts["peer_table"], scripts["peer_ways"]
    processes = Processes(scripts["children"])
    answer = ways.Answer(ids=[1], first_token_seconds=1.0, seconds_per_token=2.0, read_nbytes_per_token=0.0)
    good = table.Run(child=processes.child({}, None), answer=answer)
    full = table.Measured(name="ours, full", runs=[good, replace(good, answer=replace(answer, seconds_per_token=4.0))])
    other = table.Measured(name="other", error="killed", runs=[good, replace(good, answer=None)])
    row = table.row_of(other, full, table.Floors())
    assert (row["error"], row["all_ratios_to_full"]) == ("killed", [1.0])


def test_where_mode_full_never_answered_others_have_no_ratio_to_it(scripts: dict[str, ModuleType]) -> None:
    table, ways = scripts["peer_table"], scripts["peer_ways"]
    answer = ways.Answer(ids=[1], first_token_seconds=1.0, seconds_per_token=2.0, read_nbytes_per_token=0.0)
    run = table.Run(child=Processes(scripts["children"]).child({}, None), answer=answer)
    measured = [table.Measured(name="ours, full", error="killed"), table.Measured(name="other", runs=[run])]
    rows = table.rows_of(measured, table.Floors())
    assert rows[2]["seconds_per_token"] == 2.0
    assert "ratio_to_full" not in rows[2]
    assert table.promises(rows) == {"ours, full answered every time": False}
    table.table_text(rows)


def test_of_what_passes_bring_the_disk_s_share_of_the_layers_is_read(scripts: dict[str, ModuleType]) -> None:
    figures = generated(1.0, num_new=3, nbytes=800)
    figures["link"]["bytes"] |= {"draft": 80}
    figures["plan"] = {"disk_layers": [0, 1], "host_layers": [2, 3], "kept_layers": [0]}
    assert scripts["peer_ways"].our_answer(figures).read_nbytes_per_token == (800 / 2 + 80 / 4) / 2


def test_a_table_of_another_run_stays_in_the_result_file(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peers.json"
    out.write_text(json.dumps({"memory": {"rows": [1]}, "third": "before", "date": "before"}))
    monkeypatch.setattr(scripts["peers"], "third_table", lambda options, keep: {"rows": [2], "promises": {}})
    monkeypatch.setattr(sys, "argv", ["peers.py", "--tables", "third", "--out", str(out)])
    assert scripts["peers"].main() == 0
    result = json.loads(out.read_text())
    assert (result["tables"], result["memory"], result["third"]["rows"]) == (["memory", "third"], {"rows": [1]}, [2])
    out.write_text("{")
    assert scripts["peers"].main() == 2
    assert capsys.readouterr().err.endswith("is no result file (JSONDecodeError); remove it, or give another with --out\n")


@pytest.mark.parametrize(
    ("exit_status", "printed", "said", "settings", "error"),
    [
        (0, ["text", '{"a": 1}'], [], {}, None),
        (0, ["text"], [], {}, "its last line is no JSON"),
        (1, [], ["Traceback", "ValueError: no"], {}, "exit status 1: ValueError: no"),
        (-9, [], [], {"num_kills": 1}, "killed for want of memory"),
        (-9, [], [], {"is_late": True}, "did not end within"),
    ],
)
def test_a_process_that_fails_is_one_line(
    scripts: dict[str, ModuleType], exit_status: int, printed: list[str], said: list[str], settings: dict[str, Any], error: str
) -> None:
    settings = {"is_late": False, "num_kills": 0} | settings
    figures, found = scripts["children"].outcome(exit_status, printed, said, **settings)
    assert (figures is None) == (error is not None)
    assert found == error


def test_a_copy_that_cannot_be_packed_is_a_row(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processes = Processes(scripts["children"])
    processes.no_pack = "exit status 1: error: no"
    monkeypatch.setattr(scripts["peer_ways"], "run_child", processes.run)
    options = options_of(scripts, monkeypatch, "--model", "synthetic:tiny", "--folder", str(tmp_path), "--peers")
    ways, failed = scripts["peer_ways"].ways_to_answer(options, tmp_path, "1 2", [1, 2], None)
    assert [way.name for way in ways] == ["ours, full", "ours, sirius"]
    assert failed == {"ours, full, packed": "not prepared: exit status 1: error: no"}


def test_a_copy_is_made_anew_where_its_source_has_changed(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    models, source, copies = scripts["peer_models"], tmp_path / "source", list[Path]()

    def write(path: Path) -> None:
        copies.append(path)
        path.write_bytes(bytes(3))

    source.mkdir()
    for num_copies, content in ((1, "a"), (1, None), (2, "ab")):
        if content is not None:
            (source / "config.json").write_text(content)
        assert models.prepared(tmp_path / "copy", write, source=source).nbytes == 3
        assert len(copies) == num_copies


def test_what_still_runs_in_a_group_ends_with_it(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    cgroup = importlib.import_module("cgroup")
    group = cgroup.Cgroup(version=cgroup.VERSIONS[1], folder=tmp_path / "group")
    group.folder.mkdir()
    assert group.peak_nbytes is None, "an older kernel has no such file"
    with subprocess.Popen(["sleep", "60"]) as process:
        (group.folder / "cgroup.procs").write_text(f"{process.pid}\n")
        group._kill()
        assert process.wait() == -signal.SIGKILL


def test_an_interrupted_child_does_not_go_on(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    children, started = scripts["children"], list[subprocess.Popen[str]]()
    popen = subprocess.Popen

    def start(*words: Any, **settings: Any) -> Any:
        started.append(popen(*words, **settings))
        return started[-1]

    def interrupt(pid: int, flags: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(children.subprocess, "Popen", start)
    monkeypatch.setattr(children.os, "wait4", interrupt)
    with pytest.raises(KeyboardInterrupt):
        children.run_child(["sleep", "60"], environment=os.environ, limit_seconds=60)
    assert started[0].returncode == -signal.SIGKILL


def test_a_child_that_takes_too_long_is_ended(scripts: dict[str, ModuleType]) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = scripts["children"].run_child(command, environment=os.environ, limit_seconds=0.2)
    assert child.error == "did not end within 0 s"
    assert child.resident_peak_nbytes > 0


def test_our_figures_are_read_from_the_real_command(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))
    words = ("--model", "synthetic:tiny", "--new-tokens", "3", "--threads", "1", "--folder", str(tmp_path))
    options = options_of(scripts, monkeypatch, *words)
    folder, cost = scripts["peer_table"].model_folder(options)
    text, ids = scripts["peer_table"].prompt_of(options, folder, has_digits=True)
    assert ids == list(range(300, 316)), "the tokenizer of digits gives the ids themselves"
    assert cost.nbytes > 0
    way = scripts["peer_ways"].our_way(options, "ours", folder, text, "full")
    assert main(list(way.attempts[0].command[3:])) == 0
    answer = way.read(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert len(answer.ids) == 3
    assert answer.seconds_per_token > 0
    assert answer.read_nbytes_per_token == 0, "all of it fits"
    assert "PYTHONPATH" not in scripts["peer_ways"].environment_of(options, is_ours=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tables", "memory", "--new-tokens", "1"], "error: --new-tokens is 1; give 2 or more"),
        (["--tables", "memory", "--rounds", "0"], "error: --rounds is 0; give 1 or more"),
        (["--tables", "memory", "--model", "gpt-5"], "--model is 'gpt-5'; give synthetic:SHAPE, or a folder"),
        (["--tables", "memory", "--model", "synthetic:tiny", "--environment", "vllm=x"], "give NAME=PYTHON, a file, NAME one of"),
    ],
)
def test_a_wrong_word_is_one_line(
    scripts: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(scripts["peer_table"], "drop_page_cache", lambda: False)
    monkeypatch.setattr(
        sys, "argv", ["peers.py", *words, "--limit", "none", "--folder", str(tmp_path), "--out", str(tmp_path / "o")]
    )
    assert scripts["peers"].main() == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_gguf_copy_of_random_weights_is_the_same_model(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    scripts["gguf_copy"].copy("synthetic:tiny", tmp_path / "tiny.gguf", "F32")
    source, copied = open_checkpoint("synthetic:tiny?dtype=F32"), open_checkpoint(str(tmp_path / "tiny.gguf"))
    for key in source.tensors:
        assert np.array_equal(source.read(*key), copied.read(*key)), key


def test_a_synthetic_model_that_is_no_llama_is_not_written(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "qwen.gguf"
    monkeypatch.setattr(sys, "argv", ["gguf_copy.py", str(file), "BF16", "--source", "synthetic:qwen2.5-32b?layers=1"])
    assert scripts["gguf_copy"].main() == 2
    assert capsys.readouterr().err.endswith("is a qwen2; only llamas are written from random weights\n")
    assert not file.exists()


def test_rows_of_a_third_compare_each_pair_and_count_answers_that_are_right(scripts: dict[str, ModuleType]) -> None:
    third, processes = scripts["a_third"], Processes(scripts["children"])

    def child(seconds: float, num_new: int, last: int = 9) -> Any:
        figures = generated(seconds, num_new=num_new, nbytes=0) | {"aal": 3.0, "acceptance": 0.5, "window": 8}
        figures["token_ids"][-1] = last
        return processes.child(figures | {"memory": {"device_plan_bytes": 5}}, None)

    place = third.Place(name=third.BEHIND_LINK, memory={"device_memory": "5"}, drafts={})
    references = [child(1.0, 4), child(1.0, 4)]
    row = third.row_of(place, [(child(4.0, 3), child(1.0, 4)), (child(6.0, 3), child(2.0, 4))], references)
    assert (row["ratio"], row["all_ratios"], row["num_equal"]) == (3.5, [4.0, 3.0], 4)
    assert (row["num_sirius_equal"], row["memory"]) == (2, ["--device-memory", "5"])
    assert all(third.promises([row]).values())
    failed = third.row_of(place, [(child(1.0, 3), processes.child(None, "killed"))], references)
    assert third.promises([failed])["behind a link: every process answered"] is False
    wrong = third.row_of(place, [(child(1.0, 3), child(2.0, 4, last=1))], references)
    assert list(third.promises([wrong]).values()) == [True, False, False]


def test_both_places_of_a_third_have_the_same_bytes(scripts: dict[str, ModuleType]) -> None:
    disk, link = scripts["a_third"].places_of(10**9, 300, 0.07)
    assert int(disk.memory["device_memory"]) + int(disk.memory["host_memory"]) == int(link.memory["device_memory"]) == 10**9
    assert disk.limit_nbytes == 10**9 + 300
    without = scripts["a_third"].places_of(10**9, None, 0.07)[0]
    assert (without.name, without.limit_nbytes) == ("on disk, no cgroup can be made", None)


def test_the_link_table_takes_medians_of_rounds(scripts: dict[str, ModuleType]) -> None:
    rounds = [{"seconds": [1.0, 2.0, 9.0], "accelerate_seconds": [20.0], "ceiling_seconds": 1.6, "ratio": 10.0}]
    figures = scripts["peers"].link_figures(rounds)
    assert (figures["seconds_per_token"], figures["ratio_to_ceiling"], figures["ratio"]) == (2.0, 1.25, 10.0)
    without_gpu = scripts["peers"].link_figures([rounds[0] | {"ceiling_seconds": None}])
    assert without_gpu["ratio_to_ceiling"] is None
