"""Telling someone about work that takes long. Knows no terminal."""

from __future__ import annotations

import warnings
from typing import Protocol


class Progress(Protocol):
    """Told about work that takes long."""

    def begin(self, what: str, total_nbytes: int) -> None:
        """Something of total_nbytes begins."""

    def advance(self, nbytes: int) -> None:
        """More of it is done; may be called by any thread."""

    def end(self) -> None:
        """It is done, or given up."""

    def warn(self, line: str) -> None:
        """It works, and worse than it could: what that costs and what to do."""


class NoProgress:
    """For those who do not want to know."""

    def begin(self, what: str, total_nbytes: int) -> None:
        """See Progress."""

    def advance(self, nbytes: int) -> None:
        """See Progress."""

    def end(self) -> None:
        """See Progress."""

    def warn(self, line: str) -> None:
        """See Progress. Python's own way to say so."""
        warnings.warn(line, stacklevel=2)
