"""Quantised rows as tensors: views of their parts, and the weights that they stand for in plain torch. Knows no layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.quantization import BLOCK, MAX_WIDTH, OUTLIER_NBYTES, ZERO_STEPS, WeightFormat


@dataclass(frozen=True)
class QuantizedRows:
    """N rows of D quantised weights, anywhere: a matrix, or one of the rows of every neuron record."""

    rows: Tensor
    """uint8 [N, row_nbytes]; the bytes of a row are contiguous, rows may be further apart, by a multiple of 16."""
    width: int
    """D"""
    form: WeightFormat

    def __post_init__(self) -> None:
        assert self.rows.dtype == torch.uint8, self.rows.dtype
        assert self.rows.shape[1] == self.form.row_nbytes(self.width), (self.rows.shape, self.width, self.form)
        assert self.rows.stride(1) == 1, self.rows.stride()

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, part: slice) -> QuantizedRows:
        """Neighbouring rows, as a view."""
        return QuantizedRows(self.rows[part], self.width, self.form)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.nbytes

    @property
    def integers(self) -> Tensor:
        """A view: int8 [N, blocks * 32], or uint8 [N, blocks * 16] for int4."""
        integers = self.rows[:, : self.form.integers_nbytes(self.width)]
        return integers.view(torch.int8) if self.form.kind == "int8" else integers

    @property
    def scales(self) -> Tensor:
        """A view, float16 [N, groups]."""
        return self.rows[:, self.form.integers_nbytes(self.width) : self.form.outlier_offset(self.width)].view(torch.float16)

    @property
    def outlier_places(self) -> Tensor:
        """A view, int16 [N, 1], of unsigned numbers."""
        return self._outliers[:, :1]

    @property
    def outlier_rests(self) -> Tensor:
        """A view, float16 [N, 1]: what is added to the weight at that place."""
        return self._outliers[:, 1:].view(torch.float16)

    @property
    def _outliers(self) -> Tensor:
        start = self.form.outlier_offset(self.width)
        return self.rows[:, start : start + OUTLIER_NBYTES].view(torch.int16)

    @property
    def zeros(self) -> Tensor:
        """A view, uint8 [N, groups], in sixteenths; int4 has them."""
        assert self.form.kind == "int4", self.form
        start = self.form.zeros_offset(self.width)
        return self.rows[:, start : start + self.form.num_groups(self.width)]

    def dequantised(self) -> Tensor:
        """The weights that they stand for, float32 [N, D]."""
        places, rests = self.outlier_places.long() % MAX_WIDTH, self.outlier_rests.float()
        is_nowhere = places >= self.width  # bytes from a file may say anything
        places, rests = places.masked_fill(is_nowhere, 0), rests.masked_fill(is_nowhere, 0.0)
        return self.without_outliers().scatter_add_(1, places, rests)

    def without_outliers(self) -> Tensor:
        """What integers, scales and zeros say, float32 [N, D], exactly."""
        scales = self._spread(self.scales.float())
        if self.form.kind == "int8":
            return self.integers[:, : self.width] * scales
        blocks = self.integers.unflatten(1, (-1, BLOCK // 2))  # [N, blocks * 16] -> [N, blocks, 16]
        numbers = torch.cat((blocks & 15, blocks >> 4), dim=2).flatten(1)[:, : self.width].float()  # -> [N, blocks, 32] -> [N, D]
        return numbers.sub_(self._spread(self.zeros.float() / ZERO_STEPS)).mul_(scales)

    def without_outliers_at(self, places: Tensor) -> Tensor:
        """The same at one place of each row, int64 [N, 1] -> float32 [N, 1]."""
        groups = places // self.form.group
        scales = self.scales.gather(1, groups).float()
        if self.form.kind == "int8":
            return self.integers.gather(1, places) * scales
        blocks, index = places // BLOCK, places % BLOCK
        pairs = self.integers.gather(1, blocks * (BLOCK // 2) + index % (BLOCK // 2))
        numbers = torch.where(index < BLOCK // 2, pairs & 15, pairs >> 4).float()
        return numbers.sub_(self.zeros.gather(1, groups).float() / ZERO_STEPS).mul_(scales)

    def _spread(self, each: Tensor) -> Tensor:
        """One number a group, [N, groups] -> one a weight, [N, D]."""
        return each.repeat_interleave(self.form.group, dim=1)[:, : self.width]
