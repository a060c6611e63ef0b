"""A folder that becomes a packed model: all or nothing, going on behind an interruption, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from offload_sirius_loaders import CheckpointError, open_checkpoint
from offload_sirius_loaders.pack_file import read_file
from offload_sirius_loaders.pack_index import INDEX_NAME, MARKER_NAME, OUTSIDE_NAME, layer_file_name
from offload_sirius_loaders.pack_writer import PackWriter
from offload_sirius_loaders.packed import open_packed
from offload_sirius_loaders.writer import write_checkpoint

from .packs import JOB, MODEL, chunks, content_of, files_of, write_pack

ROOT = Path(__file__).parents[2]
NAMES = [OUTSIDE_NAME, layer_file_name(0), layer_file_name(1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a folder that nothing has disturbed."""
    directory = tmp_path_factory.mktemp("packs") / "m"
    assert write_pack(directory) == NAMES
    return files_of(directory)


def killed(directory: Path, at: int) -> subprocess.CompletedProcess[str]:
    """A process that writes it, and ends like one that is killed in front of the call of that number."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'loaders'}"}
    command = [sys.executable, "-m", "tests.loaders.packs", str(directory), str(at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_folder_has_its_files_and_nothing_else(whole: dict[str, bytes]) -> None:
    assert set(whole) == {*NAMES, "config.json", "generation_config.json", INDEX_NAME}


NUM_CALLS = 39
"""To fsync, replace, mkdir and unlink, and for bytes of tensors, while a folder is written."""


def test_a_process_makes_as_many_calls_as_it_is_killed_at(tmp_path: Path) -> None:
    ran = killed(tmp_path / "m", 1000)
    assert (ran.returncode, ran.stdout) == (0, f"{NUM_CALLS}\n"), ran.stderr


@pytest.mark.parametrize("at", range(0, NUM_CALLS, 2))
def test_killed_at_any_call_it_is_no_model_and_goes_on(at: int, whole: dict[str, bytes], tmp_path: Path) -> None:
    directory = tmp_path / "m"
    assert killed(directory, at).returncode == 9
    finished = (directory / INDEX_NAME).is_file()
    if finished:
        assert open_checkpoint(str(directory)).spec.num_layers == 2, "killed while the marker is removed"
    else:
        with pytest.raises(CheckpointError):
            open_checkpoint(str(directory))
    kept = {name: (directory / name).stat().st_ino for name in NAMES if (directory / name).is_file()}
    assert write_pack(directory) == [name for name in NAMES if name not in kept]
    assert files_of(directory) == whole
    assert {name: (directory / name).stat().st_ino for name in kept} == kept, "whole files are not written again"


class Stop(BaseException):
    """Ctrl-C, or a bug."""


def interrupted(directory: Path) -> None:
    """Ends in the middle of the first layer."""

    def stop() -> Iterator[memoryview]:
        yield memoryview(bytes(64))
        raise Stop

    writer = PackWriter(directory, JOB, open_checkpoint(MODEL))
    try:
        writer.resume(lambda nbytes: None)
        writer.write(OUTSIDE_NAME, [chunks(content_of(OUTSIDE_NAME, each)) for each in writer.tensors(OUTSIDE_NAME)])
        with pytest.raises(Stop):
            writer.write(layer_file_name(0), [stop(), iter(())])
    finally:
        writer.close()


def test_an_interruption_leaves_what_is_whole_and_says_what_to_do(tmp_path: Path) -> None:
    interrupted(tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {MARKER_NAME, OUTSIDE_NAME}
    with pytest.raises(CheckpointError, match="is a packed copy that was not finished; run the same `offload-sirius pack` again"):
        open_checkpoint(str(tmp_path / "m"))


@pytest.mark.parametrize("damage", ["a flipped bit", "a short file", "another file"])
def test_a_file_that_is_not_whole_is_written_again(damage: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    directory = tmp_path / "m"
    interrupted(directory)
    path = directory / OUTSIDE_NAME
    content = bytearray(path.read_bytes())
    content[read_file(path).head_nbytes + 10] ^= 1
    path.write_bytes({"a flipped bit": content, "a short file": content[:-1], "another file": b"{}"}[damage])
    assert write_pack(directory) == NAMES
    assert files_of(directory) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "other"}, r"is {what} of synthetic:tiny\S+, and one of other is asked for"),
        ({"fingerprint": "9"}, r"is {what} of another synthetic:tiny\S+, whose weights are not those of this one"),
        ({"dtype": "bfloat16"}, "is {what} in float32, and bfloat16 is asked for"),
        ({"quantize": "none", "quantize_group": None}, "is {what} with --quantize int8 in groups of 64, and none is asked for"),
        ({"quantize_group": 32}, "is {what} with --quantize int8 in groups of 64, and int8 in groups of 32 is asked for"),
        ({"records_nbytes": 64}, "is {what} with another layout of layers than this program's"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_something_else_is_refused_and_left(
    changes: dict[str, Any], message: str, finished: bool, tmp_path: Path
) -> None:
    (write_pack if finished else interrupted)(tmp_path / "m")
    before = files_of(tmp_path / "m")
    what = "a packed copy" if finished else "an unfinished packed copy"
    with pytest.raises(CheckpointError, match=message.format(what=what) + "; give another folder, or remove this one"):
        write_pack(tmp_path / "m", replace(JOB, **changes))
    assert files_of(tmp_path / "m") == before


def test_a_finished_folder_is_left_as_it_is(whole: dict[str, bytes], tmp_path: Path) -> None:
    write_pack(tmp_path / "m")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()}
    assert write_pack(tmp_path / "m") == []
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()} == times


@pytest.mark.parametrize("name", [layer_file_name(1), "config.json"])
def test_a_finished_folder_that_has_lost_a_file_gets_it_again(name: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    write_pack(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    assert write_pack(tmp_path / "m") == ([name] if name in NAMES else [])
    assert files_of(tmp_path / "m") == whole


def test_a_folder_with_other_things_a_file_and_a_parent_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".letter.partial").write_text("dear")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("full", "full: exists and is no packed copy; give a folder that does not exist"),
        ("file", "file: is a file; give a folder that does not exist"),
        ("no/m", "its parent folder does not exist; create it first"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_pack(tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"full", ".letter.partial", "file"}


def test_an_empty_folder_is_as_good_as_none(whole: dict[str, bytes], tmp_path: Path) -> None:
    write_pack(tmp_path)
    assert files_of(tmp_path) == whole


def test_a_folder_that_another_process_packs_is_refused(tmp_path: Path) -> None:
    writer = PackWriter(tmp_path / "m", JOB, open_checkpoint(MODEL))
    with pytest.raises(CheckpointError, match="is being packed by another process; wait for it, or stop it"):
        write_pack(tmp_path / "m")
    writer.close()
    assert write_pack(tmp_path / "m") == NAMES


class DiskUsage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 2**40, 2**23))
    with pytest.raises(
        CheckpointError, match=r"m: the disk has 0\.01 GiB free, 0\.01 GiB are needed; free some, or give a folder on another"
    ):
        write_pack(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "m")
    layers_nbytes = 2 * (2 * 4096 + (5 << 20)) + 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 2**40, layers_nbytes))
    assert write_pack(tmp_path / "m") == NAMES[1:]


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError) as caught:
            write_pack(tmp_path / "m")
    assert str(caught.value) == (
        f"{tmp_path / 'm'}: cannot be written: No space left on device; what is complete was kept, and the same command goes on"
    )
    assert write_pack(tmp_path / "m") == NAMES


def test_the_tokenizer_of_a_folder_comes_along(tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(MODEL), tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "source" / "letter.txt").write_text("dear")
    write_pack(tmp_path / "m", checkpoint=open_checkpoint(str(tmp_path / "source")))
    packed = open_packed(tmp_path / "m", "m")
    assert packed.tokenizer.directory == tmp_path / "m"
    assert (tmp_path / "m" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "m" / "letter.txt").exists()
