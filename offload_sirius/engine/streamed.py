"""A model whose weights are streamed, as decoding sees it: passes over tokens, each for a purpose.

Each pass tells the streamer what it takes of the layers and what the next one will take, so that the link works ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.config import AUTO, DecodingConfig
from offload_sirius.decode.model import Pass
from offload_sirius.engine.planning import sparsity_of
from offload_sirius.model.feed_forward import FeedForward
from offload_sirius.model.transformer import TokenTree, Transformer
from offload_sirius.sparsity.cats import Cats, FetchCounts
from offload_sirius.sparsity.griffin import Griffin
from offload_sirius.weights.layout import Cargo
from offload_sirius.weights.neuron_cache import NeuronCache
from offload_sirius.weights.streamer import WeightStreamer


class Sparsity(Protocol):
    """How some passes use only some neurons."""

    @property
    def prefill(self) -> FeedForward | None:
        """All neurons, looked at; None where there is nothing to look for."""

    @property
    def draft(self) -> FeedForward:
        """Some of them."""


class StreamedModel:
    """Satisfies decode.model.Model."""

    def __init__(self, transformer: Transformer, streamer: WeightStreamer, sparsity: Sparsity | None, draft_cargo: Cargo) -> None:
        """sparsity: None where drafts compute all neurons; draft_cargo: what a draft step takes of each layer."""
        self._transformer = transformer
        self._streamer = streamer
        self._sparsity = sparsity
        self._draft_cargo = draft_cargo

    @property
    def fetches(self) -> FetchCounts | None:
        """What draft steps needed of single neurons; None where they do not choose any."""
        return self._sparsity.counts if isinstance(self._sparsity, Cats) else None

    @property
    def length(self) -> int:
        """Positions in the KV cache."""
        return self._transformer.cache.length

    @property
    def room(self) -> int:
        """Further positions that the cache has room for."""
        return self._transformer.cache.capacity - self._transformer.cache.length

    @property
    def device(self) -> torch.device:
        """Where trees have to be."""
        return self._transformer.cache.device

    def prefill(self, token_ids: Tensor, *, following: Pass) -> Tensor:
        """See Model."""
        self._begin("prefill", following)
        # A full answer does not pay for looking at neurons: it is followed by no draft.
        observing = self._sparsity.prefill if self._sparsity is not None and following != "full" else None
        return self._transformer.prefill(token_ids, observing)

    def full(self, token_ids: Tensor, *, following: Pass) -> Tensor:
        """See Model."""
        self._begin("full", following)
        return self._transformer.step(token_ids)

    def draft(self, token_ids: Tensor, tree: TokenTree | None = None, *, following: Pass) -> Tensor:
        """See Model."""
        self._begin("draft", following)
        return self._transformer.step(token_ids, tree, self._sparsity.draft if self._sparsity is not None else None)

    def correct(self, token_ids: Tensor, tree: TokenTree | None = None, *, following: Pass) -> Tensor:
        """See Model."""
        self._begin("correction", following)
        return self._transformer.step(token_ids, tree)

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        """See Model."""
        self._transformer.cache.keep(length, offsets)

    def _begin(self, this: Pass, following: Pass) -> None:
        self._streamer.begin(this, self._cargo(this), following=self._cargo(following))

    def _cargo(self, of: Pass) -> Cargo:
        return self._draft_cargo if of == "draft" else "records"


def streamed_model(
    transformer: Transformer,
    streamer: WeightStreamer,
    caches: Mapping[int, NeuronCache],
    decoding: DecodingConfig,
) -> StreamedModel:
    """The model, with drafts as asked for. caches: layer -> records of its neurons on the device."""
    spec, kind = transformer.spec, sparsity_of(decoding, transformer.spec)
    if kind is None:
        return StreamedModel(transformer, streamer, None, "records")
    num_kept, cache = decoding.num_kept(spec.ffn_width), transformer.cache
    if kind == "griffin":
        griffin = Griffin(spec, streamer, num_kept, dtype=cache.dtype, device=cache.device)
        return StreamedModel(transformer, streamer, griffin, "kept")
    calibrate = decoding.cats_threshold == AUTO
    thresholds = None
    if decoding.cats_threshold is not None:
        given = 0.0 if calibrate else float(decoding.cats_threshold)
        thresholds = torch.full((spec.num_layers,), given, device=cache.device)
    cats = Cats(spec, streamer, num_kept, caches=caches, thresholds=thresholds, calibrate=calibrate)
    return StreamedModel(transformer, streamer, cats, "gate")
