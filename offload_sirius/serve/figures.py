"""What the server has done and does right now, from counters. Written by the thread that decodes, read by anyone."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from offload_sirius import machine
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stats import DecodeStats

RATE_SECONDS = 5.0
"""Rates are those of the last seconds."""


@dataclass(frozen=True, kw_only=True)
class AnswerFigures:
    """One finished answer."""

    tokens_per_second: float | None
    ttft_seconds: float
    aal: float | None
    acceptance: float | None
    window: int | None
    link_gbytes: float
    link_gbytes_per_second: float | None
    link_busy_share: float | None

    @classmethod
    def of(cls, result: Generation) -> AnswerFigures:
        """The figures of an answer that people ask for."""
        return cls(
            tokens_per_second=result.tokens_per_second,
            ttft_seconds=result.ttft_seconds,
            aal=result.aal,
            acceptance=result.acceptance,
            window=result.window,
            link_gbytes=result.link.copied_bytes / 1e9,
            link_gbytes_per_second=result.link.gbytes_per_second,
            link_busy_share=result.link.busy_share,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of the last seconds; None while nothing is written."""

    tokens_per_second: float | None = None
    aal: float | None = None
    """Of the answers that are being written, from their beginning; so is the next."""
    acceptance: float | None = None
    link_gbytes_per_second: float | None = None
    link_busy_share: float | None = None


@dataclass(frozen=True)
class LinkCounters:
    """What the link has carried so far."""

    copied_nbytes: int = 0
    busy_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Sample:
    seconds: float
    num_tokens: int
    link: LinkCounters


@dataclass(kw_only=True)
class Figures:
    """Counters. Single numbers may be read while they are written: each is replaced as a whole."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them those whose keys and values were there already."""
    generated_tokens: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """By how they ended: stop, length, interrupted, error."""
    windows: int = 0
    window_tokens: float = 0.0
    """Tokens that the windows gave."""
    last: AnswerFigures | None = None
    rates: Rates = field(default_factory=Rates)
    link: LinkCounters = field(default_factory=LinkCounters)
    mean_answer_seconds: float | None = None
    _samples: deque[_Sample] = field(default_factory=deque)

    @property
    def mean_aal(self) -> float | None:
        """Tokens that a window gave, on average over all finished answers."""
        return self.window_tokens / self.windows if self.windows else None

    def stepped(self, link: LinkCounters, written: Sequence[DecodeStats]) -> None:
        """A step has been made. written: counters of the answers that are being written."""
        self.link = link
        now = time.perf_counter()
        self._samples.append(_Sample(seconds=now, num_tokens=self.generated_tokens, link=link))
        while len(self._samples) > 2 and now - self._samples[1].seconds > RATE_SECONDS:
            self._samples.popleft()
        self.rates = _rates(self._samples[0], self._samples[-1], written)

    def idle(self) -> None:
        """There is nothing to do."""
        self._samples.clear()
        self.rates = Rates()

    def answered(self, result: Generation) -> None:
        """An answer has ended."""
        self.prompt_tokens += result.prompt_tokens
        self.cached_tokens += result.cached_tokens
        self.answers[result.finish_reason] += 1
        if result.aal is not None:
            self.windows += result.windows
            self.window_tokens += result.aal * result.windows
        if result.finish_reason == "interrupted":
            return
        self.last = AnswerFigures.of(result)
        seconds = result.ttft_seconds + result.decode_seconds
        before = seconds if self.mean_answer_seconds is None else self.mean_answer_seconds
        self.mean_answer_seconds = 0.8 * before + 0.2 * seconds


def _rates(first: _Sample, last: _Sample, written: Sequence[DecodeStats]) -> Rates:
    seconds = last.seconds - first.seconds
    if seconds <= 0:
        return Rates()
    copied_nbytes = last.link.copied_nbytes - first.link.copied_nbytes
    busy_seconds = last.link.busy_seconds - first.link.busy_seconds
    num_windows, num_tried = sum(len(each.windows) for each in written), sum(each.num_tried for each in written)
    return Rates(
        aal=sum(each.num_advanced for each in written) / num_windows if num_windows else None,
        acceptance=sum(each.num_accepted for each in written) / num_tried if num_tried else None,
        tokens_per_second=(last.num_tokens - first.num_tokens) / seconds,
        link_gbytes_per_second=copied_nbytes / seconds / 1e9 if last.link.copied_nbytes else None,
        link_busy_share=min(busy_seconds / seconds, 1.0) if last.link.copied_nbytes else None,
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Planned bytes by purpose, and what there is."""

    device_budget_nbytes: int
    """All of the device's memory where none is set in bytes."""
    device_bill: Mapping[str, int]
    host_bill: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with what the process takes now."""
        return {
            "device_plan_bytes": sum(self.device_bill.values()),
            "device_bill": dict(self.device_bill),
            "device_budget_bytes": self.device_budget_nbytes,
            "host_plan_bytes": sum(self.host_bill.values()),
            "host_bill": dict(self.host_bill),
            "host_resident_bytes": machine.resident_nbytes(),
            "host_total_bytes": machine.total_host_nbytes(),
        }
