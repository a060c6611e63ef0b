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
from offload_sirius.decode.model import Ask, Pass
from offload_sirius.engine.captured import CapturedStep
from offload_sirius.engine.kv_slot import KVSlot
from offload_sirius.engine.planning import CARGO, sparsity_of
from offload_sirius.model.feed_forward import FeedForward
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Tokens, Transformer
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


FOLLOWING: tuple[Pass, ...] = ("draft", "correction", "full")
"""Passes that may follow one, the first before the others."""

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
        more_caches: Sequence[KVCache] = (),
    ) -> None:
        """sparsity: whose feed-forwards are among the ways; None where they compute all neurons.

        captured: takes draft steps of a single token in the first slot that compute what `ways` says; None: there are none.
        prior: for answers with a hot set that want it. more_caches: the transformer's for further answers.
        """
        self.sparsity = sparsity
        self.slots = [KVSlot(cache) for cache in (transformer.cache, *more_caches)]
        self._transformer = transformer
        self._source = source
        self._ways = ways
        self._captured = captured
        self._plays = False
        """Whether drafts are those that are recorded."""
        self._prior = prior

    def prepare(self, decoding: DecodingConfig) -> None:
        """Passes will be for answers that are decoded so."""
        if isinstance(self.sparsity, HotStatistic):
            num_drafted = decoding.num_drafted(self._transformer.spec.ffn_width, self.sparsity.num_hot)
            self.sparsity.begin(num_drafted, self._prior if decoding.with_prior else None)
            assert isinstance(self._source, HotStreamer | CopyStreamer)
            self._source.corrects = decoding.mode == "sirius"
            self._plays = self._captured is not None and self._captured.num_drafted == num_drafted

    @property
    def reuses(self) -> bool:
        """Whether keys do not depend on what follows them: the rotations of `dynamic` do, on the length of the prompt."""
        return self._transformer.spec.rope.kind != "dynamic"

    def forget(self) -> None:
        """Something broke: what the caches hold is not to be trusted."""
        for slot in self.slots:
            slot.begin(0)
            slot.is_heard = False

    def end_answer(self) -> None:
        """Keep what an answer has shown, for others to come."""
        if isinstance(self.sparsity, HotStatistic) and self.sparsity.prior is not None:
            self.sparsity.prior.keep()

    def run(self, asks: Sequence[Ask]) -> list[Tensor]:
        """See Model."""
        slots = [_kv_slot(ask) for ask in asks]
        tokens = [
            Tokens(cache=slot.cache, token_ids=torch.tensor(ask.token_ids), tree=ask.tree)
            for slot, ask in zip(slots, asks, strict=True)
        ]
        kind: Pass = "correction" if any(ask.kind == "correction" for ask in asks) else asks[0].kind
        feed_forward = self._begin(kind, _following(asks))
        if kind == "prefill":
            self._hear(slots)
            logits = self._transformer.prefill_all(tokens, feed_forward)  # [asks, V]
            lengths = [1] * len(asks)
        else:
            if isinstance(self.sparsity, HotStatistic):
                self.sparsity.heard = _heard(asks, self._transformer.cache.device)
            played = self._played(asks) if kind == "draft" else None
            logits = self._transformer.step_all(tokens, feed_forward) if played is None else played  # [S, V]
            lengths = [len(ask.token_ids) for ask in asks]
        for slot, ask in zip(slots, asks, strict=True):
            slot.appended(ask.kind, ask.token_ids)
        return list(logits.split(lengths))

    def score(self, token_ids: Sequence[int], num_last: int, read: Callable[[Tensor], None], *, num_rows: int) -> None:
        """A prompt in the first slot that is scored and not answered. See Transformer.prefill_rows."""
        feed_forward = self._begin("prefill", "prefill")
        self._hear(self.slots[:1])
        self._transformer.prefill_rows(torch.tensor(token_ids), num_last, read, num_rows=num_rows, feed_forward=feed_forward)
        self.slots[0].appended("prefill", token_ids)

    def _played(self, asks: Sequence[Ask]) -> Tensor | None:
        """Logits of a recorded step [1, V]; None where there is no recording of it."""
        if self._captured is None or not self._plays or len(asks) > 1 or asks[0].tree is not None:
            return None
        return self._captured.step(torch.tensor(asks[0].token_ids)) if asks[0].slot is self.slots[0] else None

    def _hear(self, beginning: Sequence[KVSlot]) -> None:
        """Prompts are going to choose neurons: what was said of texts that are still there counts as before."""
        if self.sparsity is None:
            return
        num_heard = sum(slot.num_heard_before if slot in beginning else slot.num_heard for slot in self.slots)
        staying = [slot for slot in self.slots if slot.is_busy or slot in beginning]
        self.sparsity.remember(sum(slot.num_heard for slot in staying), num_heard)
        for slot in self.slots:
            slot.is_heard = slot in staying

    def _begin(self, this: Pass, following: Pass) -> FeedForward | None:
        way = self._ways[this]
        self._source.begin(this, way.cargo, following=self._ways[following].cargo)
        return way.feed_forward


def _kv_slot(ask: Ask) -> KVSlot:
    assert isinstance(ask.slot, KVSlot), ask.slot
    return ask.slot


def _following(asks: Sequence[Ask]) -> Pass:
    """What most probably comes next: the others wait while any drafts."""
    wanted = {ask.following for ask in asks}
    return next(kind for kind in FOLLOWING if kind in wanted)


def _heard(asks: Sequence[Ask], device: torch.device) -> Tensor | None:
    """1 for each token of a correction of which the statistic is to learn, 0 for others; float32 [S]. None: of all."""
    if not any(ask.num_grafted for ask in asks):
        return None
    heard = [float(index < len(ask.token_ids) - ask.num_grafted) for ask in asks for index in range(len(ask.token_ids))]
    return torch.tensor(heard, device=device)


def streamed_model(
    transformer: Transformer,
    streamer: WeightStreamer,
    caches: Mapping[int, NeuronCache],
    decoding: DecodingConfig,
    more_caches: Sequence[KVCache] = (),
) -> StreamedModel:
    """The model whose drafts bring what they need. caches: layer -> records of its neurons on the device. more_caches: as for
    StreamedModel."""
    spec, kind = transformer.spec, sparsity_of(decoding, transformer.spec)
    if kind is None:
        return StreamedModel(transformer, streamer, FULL_WAYS, more_caches=more_caches)
    num_kept, cache = decoding.num_kept(spec.ffn_width), transformer.cache
    sparsity: Griffin | Cats
    if kind == "griffin":
        sparsity = Griffin(spec, streamer, num_kept, dtype=cache.dtype, device=cache.device)
    else:
        thresholds = _thresholds(decoding, spec, cache.device)
        calibrate = decoding.cats_threshold == AUTO
        sparsity = Cats(spec, streamer, num_kept, caches=caches, thresholds=thresholds, calibrate=calibrate)
    drafting = Way(cargo=CARGO[kind], feed_forward=sparsity.draft)
    ways = FULL_WAYS | {"prefill": Way(feed_forward=sparsity.prefill), "draft": drafting}
    return StreamedModel(transformer, streamer, ways, sparsity, more_caches=more_caches)


def hot_model(
    transformer: Transformer,
    streamer: HotStreamer,
    num_hot: int,
    decoding: DecodingConfig,
    captured: CapturedStep | None = None,
    prior: NeuronPrior | None = None,
    more_caches: Sequence[KVCache] = (),
) -> StreamedModel:
    """The model whose drafts are on the device. captured: the draft step of a single token, recorded; None: it is not.
    more_caches: as for StreamedModel."""
    decay = _decay_of(decoding)
    hot_set = HotSet(transformer.spec, streamer, num_hot, decay=decay, device=transformer.cache.device)
    ways: dict[Pass, Way] = {
        "prefill": Way(feed_forward=hot_set.prefill),
        "draft": Way(cargo="hot", feed_forward=hot_set.draft),
        "correction": Way(cargo="cold", feed_forward=hot_set.correction),
        "full": Way(cargo="cold", feed_forward=hot_set.full),
    }
    return StreamedModel(transformer, streamer, ways, hot_set, captured, prior, more_caches)


def copied_model(
    transformer: Transformer,
    streamer: CopyStreamer,
    num_copied: int,
    decoding: DecodingConfig,
    captured: CapturedStep | None = None,
    prior: NeuronPrior | None = None,
    more_caches: Sequence[KVCache] = (),
) -> StreamedModel:
    """The model of which the device has a copy for drafts. captured, more_caches: as for hot_model."""
    copied = CopiedSet(transformer.spec, streamer, num_copied, decay=_decay_of(decoding), device=transformer.cache.device)
    ways: dict[Pass, Way] = {
        "prefill": Way(feed_forward=copied.prefill),
        "draft": Way(cargo="hot", feed_forward=copied.draft),
        "correction": Way(feed_forward=copied.correction),
        "full": Way(feed_forward=copied.full),
    }
    return StreamedModel(transformer, streamer, ways, copied, captured, prior, more_caches)


def _decay_of(decoding: DecodingConfig) -> float | None:
    return decoding.refresh_decay if decoding.refresh else None


def _thresholds(decoding: DecodingConfig, spec: ModelSpec, device: torch.device) -> Tensor | None:
    """Of cats, float32 [L]; None where it keeps a fixed number."""
    if decoding.cats_threshold is None:
        return None
    given = 0.0 if decoding.cats_threshold == AUTO else float(decoding.cats_threshold)
    return torch.full((spec.num_layers,), given, device=device)
