"""The program as a whole: how it ends, and what it costs to start. Only here are other processes started."""

from __future__ import annotations

import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from offload_sirius import __version__

from .conftest import TINY, Run

SLOW = (
    *("generate", *TINY, "--prompt", "hi", "--max-new-tokens", "100"),
    *("--device-memory", "1.25MiB", "--link-gbps", "0.002"),
)
"""Some tokens a second, over an emulated link."""


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "offload_sirius", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("command", "flag"),
    [("generate", "--max-new-tokens"), ("bench stream", "--passes"), ("bench decode", "--force-aal"), ("serve", "--grace")],
)
def test_help_imports_none_of_the_large_libraries(command: str, flag: str) -> None:
    large = ("torch", "transformers", "tokenizers", "numpy", "gguf", "matplotlib", "triton", "fastapi", "uvicorn")
    program = (
        f"import sys; from offload_sirius.cli import main; main([*{command.split()}, '--help']); "
        f"sys.exit(str([name for name in {large} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert flag in done.stdout
    assert done.stderr == "[]\n"


def test_ctrl_c_ends_a_slow_answer_at_once_without_a_traceback() -> None:
    with start(*SLOW) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first
    assert rest.endswith(b"\n")
    assert b"tokens, first after" in errors
    assert errors.count(b"\n") == 1


def test_a_reader_that_leaves_ends_the_program_in_silence() -> None:
    with start(*SLOW) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0
    assert errors == b""


def test_without_arguments_the_commands_are_shown(run: Run) -> None:
    ran = run()
    assert ran.code == 0
    for command in ("generate", "plan", "bench", "doctor", "models"):
        assert f"\n  {command} " in ran.out
    assert "Examples:\n    offload-sirius generate --prompt" in ran.out


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version").out == f"offload-sirius {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sing"], "No such command 'sing'"),
        (["generate", "--lyrics"], "No such option: --lyrics"),
        (["generate", "hello"], "Got unexpected extra argument(s) (hello)"),
        (["generate", "--seed"], "Option '--seed' requires an argument"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_with_2(arguments: Sequence[str], message: str, run: Run) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {message}")
    assert ran.err.count("\n") == 1


def test_verbose_shows_the_traceback_above_the_line(tiny: Run) -> None:
    lines = tiny("--prompt", "", "--verbose").err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: the prompt is empty")


def test_a_fault_of_our_own_shows_its_traceback(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("offload_sirius.engine.open_model", fail)
    with pytest.raises(ZeroDivisionError):
        tiny("--prompt", "hi")


def test_python_m_is_the_same_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["offload_sirius", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("offload_sirius", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"offload-sirius {__version__}\n"
