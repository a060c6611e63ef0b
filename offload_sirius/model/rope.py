"""Rotary position embedding: the cosines and sines of every position, and turning heads by them.

The long formulas of frequencies, llama3 and yarn, are those of transformers, which is imported only for them, since that takes a
second. Knows nothing of attention or of the cache.

A head is turned in pairs (i, i + E/2), as in the transformers checkpoints:

    turned = x * [cos, cos] + [x2, x1] * [-sin, sin]        x = [x1, x2]

The table keeps the sine with its sign, so that turning is a swap of halves, two products and a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload_sirius_loaders.spec import ModelSpec

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines, each [S, 1, E]."""


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn every head of every token: x [..., S, heads, E] -> the same shape."""
    cos, signed_sin = rotation
    swapped = x.roll(x.shape[-1] // 2, -1)  # [x1, x2] -> [x2, x1]
    return (x * cos).add_(swapped.mul_(signed_sin))


class RotaryTable:
    """Cosines and sines of positions 0, 1, ..., computed in float32 and kept in the compute dtype, as the reference models do.

    All kinds but `dynamic` are fixed when built. The frequencies of `dynamic` depend on how long the sequence was when a
    position was computed: the whole prompt at once, then one position more at a time. So the table of a sequence is settled
    by the length of its prompt, and is filled anew, in place, by `begin`.
    """

    def __init__(self, spec: ModelSpec, *, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self._spec = spec
        self.is_own = spec.rope.kind == "dynamic"
        """Whether it is of one sequence alone."""
        self._cos = torch.empty(num_positions, 1, spec.head_dim, dtype=dtype, device=device)
        self._signed_sin = torch.empty_like(self._cos)
        self._fill(prompt_length=0)

    @property
    def nbytes(self) -> int:
        """Device bytes of the table."""
        return self._cos.nbytes + self._signed_sin.nbytes

    def another(self) -> RotaryTable:
        """For another sequence."""
        num_positions, dtype, device = self._cos.shape[0], self._cos.dtype, self._cos.device
        return RotaryTable(self._spec, num_positions=num_positions, dtype=dtype, device=device)

    def begin(self, prompt_length: int) -> None:
        """A sequence begins with a prompt of that many positions: settles the frequencies that depend on it."""
        if self.is_own:
            self._fill(prompt_length)

    def span(self, start: int, stop: int) -> Rotation:
        """Rotation of the positions start, ..., stop - 1: views, nothing is copied."""
        return self._cos[start:stop], self._signed_sin[start:stop]

    def at(self, positions: Tensor) -> Rotation:
        """Rotation of any positions, int64 [S] on the device."""
        return self._cos[positions], self._signed_sin[positions]

    def _fill(self, prompt_length: int) -> None:
        """Computes on the host, so that the device never holds more than the table."""
        positions = torch.arange(self._cos.shape[0])
        frequencies, attention_factor = _frequencies(self._spec, (positions + 1).clamp(min=prompt_length))
        angles = positions[:, None].float() * frequencies  # [T, E/2]
        cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
        self._cos.copy_(torch.cat((cos, cos), dim=-1)[:, None])
        self._signed_sin.copy_(torch.cat((-sin, sin), dim=-1)[:, None])


def _frequencies(spec: ModelSpec, sequence_lengths: Tensor) -> tuple[Tensor, float]:
    """Radians a position turns each pair, [E/2] or [T, E/2], and the factor of cosine and sine.

    sequence_lengths: int64 [T], how long the sequence was when each position was computed.
    """
    rope = spec.rope
    if rope.kind == "default":
        return _frequencies_of(spec, rope.theta), 1.0
    if rope.kind == "linear":
        return _frequencies_of(spec, rope.theta) / rope.parameters["factor"], 1.0
    if rope.kind == "dynamic":
        return _frequencies_of(spec, _stretched_theta(spec, sequence_lengths)[:, None]), 1.0
    return _frequencies_of_transformers(spec)


def _frequencies_of(spec: ModelSpec, theta: float | Tensor) -> Tensor:
    """theta^(-2i/E) for i = 0, ..., E/2 - 1."""
    exponents = torch.arange(0, spec.head_dim, 2).float() / spec.head_dim
    return torch.as_tensor(1.0 / theta**exponents)


def _stretched_theta(spec: ModelSpec, sequence_lengths: Tensor) -> Tensor:
    """The theta with which a sequence longer than any in training turns its slowest pair no further than they did ("NTK")."""
    factor = spec.rope.parameters["factor"]
    trained_length = round(spec.max_positions / factor)  # the spec has the scaling counted in
    stretch = factor * sequence_lengths.clamp(min=trained_length) / trained_length - (factor - 1)
    return spec.rope.theta * stretch ** (spec.head_dim / (spec.head_dim - 2))


def _frequencies_of_transformers(spec: ModelSpec) -> tuple[Tensor, float]:
    """The formulas of transformers, which take a configuration; versions 4 and 5 both understand the older spelling of it."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=spec.head_dim,
        num_attention_heads=1,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        rope_theta=spec.rope.theta,
        rope_scaling={"rope_type": spec.rope.kind, **spec.rope.parameters},
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[spec.rope.kind](config, torch.device("cpu"))
    return frequencies, attention_factor
