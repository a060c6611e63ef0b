"""Folders that are written to: a disk that is full, a cache that is damaged or cannot be written; the real command line."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload_sirius.cli import main
from offload_sirius.kernels import native

TINY = "synthetic:tiny?dtype=F32"
ASKED = ("generate", "--model", TINY, "--prompt", "hi", "--max-new-tokens", "4", "--device", "cpu", "--threads", "1")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@contextmanager
def full_beyond(nbytes: int) -> Iterator[None]:
    """No file becomes longer: what writes to one then meets an error in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("nbytes", [100, 10_000, 150_000])
def test_a_disk_that_fills_up_while_packing_is_one_line_and_the_same_command_goes_on(
    nbytes: int, tmp_path: Path, capsys: Capture
) -> None:
    command = ["pack", "--model", TINY, "--out", str(tmp_path / "m")]
    with full_beyond(nbytes):
        assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/m: cannot be written: File too large; what is complete was kept, and the same command goes on\n"
    )
    assert not list(tmp_path.rglob("*.partial*"))
    assert main(command) == 0
    assert main(["pack", "--model", str(tmp_path / "m"), "--verify"]) == 0


def damaged_prior(cache: Path) -> None:
    for file in (cache / "priors").iterdir():
        file.write_bytes(file.read_bytes()[:-7])


def damaged_rates(cache: Path) -> None:
    (cache / "rates.json").write_text('{"cpu": ')


def priors_that_are_a_file(cache: Path) -> None:
    for file in (cache / "priors").iterdir():
        file.unlink()
    (cache / "priors").rmdir()
    (cache / "priors").touch()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "what was learnt is cut off": (damaged_prior, r"warning: \S+: is ignored and will be replaced, it does not hold a prior of"),
    "the rates are cut off": (
        damaged_rates,
        r"rates.json: is ignored, it does not hold rates; measure again with `offload-sirius",
    ),
    "it cannot be written": (
        priors_that_are_a_file,
        r"warning: \S+: cannot be written: .*; what this run learns .* is not kept:",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_said_and_the_answer_is_the_same(
    damage: Callable[[Path], None], said: str, cache: Path, capsys: Capture
) -> None:
    command = (*ASKED, "--draft", "resident", "--device-memory", "1200KiB", "--host-memory", "64MiB")
    assert main(command) == 0
    whole = capsys.readouterr().out
    damage(cache)
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == whole
    assert re.search(said, captured.err)


def test_a_damaged_library_is_compiled_anew(cache: Path) -> None:
    if native.native.__wrapped__("products").library is None:
        pytest.skip("no compiler")
    library = native.compiled("quantise", cache, native.find_compiler())  # and not loaded: the process would keep it
    library.write_bytes(library.read_bytes()[:100])
    assert native.native.__wrapped__("quantise").library is not None
    assert library.stat().st_size > 100
