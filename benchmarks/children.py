"""A process of its own for everything that is measured: its memory and disk as the kernel counts them, its last line as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgroup import Cgroup, new_cgroup

SECTOR_NBYTES = 512
"""The unit of the kernel's counts of what a process has read and written."""

LONGEST_ERROR = 200
"""Characters of an error's last line that are kept."""


@dataclass(frozen=True, kw_only=True)
class Child:
    """What came of a process."""

    figures: dict[str, Any] | None
    """The JSON of its last line; None where it failed."""
    error: str | None
    """In one line; None where it did not fail."""
    seconds: float
    """From its start to its end."""
    cpu_seconds: float
    """Of all its threads, the kernel's work for them included."""
    read_nbytes: int
    """From the disk, what its page faults made the kernel read included."""
    resident_peak_nbytes: int
    """Its own, pages of mapped files included."""
    cgroup_peak_nbytes: int | None
    """Of its group, the file cache included; None without a group."""


def run_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    limit_seconds: float,
    in_cgroup: bool = False,
    limit_nbytes: int | None = None,
) -> Child:
    """Run it to its end. in_cgroup: in a group of its own, held to limit_nbytes; nothing of it outlives an interruption.

    Raises OSError where no group can be made.
    """
    with (
        new_cgroup() if in_cgroup else nullcontext() as group,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
    ):
        if group is not None and limit_nbytes is not None:
            group.limit_to(limit_nbytes)
        began = time.perf_counter()
        process = subprocess.Popen(
            command if group is None else group.entered_by(command), env=dict(environment), stdout=out, stderr=said
        )
        alarm = threading.Timer(limit_seconds, process.kill)
        alarm.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
        finally:
            alarm.cancel()
            if process.returncode is None:
                process.kill()
                process.wait()
        lines = [_lines_of(file) for file in (out, said)]
        figures, error = outcome(process.returncode, *lines, is_late=seconds >= limit_seconds, num_kills=_num_kills(group))
        return Child(
            figures=figures,
            error=error if error != LATE else f"{LATE} {limit_seconds:.0f} s",
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            read_nbytes=usage.ru_inblock * SECTOR_NBYTES,
            resident_peak_nbytes=usage.ru_maxrss * 1024,
            cgroup_peak_nbytes=None if group is None else group.peak_nbytes,
        )


KILLED = "killed for want of memory"
LATE = "did not end within"


def outcome(
    exit_status: int, printed: Sequence[str], said: Sequence[str], *, is_late: bool, num_kills: int
) -> tuple[dict[str, Any] | None, str | None]:
    """The figures, or the error in one line."""
    if num_kills and exit_status != 0:
        return None, KILLED
    if is_late:
        return None, LATE
    if exit_status != 0:
        return None, f"exit status {exit_status}: {(said or printed or ['nothing said'])[-1][-LONGEST_ERROR:]}"
    try:
        figures = json.loads(printed[-1])
    except (IndexError, ValueError):
        return None, "its last line is no JSON"
    return figures, None


def drop_page_cache() -> bool:
    """Have the next process find none of its files in memory; False where that is not allowed."""
    os.sync()  # what is not yet on the disk cannot be dropped
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def folder_nbytes(path: Path) -> int:
    """Of all files below it, or of the file."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)


def _lines_of(file: Any) -> list[str]:
    file.seek(0)
    return [line for line in file.read().replace("\r", "\n").splitlines() if line.strip()]


def _num_kills(group: Cgroup | None) -> int:
    return 0 if group is None else group.num_kills
