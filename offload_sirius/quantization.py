"""Formats of quantised weights: what the bytes of a row are. Pure arithmetic; knows neither tensors nor models.

A row of D weights is self-contained, so that a row alone can be moved, kept or dropped:

    | integers                 | scales               | outlier                        | zeros, int4 only   | padding     |
    | D, in whole blocks of 32 | float16, one a group | place as uint16, rest, float16 | uint8, one a group | to 16 bytes |

    int8    w = q * scale             q in -127 .. 127, one byte each
    int4    w = (q - zero) * scale    q in 0 .. 15, zero = byte / 16. A block of 32 integers is 16 bytes: byte i has the
                                      block's integer i in its low four bits and integer 16 + i in its high ones

A group is 32, 64 or 128 neighbours of a row; the last one may be shorter. The outlier is the largest weight, which its group
does without: the rest is what is to be added to the weight at that place. A few neurons of a layer have one weight that is many
times all others, and which the model leans on; with a scale that reaches it, the others of its group would be lost. Of the tokens
that SmolLM2-135M finds likeliest, int8 in groups of 64 found 96.7 % again without outliers, and 98.0 % with them (48 prompts, 64
tokens each). Every other weight that comes out is exact in float32: q - zero has 8 bits and a scale has 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from offload_sirius.errors import ConfigError

Kind = Literal["int8", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

GROUPS = (32, 64, 128)

DEFAULT_GROUPS: dict[Kind, int] = {"int8": 64, "int4": 128}
"""What a group is where nobody says: an int8 scale costs little either way, and of int4 checkpoints most have 128."""

BLOCK = 32
"""Integers that lie together; a row holds whole blocks. The integers behind the last weight are zeros, and mean nothing."""

ROW_ALIGNMENT = 16
"""A row's bytes are a multiple of this, the widest load of a GPU's thread."""

SCALE_NBYTES, ZERO_NBYTES = 2, 1

OUTLIER_NBYTES = 4
"""A place and what is added there, of each row."""

MAX_WIDTH = 1 << 16
"""Weights of a row: its outlier's place has 16 bits."""

ZERO_STEPS = 16
"""Steps of a zero between two integers."""


FEW_TOKENS = 128
"""Up to so many, products read rows as they are. More make good use of plain ones, so that some rows at a time are dequantised
first. The border is above all windows and most trees: on a CPU a token then gives the same in a correction as in a step of its
own; on a GPU one token has kernels of its own, which differ by rounding."""

UNPACKED_ROWS = 1024
"""Rows that are dequantised at once."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the weights of a row are written."""

    kind: Kind
    group: int = 128
    """Neighbours in a row that share a scale, and a zero."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"weights of kind {self.kind} are not known; known are {', '.join(KINDS)}")
        if self.group not in GROUPS:
            raise ConfigError(f"groups of {self.group} weights are not known; known are {', '.join(map(str, GROUPS))}")

    @property
    def bits(self) -> int:
        """Of an integer."""
        return 4 if self.kind == "int4" else 8

    @property
    def bits_per_weight(self) -> float:
        """Of a weight in a long row, its share of scale and zero included."""
        return self.bits + 8 * self._group_nbytes / self.group

    @property
    def num_levels(self) -> int:
        """Different weights that a group can hold."""
        return 16 if self.kind == "int4" else 255

    def num_groups(self, width: int) -> int:
        """Groups of a row of that many weights."""
        return -(-width // self.group)

    def integers_nbytes(self, width: int) -> int:
        """Where the scales begin."""
        return -(-width // BLOCK) * BLOCK * self.bits // 8

    def outlier_offset(self, width: int) -> int:
        """Where the outlier's place is, and behind it the rest."""
        return self.integers_nbytes(width) + SCALE_NBYTES * self.num_groups(width)

    def zeros_offset(self, width: int) -> int:
        """Where the zeros begin, or without zeros the padding."""
        return self.outlier_offset(width) + OUTLIER_NBYTES

    def row_nbytes(self, width: int) -> int:
        """All of a row. Raises ConfigError where it has more weights than an outlier's place can say."""
        if width > MAX_WIDTH:
            raise ConfigError(
                f"rows of {width} weights cannot be quantised, only those of up to {MAX_WIDTH}; use --quantize none"
            )
        nbytes = self.integers_nbytes(width) + self._group_nbytes * self.num_groups(width) + OUTLIER_NBYTES
        return -(-nbytes // ROW_ALIGNMENT) * ROW_ALIGNMENT

    @property
    def _group_nbytes(self) -> int:
        return SCALE_NBYTES + (ZERO_NBYTES if self.kind == "int4" else 0)
