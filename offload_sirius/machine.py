"""What this process may use of the machine it runs on: memory, cores, file systems. Reads psutil, /proc and cgroup files.

Linux. Knows nothing of what the memory is for, and of a GPU only whether a driver may have one. `root` is the file system these
are read from: tests give a folder.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload_sirius.units import KIB

_ROOT = Path("/")
_UNLIMITED_NBYTES = 1 << 60
"""Version 1 writes no limit as the largest multiple of a page below 2^63."""


_GPU_DEVICES = ("nvidiactl", "kfd", "dxg")
"""NVIDIA's driver, AMD's, and Windows' for a Linux inside it."""


@dataclass(frozen=True, kw_only=True)
class FileSystem:
    """The file system that holds a path."""

    kind: str
    """As the kernel names it: ext4, xfs, nfs4, overlay, tmpfs (which is memory), ...; empty where it is not told."""
    free_nbytes: int
    """What a user without privileges can still write."""


@dataclass(frozen=True, kw_only=True)
class _Mount:
    """A mounted cgroup hierarchy."""

    version: int
    controllers: frozenset[str]
    """What a hierarchy of version 1 is for. Version 2 has one hierarchy for all; empty."""
    group: str
    """The group whose folder is mounted; / unless a container sees only its own."""
    point: str


@dataclass(frozen=True, kw_only=True)
class _MemoryFiles:
    """What a version calls the files of a group, and in memory.stat the file cache of it and of all groups below."""

    limit: str
    usage: str
    cache: tuple[str, str]


_MEMORY_FILES = {
    1: _MemoryFiles(
        limit="memory.limit_in_bytes", usage="memory.usage_in_bytes", cache=("total_inactive_file", "total_active_file")
    ),
    2: _MemoryFiles(limit="memory.max", usage="memory.current", cache=("inactive_file", "active_file")),
}


def free_host_nbytes(root: Path = _ROOT) -> int:
    """Bytes that this process can still take: what the machine has available, or a cgroup leaves it where that is less.

    File cache counts as free in both, since the kernel drops it for whoever asks.
    """
    free = [int(psutil.virtual_memory().available)]
    for files, folder in _memory_groups(root):
        limit = _memory_limit_nbytes(files, folder)
        if limit is not None:
            free.append(max(0, limit - _unreclaimable_nbytes(files, folder)))
    return min(free)


def cgroup_limit_nbytes(root: Path = _ROOT) -> int | None:
    """The smallest memory limit of this process's cgroup and those above it; None where nothing limits it."""
    limits = [_memory_limit_nbytes(files, folder) for files, folder in _memory_groups(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def memlock_limit_nbytes() -> int | None:
    """How much this process may lock in memory; None is no limit. A process with CAP_IPC_LOCK is not held to it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def num_numa_nodes(root: Path = _ROOT) -> int:
    """Nodes of memory that the machine has; 1 where the kernel tells none."""
    return max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*"))))


def physical_cores(root: Path = _ROOT) -> int:
    """Cores this process may compute on: those it is not kept off, and no more than its CPU quota pays for; at least 1."""
    cores = {_core_of(cpu, root) for cpu in os.sched_getaffinity(0)}
    quotas = [_cpu_quota(version, folder) for version, folder in _groups("cpu", root)]
    # Rounded down: a thread more than the quota pays for is stopped for part of every period, and the others wait for it.
    return max(1, int(min([len(cores), *(quota for quota in quotas if quota is not None)])))


def cpu_model(root: Path = _ROOT) -> str:
    """What the CPU calls itself, `AMD EPYC` say; its architecture where it does not."""
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or os.uname().machine


def may_have_gpu(root: Path = _ROOT) -> bool:
    """Whether a driver has left what torch needs to find a GPU: where this is false, nobody has to import torch to ask."""
    return any((root / "dev" / name).exists() for name in _GPU_DEVICES)


def peak_resident_nbytes(root: Path = _ROOT) -> int:
    """The most memory that was resident in this process at once, file mappings included."""
    # Not ru_maxrss where it can be helped: a process started by a larger one begins with the larger one's peak.
    peak_kib = _fields(root / "proc/self/status").get("VmHWM:")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak_kib is None else peak_kib) * KIB


def resident_nbytes(root: Path = _ROOT) -> int:
    """Memory that is resident in this process now, file mappings included."""
    return _fields(root / "proc/self/status").get("VmRSS:", 0) * KIB


def total_host_nbytes(root: Path = _ROOT) -> int:
    """The machine's memory, or what a cgroup allows this process where that is less."""
    total = int(psutil.virtual_memory().total)
    return min(total, cgroup_limit_nbytes(root) or total)


def file_system_of(path: Path) -> FileSystem:
    """The file system of a path, or of the first folder above it that exists."""
    resolved = path.resolve()
    existing = next(place for place in (resolved, *resolved.parents) if place.exists())
    return FileSystem(kind=_file_system_kind(existing), free_nbytes=psutil.disk_usage(str(existing)).free)


def _file_system_kind(path: Path) -> str:
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.is_relative_to(mount.mountpoint)]
    # The deepest mount holds the path. Of several on one folder the last hides the others; reversed, since `max` takes the first.
    deepest = max(reversed(mounts), key=lambda mount: len(Path(mount.mountpoint).parts), default=None)
    return "" if deepest is None else str(deepest.fstype)


def _core_of(cpu: int, root: Path) -> str:
    """A name of the core that a CPU is a hyperthread of; a CPU whose core is not told is a core of its own."""
    return _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _cpu_quota(version: int, folder: Path) -> float | None:
    """CPUs that a group may keep busy; None where it may use all."""
    if version == 2:
        quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
    else:
        quota, period = _text(folder / "cpu.cfs_quota_us") or "-1", _text(folder / "cpu.cfs_period_us") or ""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _memory_limit_nbytes(files: _MemoryFiles, folder: Path) -> int | None:
    text = _text(folder / files.limit) or "max"
    return int(text) if text.isdecimal() and int(text) < _UNLIMITED_NBYTES else None


def _unreclaimable_nbytes(files: _MemoryFiles, folder: Path) -> int:
    usage, stat = _text(folder / files.usage) or "0", _fields(folder / "memory.stat")
    return max(0, int(usage) - sum(stat.get(name, 0) for name in files.cache))


def _memory_groups(root: Path) -> Iterator[tuple[_MemoryFiles, Path]]:
    for version, folder in _groups("memory", root):
        yield _MEMORY_FILES[version], folder


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of this process's group and all above it, as far as they can be seen, wherever the controller may be."""
    groups = _own_groups(root)
    for mount in _cgroup_mounts(root):
        key = controller if mount.version == 1 else ""
        if key in groups and (mount.version == 2 or controller in mount.controllers):
            point = root / mount.point.lstrip("/")
            folder = point / _below(groups[key], mount.group)
            yield from ((mount.version, each) for each in (folder, *folder.parents) if each.is_relative_to(point))


def _below(group: str, mounted: str) -> Path:
    """Where a group is below the mounted one. One that is not there cannot be seen; what is mounted limits it all the same."""
    path = Path(group)
    return path.relative_to(mounted) if path.is_relative_to(mounted) and ".." not in path.parts else Path()


def _own_groups(root: Path) -> dict[str, str]:
    """Controller -> this process's group, from lines such as `4:cpu,cpuacct:/a/b`; version 2 has the controller ``."""
    groups: dict[str, str] = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), group)
    return groups


def _cgroup_mounts(root: Path) -> Iterator[_Mount]:
    """From lines such as `35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory`; more fields may precede the dash."""
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            group, point = left.split(" ")[3:5]
            version = 1 if kind == "cgroup" else 2
            yield _Mount(version=version, controllers=frozenset(options.split(",")), group=group, point=point)


def _fields(path: Path) -> dict[str, int]:
    """Name -> number, of the lines `name number ...` of a file; empty where the file is missing."""
    words = [line.split() for line in (_text(path) or "").splitlines()]
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdecimal()}


def _text(path: Path) -> str | None:
    """What is in a file of the kernel; None where there is no such file or it may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
