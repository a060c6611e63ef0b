"""compressed-tensors and FP8: matrices stored by output, [out, in], in small integers or 8-bit floats, with a grid of scales.

w[out, in] = (q[out, in] - z[cell]) * s[cell], where a cell is the whole matrix, a row, a group of a row's columns, or a block.
Layouts are those of compressed-tensors 0.20 and of the FP8 linear layers of transformers, compared with their own unpacking, but
for groups in any order (weight_g_idx) and FP8 with a scale for each tensor or row. No published checkpoint was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.checkpoint import Companion, TensorInfo
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.linear import SCALE_DTYPES, Linear
from offload_sirius_loaders.packing import FLOAT8_E4M3, WORD_BITS, Bytes, Floats, floats, unpack
from offload_sirius_loaders.shard import StoredTensor

Cells = Literal["tensor", "channel", "group", "block"]
"""What one scale is for. channel: a row of [out, in]."""

WEIGHT_DTYPES = {"packed": "I32", "int": "I8", "float": "F8_E4M3"}
"""Form of the numbers -> storage type."""


@dataclass(frozen=True, kw_only=True)
class ByOutput:
    """How a checkpoint's matrices are stored, from its quantization_config."""

    form: Literal["packed", "int", "float"]
    """Integers packed into words, integers of 8 bits, floats of 8 bits."""
    bits: int
    cells: Cells
    cell: tuple[int, int] = (1, 1)
    """Rows and columns of a block, or (1, columns of a group); not looked at otherwise."""
    symmetric: bool = True
    """No zero points."""
    scale_word: str = "weight_scale"

    @property
    def _weight_word(self) -> str:
        return "weight_packed" if self.form == "packed" else "weight"

    @property
    def _why(self) -> str:
        size = {"group": f" of {self.cell[1]}", "block": f" of {self.cell[0]} x {self.cell[1]}"}.get(self.cells, "")
        kind = "floats" if self.form == "float" else "integers"
        return f"{kind} of {self.bits} bits and a scale for each {self.cells}{size}"

    def is_stored_so(self, linear: Linear) -> bool:
        """Whether the layer is quantised; else its weight is a plain tensor."""
        tensor = linear.tensors.get(self._weight_word)
        return tensor is not None and tensor.dtype == WEIGHT_DTYPES[self.form]

    def open(self, linear: Linear) -> tuple[TensorInfo, OutputMatrix]:
        """Check the headers of a layer. Raises CheckpointError."""
        words = (self._weight_word, self.scale_word, "weight_zero_point", "weight_g_idx", "weight_shape")
        linear.refuse_others(words)
        per_word = WORD_BITS // self.bits if self.form == "packed" else 1
        shape = (linear.num_out, -(-linear.num_in // per_word))
        weight = linear.need(self._weight_word, (WEIGHT_DTYPES[self.form],), shape, why=self._why)
        matrix = self._matrix(linear)
        info = TensorInfo(
            name=f"{linear.name}.{self._weight_word}",
            dtype={"packed": f"INT{self.bits}", "int": "INT8", "float": "F8_E4M3"}[self.form],
            element="F32",
            shape=(linear.num_out, linear.num_in),
            file=weight.file,
            offset=weight.offset,
            nbytes=weight.nbytes,
            row_multiple=matrix.cell_rows * matrix.zeros_per_word if matrix.zeros_per_word > 1 else 1,
            companions=self._companions(linear, matrix),
        )
        return info, matrix

    def _matrix(self, linear: Linear) -> OutputMatrix:
        cell_rows, cell_columns = self._cell(linear)
        grid = (-(-linear.num_out // cell_rows), -(-linear.num_in // cell_columns))
        scales = linear.need(self.scale_word, SCALE_DTYPES, *_shapes(grid), why=self._why)
        packed_zeros = not self.symmetric and self._zeros(linear, grid).dtype == "I32"
        return OutputMatrix(
            name=linear.name,
            scheme=self,
            num_in=linear.num_in,
            cell_rows=cell_rows,
            cell_columns=cell_columns,
            grid=grid,
            scale_dtype=scales.dtype,
            zeros_per_word=WORD_BITS // self.bits if packed_zeros else 1,
        )

    def _cell(self, linear: Linear) -> tuple[int, int]:
        match self.cells:
            case "tensor":
                return linear.num_out, linear.num_in
            case "channel":
                return 1, linear.num_in
            case _:
                return self.cell

    def _zeros(self, linear: Linear, grid: tuple[int, int]) -> StoredTensor:
        """Zero points: a byte each, or packed along the rows of the grid."""
        tensor = linear.need("weight_zero_point", ("I8", "I32"), *_shapes(grid), *self._packed_shapes(grid), why=self._why)
        shapes = self._packed_shapes(grid) if tensor.dtype == "I32" else _shapes(grid)
        return linear.need("weight_zero_point", (tensor.dtype,), *shapes, why=self._why)

    def _packed_shapes(self, grid: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(-(-grid[0] // (WORD_BITS // self.bits)), grid[1])]

    def _companions(self, linear: Linear, matrix: OutputMatrix) -> tuple[Companion, ...]:
        words = [self.scale_word] if self.symmetric else [self.scale_word, "weight_zero_point"]
        spans = {self.scale_word: matrix.cell_rows, "weight_zero_point": matrix.cell_rows * matrix.zeros_per_word}
        companions = [linear.companion(word, linear.tensors[word], spans[word]) for word in words]
        if self.cells == "group" and linear.has("weight_g_idx"):
            groups = linear.need("weight_g_idx", ("I32",), (linear.num_in,), why=self._why)
            companions.append(linear.whole("weight_g_idx", groups, linear.num_out))
        return tuple(companions)


@dataclass(frozen=True, kw_only=True)
class OutputMatrix:
    """One matrix that is stored by output."""

    name: str
    scheme: ByOutput
    num_in: int
    cell_rows: int
    cell_columns: int
    grid: tuple[int, int]
    """Rows and columns of scales."""
    scale_dtype: str
    zeros_per_word: int
    """Zero points packed into a word, 1 where they are bytes or absent."""

    def decode(self, parts: Mapping[str, Bytes], first_row: int, num_rows: int) -> Floats:
        """Rows [first_row, first_row + num_rows) -> [num_rows, in]. parts: stored bytes by the last word of their name."""
        numbers = self._codes(parts, num_rows)
        rows = np.arange(first_row, first_row + num_rows) // self.cell_rows - first_row // self.cell_rows
        columns = self._columns(parts.get("weight_g_idx"))
        if "weight_zero_point" in parts:
            numbers -= _spread(self._zeros(parts["weight_zero_point"]), rows, columns)
        scales = floats(parts[self.scheme.scale_word], self.scale_dtype).reshape(-1, self.grid[1])
        numbers *= _spread(scales, rows, columns)
        return numbers

    def _codes(self, parts: Mapping[str, Bytes], num_rows: int) -> Floats:
        """float32 [num_rows, in], what is stored as numbers: integers with their sign"""
        if self.scheme.form == "float":
            return FLOAT8_E4M3[parts["weight"].reshape(num_rows, self.num_in)]
        if self.scheme.form == "int":
            return parts["weight"].view(np.int8).reshape(num_rows, self.num_in).astype(np.float32)
        per_word = WORD_BITS // self.scheme.bits
        words = parts["weight_packed"].reshape(num_rows, -1, 4)
        codes = np.empty((num_rows, words.shape[1], per_word), np.uint8)
        unpack(words, codes, range(per_word))
        return np.subtract(codes.reshape(num_rows, -1)[:, : self.num_in], self._middle, dtype=np.float32)

    @property
    def _middle(self) -> np.uint8:
        """What packed integers have been increased by, so as not to be negative."""
        return np.uint8(1 << (self.scheme.bits - 1))

    def _zeros(self, raw: Bytes) -> npt.NDArray[Any]:
        """Zero points of the rows of the grid that were read: [rows, grid columns]"""
        if self.zeros_per_word == 1:
            return raw.view(np.int8).reshape(-1, self.grid[1])
        words = raw.reshape(-1, self.grid[1], 4)
        codes = np.empty((len(words), self.zeros_per_word, self.grid[1]), np.uint8)
        unpack(words, codes.swapaxes(1, 2), range(self.zeros_per_word))
        return codes.reshape(-1, self.grid[1]).astype(np.int16) - np.int16(self._middle)

    def _columns(self, raw: Bytes | None) -> npt.NDArray[Any]:
        """Column of the grid for each input: [in]"""
        natural = np.arange(self.num_in) // self.cell_columns
        if raw is None:
            return natural
        groups: npt.NDArray[Any] = raw.view("<i4")
        if (groups == -1).all():  # how compressed-tensors says that there is no order of its own
            return natural
        least, most = int(groups.min()), int(groups.max())
        if least < 0 or most >= self.grid[1]:
            raise CheckpointError(
                f"{self.name}.weight_g_idx: holds {least if least < 0 else most}, numbers of groups from 0 to {self.grid[1] - 1} "
                "are needed; download the checkpoint again"
            )
        return groups


def _spread(grid: npt.NDArray[Any], rows: npt.NDArray[Any], columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The value of each number's cell: [rows, columns], or one column where all of a row have the same."""
    spread: npt.NDArray[Any] = grid[rows] if grid.shape[1] == 1 else grid[rows[:, None], columns]
    return spread


def _shapes(grid: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes in which a grid is written: with one column also without that dimension, with one cell also with none."""
    shapes: list[tuple[int, ...]] = [grid]
    if grid[1] == 1:
        shapes.append(grid[:1])
    if grid == (1, 1):
        shapes.append(())
    return shapes
