"""Decoding with a real forward pass and a real KV cache: positions, masks and rollback agree between the rooms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from offload_sirius.config import DecodingConfig, SamplingConfig
from offload_sirius.decode.model import Ask
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.model.dense import DenseSource
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius_loaders.checkpoint import Key
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

from .toys import decode_full, decode_sirius

SPEC = ModelSpec(
    name="test",
    architecture="llama",
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_width=48,
    vocab_size=61,
    max_positions=512,
    norm_eps=1e-5,
    rope=RopeSpec(),
    layer_windows=(None, 5),
)
PROMPT = [3, 1, 4, 1, 5]


class NoisyDraft:
    """A model, and one for drafts with weights that are a little off, on one KV cache."""

    device = torch.device("cpu")

    def __init__(self, capacity: int, noise: float) -> None:
        self._cache = KVCache(SPEC, capacity, dtype=torch.float32)
        weights = random_tensors(0)
        noisy = {key: tensor + noise * random_tensors(1)[key] for key, tensor in weights.items()}
        self._target = Transformer(SPEC, DenseSource(SPEC, weights), self._cache)
        self._sparse = Transformer(SPEC, DenseSource(SPEC, noisy), self._cache)

    @property
    def length(self) -> int:
        return self._cache.length

    @property
    def room(self) -> int:
        return self._cache.capacity - self._cache.length

    def run(self, asks: Sequence[Ask]) -> list[Tensor]:
        (ask,) = asks
        token_ids = torch.tensor(ask.token_ids)
        if ask.kind == "prefill":
            return [self._target.prefill(token_ids)[None]]
        return [(self._sparse if ask.kind == "draft" else self._target).step(token_ids, ask.tree)]

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        slots = torch.tensor([length + offset for offset in offsets], dtype=torch.int64)
        for held in (self._cache.keys, self._cache.values):
            held[:, :, :, length : length + len(slots)] = held[:, :, :, slots]
        self._cache.length = length + len(slots)


def random_tensors(seed: int) -> dict[Key, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[Key, tuple[int, ...]] = {(None, role): shape for role, shape in SPEC.model_roles().items()}
    for layer in range(SPEC.num_layers):
        shapes |= {(layer, role): shape for role, shape in SPEC.layer_roles().items()}
    return {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in shapes.items()}


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_corrected_tokens_are_those_of_full_mode(width: int, noise: float, temperature: float) -> None:
    sampler, stats = Sampler(SamplingConfig(temperature=temperature, seed=5)), DecodeStats()
    tokens = decode_sirius(
        NoisyDraft(96, noise),
        sampler,
        PROMPT,
        decoding=DecodingConfig(mode="sirius", window=5, tree_width=width),
        end_token_ids=frozenset(),
        max_new_tokens=60,
        stats=stats,
    )
    assert list(tokens) == list(islice(decode_full(NoisyDraft(96, 0.0), sampler, PROMPT, DecodeStats()), 60))
    assert stats.acceptance is not None
    # A beam may lose the path that a line would follow, so only a line of the same weights is always right.
    assert noise > 0 or width > 1 or stats.acceptance == 1
    assert noise < 1 or stats.acceptance < 1
