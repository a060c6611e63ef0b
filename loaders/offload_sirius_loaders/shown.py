"""What messages show of things that are not this program's own: short, on one line, without characters that move a cursor."""

from __future__ import annotations

from reprlib import Repr

LONGEST_REASON = 300
"""Characters of what a library says, which may quote whole files."""

_REPR = Repr()
_REPR.maxlevel = 2


def short(value: object) -> str:
    """A value as Python writes it, shortened where it is long or deep."""
    return _REPR.repr(value)


def reason(error: object) -> str:
    """What a library says, as a part of a line."""
    line = " ".join(str(error).split())
    shown = line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON // 2]} ... {line[-LONGEST_REASON // 2 :]}"
    return "".join(each if each.isprintable() else "?" for each in shown)
