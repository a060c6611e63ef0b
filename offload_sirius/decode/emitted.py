"""A token of an answer, with what the model thinks of it. Without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Emitted:
    """A token of the answer. The pass that would follow it is not begun before the next event is asked for."""

    token_id: int
    logprob: float | None = None
    """Log-probability by the full model, as it is before temperature; None where nobody wants it."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens by the same distribution, best first, with theirs."""
