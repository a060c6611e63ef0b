"""Sizes as people write and read them: `24GiB`, `500MB`, `0.8` (a share). Knows nothing of what is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from offload_sirius.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": GIB << 10,
}
_SIZE = re.compile(r"(?P<number>\d{1,18}(\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z]*)")


@dataclass(frozen=True)
class Size:
    """An amount of memory: either bytes, or a share of what is free."""

    nbytes: int | None = None
    share: float | None = None

    def resolve(self, free_nbytes: int) -> int:
        """Bytes, where free_nbytes is what a share is taken of."""
        if self.nbytes is not None:
            return self.nbytes
        assert self.share is not None
        return int(free_nbytes * self.share)


def parse_size(text: str) -> Size:
    """Read `24GiB`, `500MB`, `1073741824`, or a share in (0, 1] such as `0.8`. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in _FACTORS:
        raise ConfigError(f"size {text!r} is not understood; write 24GiB, 500MB, or a share of what is free such as 0.8")
    number, unit = float(match["number"]), match["unit"].lower()
    if number == 0:
        raise ConfigError(f"size {text!r} is zero; write 24GiB, 500MB, or a share of what is free such as 0.8")
    if not unit and number <= 1:
        return Size(share=number)
    return Size(nbytes=int(number * _FACTORS[unit]))


def format_size(nbytes: int) -> str:
    """A size to three digits in binary units, `1.50 GiB`, rounded up so that it can be given back as a budget."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= factor:
            hundredths = -(-nbytes * 100 // factor)
            return f"{hundredths / 100:.2f} {unit}"
    return f"{nbytes} B"
