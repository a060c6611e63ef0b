"""Measuring a disk: what is read, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_sirius.errors import ConfigError
from offload_sirius.units import MIB
from offload_sirius.weights import disk_rate
from offload_sirius.weights.disk_rate import measure_disk, read_seconds


def test_a_file_is_measured_itself(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * MIB + 17))
    rate = measure_disk(path)
    assert rate.path == path
    assert rate.bytes_per_second > 0
    assert (rate.depth, rate.read_nbytes) in disk_rate.QUEUES


def test_the_largest_file_of_a_folder_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_rate, "SMALLEST_FILE_NBYTES", 1000)
    (tmp_path / "small").write_bytes(bytes(1000))
    (tmp_path / "large").write_bytes(bytes(2000))
    assert measure_disk(tmp_path).path == tmp_path / "large"


def test_a_folder_without_one_is_measured_by_a_file_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_rate, "SAMPLE_NBYTES", 32 * MIB)
    assert measure_disk(tmp_path).bytes_per_second > 0
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--path .*nowhere: No such file or directory; give a file or a folder"):
        measure_disk(tmp_path / "nowhere")


def test_several_files_are_read_as_one_up_to_the_bytes_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_bytes(bytes(100_001))
    assert read_seconds(paths, 150_000, 4, 4096) > 0
    with pytest.raises(ConfigError, match="have 200002 bytes, 200003 are to be read"):
        read_seconds(paths, 200_003, 4, 4096)
