"""Rows of keys or values as a cache holds them: plain, or in 8 bits with a scale each. Knows no cache and no attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127
"""Integers run from -LEVELS to LEVELS."""


@dataclass(frozen=True, slots=True)
class QuantizedKVRows:
    """A row is integers times its scale."""

    integers: Tensor
    """int8 [B, K, T, E]"""
    scales: Tensor
    """float32 [B, K, T, 1]"""
    dtype: torch.dtype
    """What is computed in."""

    @property
    def shape(self) -> torch.Size:
        """[B, K, T, E]"""
        return self.integers.shape

    def narrow(self, start: int, length: int) -> QuantizedKVRows:
        """So many slots of them: views."""
        return QuantizedKVRows(self.integers.narrow(2, start, length), self.scales.narrow(2, start, length), self.dtype)

    def plain(self) -> Tensor:
        """[B, K, T, E], copies."""
        return (self.integers * self.scales).to(self.dtype)


KVRows = Tensor | QuantizedKVRows
"""[B, K, T, E]"""


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of integers, and their scales: [..., E] -> int8 [..., E], float32 [..., 1]. A row of zeros has a scale of 0."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / LEVELS
    return (wide / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8), scale
