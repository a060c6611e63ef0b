"""A model whose weights are streamed, as decoding sees it: passes over tokens, each for a purpose.

Each pass tells the streamer what it takes of the layers and what the next one will take, so that the link works ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.config import AUTO, DecodingConfig
from offload_sirius.decode.model import Pass
from offload_sirius.engine.captured import CapturedStep
from offload_sirius.engine.kv_slot import KVSlot
from offload_sirius.engine.planning import CARGO, sparsity_of
from offload_sirius.model.feed_forward import FeedForward
from offload_sirius.model.transformer import TokenTree, Transformer
from offload_sirius.sparsity.cats import Cats
from offload_sirius.sparsity.copied import CopiedSet
from offload_sirius.sparsity.griffin import Griffin
from offload_sirius.sparsity.hot import HotSet, HotStatistic
from offload_sirius.sparsity.prior import NeuronPrior
from offload_sirius.weights.draft_copy import CopyStreamer
from offload_sirius.weights.hotset import HotStreamer
from offload_sirius.weights.layout import Cargo
from offload_sirius.weights.neuron_cache import NeuronCache
from offload_sirius.weights.streamer import Phase, WeightStreamer
from offload_sirius_loaders.spec import ModelSpec


class Source(Protocol):
    """What passes need of a streamer."""

    def begin(self, phase: Phase, cargo: Cargo, *, following: Cargo) -> None:
        """See WeightStreamer, HotStreamer."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a kind of pass goes through the layers."""

    cargo: Cargo = "records"
    """What it takes of each."""
    feed_forward: FeedForward | None = None
    """What it does with their neurons; None computes all."""


ALL = Way()
FULL_WAYS: dict[Pass, Way] = {"prefill": ALL, "draft": ALL, "correction": ALL, "full": ALL}
"""Every pass computes all neurons."""


class StreamedModel:
    """Satisfies decode.model.Model."""

    def __init__(
        self,
        transformer: Transformer,
        source: Source,
        ways: Mapping[Pass, Way],
        sparsity: Griffin | Cats | HotStatistic | None = None,
        captured: CapturedStep | None = None,
        prior: NeuronPrior | None = None,
    ) -> None:
        """sparsity: whose feed-forwards are among the ways; None where they compute all neurons.

        captured: takes draft steps of a single token that compute what `ways` says; None: there are none. prior: for answers with
        a hot set that want it.
        """
        self.sparsity = sparsity
        self.slot = KVSlot(transformer.cache)
        self._transformer = transformer
        self._source = source
        self._ways = ways
        self._captured = captured
        self._plays = False
        """Whether the answer's drafts are those that are recorded."""
        self._prior = prior

    def begin_answer(self, decoding: DecodingConfig, prompt_ids: Sequence[int], *, reuse: bool) -> int:
        """An answer begins -> tokens of its prompt whose keys and values are those of the answer before, which are kept.

        reuse: whether any shall be; else the answer before is forgotten.
        """
        num_known = len(self.slot.token_ids)
        num_cached = self.slot.shared(prompt_ids) if reuse and self._reuses else 0
        self.slot.begin(num_cached)
        if self.sparsity is not None:
            self.sparsity.remember(num_cached, num_known)
        if isinstance(self.sparsity, HotStatistic):
            num_drafted = decoding.num_drafted(self._transformer.spec.ffn_width, self.sparsity.num_hot)
            self.sparsity.begin(num_drafted, self._prior if decoding.with_prior else None)
            assert isinstance(self._source, HotStreamer | CopyStreamer)
            self._source.corrects = decoding.mode == "sirius"
            self._plays = self._captured is not None and self._captured.num_drafted == num_drafted
        return num_cached

    def forget(self) -> None:
        """Something broke: what the cache holds is not to be trusted."""
        self.slot.begin(0)

    def end_answer(self) -> None:
        """Keep what an answer has shown, for others to come."""
        if isinstance(self.sparsity, HotStatistic) and self.sparsity.prior is not None:
            self.sparsity.prior.keep()

    @property
    def length(self) -> int:
        """See Model."""
        return self.slot.length

    @property
    def room(self) -> int:
        """See Model."""
        return self.slot.room

    @property
    def device(self) -> torch.device:
        """See Model."""
        return self.slot.device

    def prefill(self, token_ids: Tensor, *, following: Pass) -> Tensor:
        """See Model."""
        logits = self._transformer.prefill(token_ids, self._begin("prefill", following))
        self.slot.appended("prefill", token_ids.tolist())
        return logits

    def score(self, token_ids: Tensor, num_last: int, read: Callable[[Tensor], None], *, num_rows: int) -> None:
        """A prompt that is scored and not answered. See Transformer.prefill_rows."""
        feed_forward = self._begin("prefill", "prefill")
        self._transformer.prefill_rows(token_ids, num_last, read, num_rows=num_rows, feed_forward=feed_forward)
        self.slot.appended("prefill", token_ids.tolist())

    def full(self, token_ids: Tensor, *, following: Pass) -> Tensor:
        """See Model."""
        logits = self._transformer.step(token_ids, feed_forward=self._begin("full", following))
        self.slot.appended("full", token_ids.tolist())
        return logits

    def draft(self, token_ids: Tensor, tree: TokenTree | None = None, *, following: Pass) -> Tensor:
        """See Model."""
        feed_forward = self._begin("draft", following)
        played = self._captured.step(token_ids) if self._captured is not None and self._plays and tree is None else None
        logits = self._transformer.step(token_ids, tree, feed_forward) if played is None else played
        self.slot.appended("draft", token_ids.tolist())
        return logits

    def correct(self, token_ids: Tensor, tree: TokenTree | None = None, *, following: Pass, num_grafted: int = 0) -> Tensor:
        """See Model."""
        if isinstance(self.sparsity, HotStatistic):
            self.sparsity.num_unheard = num_grafted
        logits = self._transformer.step(token_ids, tree, self._begin("correction", following))
        self.slot.appended("correction", token_ids.tolist())
        return logits

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        """See Model."""
        self.slot.keep(length, offsets)

    @property
    def _reuses(self) -> bool:
        """Whether keys do not depend on what follows them: the rotations of `dynamic` do, on the length of the prompt."""
        return self._transformer.spec.rope.kind != "dynamic"

    def _begin(self, this: Pass, following: Pass) -> FeedForward | None:
        way = self._ways[this]
        self._source.begin(this, way.cargo, following=self._ways[following].cargo)
        return way.feed_forward


def streamed_model(
    transformer: Transformer, streamer: WeightStreamer, caches: Mapping[int, NeuronCache], decoding: DecodingConfig
) -> StreamedModel:
    """The model whose drafts bring what they need. caches: layer -> records of its neurons on the device."""
    spec, kind = transformer.spec, sparsity_of(decoding, transformer.spec)
    if kind is None:
        return StreamedModel(transformer, streamer, FULL_WAYS)
    num_kept, cache = decoding.num_kept(spec.ffn_width), transformer.cache
    sparsity: Griffin | Cats
    if kind == "griffin":
        sparsity = Griffin(spec, streamer, num_kept, dtype=cache.dtype, device=cache.device)
    else:
        thresholds = _thresholds(decoding, spec, cache.device)
        calibrate = decoding.cats_threshold == AUTO
        sparsity = Cats(spec, streamer, num_kept, caches=caches, thresholds=thresholds, calibrate=calibrate)
    drafting = Way(cargo=CARGO[kind], feed_forward=sparsity.draft)
    return StreamedModel(
        transformer, streamer, FULL_WAYS | {"prefill": Way(feed_forward=sparsity.prefill), "draft": drafting}, sparsity
    )


def hot_model(
    transformer: Transformer,
    streamer: HotStreamer,
    num_hot: int,
    decoding: DecodingConfig,
    captured: CapturedStep | None = None,
    prior: NeuronPrior | None = None,
) -> StreamedModel:
    """The model whose drafts are on the device. captured: the draft step of a single token, recorded; None: it is not."""
    decay = _decay_of(decoding)
    hot_set = HotSet(transformer.spec, streamer, num_hot, decay=decay, device=transformer.cache.device)
    ways: dict[Pass, Way] = {
        "prefill": Way(feed_forward=hot_set.prefill),
        "draft": Way(cargo="hot", feed_forward=hot_set.draft),
        "correction": Way(cargo="cold", feed_forward=hot_set.correction),
        "full": Way(cargo="cold", feed_forward=hot_set.full),
    }
    return StreamedModel(transformer, streamer, ways, hot_set, captured, prior)


def copied_model(
    transformer: Transformer,
    streamer: CopyStreamer,
    num_copied: int,
    decoding: DecodingConfig,
    captured: CapturedStep | None = None,
    prior: NeuronPrior | None = None,
) -> StreamedModel:
    """The model of which the device has a copy for drafts. captured: as for hot_model."""
    copied = CopiedSet(transformer.spec, streamer, num_copied, decay=_decay_of(decoding), device=transformer.cache.device)
    ways: dict[Pass, Way] = {
        "prefill": Way(feed_forward=copied.prefill),
        "draft": Way(cargo="hot", feed_forward=copied.draft),
        "correction": Way(feed_forward=copied.correction),
        "full": Way(feed_forward=copied.full),
    }
    return StreamedModel(transformer, streamer, ways, copied, captured, prior)


def _decay_of(decoding: DecodingConfig) -> float | None:
    return decoding.refresh_decay if decoding.refresh else None


def _thresholds(decoding: DecodingConfig, spec: ModelSpec, device: torch.device) -> Tensor | None:
    """Of cats, float32 [L]; None where it keeps a fixed number."""
    if decoding.cats_threshold is None:
        return None
    given = 0.0 if decoding.cats_threshold == AUTO else float(decoding.cats_threshold)
    return torch.full((spec.num_layers,), given, device=device)
