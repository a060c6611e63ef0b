"""A matrix by its rows, as a layer multiplies with it: plain numbers, or quantised rows, which are never unpacked to memory.

Whoever computes with a matrix need not know which it is; whoever moves rows moves their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from offload_sirius.quantization import WeightFormat


@dataclass(frozen=True)
class QuantizedRows:
    """A matrix [N, K] whose rows are quantised, each with its scales."""

    rows: Tensor
    """uint8 [N, row_nbytes]; rows are contiguous, the distance between them may be any."""
    num_columns: int
    """K"""
    format: WeightFormat

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as a tensor's."""
        return self.rows.shape[0], self.num_columns

    def __getitem__(self, rows: slice) -> QuantizedRows:
        """Some of the rows: a view."""
        return QuantizedRows(self.rows[rows], self.num_columns, self.format)


Matrix = Tensor | QuantizedRows


def project(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [S, K] times the transposed matrix [N, K], plus bias [N] -> [S, N]."""
    if isinstance(matrix, Tensor):
        return functional.linear(x, matrix, bias)
    y = quantized_linear(x, matrix.rows, matrix.format)
    return y if bias is None else y.add_(bias)


def combine(z: Tensor, matrix: Matrix) -> Tensor:
    """z [S, N] times the matrix [N, K] -> [S, K]."""
    if isinstance(matrix, Tensor):
        return z @ matrix
    return quantized_down(z, matrix.rows, matrix.format)
