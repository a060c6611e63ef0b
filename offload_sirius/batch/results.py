"""The answers of a batch on disk: the output, in the input's order, and beside it journals of those whose turn it is not yet.

A journal, FILE.partial, is there before the output has its first line and gone when it has its last. It begins with what the run
was asked for. Each process has its own. What is written is on the disk before the next answer is; a line that was being written
when the process was killed is cut off when the next one goes on. Knows no model.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_sirius.batch.lines import Id
from offload_sirius.errors import ConfigError

OTHER_OUT = "name another --out"


@dataclass(kw_only=True)
class Finished:
    """What is on the disk."""

    num_written: int = 0
    """Lines of the output: those of so many of the first prompts."""
    num_whole_bytes: int = 0
    """Of the output; behind them is a line that was not written to its end."""
    early: dict[int, bytes] = field(default_factory=dict)
    """Lines that are in a journal only, by their place in the input."""
    num_errors: int = 0
    """Of all of them."""

    def has(self, place: int) -> bool:
        """Whether the prompt at that place of the input has its answer."""
        return place < self.num_written or place in self.early

    @property
    def num_done(self) -> int:
        """Prompts that have one."""
        return self.num_written + len(self.early)


def journal_path(out: Path, process: int) -> Path:
    """Where a process keeps what is not in the output yet."""
    return out.with_name(f"{out.name}.partial" + (f"-{process}" if process else ""))


def journals_of(out: Path) -> list[Path]:
    """Those that there are."""
    first = journal_path(out, 0)
    others = (each for each in out.parent.glob("*") if each.name.startswith(f"{first.name}-"))
    numbered = (each for each in others if each.name.removeprefix(f"{first.name}-").isdecimal())
    return [each for each in (first, *sorted(numbered)) if each.exists()]


def read_finished(out: Path, ids: Sequence[Id], asked: Mapping[str, Any]) -> Finished:
    """What earlier runs have left. asked: what must have been asked of them. Changes nothing.

    Raises ConfigError where the output is that of another input, or the journals are of another run.
    """
    finished = Finished()
    journals = {path: lines for path in journals_of(out) if (lines := _whole_lines(_content(path)))}
    _read_output(out, ids, finished, may_be_cut=bool(journals))
    places = {each: place for place, each in enumerate(ids)}
    for path, (header, *lines) in journals.items():
        _require_same(path, out, _parsed(header), asked)
        for line in lines:
            place = places.get(_answer(line).get("id"))  # type: ignore[arg-type]
            if place is not None and not finished.has(place):
                finished.early[place] = line
                finished.num_errors += "error" in _answer(line)
    return finished


def _read_output(out: Path, ids: Sequence[Id], finished: Finished, *, may_be_cut: bool) -> None:
    content = _content(out)
    for line in _whole_lines(content):
        answer, place = _answer(line), finished.num_written
        if not answer and may_be_cut:
            return
        if not answer or place >= len(ids) or not _same(answer["id"], ids[place]):
            expected = "nothing" if place >= len(ids) else f"the answer to id {json.dumps(ids[place])[:100]}"
            raise ConfigError(f"--out {out}: line {place + 1} is not {expected}: it is no output of this input; {OTHER_OUT}")
        finished.num_written += 1
        finished.num_whole_bytes += len(line)
        finished.num_errors += "error" in answer
    if finished.num_whole_bytes < len(content) and not may_be_cut:
        raise ConfigError(f"--out {out}: its last line is not whole, and {journal_path(out, 0).name} is not there; {OTHER_OUT}")


def _require_same(journal: Path, out: Path, found: dict[str, Any], asked: Mapping[str, Any]) -> None:
    if found == asked:
        return
    if set(found) != set(asked):
        raise ConfigError(f"{journal}: is not what this command has written; remove it, or {OTHER_OUT}")
    name = next(name for name in asked if found[name] != asked[name])
    raise ConfigError(
        f"--out {out}: was begun with another {name}: {str(found[name])[:100]}, and now it is {str(asked[name])[:100]}; "
        f"give what it was begun with, or {OTHER_OUT}"
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {OTHER_OUT}") from error


def _whole_lines(content: bytes) -> list[bytes]:
    """Each with its line break."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _answer(line: bytes) -> dict[str, Any]:
    """What a line of output or journal says; empty where it is none."""
    found = _parsed(line)
    is_answer = isinstance(found.get("id"), str | int) and ("text" in found or "error" in found)
    return found if is_answer else {}


def _same(found: object, needed: Id) -> bool:
    return type(found) is type(needed) and found == needed


class LinesFile:
    """A file that grows by whole lines. Raises ConfigError where it cannot; it then still ends with a whole one."""

    def __init__(self, path: Path) -> None:
        """Nobody else can open it so before it is closed."""
        self.path = path
        self._is_new = not path.exists()
        self._num_whole_bytes = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if isinstance(error, BlockingIOError):
                raise ConfigError(f"{path}: another run is writing it; wait for its end, or {OTHER_OUT}") from None
            raise self._unwritable(error) from error

    def cut(self, num_bytes: int) -> None:
        """Keep so much of it, whole lines, and go on behind them."""
        os.ftruncate(self._file, num_bytes)
        os.lseek(self._file, num_bytes, os.SEEK_SET)
        self._num_whole_bytes = num_bytes

    def append(self, content: bytes) -> None:
        """Add whole lines; they are on the disk when it returns."""
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            self.cut(self._num_whole_bytes)
            raise self._unwritable(error) from error
        self._num_whole_bytes += len(content)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it, not even a part of a line."""
        return os.fstat(self._file).st_size == 0

    def close(self) -> None:
        """Give the file to others. One that was not there and has nothing does not stay."""
        if self._is_new and self.is_empty:
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.path}: cannot be written: {error.strerror}; what is complete was kept, and the same command goes on"
        )


class Results:
    """Where a process leaves its answers."""

    def __init__(self, out: Path, ids: Sequence[Id], asked: Mapping[str, Any], process: int = 0) -> None:
        """asked: what this run is asked for; process: the first one, 0, writes the output.

        Raises ConfigError as read_finished does, and where another run writes the files.
        """
        self._out, self._ids, self._asked = out, ids, asked
        with ExitStack() as undone:
            self._journal = LinesFile(journal_path(out, process))
            undone.callback(self._journal.close)
            self._output = LinesFile(out) if process == 0 else None
            if self._output is not None:
                undone.callback(self._output.close)
            # Nobody else writes them from here on, so that this is what is there.
            self._finished = read_finished(out, ids, asked)
            self._begin()
            undone.pop_all()

    def _begin(self) -> None:
        content = b"".join(_whole_lines(_content(self._journal.path)))
        self._journal.cut(len(content))
        if not content:
            self._journal.append(line_of(self._asked))
        if self._output is not None:
            self._output.cut(self._finished.num_whole_bytes)
            self._write_early()

    def add(self, place: int, answer: Mapping[str, Any]) -> None:
        """Keep an answer. place: its prompt's, in the input."""
        finished, line = self._finished, line_of(answer)
        if finished.has(place):
            return
        finished.num_errors += "error" in answer
        if self._output is not None and place == finished.num_written:
            self._output.append(line)
            finished.num_written += 1
            self._write_early()
        else:
            self._journal.append(line)
            finished.early[place] = line

    def _write_early(self) -> None:
        """Those whose turn it is now."""
        finished = self._finished
        assert self._output is not None, "the first process does this"
        if finished.num_written not in finished.early:
            return
        last = finished.num_written
        while last in finished.early:
            last += 1
        places = range(finished.num_written, last)
        self._output.append(b"".join(finished.early[place] for place in places))
        finished.num_written = last
        for place in places:
            del finished.early[place]

    @property
    def num_done(self) -> int:
        """Prompts that have an answer, as far as this process knows."""
        return self._finished.num_done

    @property
    def num_errors(self) -> int:
        """Those of them that have an error in place of one."""
        return self._finished.num_errors

    def complete(self) -> None:
        """All processes have ended: bring what they have left into the output, and remove the journals."""
        left = read_finished(self._out, self._ids, self._asked)
        self._finished.early, self._finished.num_errors = left.early, left.num_errors
        self._write_early()
        assert self._finished.num_written == len(self._ids), "every prompt has its answer or its error"
        for journal in journals_of(self._out):
            journal.unlink()

    def close(self) -> None:
        """Give the files to others. Where no prompt has its answer, nothing stays: the next run may be asked for anything."""
        # By its size: an interruption may have come before a line was counted.
        if self.num_done == 0 and (self._output is None or self._output.is_empty):
            self._journal.cut(0)
        self._journal.close()
        if self._output is not None:
            self._output.close()


def line_of(fields: Mapping[str, Any]) -> bytes:
    """A JSON object and its line break."""
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
