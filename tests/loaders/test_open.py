"""open_checkpoint: which name leads where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from offload_sirius_loaders import CheckpointError, hub, open_checkpoint
from offload_sirius_loaders.synthetic import open_synthetic
from offload_sirius_loaders.writer import write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny folder of several shards."""
    write_checkpoint(open_synthetic("synthetic:tiny?layers=1"), tmp_path / "my-model", max_shard_nbytes=50_000)
    return tmp_path / "my-model"


@pytest.fixture
def opened_gguf(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """What the GGUF reader was asked to open, instead of opening it."""
    calls: list[tuple[Path, str]] = []
    reader = ModuleType("offload_sirius_loaders.gguf")
    reader.open_gguf = lambda path, name: calls.append((path, name))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "offload_sirius_loaders.gguf", reader)
    return calls


def message_of(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_importing_the_package_imports_no_format_and_no_numbers() -> None:
    program = "import sys, offload_sirius_loaders; print([m for m in ('numpy', 'gguf', 'huggingface_hub') if m in sys.modules])"
    folder = str(Path(hub.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": folder}, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_synthetic_weights_are_opened_by_their_prefix() -> None:
    assert open_checkpoint("synthetic:tiny?layers=2").spec.num_layers == 2


def test_a_folder_is_called_by_its_name_however_it_is_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    monkeypatch.setenv("HOME", str(model.parent))
    for given in (str(model), f"{model}/", ".", "../my-model", "~/my-model"):
        assert open_checkpoint(given).spec.name == "my-model"


def test_an_index_is_opened_by_its_path(model: Path) -> None:
    checkpoint = open_checkpoint(str(model / "model.safetensors.index.json"))
    assert checkpoint.spec.name == "model.safetensors.index.json"
    assert len({info.file for info in checkpoint.tensors.values()}) > 1


def test_a_gguf_file_goes_to_its_reader(tmp_path: Path, opened_gguf: list[tuple[Path, str]]) -> None:
    (tmp_path / "m.gguf").touch()
    open_checkpoint(str(tmp_path / "m.gguf"))
    open_checkpoint(str(tmp_path))
    assert opened_gguf == [(tmp_path / "m.gguf", "m.gguf"), (tmp_path / "m.gguf", tmp_path.name)]


def test_a_folder_with_safetensors_and_gguf_is_opened_by_the_safetensors(
    model: Path, opened_gguf: list[tuple[Path, str]]
) -> None:
    (model / "m.gguf").touch()
    assert open_checkpoint(str(model)).spec.num_layers == 1
    assert opened_gguf == []


def test_a_folder_with_several_gguf_files_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    assert message_of(str(tmp_path)) == f"{tmp_path}: has 2 .gguf files; give the path of one of them"


def test_an_alias_is_downloaded_and_keeps_its_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(hub_id: str) -> Path:
        asked.append(hub_id)
        return model

    monkeypatch.setattr(hub, "download", download)
    assert open_checkpoint("llama-3-70b").spec.name == "llama-3-70b"
    assert open_checkpoint("org/name").spec.name == "org/name"
    assert asked == ["meta-llama/Meta-Llama-3-70B-Instruct", "org/name"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_demo_model_comes_from_its_package_else_from_the_hub(
    installed: bool, model: Path, opened_gguf: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model.parent / "demo.gguf"
    file.touch()
    monkeypatch.setattr(hub, "demo_gguf", lambda: file if installed else None)
    monkeypatch.setattr(hub, "download", lambda hub_id: model)
    opened: Any = open_checkpoint("smollm2-135m")
    assert opened_gguf == ([(file, "smollm2-135m")] if installed else [])
    assert installed or opened.spec.name == "smollm2-135m"


def test_a_folder_with_the_name_of_an_alias_comes_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.rename(model.parent / "llama-3-8b")
    monkeypatch.chdir(model.parent)
    assert open_checkpoint("llama-3-8b").spec.num_layers == 1


@pytest.mark.parametrize("given", ["./m", "/no/such/m", "~/no-such-model", "m.gguf", "org/m.safetensors", "m.bin"])
def test_what_looks_like_a_path_and_does_not_exist_is_no_name(given: str) -> None:
    assert message_of(given).startswith(f"{given}: no such file or directory; accepted are an alias, a hub id")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lama-3-70b", "'lama-3-70b' is not a known model; close are llama-3-70b,"),
        ("Llama-3-8B", "'Llama-3-8B' is not a known model; close are llama-3-8b,"),
        ("zzz", "'zzz' is not a known model; aliases are llama-3.3-70b,"),
        ("", "'' is not a known model;"),
        ("a/b/c", "'a/b/c' is not a known model;"),
        ("two\nlines", "'two\\nlines' is not a known model;"),
        ("nul\0", "'nul\\x00' is not a known model;"),
        ("x" * 5000, "'xxx"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_are_close(given: str, message: str) -> None:
    assert message_of(given).startswith(message)
    assert "a hub id (ORGANISATION/NAME), a folder, a .safetensors or .gguf file, or synthetic:SHAPE" in message_of(given)


def test_a_folder_that_cannot_be_read_is_told_in_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, name: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("offload_sirius_loaders.safetensors.open_safetensors", refuse)
    assert message_of(str(model)) == f"{model}: cannot be read: Permission denied"
