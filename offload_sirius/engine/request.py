"""One answer while it is written: what was asked for, and what the counters said when it began."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig
from offload_sirius.decode.accept import AcceptanceRule
from offload_sirius.decode.result import LinkBytes, LinkFigures
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.engine.streamed import StreamedModel
from offload_sirius.sparsity.cats import Cats, FetchCounts
from offload_sirius.sparsity.hot import HotStatistic
from offload_sirius.weights.streamer import Streamer


@dataclass(kw_only=True)
class Request:
    """One answer while it is written."""

    prompt_ids: list[int]
    config: GenerationConfig
    decoding: DecodingConfig
    max_new_tokens: int
    end_token_ids: frozenset[int]
    rule: AcceptanceRule | None
    stats: DecodeStats = field(default_factory=DecodeStats)
    num_cached: int = 0
    """Tokens of the prompt that the KV cache held already."""

    @property
    def reuses(self) -> bool:
        """Whether what the KV cache holds of earlier answers may be used: where drafts decide, their neurons would depend on what
        was asked before, and the text on them."""
        decided = self.decoding.mode == "full" or (self.decoding.mode == "sirius" and self.decoding.accept == "exact")
        return self.config.reuse and decided and self.rule is None


def settings_of(config: EngineConfig, request: Request) -> dict[str, Any]:
    """Every setting of an answer by its name; those of decoding, as they were for this answer, also together."""
    decoding = asdict(request.decoding)
    return asdict(config) | asdict(request.config) | decoding | {"decoding": decoding}


class Counters:
    """The streamer's and the link's counters, from where an answer began. What crossed for others meanwhile is counted, too."""

    def __init__(self, streamer: Streamer, streamed: StreamedModel) -> None:
        self._streamer = streamer
        self._fetches = streamed.sparsity.counts if isinstance(streamed.sparsity, Cats) else None
        self._hot_set = streamed.sparsity if isinstance(streamed.sparsity, HotStatistic) else None
        self._num_exchanged = self._hot_set.num_exchanged if self._hot_set else 0
        self._pass_nbytes = dict(streamer.pass_nbytes)
        self._discarded_nbytes = streamer.discarded_nbytes
        self._copied_nbytes = streamer.copied_nbytes
        self._busy_seconds = streamer.busy_seconds
        self._num_needed, self._num_missing = (self._fetches.needed, self._fetches.missing) if self._fetches else (0, 0)

    def figures(self, seconds: float, loaded_nbytes: int) -> LinkFigures:
        """What has happened since. seconds: how long it took."""
        streamer = self._streamer
        by_phase = {phase: nbytes - self._pass_nbytes[phase] for phase, nbytes in streamer.pass_nbytes.items()}
        copied = streamer.copied_nbytes - self._copied_nbytes
        peak = streamer.peak_bytes_per_second
        streams = copied > 0 and seconds > 0
        return LinkFigures(
            bytes=LinkBytes(load=loaded_nbytes, discarded=streamer.discarded_nbytes - self._discarded_nbytes, **by_phase),
            copied_bytes=copied,
            gbytes_per_second=copied / seconds / 1e9 if streams else None,
            measured_peak_gbytes_per_second=peak / 1e9 if peak else None,
            busy_share=min((streamer.busy_seconds - self._busy_seconds) / seconds, 1.0) if streams else None,
            cache_hit_share=self._hit_share,
        )

    def churn(self, num_windows: int) -> float | None:
        """Share of the hot set that a window exchanged."""
        hot_set = self._hot_set
        if hot_set is None or hot_set.decay is None or num_windows == 0:
            return None
        return (hot_set.num_exchanged - self._num_exchanged) / (num_windows * hot_set.ids.shape[0] * hot_set.num_hot)

    @property
    def _hit_share(self) -> float | None:
        if self._fetches is None:
            return None
        counts = FetchCounts(needed=self._fetches.needed - self._num_needed, missing=self._fetches.missing - self._num_missing)
        return counts.hit_share
