"""Where files that can be made again are kept between runs. Knows nothing of what they are."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """OFFLOAD_SIRIUS_CACHE where it is set, else offload-sirius in the user's cache folder. Not created here."""
    if own := os.environ.get("OFFLOAD_SIRIUS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "offload-sirius"
