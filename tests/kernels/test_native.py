"""C files becoming libraries: compiled once, by whatever compiler there is, and never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from offload_sirius.errors import ConfigError
from offload_sirius.kernels import native as room
from offload_sirius.kernels.native import compiled, find_compiler, loaded_openmp, native

needs_compiler = pytest.mark.skipif(not any(map(room.shutil.which, room.COMPILERS)), reason="there is no C compiler")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def counting_compiler(tmp_path: Path) -> tuple[str, Path]:
    """One that writes a line for each call, and as output what is no library; and its log."""
    log = tmp_path / "calls"
    text = f'echo call >> {log}\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.2\necho nothing > "$2"'
    return script(tmp_path / "cc", text), log


def test_a_library_is_compiled_once(tmp_path: Path, counting_compiler: tuple[str, Path]) -> None:
    compiler, log = counting_compiler
    first, second = (compiled("products", tmp_path, compiler) for _ in range(2))
    assert first == second
    assert log.read_text().splitlines() == ["call"]
    assert compiled("quantise", tmp_path, compiler) != first


def test_processes_that_need_it_at_once_compile_it_once(tmp_path: Path, counting_compiler: tuple[str, Path]) -> None:
    compiler, log = counting_compiler
    program = (
        "import pathlib; from offload_sirius.kernels.native import compiled; "
        f"print(compiled('products', pathlib.Path({str(tmp_path)!r}), {compiler!r}).read_text())"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [each.communicate()[0].strip() for each in running] == ["nothing"] * 3
    assert log.read_text().splitlines() == ["call"]
    assert not list(tmp_path.glob("*.partial*"))


def test_another_compiler_or_cpu_makes_another_library(
    tmp_path: Path, counting_compiler: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, _ = counting_compiler
    other = script(tmp_path / "other", Path(compiler).read_text())
    made = {compiled("products", tmp_path, compiler), compiled("products", tmp_path, other)}
    monkeypatch.setattr(room, "_instructions", lambda: "flags: avx1024")
    assert len(made | {compiled("products", tmp_path, compiler)}) == 3


def test_a_compiler_that_fails_is_said_in_one_line(tmp_path: Path) -> None:
    compiler = script(tmp_path / "cc", 'echo "products.c:1:1: error: no such instruction" >&2\nexit 1')
    with pytest.raises(ConfigError, match=r"could not compile products\.c: .*no such instruction; set CC to another compiler"):
        compiled("products", tmp_path, compiler)
    assert not list(tmp_path.glob("*.so"))


def test_without_a_compiler_there_is_no_library_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no C compiler was found"):
        find_compiler()
    fresh = native.__wrapped__("products")
    assert fresh.library is None
    assert "install one, such as gcc" in fresh.problem
    assert "\n" not in fresh.problem


def test_a_cache_folder_that_cannot_be_made_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "file" / "folder"))
    fresh = native.__wrapped__("products")
    assert fresh.library is None
    assert "cannot be made" in fresh.problem


def test_what_is_no_library_is_a_problem_and_not_an_error(
    tmp_path: Path, counting_compiler: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", counting_compiler[0])
    assert native.__wrapped__("products").library is None


@needs_compiler
def test_all_files_compile_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FLAGS", (*room.FLAGS, "-Wall", "-Wextra", "-Werror"))
    for name in get_args(room.Name):
        assert compiled(name, tmp_path, find_compiler()).exists()


@needs_compiler
def test_a_process_has_one_openmp_runtime_after_loading() -> None:
    before = loaded_openmp()
    if len(before) != 1:
        pytest.skip(f"torch has loaded {before}")
    assert native("products").library is not None
    assert loaded_openmp() == before


@needs_compiler
def test_ctypes_finds_the_functions() -> None:
    assert os.path.exists(str(native("products").library._name))  # type: ignore[union-attr]
    for function in ("linear", "gate_up", "down"):
        assert getattr(native("products").library, f"offload_sirius_{function}")
    assert native("quantise").library.offload_sirius_quantise_int4  # type: ignore[union-attr]
