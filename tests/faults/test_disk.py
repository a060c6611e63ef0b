"""A disk that fails or changes under a run, through the real command line; injected below the reader, at the system call."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from offload_sirius.cli import main
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.writer import write_checkpoint

TINY = "synthetic:tiny?dtype=F32"
FROM_DISK = ("--device-memory", "600KiB", "--host-memory", "12MiB")
"""Too little for all layers: each pass reads some."""
Capture = pytest.CaptureFixture[str]
Read = Callable[[int, list[memoryview], int], int]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one file, with a tokenizer of some words."""
    write_checkpoint(open_checkpoint(TINY), tmp_path / "m")
    words = {f"w{number}": number for number in range(64)}
    tokenizer = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path / "m"


def generate(folder: Path, capsys: Capture, *flags: str) -> tuple[int, str, str]:
    asked = ("--prompt", "w1", "--max-new-tokens", "6", "--ignore-eos", "--mode", "full", "--device", "cpu", "--threads", "1")
    code = main(["generate", "--model", str(folder), *asked, *FROM_DISK, *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Reads:
    """Stands before the system call that reads, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Reads, Read, int, list[memoryview], int], int]) -> None:
        self.count = 0
        real = os.preadv

        def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            self.count += 1
            return fault(self, real, descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)


def reads_of_a_whole_run(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """How many there are, and the text."""
    with monkeypatch.context() as patched:
        reads = Reads(patched, lambda _, read, *given: read(*given))
        code, text, _ = generate(folder, capsys)
    assert code == 0
    return reads.count, text


def failing_from(moment: int, error: int) -> Callable[..., int]:
    def fault(reads: Reads, read: Read, *given: int) -> int:
        if reads.count >= moment:
            raise OSError(error, os.strerror(error))
        return read(*given)  # type: ignore[arg-type]

    return fault


def test_a_read_error_while_loading_or_running_is_one_line(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, whole = reads_of_a_whole_run(folder, capsys, monkeypatch)
    for moment, error, said in ((2, errno.EIO, "Input/output error"), (count // 2, errno.ESTALE, "Stale file handle")):
        with monkeypatch.context() as patched:
            Reads(patched, failing_from(moment, error))
            code, text, line = generate(folder, capsys)
        assert code == 2
        assert whole.startswith(text.removesuffix("\n"))
        assert re.search(rf"error: {folder}/\S+: cannot be read: {said}; check the disk and the file\n$", line)
        assert "Traceback" not in line


def test_short_reads_change_nothing(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = reads_of_a_whole_run(folder, capsys, monkeypatch)
    Reads(monkeypatch, lambda _, read, descriptor, buffers, offset: read(descriptor, [buffers[0][:4096]], offset))
    assert generate(folder, capsys)[:2] == (0, whole)


def test_a_file_truncated_during_a_run_is_named(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    count, whole = reads_of_a_whole_run(folder, capsys, monkeypatch)

    def truncate(reads: Reads, read: Read, *given: int) -> int:
        if reads.count == count // 2:
            os.truncate(folder / "model.safetensors", 2000)
        return read(*given)  # type: ignore[arg-type]

    Reads(monkeypatch, truncate)
    code, text, line = generate(folder, capsys)
    assert code == 2
    assert whole.startswith(text.removesuffix("\n"))
    assert re.search(r"model.safetensors: ends at byte \d+, byte \d+ is needed; the file was changed while it was in use: ", line)


def test_a_file_replaced_during_a_run_is_not_read(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was opened stays the one that is read, as with any program."""
    count, whole = reads_of_a_whole_run(folder, capsys, monkeypatch)
    other = folder / "other"
    other.write_bytes(os.urandom((folder / "model.safetensors").stat().st_size))

    def replace(reads: Reads, read: Read, *given: int) -> int:
        if reads.count == count // 2:
            os.replace(other, folder / "model.safetensors")
        return read(*given)  # type: ignore[arg-type]

    Reads(monkeypatch, replace)
    assert generate(folder, capsys)[:2] == (0, whole)
