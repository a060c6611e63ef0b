"""The forward pass of llama, mistral, qwen2 and qwen3, which differ only in what a ModelSpec says.

Weights come from a WeightSource, layer after layer; this file does not know whether they were streamed or always there. Every
pass asks for each layer once, whatever the number of tokens: a pass costs its weights, tokens are nearly free.

    prefill   a prompt of any length, in chunks within each layer -> logits of its last token
    step      a few tokens at the end of the cache -> logits of each

Several sequences may share a pass: each has a cache of its own, and what a layer multiplies is multiplied for all together.
What a pass does with a layer's neurons, all of them or some, is the feed-forward that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from offload_sirius.errors import PromptError
from offload_sirius.model.costs import CHUNK_SIZE
from offload_sirius.model.feed_forward import DenseFeedForward, FeedForward
from offload_sirius.model.fixed_step import FixedStep
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.layers import Rows, head_logits, run_layers
from offload_sirius.model.ops import causal_mask, grouped_attention, window_mask
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
class Tokens:
    """What a pass appends to one sequence."""

    cache: KVCache
    """The sequence's."""
    token_ids: Tensor
    """int64 [S] in host memory."""
    tree: TokenTree | None = None
    """None: they follow each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens in neighbouring slots of a cache. See Rows."""

    cache: KVCache

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

    def attend(self, layer: int, window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See Rows. A single token sees all slots from the first one in its window on, and needs no mask."""
        self.cache.write(layer, self.start, keys.transpose(1, 2), values.transpose(1, 2))  # [B, C, K, E] -> [B, K, C, E]
        first = 0 if window is None else max(0, self.least_position - window + 1)
        cached_keys, cached_values = self.cache.read(layer, first, self.stop)  # [B, K, T, E]
        return grouped_attention(queries, cached_keys, cached_values, self._mask(first, window))

    def _mask(self, first: int, window: int | None) -> Tensor | None:
        """bool [C, T - first]: what each token sees of the slots from the first one on."""
        if self.mask is None and self.hidden.shape[0] == 1:
            return None
        queries, keys = self.key_positions[self.start :], self.key_positions[first:]
        mask = causal_mask(queries, keys) if self.mask is None else self.mask[:, first:]
        return mask if window is None else mask & window_mask(queries, keys, window)


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Tokens of several sequences. See Rows."""

    hidden: Tensor
    """[C, D]: those of all chunks, one behind the other."""
    rotation: Rotation
    chunks: Sequence[Chunk]
    """One of each sequence."""

    def attend(self, layer: int, window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See Rows. Each sees its own sequence."""
        lengths = [chunk.hidden.shape[0] for chunk in self.chunks]
        mixed = queries.new_empty(queries.shape[1], queries.shape[2] * queries.shape[3])  # [C, HE]
        given = [each.split(lengths, dim=1) for each in (queries, keys, values)]
        for chunk, place, *own in zip(self.chunks, mixed.split(lengths), *given, strict=True):
            place.copy_(chunk.attend(layer, window, *own))
        return mixed


class Transformer:
    """A model, the KV caches of its sequences, and the two ways through them."""

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        cache: KVCache,
        *,
        chunk_size: int = CHUNK_SIZE,
        tracer: Tracer | None = None,
        more_caches: Sequence[KVCache] = (),
    ) -> None:
        """Computes in the dtype and on the device of the cache. more_caches: for further sequences, of the same capacity.

        Raises ConfigError where the activation is unknown.
        """
        assert len(spec.layer_windows) == spec.num_layers, (len(spec.layer_windows), spec.num_layers)
        self.spec = spec
        self.cache = cache
        self._source = source
        self._chunk_size = chunk_size
        self._tracer = tracer
        self._dense = DenseFeedForward(source, spec.activation)
        table = RotaryTable(spec, num_positions=cache.capacity, dtype=cache.dtype, device=cache.device)
        self._rotary = {
            id(each): table if each is cache or not table.is_own else table.another() for each in (cache, *more_caches)
        }
        self._slots = torch.arange(cache.capacity, device=cache.device)

    @property
    def nbytes(self) -> int:
        """Device bytes of the position tables; weights and cache count their own."""
        return sum(table.nbytes for table in set(self._rotary.values())) + self._slots.nbytes

    def prefill(self, token_ids: Tensor, feed_forward: FeedForward | None = None) -> Tensor:
        """Append a prompt, int64 [S] in host memory, to the first sequence -> float32 [V], the logits after its last token.

        feed_forward: what to do with the neurons; None computes all. Raises PromptError where the prompt is empty or does not fit
        into the cache.
        """
        return self.prefill_all([Tokens(cache=self.cache, token_ids=token_ids)], feed_forward)[0]

    @torch.inference_mode()
    def prefill_all(self, prompts: Sequence[Tokens], feed_forward: FeedForward | None = None) -> Tensor:
        """The same for a prompt of each of some sequences -> float32 [sequences, V]."""
        hidden = self._prompts(prompts, feed_forward)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        return self._logits(hidden[[stop - 1 for stop in accumulate(lengths)]])

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
        """Append a prompt, int64 [S] in host memory, to the first sequence, and have the logits after its last tokens read.

        read: is given float32 [R, V], R at most num_rows, until num_last tokens have been read in order; what it is given may be
        overwritten. num_rows: logits that there is memory for at once. Raises PromptError as prefill does.
        """
        hidden = self._prompts([Tokens(cache=self.cache, token_ids=token_ids)], feed_forward)
        for rows in hidden[-num_last:].split(num_rows):
            read(self._logits(rows))  # [R, D] -> [R, V]

    def step(self, token_ids: Tensor, tree: TokenTree | None = None, feed_forward: FeedForward | None = None) -> Tensor:
        """Append a few tokens, int64 [S] in host memory, to the first sequence -> float32 [S, V], the logits after each.

        They follow each other, unless a tree says otherwise. feed_forward: what to do with the neurons; None computes all.
        Raises PromptError where they do not fit into the cache.
        """
        return self.step_all([Tokens(cache=self.cache, token_ids=token_ids, tree=tree)], feed_forward)

    @torch.inference_mode()
    def step_all(self, steps: Sequence[Tokens], feed_forward: FeedForward | None = None) -> Tensor:
        """The same for some tokens of each of some sequences -> float32 [S, V], S tokens of all together."""
        for step in steps:
            step.cache.require_room(len(step.token_ids))
        hidden = self._embed(steps)  # [S, D]
        rows = hidden.split([len(step.token_ids) for step in steps])
        chunks = [self._chunk(step, own) for step, own in zip(steps, rows, strict=True)]
        self._pass(chunks if len(chunks) == 1 else [_together(hidden, chunks)], feed_forward)
        self._advance(steps)
        return self._logits(hidden)

    def fixed_step(self, source: WeightSource) -> FixedStep:
        """Steps of one token, in the same cache, that a device can record. source: where all weights stay at their places."""
        return FixedStep(self.spec, source, self.cache, self._rotary[id(self.cache)], self._slots)

    def _prompts(self, prompts: Sequence[Tokens], feed_forward: FeedForward | None) -> Tensor:
        """Append a prompt to each of some sequences -> hidden states behind the last layer [S, D], S tokens of all together."""
        for prompt in prompts:
            if prompt.token_ids.numel() == 0:
                raise PromptError("the prompt has no tokens, at least one is needed; give a text that is not empty")
            prompt.cache.require_room(len(prompt.token_ids))
            self._rotary[id(prompt.cache)].begin(prompt.cache.length + len(prompt.token_ids))
        hidden = self._embed(prompts)  # [S, D]
        chunks = [
            self._line(prompt.cache, rows, prompt.cache.length + index * self._chunk_size)
            for prompt, own in zip(prompts, hidden.split([len(prompt.token_ids) for prompt in prompts]), strict=True)
            for index, rows in enumerate(own.split(self._chunk_size))
        ]
        self._pass(chunks, feed_forward)
        self._advance(prompts)
        return hidden

    def _embed(self, tokens: Sequence[Tokens]) -> Tensor:
        """[S] of each -> [S, D], S tokens of all together."""
        return self._source.embed(torch.cat([each.token_ids for each in tokens]))

    def _advance(self, tokens: Sequence[Tokens]) -> None:
        """Every layer has seen them."""
        for each in tokens:
            each.cache.advance(len(each.token_ids))

    def _chunk(self, step: Tokens, hidden: Tensor) -> Chunk:
        if step.tree is None:
            return self._line(step.cache, hidden, step.cache.length)
        return self._branches(step.cache, hidden, step.tree)

    def _line(self, cache: KVCache, hidden: Tensor, start: int) -> Chunk:
        """Tokens that follow each other: a token's slot is its position."""
        stop = start + hidden.shape[0]
        rotation, key_positions = self._rotary[id(cache)].span(start, stop), self._slots[:stop]
        return Chunk(
            cache=cache,
            hidden=hidden,
            start=start,
            stop=stop,
            rotation=rotation,
            least_position=start,
            key_positions=key_positions,
            mask=None,
        )

    def _branches(self, cache: KVCache, hidden: Tensor, tree: TokenTree) -> Chunk:
        """Tokens of a tree: they take the next slots, each at the position the tree gives it."""
        num_tokens, start = hidden.shape[0], cache.length
        stop = start + num_tokens
        root = stop - len(tree.positions)
        return Chunk(
            cache=cache,
            hidden=hidden,
            start=start,
            stop=stop,
            rotation=self._rotary[id(cache)].at(tree.positions[-num_tokens:]),
            least_position=root,
            key_positions=torch.cat((self._slots[:root], tree.positions)),
            mask=tree.mask,
        )

    def _pass(self, all_rows: Sequence[Rows], feed_forward: FeedForward | None) -> None:
        """Take all rows through every layer."""
        run_layers(self.spec, self._source, all_rows, feed_forward or self._dense)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[S, D] -> float32 [S, V]"""
        with during(self._tracer, "compute", "head"):
            return head_logits(self.spec, self._source, hidden)


def _together(hidden: Tensor, chunks: Sequence[Chunk]) -> Together:
    """hidden: [C, D], of which each chunk has its own rows."""
    cos, sin = zip(*(chunk.rotation for chunk in chunks), strict=True)
    return Together(hidden=hidden, rotation=(torch.cat(cos), torch.cat(sin)), chunks=chunks)
