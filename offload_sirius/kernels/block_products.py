"""Products of a few tokens with rows of blocks: on a CPU by C, elsewhere in plain torch, which is the reference.

    linear    y = x W^T                                x [S, D], N rows of D -> [S, N]
    down      y = z W, the sum of z_j times row j      z [S, N], N neurons' rows of D outputs -> [S, D]

All give float32. Knows no layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius.kernels import blocks_cpu
from offload_sirius.kernels.blocks import BlockRows, NeuronRows

REFERENCE_ROWS = 256
"""Rows that the reference holds in float32 at once."""


def block_linear(x: Tensor, rows: BlockRows) -> Tensor:
    """y = x rows^T: x [S, D] of any float type -> float32 [S, N]."""
    return blocks_cpu.linear(x, rows) if _by_library(x) else linear_reference(x, rows)


def block_down(z: Tensor, rows: NeuronRows) -> Tensor:
    """y = z rows: z [S, N] of any float type -> float32 [S, D]."""
    return blocks_cpu.down(z, rows) if _by_library(z) else down_reference(z, rows)


def block_weights(rows: BlockRows | NeuronRows) -> Tensor:
    """The weights that rows stand for, float32 [N, D]."""
    return (
        blocks_cpu.weights(rows) if _by_library(rows.rows if isinstance(rows, BlockRows) else rows.codes) else rows.dequantised()
    )


def linear_reference(x: Tensor, rows: BlockRows) -> Tensor:
    """block_linear in torch."""
    parts = [
        functional.linear(x.float(), rows[start : start + REFERENCE_ROWS].dequantised())
        for start in range(0, len(rows), REFERENCE_ROWS)
    ]
    return torch.cat(parts, dim=1) if parts else x.new_empty(x.shape[0], 0, dtype=torch.float32)


def down_reference(z: Tensor, rows: NeuronRows) -> Tensor:
    """block_down in torch."""
    y = z.new_zeros(z.shape[0], rows.width, dtype=torch.float32)
    for start in range(0, len(rows), REFERENCE_ROWS):
        y += z[:, start : start + REFERENCE_ROWS].float() @ rows[start : start + REFERENCE_ROWS].dequantised()
    return y


def _by_library(x: Tensor) -> bool:
    return x.device.type == "cpu" and blocks_cpu.available()
