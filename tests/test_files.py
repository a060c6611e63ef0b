"""Result files: asked for before the work, and whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from offload_sirius.errors import ConfigError
from offload_sirius.files import require_writable, write_whole


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    require_writable(tmp_path / "old", "--trace")
    require_writable(tmp_path / "new", "--trace")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        require_writable(tmp_path, "--trace")
    assert str(caught.value) == f"--trace {tmp_path}: is a folder; name a file in it"


def test_a_file_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(ConfigError) as caught:
        require_writable(path, "--plot")
    assert str(caught.value) == (
        f"--plot {path}: cannot be written: No such file or directory; name a file in a folder that can be written to"
    )


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    write_whole(path, b"new")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_where_writing_breaks_off_the_old_file_stays_and_nothing_else(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_whole(path, b"new")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]
    if expected is ConfigError:
        assert "cannot be written: No space left on device" in str(caught.value)
