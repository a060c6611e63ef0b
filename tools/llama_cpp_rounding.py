"""Products with blocks as llama.cpp computes them: it rounds activations to 8 bits before it multiplies, which ours do not.

Within `rounded_activations()` products of blocks round x, or z of a down projection, in pieces of 32 as quantize_row_q8_0 and
quantize_row_q8_1 of ggml do on x86: d = max |x| / 127 in float32, q = round(x * (127 / max |x|)), and d is kept as float16. Where
blocks have a minimum m, that meets s = float16(d * sum of q). Sums are float32, in another order than llama.cpp's. For formats
with blocks of 32; the others' activations are rounded in pieces of 256 (Q8_K).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from offload_sirius.blocks import UNIT
from offload_sirius.kernels import matrix
from offload_sirius.kernels.block_products import block_weights
from offload_sirius.kernels.blocks import BlockRows, NeuronRows, split_blocks, split_header

ANY_TOKENS = 1 << 30
"""More tokens than any pass has: the products of few tokens are those that are replaced."""


@contextmanager
def rounded_activations() -> Iterator[None]:
    """While it is open. Holds the weights that it met in float32."""
    held: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def project(x: Tensor, rows: BlockRows) -> Tensor:
        weights, minima = _held(held, rows)
        return _product(x, weights.t(), None if minima is None else minima.t())

    def combine(z: Tensor, rows: NeuronRows) -> Tensor:
        return _product(z, *_held(held, rows))

    with patch.multiple(matrix, FEW_TOKENS=ANY_TOKENS, _few_projected=project, _few_combined=combine):
        yield


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """What x [S, K] becomes, [S, K], and by how much a piece's s is off their sum, [S, K/32]: float32."""
    pieces = x.float().unflatten(1, (-1, UNIT))
    largest = pieces.abs().amax(dim=2, keepdim=True)
    codes = (pieces * torch.where(largest > 0, 127 / largest, 0)).round_()
    factors = largest / 127
    stored = factors.half().float()
    counts = codes.sum(dim=2, keepdim=True)
    sums = (factors * counts).half().float()
    return (codes * stored).flatten(1), (sums - stored * counts).flatten(1)


def _product(x: Tensor, weights: Tensor, minima: Tensor | None) -> Tensor:
    """x [S, K], weights [K, N], minima [K/32, N] -> [S, N]"""
    values, rests = rounded(x)
    y = values @ weights
    return y if minima is None else y.addmm_(rests, minima)


def _held(
    held: dict[tuple[int, ...], tuple[Tensor, Tensor | None]], rows: BlockRows | NeuronRows
) -> tuple[Tensor, Tensor | None]:
    """Weights float32 [N, D], and the minima of their blocks, where these have some: [N, D/32], or [N/32, D] of neurons."""
    assert rows.form.block == UNIT, rows.form
    stored = rows.rows if isinstance(rows, BlockRows) else rows.codes
    key = (stored.data_ptr(), *stored.shape)
    if key not in held:
        held[key] = block_weights(rows), _minima(rows) if rows.form.has_minimum else None
    return held[key]


def _minima(rows: BlockRows | NeuronRows) -> Tensor:
    if isinstance(rows, NeuronRows):
        _, minimum, _ = rows._planes()
        assert minimum is not None
        return minimum.float()
    header, _ = split_blocks(rows.rows.unflatten(1, (-1, rows.form.block_nbytes)), rows.form)
    _, minimum, _ = split_header(header, rows.form)
    assert minimum is not None
    return minimum.float().flatten(1)
