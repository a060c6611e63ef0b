"""Numbers as quantised files keep them: small integers packed into words, 8-bit floats, scales. Knows no formats, no files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_BITS = 32

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def unpack(words: Bytes, places: npt.NDArray[np.uint8], order: Sequence[int]) -> None:
    """Unsigned integers of 4 or 8 bits out of little-endian 32-bit words.

    words: uint8 [..., 4], the bytes of each word. places: uint8 [..., n], what is written to; n = 8 for 4 bits, 4 for 8.
    order: integer i of a word, counted from its lowest bits, goes to place order[i].
    """
    bits = WORD_BITS // places.shape[-1]
    mask = (1 << bits) - 1
    for index, place in enumerate(order):
        byte, shift = divmod(index * bits, 8)
        places[..., place] = (words[..., byte] >> shift) & mask


def _float8_e4m3() -> Floats:
    """Value of each byte: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, all ones is no number.

    Source of the format: "FP8 Formats for Deep Learning", arXiv 2209.05433.
    """
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)).astype(np.float32)
    values[127] = np.nan
    return np.concatenate([values, -values])


FLOAT8_E4M3 = _float8_e4m3()
"""float32 [256]"""


def floats(raw: Bytes, dtype: str) -> Floats:
    """Stored floats as float32, in one dimension. dtype: F32, F16, BF16."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
