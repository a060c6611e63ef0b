"""The forward pass of llama, mistral, qwen2 and qwen3, which differ only in what a ModelSpec says.

Weights come from a WeightSource, layer after layer; this file does not know whether they were streamed or always there. Every
pass asks for each layer once, whatever the number of tokens: a pass costs its weights, tokens are nearly free.

    prefill   a prompt of any length, in chunks within each layer -> logits of its last token
    step      a few tokens at the end of the cache -> logits of each

What a pass does with a layer's neurons, all of them or some, is the feed-forward that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.errors import PromptError
from offload_sirius.model.costs import CHUNK_SIZE
from offload_sirius.model.feed_forward import DenseFeedForward, FeedForward
from offload_sirius.model.fixed_step import FixedStep
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.kv_rows import KVRows
from offload_sirius.model.layers import head_logits, run_layers
from offload_sirius.model.ops import causal_mask, window_mask
from offload_sirius.model.rope import RotaryTable, Rotation
from offload_sirius.model.source import WeightSource
from offload_sirius.trace import Tracer, during
from offload_sirius_loaders.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """Where the tokens of a step stand when they are not one line: drafted branches that share their beginnings.

    They may grow step by step: then the last slots of the cache hold nodes of the tree, too. Before these a slot's number is its
    position, as the tree's root takes the first slot behind them.
    """

    positions: Tensor
    """int64 [P] on the device, of the last P slots: nodes that are cached, then the S tokens of the step. The first is the least.
    Tokens on different branches may have the same."""
    mask: Tensor
    """bool [S, T] on the device, T = length of the cache + S: true where a token (row) sees a slot of the cache (column)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens in neighbouring slots of the cache. See Rows."""

    hidden: Tensor
    """[C, D]: rows of the hidden states of the pass. Layers add to them in place."""
    start: int
    """Slot of the first token."""
    stop: int
    """Slot after the last."""
    rotation: Rotation
    least_position: int
    """No token's position is below; of tokens that follow each other the first one's."""
    key_positions: Tensor
    """int64 [T]: the position of every slot, up to the chunk's last."""
    mask: Tensor | None
    """bool [C, T]: which slots each token sees; None where it is all up to its own."""

    def write(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor) -> None:
        """See Rows."""
        cache.write(layer, self.start, keys, values)

    def read(self, cache: KVCache, layer: int, window: int | None) -> tuple[KVRows, KVRows, Tensor | None]:
        """See Rows. A single token sees all slots from the first one in its window on, and needs no mask."""
        first = 0 if window is None else max(0, self.least_position - window + 1)
        keys, values = cache.read(layer, first, self.stop)
        return keys, values, self._mask(first, window)

    def _mask(self, first: int, window: int | None) -> Tensor | None:
        """bool [C, T - first]: what each token sees of the slots from the first one on."""
        if self.mask is None and self.hidden.shape[0] == 1:
            return None
        queries, keys = self.key_positions[self.start :], self.key_positions[first:]
        mask = causal_mask(queries, keys) if self.mask is None else self.mask[:, first:]
        return mask if window is None else mask & window_mask(queries, keys, window)


class Transformer:
    """A model for one sequence: its weights, its KV cache, and the two ways through them."""

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        cache: KVCache,
        *,
        chunk_size: int = CHUNK_SIZE,
        tracer: Tracer | None = None,
    ) -> None:
        """Computes in the dtype and on the device of the cache. Raises ConfigError where the activation is unknown."""
        assert len(spec.layer_windows) == spec.num_layers, (len(spec.layer_windows), spec.num_layers)
        self.spec = spec
        self.cache = cache
        self._source = source
        self._chunk_size = chunk_size
        self._tracer = tracer
        self._dense = DenseFeedForward(source, spec.activation)
        self._rotary = RotaryTable(spec, num_positions=cache.capacity, dtype=cache.dtype, device=cache.device)
        self._slots = torch.arange(cache.capacity, device=cache.device)

    @property
    def nbytes(self) -> int:
        """Device bytes of the position tables; weights and cache count their own."""
        return self._rotary.nbytes + self._slots.nbytes

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor, feed_forward: FeedForward | None = None) -> Tensor:
        """Append a prompt, int64 [S] in host memory -> float32 [V], the logits after its last token.

        feed_forward: what to do with the neurons; None computes all. Raises PromptError where the prompt is empty or does not fit
        into the cache.
        """
        return self._logits(self._prompt(token_ids, feed_forward)[-1:])[0]

    @torch.inference_mode()
    def prefill_rows(
        self,
        token_ids: Tensor,
        num_last: int,
        read: Callable[[Tensor], None],
        *,
        num_rows: int,
        feed_forward: FeedForward | None = None,
    ) -> None:
        """Append a prompt, int64 [S] in host memory, and have the logits after each of its last tokens read.

        read: is given float32 [R, V], R at most num_rows, until num_last tokens have been read in order; what it is given may be
        overwritten. num_rows: logits that there is memory for at once. Raises PromptError as prefill does.
        """
        for hidden in self._prompt(token_ids, feed_forward)[-num_last:].split(num_rows):
            read(self._logits(hidden))  # [R, D] -> [R, V]

    @torch.inference_mode()
    def step(self, token_ids: Tensor, tree: TokenTree | None = None, feed_forward: FeedForward | None = None) -> Tensor:
        """Append a few tokens, int64 [S] in host memory -> float32 [S, V], the logits after each.

        They follow each other, unless a tree says otherwise. feed_forward: what to do with the neurons; None computes all.
        Raises PromptError where they do not fit into the cache.
        """
        self.cache.require_room(len(token_ids))
        hidden = self._source.embed(token_ids)  # [S] -> [S, D]
        chunk = self._line(hidden, self.cache.length) if tree is None else self._branches(hidden, tree)
        self._pass([chunk], feed_forward or self._dense)
        self.cache.advance(len(token_ids))
        return self._logits(hidden)

    def _prompt(self, token_ids: Tensor, feed_forward: FeedForward | None) -> Tensor:
        """Append a prompt, int64 [S] -> hidden states [S, D] behind the last layer."""
        if token_ids.numel() == 0:
            raise PromptError("the prompt has no tokens, at least one is needed; give a text that is not empty")
        start = self.cache.length
        self.cache.require_room(len(token_ids))
        self._rotary.begin(start + len(token_ids))
        hidden = self._source.embed(token_ids)  # [S] -> [S, D]
        chunks = [self._line(rows, start + i * self._chunk_size) for i, rows in enumerate(hidden.split(self._chunk_size))]
        self._pass(chunks, feed_forward or self._dense)
        self.cache.advance(len(token_ids))
        return hidden

    def fixed_step(self, source: WeightSource) -> FixedStep:
        """Steps of one token, in the same cache, that a device can record. source: where all weights stay at their places."""
        return FixedStep(self.spec, source, self.cache, self._rotary, self._slots)

    def _line(self, hidden: Tensor, start: int) -> Chunk:
        """Tokens that follow each other: a token's slot is its position."""
        stop = start + hidden.shape[0]
        rotation, key_positions = self._rotary.span(start, stop), self._slots[:stop]
        return Chunk(
            hidden=hidden,
            start=start,
            stop=stop,
            rotation=rotation,
            least_position=start,
            key_positions=key_positions,
            mask=None,
        )

    def _branches(self, hidden: Tensor, tree: TokenTree) -> Chunk:
        """Tokens of a tree: they take the next slots, each at the position the tree gives it."""
        num_tokens, start = hidden.shape[0], self.cache.length
        stop = start + num_tokens
        root = stop - len(tree.positions)
        return Chunk(
            hidden=hidden,
            start=start,
            stop=stop,
            rotation=self._rotary.at(tree.positions[-num_tokens:]),
            least_position=root,
            key_positions=torch.cat((self._slots[:root], tree.positions)),
            mask=tree.mask,
        )

    def _pass(self, chunks: list[Chunk], feed_forward: FeedForward) -> None:
        """Take every chunk through every layer."""
        run_layers(self.spec, self._source, self.cache, chunks, feed_forward)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[S, D] -> float32 [S, V]"""
        with during(self._tracer, "compute", "head"):
            return head_logits(self.spec, self._source, hidden)
