"""What followed the last tokens of a text when they stood there before. Pure ids: knows no model and no trees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LENGTHS = range(4, 1, -1)
"""Of the n-grams that are looked up: longer ones first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """A place where the same tokens stood."""

    length: int
    """Of the n-gram."""
    place: int
    """Index of the token that followed it."""


class Ngrams:
    """An index of the n-grams of a text that grows."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        """The text."""
        self._places: dict[tuple[int, ...], int] = {}
        """Of each n-gram that something follows: where its last occurrence is followed."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append to the text."""
        for token_id in token_ids:
            for length in LENGTHS:
                if length <= len(self):
                    self._places[tuple(self.token_ids[-length:])] = len(self)
            self.token_ids.append(token_id)

    def find(self, last_ids: Sequence[int]) -> Match | None:
        """The longest n-gram that these tokens end with and that stands in the text with something behind it.

        Of several occurrences the last one counts.
        """
        for length in LENGTHS:
            if length <= len(last_ids):
                place = self._places.get(tuple(last_ids[-length:]))
                if place is not None:
                    return Match(length=length, place=place)
        return None
