"""Where files that can be made again are kept between runs. Knows nothing of what they are."""

from __future__ import annotations

import os
from pathlib import Path

from offload_sirius.errors import ConfigError


def cache_folder() -> Path:
    """OFFLOAD_SIRIUS_CACHE where it is set, else offload-sirius in the user's cache folder. Not created here."""
    if own := os.environ.get("OFFLOAD_SIRIUS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "offload-sirius"


def made_cache_folder() -> Path:
    """The same, made where it was not there. Raises ConfigError, which names --path as another way out."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made: {error.strerror}; set OFFLOAD_SIRIUS_CACHE, or name a folder with --path"
        ) from error
    return folder


def safe_name(name: str) -> str:
    """A model's name as a file's."""
    return "".join(each if each.isalnum() or each in ".-" else "_" for each in name)
