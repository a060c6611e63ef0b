"""When the tokens of an answer came, and the line of JSON that a runner ends with. Knows neither peers nor this project."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


def read_nbytes() -> int:
    """Bytes that this process has had read from the disk, those behind its page faults included; 0 where it is not counted."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class Moments:
    """Told of each token as it is chosen: a streamer, as transformers calls it. Made before anything of the model is read."""

    def __init__(self) -> None:
        self.made = time.perf_counter()
        self.began = self.made
        self.tokens: list[float] = []
        self.read: list[int] = []
        self._is_prompt = False

    def begin(self) -> None:
        """All is loaded; the prompt begins."""
        self.began = time.perf_counter()
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """A token. transformers puts the prompt first, which is none."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.tokens.append(time.perf_counter())
        self.read.append(read_nbytes())

    def end(self) -> None:
        """Nothing is kept back."""


def report(moments: Moments, ids: list[int], facts: dict[str, Any]) -> None:
    """Print what was measured. facts: of the peer, versions among them."""
    steps = len(moments.tokens) - 1
    figures = {
        "ids": ids,
        "load_seconds": moments.began - moments.made,
        "ttft_seconds": moments.tokens[0] - moments.began,
        "seconds_per_token": (moments.tokens[-1] - moments.tokens[0]) / steps,
        "read_bytes_per_token": (moments.read[-1] - moments.read[0]) / steps,
    }
    print(json.dumps(figures | facts), flush=True)
