"""What a generation returns: the text, how it ended, and figures from counters. Knows neither model nor tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from offload_sirius.config import Mode

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes over the layers, by what they were for."""

    prefill: int = 0
    draft: int = 0
    correction: int = 0
    full: int = 0


@dataclass(frozen=True, kw_only=True)
class TokensByOrigin:
    """Tokens of an answer, by what proposed them."""

    full: int = 0
    draft: int = 0
    """Corrected ones that stood, where there is a correction."""
    lookup: int = 0
    """Those that had followed the same tokens before, and stood where the draft did not."""


@dataclass(frozen=True, kw_only=True)
class LinkBytes:
    """Bytes of layers that crossed the link, by the pass that used them. What is prefetched for a next pass counts with that."""

    load: int = 0
    """Stored bytes read from disk before the first token."""
    prefill: int = 0
    draft: int = 0
    correction: int = 0
    full: int = 0
    discarded: int = 0
    """Bytes fetched for a pass that did not come."""


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """How the link was used. Rates are None where nothing was streamed."""

    bytes: LinkBytes = field(default_factory=LinkBytes)
    copied_bytes: int = 0
    """Counted at the copy, while this text was generated; a prefetch for the next pass included."""
    gbytes_per_second: float | None = None
    """copied_bytes over the time from the prompt to the last token."""
    measured_peak_gbytes_per_second: float | None = None
    busy_share: float | None = None
    """Share of that time in which at least one transfer was under way."""
    cache_hit_share: float | None = None
    """Fine sparsity: share of needed neuron records that were on the device already."""


@dataclass(frozen=True, kw_only=True)
class MemoryFigures:
    """Planned and measured bytes."""

    device_plan_bytes: int
    device_peak_bytes: int
    """CUDA: the allocator's peak. CPU: all buffers, and the activations of the longest pass by their formula."""
    host_plan_bytes: int
    host_peak_bytes: int
    """Peak resident memory of the process; without a GPU the device's share is part of it."""
    pinned_bytes: int
    """Host memory of layers that the device reads directly. CPU: 0, nothing has to."""
    pageable_bytes: int
    """Host memory of layers that it does not."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One finished text. `as_json` is the contract of `generate --json`."""

    model: str
    mode: Mode
    text: str
    token_ids: tuple[int, ...]
    """Everything that was generated, an end token included."""
    finish_reason: FinishReason
    prompt_tokens: int
    ttft_seconds: float
    """From the prompt to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    load_seconds: float
    passes: Passes
    link: LinkFigures
    memory: MemoryFigures
    plan: Mapping[str, Any]
    settings: Mapping[str, Any]
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were there from earlier answers."""
    tokens_by_origin: TokensByOrigin = field(default_factory=TokensByOrigin)
    windows: int = 0
    """Corrections, each of one window."""
    aal: float | None = None
    """Average advancement length: tokens that a window gave. None without windows."""
    acceptance: float | None = None
    """Share of the drafted tokens looked at that stood; behind a rejected one none is looked at. None without any."""
    effective_density: float | None = None
    """Parameters that were computed with for a token, as a share of the model's: a draft step counts as the share that --keep
    says, also where a threshold decides. None without windows."""
    window: int | None = None
    """Tokens of a window as it was last chosen."""
    draft_seconds: float | None = None
    """Median of the draft steps."""
    correction_seconds: float | None = None
    """Median of the corrections."""
    churn: float | None = None
    """Share of the neurons resident for drafts that a correction exchanged, on average. None where no set is refreshed."""
    flips: int | None = None
    """Corrected tokens whose rival was closer than the compute dtype resolves: another order of sums could choose that one.
    None where they are not counted."""

    @property
    def new_tokens(self) -> int:
        """Tokens generated."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float | None:
        """Rate behind the first token; None where there is no second one."""
        if self.new_tokens < 2 or self.decode_seconds <= 0:
            return None
        return (self.new_tokens - 1) / self.decode_seconds

    def as_json(self) -> dict[str, Any]:
        """The figures as plain values, names as in the documented contract."""
        return asdict(self) | {"new_tokens": self.new_tokens, "tokens_per_second": self.tokens_per_second}
