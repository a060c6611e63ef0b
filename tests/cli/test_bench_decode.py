"""`offload-sirius bench decode`: a table for people, one object for programs, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, SamplingConfig

from .conftest import TINY, Run

DECODE = ("bench", "decode", *TINY, "--no-chat", "--limit", "2", "--max-new-tokens", "6", "--window", "3")


def test_help_teaches_by_two_examples(run: Run) -> None:
    ran = run("bench", "decode", "--help")
    assert ran.code == 0
    examples = ran.out.partition("Examples:")[2]
    assert examples.count("offload-sirius bench decode --") == 2
    assert "--force-aal X" in ran.out


def test_people_get_a_line_for_each_row_beside_the_full_model(run: Run) -> None:
    ran = run(*DECODE, "--link-gbps", "0.5", "--sparsity", "griffin,cats")
    assert (ran.code, ran.err) == (0, "")
    title, head, *rows = ran.out.splitlines()
    assert title == (
        "synthetic:tiny?dtype=F32 on cpu, float32: 2 prompts, up to 6 tokens, 4 of 4 layers streamed in mode full at 0.5 GB/s"
    )
    assert head.split()[:4] == ["s/token", "(lowest", "to", "highest)"]
    assert [row.split("  ")[0] for row in rows] == [
        "full",
        "griffin 0.5 sparse",
        "griffin 0.5 sirius exact w3",
        "cats 0.5 sparse",
        "cats 0.5 sirius exact w3",
    ]
    assert len({len(row) for row in (head, *rows)}) == 1


def test_json_is_one_object_and_the_picture_lies_beside_it(run: Run, tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "decode.png"
    ran = run(*DECODE, "--json", "--plot", str(picture), "--trace", str(trace))
    assert (ran.code, ran.out.count("\n")) == (0, 1)
    found = json.loads(ran.out)
    assert [row["mode"] for row in found["rows"]] == ["full", "sparse", "sirius"]
    assert (found["num_prompts"], found["max_new_tokens"], found["forced_aal"]) == (2, 6, None)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {event["cat"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"} >= {"copy", "wait"}


def test_a_forced_advance_is_the_one_that_was_typed(run: Run) -> None:
    ran = run(*DECODE, "--json", "--modes", "sirius", "--force-aal", "2.5")
    found = json.loads(ran.out)
    assert (found["forced_aal"], found["max_new_tokens"], found["rows"][1]["aal"]) == (2.5, 6, 2.5)


def test_prompts_come_from_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "three"}\n{"prompt": "none"}\n')
    found = json.loads(run(*DECODE, "--json", "--modes", "full", "--prompts", str(file)).out)
    assert found["prompt_tokens"] == [3, 5]


def test_verbose_explains_the_plan_of_each_load(run: Run) -> None:
    assert run(*DECODE, "--verbose").err.count("layers: 0 resident, 4 streamed from host memory") == 2


def test_long_runs_say_how_far_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius.cli.bench_decode.SAID_EVERY_SECONDS", 0.0)
    lines = run(*DECODE, "--modes", "full").err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["full: 1 of 2 answers", "full: 2 of 2 answers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0.5,much"], "--keep is 0.5,much; it must be numbers with commas, such as 0.5,0.75"),
        (["--keep", "0.5,"], "--keep is 0.5,; it must be numbers with commas, such as 0.5,0.75"),
        (["--keep", "0.5,2"], "--keep is 2.0; it must be above 0 and at most 1"),
        (["--tree-width", "1.5"], "--tree-width is 1.5; it must be whole numbers with commas, such as 1,4"),
        (["--modes", "full,fast"], "--modes has fast; it must be of full, sparse, sirius"),
        (["--sparsity", "griffin,,cats"], "--sparsity is ; it must be one of griffin, cats"),
        (["--window", "1"], "--window is 1; it must be auto, or 2 or more tokens"),
        (["--accept", "never"], "--accept is never; it must be one of exact, threshold"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--force-aal", "9"], "--force-aal is 9; it must be between 1 and --window 3"),
        (["--force-aal", "nan"], "--force-aal is nan; it must be a number"),
        (
            ["--temperature", "1", "--accept", "threshold"],
            "--accept threshold is greedy, and --temperature is 1.0; use --temperature 0, or --accept exact, which samples",
        ),
        (["--prompts", "/nowhere.jsonl"], "prompts /nowhere.jsonl: No such file or directory; give a file that can be read"),
        (
            ["--max-new-tokens", "2040"],
            "prompt 1 has 47 tokens and its answer takes 2040 positions, synthetic:tiny?dtype=F32 has 2048; "
            "leave that prompt out, or give a smaller --max-new-tokens",
        ),
        (
            ["--plot", "/nowhere/decode.png"],
            "--plot /nowhere/decode.png: cannot be written: No such file or directory; "
            "name a file in a folder that can be written to",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], message: str, run: Run) -> None:
    ran = run(*DECODE, *arguments)
    assert (ran.code, ran.out, ran.err) == (2, "", f"error: {message}\n")


def test_what_is_given_is_common_to_all_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    monkeypatch.setattr("offload_sirius.cli.bench_decode._measure", lambda *given, **more: got.extend((*given, more)))
    monkeypatch.setattr("offload_sirius.cli.bench_decode.table", lambda _: [])
    model = ("--model", "synthetic:tiny", "--shared-host-buffers", "2", "--kv-dtype", "int8", "--device-memory", "20MiB")
    decoding = (
        "--modes",
        "sirius",
        "--sparsity",
        "griffin,cats",
        "--cats-threshold",
        "0.5",
        "--draft-keep",
        "0.25",
        "--no-overlap",
    )
    assert run("bench", "decode", *model, *decoding, "--seed", "3", "--no-chat", "--ignore-eos").code == 0
    config, bench, *_, more = got
    assert config == EngineConfig(model="synthetic:tiny", shared_host_buffers=2, kv_dtype="int8", device_memory="20MiB")
    assert more["all_streamed"] is False
    assert bench.generation == GenerationConfig(
        sampling=SamplingConfig(seed=3), max_new_tokens=64, ignore_eos=True, chat=False, reuse=False
    )
    assert bench.variants == (
        DecodingConfig(draft_keep=0.25, overlap=False, prior=False),
        DecodingConfig(sparsity="cats", cats_threshold=0.5, overlap=False, prior=False),
    )
