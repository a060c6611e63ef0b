"""`offload-sirius doctor`: facts for people and for programs. The disk is not measured here."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload_sirius.kernels.native import Native
from offload_sirius.rates import Rates
from offload_sirius.units import MIB
from offload_sirius.weights.disk_rate import DiskRate

from .conftest import Run

NAMES = {
    "version",
    "demo_model",
    "triton",
    "compiled_kernels",
    "cpu_cores",
    "cuda_devices",
    "host_memory_free_bytes",
    "cgroup_limit_bytes",
    "memlock_limit_bytes",
    "disk_file_system",
    "disk_free_bytes",
    "disk_gbytes_per_second",
    "rates_bfloat16",
    "rates_float32",
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths whose disk was measured: each reads 2 GB/s through the page cache."""
    paths: list[Path] = []

    def measure(path: Path) -> DiskRate:
        paths.append(path)
        return DiskRate(path=path, bytes_per_second=2e9, depth=8, read_nbytes=4 * MIB, direct=False)

    monkeypatch.setattr("offload_sirius.weights.disk_rate.measure_disk", measure)
    return paths


def test_json_is_one_object_with_every_finding(run: Run, measured: list[Path], tmp_path: Path) -> None:
    ran = run("doctor", "--json", "--path", str(tmp_path))
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
    found = json.loads(ran.out)
    assert set(found) == NAMES
    assert found["disk_gbytes_per_second"] == 2.0
    assert found["host_memory_free_bytes"] > 0
    assert measured == [tmp_path]


def test_c_kernels_that_could_not_be_compiled_are_said_to_be(
    run: Run, measured: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = "this CPU takes a few times longer than it has to: no C compiler was found"
    monkeypatch.setattr("offload_sirius.kernels.native.native", lambda name: Native(library=None, problem=problem))
    assert f"compiled kernels         {problem}" in run("doctor").out.splitlines()


def test_people_get_a_line_for_each_finding_and_advice_below_it(run: Run, measured: list[Path], tmp_path: Path) -> None:
    lines = run("doctor", "--path", str(tmp_path)).out.splitlines()
    named = [line for line in lines if not line.startswith(" ")]
    assert {line[:24].strip().replace(" ", "_") for line in named} == NAMES
    assert lines[-6:] == [
        "disk gbytes per second   2.00 GB/s by page cache, 8 reads of 4.00 MiB at a time",
        " " * 24 + " -> this file system refuses O_DIRECT; a local disk streams faster",
        "rates bfloat16           not measured",
        " " * 24 + " -> measure with `offload-sirius doctor --measure`",
        "rates float32            not measured",
        " " * 24 + " -> measure with `offload-sirius doctor --measure`",
    ]
    assert len(measured) == 1


def test_what_was_measured_is_kept_and_shown_with_its_date(
    run: Run, measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(device: torch.device, dtype: torch.dtype, disk: Path, assumed: Rates, source: str) -> Rates:
        assert (device.type, disk) == ("cpu", tmp_path)
        known = {"link_bytes_per_second": 5e9, "device_bytes_per_second": 8e9 * dtype.itemsize}
        return replace(assumed, **known, sources={**assumed.sources, **dict.fromkeys(known, source)})  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("offload_sirius.bench.rates.measure_rates", measure)
    first = run("doctor", "--measure", "--path", str(tmp_path))
    assert [line.rpartition(", ")[2] for line in first.err.splitlines()] == [
        "bfloat16: about two minutes",
        "float32: about two minutes",
    ]
    shown = run("doctor", "--path", str(tmp_path)).out.splitlines()[-2:]
    today = datetime.date.today().isoformat()
    assert shown[0].startswith("rates bfloat16           link 5.00 GB/s, disk 3.00 GB/s, device memory 16 GB/s, ")
    assert shown[1].startswith("rates float32            link 5.00 GB/s, disk 3.00 GB/s, device memory 32 GB/s, ")
    assert all(line.endswith(f"; measured {today}") for line in shown)
    found = json.loads(run("doctor", "--json", "--path", str(tmp_path)).out)
    assert found["rates_float32"]["sources"]["link_bytes_per_second"] == f"measured {today}"
    assert found["rates_float32"]["sources"]["disk_bytes_per_second"] == "assumed"


def test_without_a_path_the_disk_of_the_cache_folder_is_measured(run: Run, measured: list[Path], tmp_path: Path) -> None:
    assert run("doctor", "--json").code == 0
    assert measured == [tmp_path / "cache"]
    assert measured[0].is_dir()


def test_a_cache_folder_that_cannot_be_made_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(file / "cache"))
    ran = run("doctor")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"error: {file}/cache: cannot be made: Not a directory; set OFFLOAD_SIRIUS_CACHE, or name a folder with --path\n"
    )


def test_a_path_that_is_not_there_is_named(run: Run) -> None:
    ran = run("doctor", "--path", "/nowhere")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: --path /nowhere: No such file or directory; give a file or a folder on the disk to measure\n"
