"""Products with coded rows of which some at a time become weights: no more than those take memory. Knows no codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius.kernels.blocks import BlockRows, NeuronRows
from offload_sirius.kernels.packed import QuantizedRows

RowsT = TypeVar("RowsT", bound=QuantizedRows | BlockRows | NeuronRows)


def linear_in_parts(x: Tensor, rows: RowsT, most_rows: int, weights: Callable[[RowsT], Tensor]) -> Tensor:
    """x [S, D] times the transposed rows [N, D] -> [S, N], in the type of x. weights: of some rows, in that type."""
    products = [functional.linear(x, weights(part)) for part in parts(rows, most_rows)]
    return torch.cat(products, dim=1) if products else x.new_empty(x.shape[0], 0)


def down_in_parts(z: Tensor, rows: RowsT, most_rows: int, weights: Callable[[RowsT], Tensor]) -> Tensor:
    """z [S, N] times rows [N, D] -> float32 [S, D]. weights: of some rows, in the type of z, in which each part is summed."""
    y = z.new_zeros(z.shape[0], rows.width, dtype=torch.float32)
    for part, values in zip(parts(rows, most_rows), z.split(most_rows, dim=1), strict=False):
        y += values @ weights(part)
    return y


def parts(rows: RowsT, most_rows: int) -> Iterator[RowsT]:
    """Neighbouring rows, in order: views."""
    return (cast(RowsT, rows[start : start + most_rows]) for start in range(0, len(rows), most_rows))
