"""Memory cgroups of version 1 and 2: a group for a process, its limit, its peak, and whether somebody was killed. Takes root."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CgroupVersion:
    """Where groups are made, and what a version calls its files."""

    root: Path
    limit: str
    swap: tuple[str, bool]
    """File of the limit that covers swap, and whether it counts memory as well; absent where the kernel does not count swap."""
    peak: str
    events: str
    """Has a line `oom_kill N`."""


REMOVE_SECONDS = 5.0
"""In which what still runs in a group must have ended, once it is killed."""

VERSIONS = (
    CgroupVersion(
        root=Path("/sys/fs/cgroup/memory"),
        limit="memory.limit_in_bytes",
        swap=("memory.memsw.limit_in_bytes", True),
        peak="memory.max_usage_in_bytes",
        events="memory.oom_control",
    ),
    CgroupVersion(
        root=Path("/sys/fs/cgroup"),
        limit="memory.max",
        swap=("memory.swap.max", False),
        peak="memory.peak",
        events="memory.events",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cgroup:
    """A group that exists."""

    version: CgroupVersion
    folder: Path

    def limit_to(self, limit_nbytes: int) -> None:
        """No more memory than that, and nothing of it swapped out instead."""
        (self.folder / self.version.limit).write_text(str(limit_nbytes))
        name, counts_memory = self.version.swap
        if (self.folder / name).exists():
            (self.folder / name).write_text(str(limit_nbytes if counts_memory else 0))

    def entered_by(self, command: Sequence[str]) -> list[str]:
        """The command, in the group from its first byte of memory on: a shell enters it and becomes the command."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def peak_nbytes(self) -> int | None:
        """The most memory its processes ever had together, their file cache included; None where the kernel does not keep it."""
        file = self.folder / self.version.peak
        return int(file.read_text()) if file.exists() else None

    @property
    def num_kills(self) -> int:
        """Processes that were killed for want of memory."""
        lines = (self.folder / self.version.events).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    def remove(self) -> None:
        """What still runs in it is killed. Raises OSError where that does not end in time."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            self._kill()
            try:
                self.folder.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _kill(self) -> None:
        procs = self.folder / "cgroup.procs"
        for pid in procs.read_text().split() if procs.exists() else ():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def new_cgroup() -> Iterator[Cgroup]:
    """A group of the version whose memory controller is there; removed at the end, with all that runs in it. Raises OSError."""
    for version in VERSIONS:
        folder = version.root / f"offload-sirius-{os.getpid()}"
        if not version.root.is_dir():
            continue
        folder.mkdir()
        group = Cgroup(version=version, folder=folder)
        try:
            if (folder / version.limit).exists():
                yield group
                return
        finally:
            group.remove()
    raise FileNotFoundError("no memory controller under " + " or ".join(str(version.root) for version in VERSIONS))
