"""`offload-sirius batch` on the tiny synthetic model: a file of prompts becomes one of answers, however it is broken off."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from offload_sirius.engine.batch import Batch

from .conftest import TINY, Run

NUM_PROMPTS = 300
ROOT = Path(__file__).parents[2]
COMMAND = ("batch", *TINY)


def prompts(number: int) -> str:
    """Prompts and answers of many lengths, so that answers end in another order than they began; every second one is drawn."""
    lines = [
        {"id": f"p{i}", "prompt": f"question {i}"[: 4 + i % 9], "max_tokens": 1 + i * 7 % 5, "temperature": i % 2, "seed": i}
        for i in range(number)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "in.jsonl").write_text(prompts(12))
    return "--in", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_generate_in_the_order_of_the_prompts(run: Run, files: tuple[str, ...], tmp_path: Path) -> None:
    ran = run(*COMMAND, *files)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.splitlines() == ["12 prompts, 12 at once", f"{tmp_path}/out.jsonl: 12 answers"]
    found = answers(tmp_path / "out.jsonl")
    assert [each["id"] for each in found] == [f"p{i}" for i in range(12)]
    asked = json.loads(prompts(8).splitlines()[-1])
    settings = ("--max-new-tokens", str(asked["max_tokens"]), "--temperature", "1", "--seed", "7", "--json")
    alone = json.loads(run("generate", *TINY, "--prompt", asked["prompt"], *settings).out)
    assert {name: found[7][name] for name in ("text", "token_ids", "finish_reason")} == {
        name: alone[name] for name in ("text", "token_ids", "finish_reason")
    }
    before = (tmp_path / "out.jsonl").read_bytes()
    again = run(*COMMAND, *files)
    assert (again.code, again.err) == (0, f"{tmp_path}/out.jsonl: has the answers to all 12 prompts already\n")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_line_that_cannot_be_answered_says_why_and_the_others_are_answered(
    run: Run, files: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello hello hello"}\n{"prompt": "hi"}\n')
    for said in (
        f"{tmp_path}/out.jsonl: 2 answers, of which 1 are errors",
        "has the answers to all 2 prompts already, of which 1",
    ):
        ran = run(*COMMAND, *files, "--max-context", "12", "--max-new-tokens", "4", "--figures")
        assert ran.code == 1
        assert said in ran.err
    refused, answered = answers(tmp_path / "out.jsonl")
    assert refused["error"].startswith("prompt and answer take ")
    assert answered["figures"]["new_tokens"] == answered["usage"]["completion_tokens"] == 4


def test_messages_are_a_conversation_and_a_prompt_is_its_first_message(
    run: Run, files: tuple[str, ...], tmp_path: Path, chat_directory: Path
) -> None:
    asked = [
        {"messages": [{"role": "user", "content": "hello there"}]},
        {"prompt": "hello there"},
        {"prompt": "hello there", "chat": False},
        {"messages": [{"role": "system", "content": "good bye"}, {"role": "user", "content": "hello there"}]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    given = ("batch", *files, "--device", "cpu", "--threads", "1", "--mode", "full", "--max-new-tokens", "4")
    assert run(*given, "--model", str(chat_directory)).code == 0
    conversation, prompt, plain, longer = answers(tmp_path / "out.jsonl")
    assert conversation["token_ids"] == prompt["token_ids"]
    lengths = [each["usage"]["prompt_tokens"] for each in (conversation, prompt, plain, longer)]
    assert lengths[2] < lengths[0] == lengths[1] < lengths[3]
    (tmp_path / "out.jsonl").unlink()
    assert run(*given, "--model", TINY[1]).code == 1
    assert "has no chat template" in answers(tmp_path / "out.jsonl")[0]["error"]


WRONG = {
    "no --out": (("--in", "IN"), "--out is not given; give --in FILE and --out FILE"),
    "no --in": (("--out", "OUT"), "--in is not given; give --in FILE and --out FILE"),
    "the same file": (("--in", "IN", "--out", "IN"), "--out IN: is --in, too; name another file"),
    "no file": (("--in", "IN", "--out", "/dev/null"), "--out /dev/null: is no file that a run could go on with; name a file"),
    "no input": (("--in", "OUT", "--out", "OUT"), "--in OUT: cannot be read: No such file or directory; give a file with a JSON"),
    "a word": (("--in", "IN", "--out", "OUT", "--parallel", "x"), "--parallel is x; it must be auto or a number of answers"),
    "none": (("--in", "IN", "--out", "OUT", "--parallel", "0"), "--parallel is 0; it must be between 1 and 64"),
    "a model": (("--in", "IN", "--out", "OUT", "--model", "nowhere/here.gguf"), "nowhere/here.gguf: "),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_ends_with_one_line(
    arguments: tuple[str, ...], message: str, run: Run, files: tuple[str, ...], tmp_path: Path
) -> None:
    names = {"IN": files[1], "OUT": files[3]}
    ran = run(*COMMAND, *(names.get(each, each) for each in arguments))
    for name, path in names.items():
        message = message.replace(name, path)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {message}")
    assert ran.err.count("\n") == 1
    assert (tmp_path / "in.jsonl").read_text() == prompts(12)


def signal_at_step(number: int, moment: int, patched: pytest.MonkeyPatch) -> None:
    """Send it in front of the step of that number."""
    step, count = Batch.step, 0

    def watched(batch: Batch) -> bool:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), number)
        return step(batch)

    patched.setattr(Batch, "step", watched)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_what_the_same_command_goes_on_with(
    number: int, code: int, run: Run, files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        signal_at_step(number, 4, patched)
        ran = run(*COMMAND, *files, "--parallel", "4", "--mode", "full")
    assert ran.code == code
    said = ran.err.splitlines()[-1]
    assert said.endswith(" of 12 prompts are answered; the same command goes on")
    num_answered = int(said.split()[0])
    assert 0 < num_answered < 12
    ran = run(*COMMAND, *files, "--parallel", "4", "--mode", "full")
    assert ran.code == 0
    assert ran.err.startswith(f"{tmp_path}/out.jsonl: {num_answered} of 12 prompts are answered; going on\n")
    assert [each["id"] for each in answers(tmp_path / "out.jsonl")] == [f"p{i}" for i in range(12)]
    assert not list(tmp_path.glob("*.partial*"))


def test_a_run_does_not_go_on_with_other_settings(
    run: Run, files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in (4, 1):
        with monkeypatch.context() as patched:
            signal_at_step(signal.SIGINT, moment, patched)
            assert run(*COMMAND, *files, "--mode", "full", "--parallel", "4").code == 130
    ran = run(*COMMAND, *files, "--mode", "full", "--top-k", "3")
    assert (ran.code, ran.err) == (
        2,
        f"error: --out {tmp_path}/out.jsonl: was begun with another top_k: 0, and now it is 3; "
        "give what it was begun with, or name another --out\n",
    )


def test_a_run_that_has_answered_nothing_leaves_nothing(run: Run, files: tuple[str, ...], tmp_path: Path) -> None:
    ran = run(*COMMAND, *files, "--device-memory", "1KiB")
    assert ran.code == 2
    assert ran.err.startswith("error: device budget 1.00 KiB is too small")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["in.jsonl"]


def test_one_process_where_several_were_asked_for_says_how_there_would_be_more(
    run: Run, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    ran = run(*COMMAND, *files, "--mode", "full")
    assert ran.code == 0
    assert ran.err.startswith("warning: accelerate starts one process on CPUs, however many it is asked for, unless it has")
    assert len(answers(Path(files[3]))) == 12


def start(*command: str) -> subprocess.Popen[bytes]:
    """In a session of its own, so that it can be killed with all that it has started."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "loaders"), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill_after(process: subprocess.Popen[bytes], out: Path, num_lines: int) -> None:
    """kill -9 once so many answers are on the disk, those included that wait for their turn."""
    while count_lines(out) < num_lines:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def count_lines(out: Path) -> int:
    paths = [out, *out.parent.glob(f"{out.name}.partial*")]
    return sum(path.read_bytes().count(b'"text"') for path in paths if path.exists())


def test_a_run_of_300_prompts_that_is_killed_twice_gives_the_file_of_an_unbroken_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(prompts(NUM_PROMPTS))
    given = (*COMMAND, "--in", str(tmp_path / "in.jsonl"), "--parallel", "32", "--mode", "full", "--out")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(*given, str(whole)).code == 0
    for num_lines in (60, 170):
        kill_after(start("-m", "offload_sirius", *given, str(out)), out, num_lines)
        assert (tmp_path / "out.jsonl.partial").exists()
        assert 0 < len(out.read_bytes()) < len(whole.read_bytes())
    assert run(*given, str(out)).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert len(answers(out)) == NUM_PROMPTS
    assert not list(tmp_path.glob("*.partial*"))


def test_two_processes_of_accelerate_share_a_file_and_go_on_where_they_were_killed(
    run: Run, files: tuple[str, ...], tmp_path: Path
) -> None:
    given = (*COMMAND, "--in", files[1], "--mode", "full", "--parallel", "4", "--out")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(*given, str(whole)).code == 0
    # What a killed run has left in the journal of a process: the last answer, and a beginning of another.
    last = whole.read_bytes().splitlines(keepends=True)[-1]
    with pytest.MonkeyPatch.context() as patched:
        signal_at_step(signal.SIGINT, 2, patched)
        assert run(*given, str(out)).code == 130
    journal = tmp_path / "out.jsonl.partial"
    (tmp_path / "out.jsonl.partial-1").write_bytes(journal.read_bytes() + last + b'{"id": "p')
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    launched = start(*launch, "-m", "offload_sirius", *given, str(out))
    said = launched.communicate(timeout=200)[1].decode()
    assert launched.returncode == 0, said
    done = [int(number) for number in re.findall(r"(\d+) of 12 prompts are answered; going on", said)]
    shares = [int(number) for number in re.findall(r"(\d+) prompts, 4 at once, by one of 2 processes", said)]
    assert len(done) == 1
    assert sorted(shares) == [(12 - done[0]) // 2, (13 - done[0]) // 2]
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial*"))
