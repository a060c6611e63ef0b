"""Products of a few tokens with quantised rows: on a GPU by Triton, on a CPU by C, and in plain torch, which is their reference.

    linear    y = x W^T                                         x [S, D], N rows of D -> [S, N]
    gate_up   z = activation(x Wgate^T) * (x Wup^T)             x [S, D], twice N rows of D -> [S, N]
    down      y = z W, the sum of z_j times row j               z [S, N], N rows of D -> [S, D]

All give float32. Meant for a window of tokens: nothing is gained by rows that stay quantised once there are some hundred. Knows
no layers.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius.kernels import cpu
from offload_sirius.kernels.cpu import Activation
from offload_sirius.kernels.gather import has_triton
from offload_sirius.kernels.in_parts import down_in_parts, linear_in_parts
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import UNPACKED_ROWS

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

REFERENCE_ROWS = 256
"""Rows that the reference holds in float32 at once."""


def quantized_linear(x: Tensor, rows: QuantizedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """y = x rows^T: x [S, D] of any float type -> [S, N].

    dtype: what sums, which are float32, are rounded to.
    """
    if _on_gpu(x):
        from offload_sirius.kernels import quantized_gpu

        return quantized_gpu.linear(_contiguous(x), rows).to(dtype)
    return cpu.linear(x, rows, dtype) if _by_library(x) else linear_reference(x, rows).to(dtype)


def quantized_gate_up(
    x: Tensor,
    gate: QuantizedRows,
    up: QuantizedRows,
    activation: Activation,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """z = activation(x gate^T) * (x up^T): x [S, D] of any float type -> [S, N].

    dtype: what z, computed in float32, is rounded to.
    """
    if _on_gpu(x):
        assert gate.form == up.form, (gate.form, up.form)
        from offload_sirius.kernels import quantized_gpu

        return quantized_gpu.gate_up(_contiguous(x), gate, up, activation).to(dtype)
    if _by_library(x):
        return cpu.gate_up(x, gate, up, activation, dtype)
    return gate_up_reference(x, gate, up, activation).to(dtype)


def quantized_down(z: Tensor, rows: QuantizedRows) -> Tensor:
    """y = z rows: z [S, N] of any float type -> float32 [S, D].

    On a GPU, of more than one token, weights are rounded to the type of z, and so are sums over some rows.
    """
    if _on_gpu(z):
        from offload_sirius.kernels import quantized_gpu

        if z.shape[0] == 1:
            return quantized_gpu.down_of_one(_contiguous(z), rows)
        return down_in_parts(z, rows, UNPACKED_ROWS, lambda part: quantized_gpu.weights(part, z.dtype))
    return cpu.down(z, rows) if _by_library(z) else down_reference(z, rows)


def quantized_weights(rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """The weights that rows stand for, rounded to a type: [N, D]."""
    if _on_gpu(rows.rows):
        from offload_sirius.kernels import quantized_gpu

        return quantized_gpu.weights(rows, dtype)
    return rows.dequantised().to(dtype)


def linear_reference(x: Tensor, rows: QuantizedRows) -> Tensor:
    """quantized_linear in torch."""
    return linear_in_parts(x.float(), rows, REFERENCE_ROWS, QuantizedRows.dequantised)


def gate_up_reference(x: Tensor, gate: QuantizedRows, up: QuantizedRows, activation: Activation) -> Tensor:
    """quantized_gate_up in torch."""
    return activated(linear_reference(x, gate), activation) * linear_reference(x, up)


def down_reference(z: Tensor, rows: QuantizedRows) -> Tensor:
    """quantized_down in torch."""
    return down_in_parts(z.float(), rows, REFERENCE_ROWS, QuantizedRows.dequantised)


def activated(gates: Tensor, activation: Activation) -> Tensor:
    """The activation by its name, elementwise."""
    if activation == "silu":
        return functional.silu(gates)
    return functional.gelu(gates, approximate="tanh" if activation == "gelu_tanh" else "none")


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda" and has_triton()


def _by_library(x: Tensor) -> bool:
    return x.device.type == "cpu" and cpu.available()


def _contiguous(x: Tensor) -> Tensor:
    """Each row contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()
