"""AWQ and GPTQ: matrices of small integers stored by input, [in, out], with scales and zero points for groups of inputs.

w[out, in] = (q[in, out] - z[group of in, out]) * s[group of in, out]. Orders and offsets are those of AutoAWQ 0.2.5
and AutoGPTQ 0.7.1, compared with their own unpacking; AWQ without zero points, GPTQ with desc_act and its version 2 (gptq_v2)
were compared with loops in the tests only. No published checkpoint was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.checkpoint import Companion, TensorInfo
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.linear import SCALE_DTYPES, Linear
from offload_sirius_loaders.packing import WORD_BITS, Bytes, Floats, floats, unpack

GROUP_NBYTES = 8 * 2**20
"""Decoded bytes up to which the rows of a group are kept together, so that its scales are read once."""
ANY_ORDER_NBYTES = 32 * 2**20
"""The same for groups in any order, where each piece reads the scales of all groups: 4 % of the matrix for groups of 128."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Integer i of a word, from its lowest bits, is column AWQ_ORDER[i] of eight."""


@dataclass(frozen=True, kw_only=True)
class ByInput:
    """How a checkpoint's matrices are stored, from its quantization_config."""

    method: Literal["AWQ", "GPTQ"]
    bits: int
    group_size: int | None
    """None: one group of all inputs."""
    any_order: bool = False
    """desc_act: the group of an input is what g_idx says. Else groups follow each other."""
    zero_offset: int = 0
    """What is added to stored zero points: GPTQ files keep them less one."""
    zeros_needed: bool = True
    """Whether qzeros must be there; without them zero is the middle, 2^(bits-1)."""

    @property
    def _per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def _why(self) -> str:
        group = "all inputs" if self.group_size is None else self.group_size
        return f"{self.method}, bits {self.bits} and group_size {group}"

    def is_stored_so(self, linear: Linear) -> bool:
        """Whether the layer is quantised; else its weight is a plain tensor."""
        return linear.has("qweight")

    def open(self, linear: Linear) -> tuple[TensorInfo, InputMatrix]:
        """Check the headers of a layer. Raises CheckpointError."""
        num_in, num_out, per_word = linear.num_in, linear.num_out, self._per_word
        self._check_words(linear)
        linear.refuse_others(("qweight", "qzeros", "scales", "g_idx"))
        shape = (num_in // per_word, num_out) if self.method == "GPTQ" else (num_in, num_out // per_word)
        weight = linear.need("qweight", ("I32",), shape, why=self._why)
        matrix = self._matrix(linear)
        info = TensorInfo(
            name=f"{linear.name}.qweight",
            dtype=f"{self.method}{self.bits}",
            element="F32",
            shape=(num_out, num_in),
            file=weight.file,
            offset=weight.offset,
            nbytes=weight.nbytes,
            row_multiple=self._row_multiple(num_in, num_out),
            companions=self._companions(linear, matrix),
            transposed=True,
        )
        return info, matrix

    def _check_words(self, linear: Linear) -> None:
        """Whole words are filled, with outputs (zero points of GPTQ, too) or with inputs."""
        packed = [("outputs", linear.num_out)]
        if self.method == "GPTQ":
            packed.append(("inputs", linear.num_in))
        for side, count in packed:
            if count % self._per_word:
                raise linear.error("qweight", f"packs {self._per_word} {side} in a word with {self._why}, the layer has {count}")

    def _row_multiple(self, num_in: int, num_out: int) -> int:
        """Inputs of one word, and as many of those together as save reading scales twice."""
        unit = self._per_word if self.method == "GPTQ" else 1
        wished = num_in if self.any_order else lcm(unit, self.group_size or 1)
        most = (ANY_ORDER_NBYTES if self.any_order else GROUP_NBYTES) // (num_out * 4)
        return max(min(wished, most) // unit, 1) * unit

    def _matrix(self, linear: Linear) -> InputMatrix:
        group_size = self.group_size or linear.num_in
        num_groups = -(-linear.num_in // group_size)
        scales = linear.need("scales", SCALE_DTYPES, (num_groups, linear.num_out), why=self._why)
        return InputMatrix(
            name=linear.name,
            scheme=self,
            num_out=linear.num_out,
            group_size=group_size,
            num_groups=num_groups,
            scale_dtype=scales.dtype,
        )

    def _companions(self, linear: Linear, matrix: InputMatrix) -> tuple[Companion, ...]:
        num_groups = matrix.num_groups
        found = {"scales": linear.tensors["scales"]}
        if self.zeros_needed or linear.has("qzeros"):
            shape = (num_groups, linear.num_out // self._per_word)
            found["qzeros"] = linear.need("qzeros", ("I32",), shape, why=self._why)
        companions = [
            # In any order, a row may need every group: all of them are one row then.
            linear.whole(word, tensor, linear.num_in) if self.any_order else linear.companion(word, tensor, matrix.group_size)
            for word, tensor in found.items()
        ]
        if self.any_order or linear.has("g_idx"):
            companions.append(linear.companion("g_idx", linear.need("g_idx", ("I32",), (linear.num_in,), why=self._why), 1))
        return tuple(companions)


@dataclass(frozen=True, kw_only=True)
class InputMatrix:
    """One matrix that is stored by input."""

    name: str
    scheme: ByInput
    num_out: int
    group_size: int
    num_groups: int
    scale_dtype: str

    def decode(self, parts: Mapping[str, Bytes], first_row: int, num_rows: int) -> Floats:
        """Inputs [first_row, first_row + num_rows) -> [num_rows, out]. parts: stored bytes by the last word of their name."""
        codes = self._codes(parts["qweight"], num_rows)
        scales = parts["scales"].reshape(-1, self.num_out * (4 if self.scale_dtype == "F32" else 2))
        zeros = self._zeros(parts.get("qzeros"), len(scales))
        groups = self._groups(parts.get("g_idx"), first_row, num_rows)
        numbers = np.empty(codes.shape, np.float32)
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), num_rows]):
            group = groups[start]
            np.subtract(codes[start:end], zeros[group], out=numbers[start:end], dtype=np.float32)
            numbers[start:end] *= floats(scales[group], self.scale_dtype)
        return numbers

    def _codes(self, raw: Bytes, num_rows: int) -> Bytes:
        """uint8 [num_rows, out], unsigned"""
        per_word = WORD_BITS // self.scheme.bits
        if self.scheme.method == "AWQ":
            return self._unpacked_rows(raw, num_rows)
        codes = np.empty((num_rows // per_word, per_word, self.num_out), np.uint8)
        unpack(raw.reshape(-1, self.num_out, 4), codes.swapaxes(1, 2), range(per_word))
        return codes.reshape(num_rows, self.num_out)

    def _unpacked_rows(self, raw: Bytes, num_rows: int) -> Bytes:
        """Words that each hold neighbouring outputs -> uint8 [num_rows, out]"""
        per_word = WORD_BITS // self.scheme.bits
        order = AWQ_ORDER if self.scheme.method == "AWQ" else range(per_word)
        codes = np.empty((num_rows, self.num_out // per_word, per_word), np.uint8)
        unpack(raw.reshape(num_rows, -1, 4), codes, order)
        return codes.reshape(num_rows, self.num_out)

    def _zeros(self, raw: Bytes | None, num_groups: int) -> Bytes:
        """uint8 [groups that were read, out]. A zero point that is stored less one wraps, as AutoGPTQ's does: 15 is 0."""
        bits = self.scheme.bits
        if raw is None:
            return np.full((num_groups, 1), 1 << (bits - 1), np.uint8)
        zeros = self._unpacked_rows(raw, num_groups)
        if self.scheme.zero_offset:
            zeros += np.uint8(self.scheme.zero_offset)
            zeros &= np.uint8((1 << bits) - 1)
        return zeros

    def _groups(self, raw: Bytes | None, first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """Group of each input, counted from the first group that was read: [num_rows]"""
        natural: npt.NDArray[Any] = np.arange(first_row, first_row + num_rows) // self.group_size
        if raw is None:
            return natural - first_row // self.group_size
        groups: npt.NDArray[Any] = raw.view("<i4")
        if self.scheme.any_order:
            least, most = int(groups.min()), int(groups.max())
            if least < 0 or most >= self.num_groups:
                raise CheckpointError(
                    f"{self.name}.g_idx: holds {least if least < 0 else most}, numbers of groups from 0 to {self.num_groups - 1} "
                    "are needed; download the checkpoint again"
                )
            return groups
        if not np.array_equal(groups, natural):
            raise CheckpointError(
                f"{self.name}.g_idx: groups do not follow each other, which desc_act = false in config.json says; "
                "set it to true, or download config.json and weights of the same model"
            )
        return natural - first_row // self.group_size
