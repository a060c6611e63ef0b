"""Block formats of GGUF files, kept as they are stored: what the bytes of a row are. Pure arithmetic; knows neither tensors nor
models.

A row is blocks of 32 weights, or of 256, each with its scales before or behind its codes, as llama.cpp defines them
(ggml-common.h). A group of weights has a factor and, in some formats, a summand: w = (q - centre) * factor + summand.

    name   block  bits  group  factor                        summand            centre
    Q8_0   32     8     32     d                                                0, codes are signed
    Q4_0   32     4     32     d                                                8
    Q4_1   32     4     32     d                             m
    Q5_0   32     5     32     d                                                16
    Q5_1   32     5     32     d                             m
    Q4_K   256    4     32     d * scale, 6 bits a group     -dmin * minimum, 6 bits a group
    Q5_K   256    5     32     the same                      the same
    Q6_K   256    6     16     d * scale, 8 bits a group                        32

d, m and dmin are float16, one a block. Rows along the inputs, which all matrices but the down projection have, stay as they are.

The down projection is stored with its blocks along the neurons, so that no neuron has its bytes for itself. Its codes are
regrouped by neuron, without losing a bit, in units of 32 outputs,

    | low four bits of codes i and 16 + i in byte i    | the bits above them                                          |
    | 16 bytes                                         | 5 bits: bit i is of code i, 4 bytes; 6 bits: byte i has those |
    | 8 bits: code i in byte i, 32 bytes               | of codes i, 8 + i, 16 + i and 24 + i, lowest first, 8 bytes   |

and what blocks have beside their codes goes to a table, in which the row of a block of neurons has, for all D outputs one behind
the other, d, then m or dmin, then each byte of the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BlockName = Literal["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
BLOCK_NAMES: tuple[BlockName, ...] = get_args(BlockName)

UNIT = 32
"""Weights whose codes lie together, in any format; a block has whole units."""

HALF_NBYTES = 2


@dataclass(frozen=True, kw_only=True, order=True)
class BlockFormat:
    """How the blocks of a row are written."""

    name: BlockName
    block: int
    """Weights of a block."""
    bits: int
    """Of a code."""
    group: int = UNIT
    """Weights that share a factor."""
    centre: int = 0
    """The code of the weight zero."""
    has_minimum: bool = False
    """There is a summand."""
    scales_nbytes: int = 0
    """Of a block: what there is of scales beside d, and m or dmin."""

    @property
    def codes_nbytes(self) -> int:
        """Codes of a block."""
        return self.block * self.bits // 8

    @property
    def header_nbytes(self) -> int:
        """What a block has beside them."""
        return HALF_NBYTES * (2 if self.has_minimum else 1) + self.scales_nbytes

    @property
    def block_nbytes(self) -> int:
        """All of a block."""
        return self.codes_nbytes + self.header_nbytes

    @property
    def bits_per_weight(self) -> float:
        """Of a weight, its share of the header included."""
        return 8 * self.block_nbytes / self.block

    def row_nbytes(self, width: int) -> int:
        """A row of that many weights, whole blocks."""
        assert width % self.block == 0, (width, self)
        return width // self.block * self.block_nbytes

    @property
    def unit_nbytes(self) -> int:
        """Codes of 32 weights."""
        return UNIT * self.bits // 8

    def column_nbytes(self, width: int) -> int:
        """A neuron's codes of the down projection, for that many outputs, whole units."""
        assert width % UNIT == 0, (width, self)
        return width // UNIT * self.unit_nbytes

    def table_shape(self, num_neurons: int, width: int) -> tuple[int, int]:
        """Rows and bytes of the table of a down projection."""
        assert num_neurons % self.block == 0, (num_neurons, self)
        return num_neurons // self.block, self.header_nbytes * width


BLOCK_FORMATS: dict[str, BlockFormat] = {
    form.name: form
    for form in (
        BlockFormat(name="Q8_0", block=32, bits=8),
        BlockFormat(name="Q4_0", block=32, bits=4, centre=8),
        BlockFormat(name="Q4_1", block=32, bits=4, has_minimum=True),
        BlockFormat(name="Q5_0", block=32, bits=5, centre=16),
        BlockFormat(name="Q5_1", block=32, bits=5, has_minimum=True),
        BlockFormat(name="Q4_K", block=256, bits=4, has_minimum=True, scales_nbytes=12),
        BlockFormat(name="Q5_K", block=256, bits=5, has_minimum=True, scales_nbytes=12),
        BlockFormat(name="Q6_K", block=256, bits=6, group=16, centre=32, scales_nbytes=16),
    )
}
"""By name."""
