"""What the answers of one setting say together, beside those of the full model to the same prompts. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from offload_sirius.bench.spread import Spread, spread_of
from offload_sirius.config import Accept, DecodingConfig, Mode, Sparsity
from offload_sirius.decode.result import Generation


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one answer, what rows are made of."""

    token_ids: tuple[int, ...]
    decode_seconds: float
    """From the first token to the last."""
    num_windows: int
    num_advanced: int
    """Tokens that the windows gave."""
    num_drafts: int
    """Draft steps."""
    acceptance: float | None
    draft_nbytes: int
    """Bytes of layers that crossed the link for draft steps."""
    nbytes: int
    """The same for all passes behind the prompt's."""
    busy_share: float | None
    cache_hit_share: float | None
    step_seconds: float | None
    """Median between two tokens; in mode sirius, where they come by the window, it means nothing."""
    draft_seconds: float | None
    """Median of the draft steps; in mode sparse every token behind the first is one."""
    correction_seconds: float | None
    """Median of the corrections."""

    @property
    def num_timed(self) -> int:
        """Tokens behind the first."""
        return len(self.token_ids) - 1

    @property
    def seconds_per_token(self) -> float | None:
        """None where there is no second token."""
        return self.decode_seconds / self.num_timed if self.num_timed > 0 else None


def answer_of(result: Generation, moments: Sequence[float]) -> Answer:
    """Keep what rows are made of. moments: seconds at which each token was there."""
    link, passes = result.link, result.passes
    steps = [after - before for before, after in pairwise(moments)]
    step_seconds = median(steps) if steps else None
    return Answer(
        token_ids=result.token_ids,
        decode_seconds=result.decode_seconds,
        num_windows=result.windows,
        num_advanced=round((result.aal or 0) * result.windows),
        num_drafts=passes.draft,
        acceptance=result.acceptance,
        draft_nbytes=link.bytes.draft,
        nbytes=link.bytes.draft + link.bytes.correction + link.bytes.full,
        busy_share=link.busy_share,
        cache_hit_share=link.cache_hit_share,
        step_seconds=step_seconds,
        draft_seconds=step_seconds if result.mode == "sparse" else result.draft_seconds,
        correction_seconds=result.correction_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One setting. What it does not have is None."""

    name: str
    mode: Mode
    sparsity: Sparsity | None
    keep: float | None
    window: int | str | None
    accept: Accept | None
    threshold: float | None
    tree_width: int | None
    seconds_per_token: Spread | None
    """Over the prompts, of tokens behind the first."""
    ratio: float | None
    """Median seconds of a token, over those of the full model: below 1 is faster."""
    aal: float | None
    """Tokens that a correction gave, over all windows of all prompts."""
    acceptance: float | None
    """Share of the drafted tokens looked at that stood: median over the prompts."""
    effective_density: float | None
    """Share of the model's parameters that a token cost, over all prompts."""
    nbytes_per_token: float | None
    """Bytes of layers over the link for a token behind the first, over all prompts."""
    agreement: float
    """Share of positions with the full model's token, both running free; of two answers the longer one counts."""
    num_identical: int
    """Prompts with all tokens of the full model's answer, and no others."""
    busy_share: float | None
    """Of the link, the prompt's pass included: median over the prompts."""
    cache_hit_share: float | None
    """Of cats' neuron caches: median over the prompts."""
    draft_seconds: float | None
    """Of a draft step: median over the prompts of their medians."""
    draft_nbytes: float | None
    """Bytes of layers over the link for a draft step, over all prompts."""
    draft_link_ratio: float | None
    """Seconds of a draft step, over its bytes at the link's set rate."""
    correction_seconds: float | None
    """Of a correction: median over the prompts of their medians."""
    correction_ratio: float | None
    """Seconds of a correction, over those of a step of the full model: medians."""
    num_streamed_layers: int
    num_resident_layers: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """How an engine has placed the model, for all rows that it answered."""

    num_streamed_layers: int
    num_resident_layers: int
    draft_density: float
    """Share of the parameters that a draft step uses."""
    link_bytes_per_second: float | None
    """As set; None where the link is a real one."""


def row_of(decoding: DecodingConfig, answers: Sequence[Answer], full: Sequence[Answer], loaded: Loaded, name: str) -> DecodeRow:
    """answers: one for each prompt; full: the full model's to the same, in the same order."""
    drafts, corrects = decoding.drafts, decoding.mode == "sirius"
    draft_seconds, correction_seconds = (_median(answers, field) for field in ("draft_seconds", "correction_seconds"))
    num_drafts, num_advanced = _total(answers, "num_drafts"), _total(answers, "num_advanced")
    draft_nbytes = _over(_total(answers, "draft_nbytes"), num_drafts)
    seconds, full_seconds = _seconds(answers), _middle(_seconds(full))
    return DecodeRow(
        name=name,
        mode=decoding.mode,
        sparsity=decoding.sparsity if drafts else None,
        keep=decoding.keep if drafts else None,
        window=decoding.window if corrects else None,
        accept=decoding.accept if corrects else None,
        threshold=decoding.threshold if corrects and decoding.accept == "threshold" else None,
        tree_width=decoding.tree_width if corrects else None,
        seconds_per_token=seconds,
        ratio=_over(_middle(seconds), full_seconds),
        aal=_over(num_advanced, _total(answers, "num_windows")),
        acceptance=_median(answers, "acceptance"),
        effective_density=_effective_density(decoding.mode, answers, loaded.draft_density),
        nbytes_per_token=_over(_total(answers, "nbytes"), _total(answers, "num_timed")),
        agreement=agreement([answer.token_ids for answer in answers], [answer.token_ids for answer in full]),
        num_identical=sum(here.token_ids == there.token_ids for here, there in zip(answers, full, strict=True)),
        busy_share=_median(answers, "busy_share"),
        cache_hit_share=_median(answers, "cache_hit_share"),
        draft_seconds=draft_seconds,
        draft_nbytes=draft_nbytes,
        draft_link_ratio=_link_ratio(draft_seconds, draft_nbytes, loaded.link_bytes_per_second),
        correction_seconds=correction_seconds,
        correction_ratio=_over(correction_seconds, _median(full, "step_seconds")),
        num_streamed_layers=loaded.num_streamed_layers,
        num_resident_layers=loaded.num_resident_layers,
    )


def agreement(answers: Iterable[Sequence[int]], full: Iterable[Sequence[int]]) -> float:
    """Share of positions at which both have the same token; positions that only one of two has are none of them."""
    same = length = 0
    for here, there in zip(answers, full, strict=True):
        same += sum(one == other for one, other in zip(here, there, strict=False))
        length += max(len(here), len(there))
    return same / length


def _effective_density(mode: Mode, answers: Sequence[Answer], draft_density: float) -> float | None:
    """As DecodeStats has it, over several answers; a step of the full model is 1, one that nobody corrects what a draft is."""
    if mode != "sirius":
        return 1.0 if mode == "full" else draft_density
    cost = _total(answers, "num_drafts") * draft_density + _total(answers, "num_windows")
    return _over(cost, _total(answers, "num_advanced"))


def _seconds(answers: Sequence[Answer]) -> Spread | None:
    found = [seconds for answer in answers if (seconds := answer.seconds_per_token) is not None]
    return spread_of(found) if found else None


def _middle(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def _link_ratio(seconds: float | None, nbytes: float | None, bytes_per_second: float | None) -> float | None:
    return None if nbytes is None or bytes_per_second is None else _over(seconds, nbytes / bytes_per_second)


def _total(answers: Sequence[Answer], field: str) -> int:
    return sum(getattr(answer, field) for answer in answers)


def _median(answers: Sequence[Answer], field: str) -> float | None:
    found = [value for answer in answers if (value := getattr(answer, field)) is not None]
    return median(found) if found else None


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
