"""What is counted while tokens are found: passes, windows, where tokens came from, seconds. Knows no model and no text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from offload_sirius.decode.accept import Acceptance
from offload_sirius.decode.model import PASSES, Pass
from offload_sirius.decode.result import Passes, TokensByOrigin

Origin = Literal["full", "draft", "lookup"]
"""What proposed a token. A drafted one that the full model would have chosen too is the draft's."""


@dataclass(kw_only=True)
class DecodeStats:
    """Counters of one answer. Passes count when they are done, tokens when they are asked for."""

    num_passes: Counter[Pass] = field(default_factory=Counter)
    num_tokens: Counter[Origin] = field(default_factory=Counter)
    windows: list[int] = field(default_factory=list)
    """W as it was chosen for each; at the end of an answer or of the KV cache less is drafted."""
    num_advanced: int = 0
    """Tokens that the windows gave, n + 1 each, though none may have asked for the last ones."""
    num_tried: int = 0
    """Drafted levels that were looked at."""
    num_accepted: int = 0
    """Drafted levels that stood."""
    flips: int | None = None
    """Tokens whose rival was too close for the compute dtype; None where they are not counted."""
    draft_seconds: list[float] = field(default_factory=list)
    """Of each draft step, the choice of the next one's tokens included."""
    correction_seconds: list[float] = field(default_factory=list)
    """Of each correction, acceptance included."""

    def count_window(self, window: int, acceptance: Acceptance) -> None:
        """A window was corrected."""
        self.windows.append(window)
        self.num_advanced += len(acceptance.token_ids)
        self.num_tried += acceptance.num_tried
        self.num_accepted += acceptance.num_accepted

    def count_flips(self, flips: int) -> None:
        """So many tokens were close."""
        self.flips = flips + (self.flips or 0)

    @property
    def passes(self) -> Passes:
        """Passes by kind."""
        return Passes(**{kind: self.num_passes[kind] for kind in PASSES})

    @property
    def tokens_by_origin(self) -> TokensByOrigin:
        """Tokens by origin."""
        return TokensByOrigin(full=self.num_tokens["full"], draft=self.num_tokens["draft"], lookup=self.num_tokens["lookup"])

    @property
    def aal(self) -> float | None:
        """Average advancement length, method of arXiv 2409.03856: every window counts. None without windows."""
        return self.num_advanced / len(self.windows) if self.windows else None

    @property
    def acceptance(self) -> float | None:
        """Share of tried levels that were accepted; None where none was tried."""
        return self.num_accepted / self.num_tried if self.num_tried else None

    @property
    def last_window(self) -> int | None:
        """None without windows."""
        return self.windows[-1] if self.windows else None

    @property
    def mean_window(self) -> float | None:
        """None without windows."""
        return sum(self.windows) / len(self.windows) if self.windows else None

    @property
    def median_draft_seconds(self) -> float | None:
        """None without draft steps."""
        return _median(self.draft_seconds)

    @property
    def median_correction_seconds(self) -> float | None:
        """None without corrections."""
        return _median(self.correction_seconds)

    def effective_density(self, draft_density: float) -> float | None:
        """Share of the parameters that a token cost. draft_density: the same of a draft step. None without windows.

        ((W - 1) * draft_density + 1) / AAL where all windows are of length W.
        """
        if not self.windows:
            return None
        return (self.num_passes["draft"] * draft_density + self.num_passes["correction"]) / self.num_advanced


def _median(seconds: Sequence[float]) -> float | None:
    return median(seconds) if seconds else None
