"""What must hold of any files: they open properly, or an error of this program's own says in one line why not.

Opening properly means: every byte that would be read lies in a file of the folder, numbers come out as the headers say, prompts
can be encoded, a plan can be made, and where asked for the model answers.

Time is the CPU's, so that a busy machine finds nothing. Memory is the growth of the process's resident set, which the kernel
keeps the peak of, over what it was before the case: it counts what Python, numpy, the tokenizers library and torch have
touched. What is asked for and not touched is bounded by a limit on the address space.
"""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from offload_sirius import load
from offload_sirius.config import EngineConfig
from offload_sirius.engine import open_model
from offload_sirius.engine.packing import report_of
from offload_sirius.engine.planning import as_packed, host_hardware, plan_model
from offload_sirius.errors import USER_ERRORS
from offload_sirius.model import chat_template
from offload_sirius_loaders.checkpoint import NUMPY_OF_ELEMENT, Checkpoint, TensorInfo, read_rows

CASE_SECONDS = 3.0
"""CPU time of a case. A template has less, in its own process."""
chat_template.RENDER_SECONDS = 0.3
SPARE_NBYTES = 48 << 20
NBYTES_PER_BYTE = 32
"""A case may take so much memory, and so much for each byte of its files: JSON takes about 20 in Python's objects."""
ADDRESS_NBYTES = 2 << 30
"""Addresses a case may ask for beyond those of the process."""
LONGEST_LINE = 1500
"""Characters of an error's line: more than a terminal shows at once helps nobody."""
DEEP_NBYTES = 4 << 20
"""Models with more weights are not run."""


class TooLongError(BaseException):
    """Not an Exception, so that no code under test takes it for one of its own."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a case."""

    outcome: str
    """opened, answered, the name of the error that refused it, or `found` where that is a bug."""
    signature: str = ""
    """Of a bug: what it is and where, the same for the same one."""
    detail: str = ""
    seconds: float = 0.0
    grown_nbytes: int = 0


def write_files(files: Mapping[str, bytes], folder: Path) -> Path:
    """Put a case on the disk, in place of the one before; returns the path to open."""
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / "model.gguf" if "model.gguf" in files else folder


def judge(path: Path, nbytes: int, *, deep: bool, chat: bool) -> Verdict:
    """Open what is there. deep: let it answer, too; chat: render a conversation, which takes a process. nbytes: of its files."""
    before = _reset_peak()
    began = time.process_time()
    try:
        with _limited():
            outcome, found = _opened(path, deep, chat), ""
    except USER_ERRORS as error:
        outcome, found = type(error).__name__, _bad_line(str(error))
    except TooLongError as error:
        outcome, found = "found", f"takes longer than {CASE_SECONDS:g} s, {_place(error)}"
        return Verdict(outcome=outcome, signature=found, detail=traceback.format_exc(), seconds=CASE_SECONDS)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Verdict(
            outcome="found", signature=f"{type(error).__name__} {_place(error)}", detail=traceback.format_exc()[-6000:]
        )
    seconds, grown = time.process_time() - began, _peak_nbytes() - before
    if found:
        return Verdict(outcome="found", signature=found, detail=found)
    if grown > SPARE_NBYTES + NBYTES_PER_BYTE * nbytes and outcome != "answered":
        detail = f"{outcome}: memory grew by {grown} bytes over files of {nbytes}"
        return Verdict(
            outcome="found", signature=f"takes memory out of proportion ({outcome})", detail=detail, grown_nbytes=grown
        )
    return Verdict(outcome=outcome, seconds=seconds, grown_nbytes=grown)


def _opened(path: Path, deep: bool, chat: bool) -> str:
    model = open_model(str(path))
    folder = (path if path.is_dir() else path.parent).resolve()
    sizes = {file: file.stat().st_size for file in folder.iterdir()}
    for info in model.checkpoint.infos:
        _check_ranges(info, sizes)
        _check_numbers(model.checkpoint, info)
    token_ids = model.encode("w1 ab w2", chat=chat)
    model.tokenizer.decode([*token_ids, 0, model.spec.vocab_size - 1])
    config = as_packed(EngineConfig(model=str(path), device="cpu", threads=1), model.checkpoint)
    plan_model(model.checkpoint, config, host_hardware())
    if model.checkpoint.packed is not None:
        report_of(str(path))
    if not deep or sum(info.nbytes for info in model.checkpoint.infos) > DEEP_NBYTES or model.spec.max_positions < 4:
        return "opened"
    with load(str(path), device="cpu", threads=1, max_context=4, device_memory="96MiB", host_memory="96MiB") as engine:
        engine.generate([0, 1], max_new_tokens=2)
    return "answered"


def _check_ranges(info: TensorInfo, sizes: Mapping[Path, int]) -> None:
    """Of everything that is read of a tensor, and of its last row alone. sizes: of the files of the folder."""
    for ranges in (info.ranges(0, info.num_rows), info.ranges(info.num_rows - 1, 1)):
        for file, offset, nbytes in ranges:
            assert file in sizes, f"reads {file}, outside of its folder"
            assert 0 <= offset <= offset + nbytes <= sizes[file], f"reads outside of {file.name}"


def _check_numbers(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """First and last rows come out as the headers say."""
    step = min(info.row_multiple, info.num_rows)
    for first in {0, (info.num_rows - 1) // step * step}:
        count = min(step, info.num_rows - first)
        numbers = checkpoint.decode(info, read_rows(info, first, count), first, count)
        expected = (count, *info.stored_shape[1:]) if len(info.shape) > 1 else info.shape
        assert numbers.shape == expected, f"decodes {info.name} to {numbers.shape} instead of {expected}"
        assert numbers.dtype == np.dtype(NUMPY_OF_ELEMENT[info.element]), f"decodes {info.name} to {numbers.dtype}"


def _bad_line(message: str) -> str:
    """What is wrong with an error's line; empty where nothing is."""
    line = " ".join(message.split())
    if not line:
        return "an error without words"
    if not line.isprintable():
        return (
            "an error whose line is not printable: "
            + "".join(each if each.isprintable() else "?" for each in line)[:80].rpartition("/")[2]
        )
    return f"an error of {LONGEST_LINE} characters and more: {line[-60:]}" if len(line) > LONGEST_LINE else ""


def _place(error: BaseException) -> str:
    """The innermost line of this program's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "offload_sirius" in frame.filename or "fuzzing" in frame.filename]
    last = ours[-1] if ours else frames[-1]
    return f"in {Path(last.filename).name}:{last.lineno} {last.name}"


@contextmanager
def _limited() -> Iterator[None]:
    size_nbytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size_nbytes + ADDRESS_NBYTES, limits[1]))
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _too_long(number: int, frame: FrameType | None) -> Any:
    raise TooLongError


def _reset_peak() -> int:
    """Resident bytes, from which the kernel now counts its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_nbytes()


def _peak_nbytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0
