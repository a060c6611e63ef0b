"""A matrix by its rows, as a layer multiplies with it: plain numbers, or quantised rows and blocks, of which no more than some
rows are ever unpacked to memory.

Whoever computes with a matrix need not know which it is; whoever moves rows moves their bytes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius.kernels import cpu
from offload_sirius.kernels.block_products import block_down, block_linear, block_weights
from offload_sirius.kernels.blocks import BlockRows, NeuronRows
from offload_sirius.kernels.cpu import Activation
from offload_sirius.kernels.in_parts import down_in_parts, linear_in_parts
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.kernels.quantized import quantized_down, quantized_gate_up, quantized_linear, quantized_weights
from offload_sirius.quantization import FEW_TOKENS, UNPACKED_ROWS

Matrix = Tensor | QuantizedRows | BlockRows | NeuronRows
"""N rows of K numbers."""

Coded = QuantizedRows | BlockRows | NeuronRows
"""One whose rows are not plain numbers."""

Stack = Matrix | tuple[Matrix, ...]
"""A matrix, or some of which one's rows follow the other's: each in a format of its own."""


def project(x: Tensor, matrix: Stack, bias: Tensor | None = None) -> Tensor:
    """x [S, K] times the transposed matrix [N, K], plus bias [N] -> [S, N], in the type of x."""
    if isinstance(matrix, Tensor):
        if not _by_tiles(x, matrix):
            return functional.linear(x, matrix, bias)
        y = cpu.linear(x, matrix, dtype=x.dtype)
    elif isinstance(matrix, tuple):
        y = torch.cat([project(x, part) for part in matrix], dim=1)
    elif x.shape[0] <= FEW_TOKENS or len(matrix) == 0:
        y = _few_projected(x, matrix)
    else:
        y = linear_in_parts(x, matrix, UNPACKED_ROWS, partial(_weights, dtype=x.dtype))
    return y if bias is None else y.add_(bias)


def gated(x: Tensor, gate: Matrix, up: Matrix, activation: Activation) -> Tensor | None:
    """z = activation(x gate^T) * (x up^T) in one go, [S, K] -> [S, N] in the type of x; None where there is no such kernel.

    z is rounded once, where products rounded on their own and an activation between them round three times.
    """
    if isinstance(gate, QuantizedRows) and isinstance(up, QuantizedRows):
        few = x.shape[0] <= FEW_TOKENS and len(gate) > 0 and gate.form == up.form
        return quantized_gate_up(x, gate, up, activation, dtype=x.dtype) if few else None
    if isinstance(gate, Tensor) and isinstance(up, Tensor) and _by_tiles(x, gate) and _by_tiles(x, up):
        return cpu.gate_up(x, gate, up, activation, dtype=x.dtype)
    return None


def combine(z: Tensor, matrix: Matrix) -> Tensor:
    """z [S, N] times the matrix [N, K] -> [S, K], in the type of z."""
    if isinstance(matrix, Tensor):
        return cpu.down(z, matrix).to(z.dtype) if _by_tiles(z, matrix) else z @ matrix
    if z.shape[0] <= FEW_TOKENS or len(matrix) == 0:
        return _few_combined(z, matrix).to(z.dtype)
    return down_in_parts(z, matrix, UNPACKED_ROWS, partial(_weights, dtype=z.dtype)).to(z.dtype)


def _few_projected(x: Tensor, matrix: Coded) -> Tensor:
    assert not isinstance(matrix, NeuronRows), "a down projection is summed over its rows"
    if isinstance(matrix, QuantizedRows):
        return quantized_linear(x, matrix, dtype=x.dtype)
    return block_linear(x, matrix).to(x.dtype)


def _few_combined(z: Tensor, matrix: Coded) -> Tensor:
    assert not isinstance(matrix, BlockRows), "a neuron has no whole blocks of a down projection"
    return quantized_down(z, matrix) if isinstance(matrix, QuantizedRows) else block_down(z, matrix)


def _weights(rows: Coded, dtype: torch.dtype) -> Tensor:
    return quantized_weights(rows, dtype) if isinstance(rows, QuantizedRows) else block_weights(rows, dtype)


def _by_tiles(x: Tensor, matrix: Tensor) -> bool:
    """Whether the CPU's matrix unit takes rows of bfloat16 as they lie.

    For few tokens that is about as fast as torch, and faster where rows are summed; and what a token gives does not depend on the
    tokens beside it.
    """
    return (
        matrix.dtype == torch.bfloat16 == x.dtype
        and matrix.device.type == "cpu"
        and x.shape[0] <= FEW_TOKENS
        and matrix.stride(1) == 1
        and cpu.tiles() is not None
    )
