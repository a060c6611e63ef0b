"""What the tests of the command line share: a command run in this process, and what it left behind."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload_sirius.cli import main


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str


TINY = ("--model", "synthetic:tiny?dtype=F32", "--device", "cpu", "--threads", "1")
"""On the CPU, as budgets and rates mean other things on a GPU."""

Run = Callable[..., Ran]
Pipe = Callable[[bytes], None]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written outside the test's own folder."""
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line with these arguments."""

    def run(*arguments: str) -> Ran:
        code = main(arguments)
        captured = capsys.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def tiny(run: Run) -> Run:
    """Run `generate` on the tiny synthetic model, 8 tokens unless told otherwise."""

    def generate(*arguments: str) -> Ran:
        return run("generate", *TINY, "--max-new-tokens", "8", *arguments)

    return generate


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """Put bytes on standard input."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
