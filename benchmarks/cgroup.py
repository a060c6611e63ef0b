"""Memory cgroups of version 1 and 2: a group for a process, its limit, its peak, and whether somebody was killed. Takes root."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    def peak_nbytes(self) -> int:
        """The most memory its processes ever had together, their file cache included."""
        return int((self.folder / self.version.peak).read_text())

    @property
    def num_kills(self) -> int:
        """Processes that were killed for want of memory."""
        lines = (self.folder / self.version.events).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])


@contextmanager
def new_cgroup() -> Iterator[Cgroup]:
    """A group of the version whose memory controller is there; removed at the end. Raises OSError."""
    for version in VERSIONS:
        folder = version.root / f"offload-sirius-{os.getpid()}"
        if not version.root.is_dir():
            continue
        folder.mkdir()
        try:
            if (folder / version.limit).exists():
                yield Cgroup(version=version, folder=folder)
                return
        finally:
            folder.rmdir()
    raise FileNotFoundError("no memory controller under " + " or ".join(str(version.root) for version in VERSIONS))
