"""Checkpoints on disk: finds a model by any name people give it, reads its headers, and says where its weights lie.

Knows neither torch nor the program around it. Importing this package imports no file format; `open_checkpoint` imports the one it
needs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from offload_sirius_loaders.errors import CheckpointError

if TYPE_CHECKING:
    from offload_sirius_loaders.checkpoint import Checkpoint

__all__ = ["CheckpointError", "open_checkpoint"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PATH_STARTS = (".", "/", "~")
_FILE_SUFFIXES = (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
_ACCEPTED = "an alias, a hub id (ORGANISATION/NAME), a folder, a .safetensors or .gguf file, or synthetic:SHAPE"


def open_checkpoint(model: str) -> Checkpoint:
    """Open a model by what a user calls it: the only door to this package.

    In this order: `synthetic:SHAPE`, a path that exists, an alias, a hub id. What is only on the hub is downloaded, with progress
    on stderr. Headers are read and checked, weights are not. `spec.name` is the alias or hub id as given, else the name of the
    folder or file. Raises CheckpointError, whose message is one line, for whatever user, file or network can cause.
    """
    from offload_sirius_loaders.hub import ALIASES

    if model.startswith("synthetic:"):
        from offload_sirius_loaders.synthetic import open_synthetic

        return open_synthetic(model)
    path = os.path.expanduser(model)
    if os.path.exists(path):
        return _open_path(Path(path), os.path.basename(os.path.abspath(path)))
    if model.startswith(_PATH_STARTS) or model.endswith(_FILE_SUFFIXES):
        raise CheckpointError(f"{model}: no such file or directory; accepted are {_ACCEPTED}")
    if model in ALIASES:
        return _open_alias(model)
    if _HUB_ID.fullmatch(model):
        return _open_hub_model(model, model)
    raise CheckpointError(f"{model!r} is not a known model{_did_you_mean(model)}; accepted are {_ACCEPTED}")


def hub_id_of(model: str) -> str | None:
    """The hub id under which `open_checkpoint` would look for a model; None for all that is not looked for there."""
    from offload_sirius_loaders.hub import ALIASES, DEMO_ALIAS, demo_gguf

    if model.startswith("synthetic:") or os.path.exists(os.path.expanduser(model)):
        return None
    if model in ALIASES:
        return None if model == DEMO_ALIAS and demo_gguf() else ALIASES[model]
    is_path = model.startswith(_PATH_STARTS) or model.endswith(_FILE_SUFFIXES)
    return model if _HUB_ID.fullmatch(model) and not is_path else None


def _open_path(path: Path, name: str) -> Checkpoint:
    from offload_sirius_loaders.pack_index import is_packed

    try:
        if is_packed(path):
            from offload_sirius_loaders.packed import open_packed

            return open_packed(path, name)
        gguf_file = _gguf_file(path)
        if gguf_file:
            from offload_sirius_loaders.gguf import open_gguf

            return open_gguf(gguf_file, name)
        from offload_sirius_loaders.safetensors import open_safetensors

        return open_safetensors(path, name)
    except OSError as error:  # a folder that may not be looked into, a disk that fails
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _gguf_file(path: Path) -> Path | None:
    """A .gguf file itself, or the one of a folder that has no safetensors."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = [] if any(path.glob("*.safetensors*")) else sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(f"{path}: has {len(found)} .gguf files; give the path of one of them")
    return found[0] if found else None


def _open_alias(alias: str) -> Checkpoint:
    from offload_sirius_loaders.hub import ALIASES, DEMO_ALIAS, demo_gguf

    installed = demo_gguf() if alias == DEMO_ALIAS else None
    return _open_path(installed, alias) if installed else _open_hub_model(ALIASES[alias], alias)


def _open_hub_model(hub_id: str, name: str) -> Checkpoint:
    from offload_sirius_loaders.hub import download

    return _open_path(download(hub_id), name)


def _did_you_mean(model: str) -> str:
    from difflib import get_close_matches

    from offload_sirius_loaders.hub import ALIASES

    close = get_close_matches(model.lower(), ALIASES, cutoff=0.5)
    return f"; close are {', '.join(close)}" if close else f"; aliases are {', '.join(ALIASES)}"
