"""Products of a few tokens with rows of blocks, and the weights of such rows: on a CPU by C, on a GPU weights by Triton and
products by torch, else in plain torch, which is the reference.

    linear    y = x W^T                                x [S, D], N rows of D -> [S, N]
    down      y = z W, the sum of z_j times row j      z [S, N], N neurons' rows of D outputs -> [S, D]

A down projection is regrouped by neuron by C or torch. Products are float32. On a GPU weights are rounded to the type of the
tokens. Knows no layers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from offload_sirius.kernels import blocks_cpu
from offload_sirius.kernels.blocks import BlockRows, NeuronRows, regroup_reference, write_headers
from offload_sirius.kernels.gather import has_triton
from offload_sirius.kernels.in_parts import down_in_parts, linear_in_parts
from offload_sirius.quantization import UNPACKED_ROWS

REFERENCE_ROWS = 256
"""Rows that the reference holds in float32 at once."""


def block_linear(x: Tensor, rows: BlockRows) -> Tensor:
    """y = x rows^T: x [S, D] of any float type -> float32 [S, N]."""
    if _by_library(x.device):
        return blocks_cpu.linear(x, rows)
    if not _on_gpu(x.device):
        return linear_reference(x, rows)
    return linear_in_parts(x, rows, UNPACKED_ROWS, partial(block_weights, dtype=x.dtype)).float()


def block_down(z: Tensor, rows: NeuronRows) -> Tensor:
    """y = z rows: z [S, N] of any float type -> float32 [S, D]."""
    if _by_library(z.device):
        return blocks_cpu.down(z, rows)
    if not _on_gpu(z.device):
        return down_reference(z, rows)
    return down_in_parts(z, rows, UNPACKED_ROWS, partial(block_weights, dtype=z.dtype))


def block_weights(rows: BlockRows | NeuronRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that rows stand for, rounded to a type: [N, D]."""
    if _on_gpu(rows.device):
        from offload_sirius.kernels import blocks_gpu

        return blocks_gpu.weights(rows, dtype)
    return (blocks_cpu.weights(rows) if _by_library(rows.device) else rows.dequantised()).to(dtype)


def write_outputs(place: NeuronRows, first: int, stored: Tensor) -> None:
    """Write rows of a down projection as they are stored to all of a layer's neurons, in host memory.

    stored: uint8 [n, blocks * block_nbytes], those of outputs first .. first + n, both multiples of 32. The first ones bring the
    neurons' numbers.
    """
    if first == 0:
        place.numbers.copy_(torch.arange(len(place), dtype=torch.int32))
    write_headers(stored, first, place)
    (blocks_cpu.regroup if blocks_cpu.available() else regroup_reference)(stored, first, place)


def linear_reference(x: Tensor, rows: BlockRows) -> Tensor:
    """block_linear in torch."""
    return linear_in_parts(x.float(), rows, REFERENCE_ROWS, BlockRows.dequantised)


def down_reference(z: Tensor, rows: NeuronRows) -> Tensor:
    """block_down in torch."""
    return down_in_parts(z.float(), rows, REFERENCE_ROWS, NeuronRows.dequantised)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and has_triton()


def _by_library(device: torch.device) -> bool:
    return device.type == "cpu" and blocks_cpu.available()
