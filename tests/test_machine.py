"""What the machine has, read from file trees written out here: /proc, /sys and cgroups of version 1, version 2 and both."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from offload_sirius import machine
from offload_sirius.units import GIB, KIB, MIB

V1_UNLIMITED = "9223372036854771712"
V1_MOUNTS = """\
23 1 254:0 / / rw - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
"""
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v1_group(folder: str, *, limit: str, usage: int = 0, cache: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": f"cache 5\ninactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file 10\n",
    }


def v2_group(folder: str, *, limit: str, usage: int = 0, cache: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 7\nfile 99\ninactive_file {cache}\nactive_file 10\n",
    }


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine itself has 64 GiB available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))


def test_without_cgroups_what_the_machine_has_available_is_free(tmp_path: Path) -> None:
    assert machine.free_host_nbytes(tmp_path) == 64 * GIB
    assert machine.cgroup_limit_nbytes(tmp_path) is None


def test_a_version_1_group_leaves_its_limit_less_usage_that_is_no_file_cache(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/mountinfo": V1_MOUNTS, "proc/self/cgroup": "4:memory:/job\n"})
    write(root, v1_group("sys/fs/cgroup/memory", limit=V1_UNLIMITED))
    write(root, v1_group("sys/fs/cgroup/memory/job", limit=str(2 * GIB), usage=GIB, cache=300))
    assert machine.free_host_nbytes(root) == GIB + 310
    assert machine.cgroup_limit_nbytes(root) == 2 * GIB


def test_a_version_2_group_leaves_its_limit_less_usage_that_is_no_file_cache(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/user.slice/job\n"})
    write(root, v2_group("sys/fs/cgroup/user.slice/job", limit=str(2 * GIB), usage=GIB, cache=300))
    assert machine.free_host_nbytes(root) == GIB + 310
    assert machine.cgroup_limit_nbytes(root) == 2 * GIB


def test_a_tighter_group_above_counts(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/a/b/c\n"})
    write(root, v2_group("sys/fs/cgroup/a", limit=str(GIB), usage=700 * MIB))
    write(root, v2_group("sys/fs/cgroup/a/b", limit="max", usage=600 * MIB))
    write(root, v2_group("sys/fs/cgroup/a/b/c", limit=str(8 * GIB), usage=500 * MIB))
    assert machine.free_host_nbytes(root) == 324 * MIB + 10
    assert machine.cgroup_limit_nbytes(root) == GIB


def test_the_limit_and_the_least_free_may_be_of_different_groups(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/full/small\n"})
    write(root, v2_group("sys/fs/cgroup/full", limit=str(4 * GIB), usage=4 * GIB))
    write(root, v2_group("sys/fs/cgroup/full/small", limit=str(GIB)))
    assert machine.free_host_nbytes(root) == 10
    assert machine.cgroup_limit_nbytes(root) == GIB


def test_other_groups_of_the_machine_do_not_count(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/mine\n"})
    write(root, v2_group("sys/fs/cgroup/mine", limit="max"))
    write(root, v2_group("sys/fs/cgroup/mine/below", limit=str(MIB)))
    write(root, v2_group("sys/fs/cgroup/other", limit=str(MIB)))
    assert machine.free_host_nbytes(root) == 64 * GIB
    assert machine.cgroup_limit_nbytes(root) is None


def test_a_machine_with_both_versions_is_read_by_both(tmp_path: Path) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    groups = "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/fast\n0::/\n"
    root = write(tmp_path, {"proc/self/mountinfo": V1_MOUNTS + unified, "proc/self/cgroup": groups})
    write(root, v1_group("sys/fs/cgroup/memory/job", limit=str(GIB)))
    (root / "sys/fs/cgroup/unified").mkdir()
    assert machine.cgroup_limit_nbytes(root) == GIB


def test_a_container_that_is_mounted_its_own_group_finds_its_limit(tmp_path: Path) -> None:
    mounts = "35 31 0:32 /docker/4fe1 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    root = write(tmp_path, {"proc/self/mountinfo": mounts, "proc/self/cgroup": "4:memory:/docker/4fe1/inner\n"})
    write(root, v1_group("sys/fs/cgroup/memory", limit=str(3 * GIB)))
    write(root, v1_group("sys/fs/cgroup/memory/inner", limit=str(2 * GIB)))
    assert machine.cgroup_limit_nbytes(root) == 2 * GIB


@pytest.mark.parametrize("group", ["/../../elsewhere", "/docker/other"])
def test_a_group_that_cannot_be_seen_is_limited_by_what_is_mounted(tmp_path: Path, group: str) -> None:
    mounts = "30 23 0:26 /docker/4fe1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    root = write(tmp_path, {"proc/self/mountinfo": mounts, "proc/self/cgroup": f"0::{group}\n"})
    write(root, v2_group("sys/fs/cgroup", limit=str(GIB)))
    assert machine.cgroup_limit_nbytes(root) == GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/job\n"})
    write(root, v2_group("sys/fs/cgroup/job", limit=str(GIB), usage=2 * GIB))
    assert machine.free_host_nbytes(root) == 0


def test_a_group_of_more_cache_than_usage_leaves_its_limit(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/job\n"})
    write(root, v2_group("sys/fs/cgroup/job", limit=str(GIB), usage=MIB, cache=2 * MIB))
    assert machine.free_host_nbytes(root) == GIB


@pytest.mark.parametrize(("soft", "expected"), [(8 * MIB, 8 * MIB), (0, 0), (resource.RLIM_INFINITY, None)])
def test_the_memlock_limit_is_the_soft_one(monkeypatch: pytest.MonkeyPatch, soft: int, expected: int | None) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert machine.memlock_limit_nbytes() == expected


def hyperthreads(root: Path, *siblings: str) -> Path:
    """A machine whose CPU number i is on the core of these siblings."""
    topology = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in enumerate(siblings)}
    return write(root, topology)


def allow_cpus(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))


def test_hyperthreads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_cpus(monkeypatch, 0, 1, 2, 3)
    assert machine.physical_cores(hyperthreads(tmp_path, "0,2\n", "1,3\n", "0,2\n", "1,3\n")) == 2


def test_cores_the_process_is_kept_off_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_cpus(monkeypatch, 0, 1, 2)
    assert machine.physical_cores(hyperthreads(tmp_path, "0-1", "0-1", "2-3", "2-3", "4-5", "4-5")) == 2


def test_cpus_whose_core_is_not_told_count_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_cpus(monkeypatch, 0, 1, 2, 5)
    assert machine.physical_cores(tmp_path) == 4


@pytest.mark.parametrize(
    ("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("9900000 100000", 4)]
)
def test_a_version_2_quota_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    allow_cpus(monkeypatch, 0, 1, 2, 3)
    root = write(tmp_path, {"proc/self/mountinfo": V2_MOUNTS, "proc/self/cgroup": "0::/job/step\n"})
    write(root, {"sys/fs/cgroup/job/cpu.max": f"{quota}\n", "sys/fs/cgroup/job/step/cpu.max": "max 100000\n"})
    assert machine.physical_cores(root) == cores


@pytest.mark.parametrize(("quota", "cores"), [("300000", 3), ("-1", 4)])
def test_a_version_1_quota_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    allow_cpus(monkeypatch, 0, 1, 2, 3)
    root = write(tmp_path, {"proc/self/mountinfo": V1_MOUNTS, "proc/self/cgroup": "1:cpu,cpuacct:/job\n"})
    folder = "sys/fs/cgroup/cpu,cpuacct/job"
    write(root, {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"})
    assert machine.physical_cores(root) == cores


def test_the_peak_is_the_high_water_mark_of_the_process(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/status": "Name:\tpython\nVmPeak:\t  9000 kB\nVmHWM:\t  1234 kB\nVmRSS:\t  1000 kB\n"})
    assert machine.peak_resident_nbytes(tmp_path) == 1234 * KIB


def test_the_peak_is_that_of_getrusage_where_the_kernel_tells_no_other(tmp_path: Path) -> None:
    assert machine.peak_resident_nbytes(tmp_path) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_peak_of_a_process_stays_after_its_memory_was_given_back() -> None:
    code = "from offload_sirius.machine import peak_resident_nbytes as peak; b'x' * (64 << 20); print(peak())"
    assert 64 * MIB < int(run_python(code)) < 200 * MIB


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tmp_path is ext4; below it `shared` is NFS, and on `memory` a tmpfs was mounted over an xfs."""
    table = [("/", "overlay"), (str(tmp_path), "ext4"), (f"{tmp_path}/shared", "nfs4")]
    table += [(f"{tmp_path}/memory", "xfs"), (f"{tmp_path}/memory", "tmpfs")]
    partitions = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in table]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: partitions)


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(
    ("name", "kind"), [("models", "ext4"), ("shared/models", "nfs4"), ("shared2", "ext4"), ("memory", "tmpfs")]
)
def test_a_path_is_on_the_deepest_mount_above_it(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert machine.file_system_of(tmp_path / name).kind == kind


@pytest.mark.usefixtures("mounts")
def test_a_path_not_made_yet_is_on_the_file_system_of_the_folder_above(tmp_path: Path) -> None:
    found = machine.file_system_of(tmp_path / "cache" / "models" / "model.gguf")
    assert found.kind == "ext4"
    assert 0 < found.free_nbytes <= psutil.disk_usage(str(tmp_path)).total


def test_a_kind_that_is_not_told_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [])
    assert machine.file_system_of(tmp_path).kind == ""


def test_this_machine_can_be_read() -> None:
    assert 0 < machine.free_host_nbytes() <= 64 * GIB
    assert machine.physical_cores() >= 1
    assert machine.peak_resident_nbytes() > MIB
    assert machine.file_system_of(Path.cwd()).kind != ""


def test_importing_it_does_not_import_torch() -> None:
    assert run_python("import sys, offload_sirius.machine; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", os.uname().machine),
    ],
)
def test_a_cpu_is_called_as_it_calls_itself_or_by_its_architecture(cpuinfo: str, model: str, tmp_path: Path) -> None:
    assert machine.cpu_model(write(tmp_path, {"proc/cpuinfo": cpuinfo})) == model


@pytest.mark.parametrize("name", ["nvidiactl", "kfd", "dxg"])
def test_a_driver_s_device_says_that_there_may_be_a_gpu(name: str, tmp_path: Path) -> None:
    assert not machine.may_have_gpu(tmp_path)
    assert machine.may_have_gpu(write(tmp_path, {f"dev/{name}": ""}))
