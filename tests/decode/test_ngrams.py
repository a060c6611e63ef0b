"""The index of n-grams, against a search through the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.decode.ngrams import LENGTHS, Match, Ngrams

TEXTS = st.lists(st.integers(0, 3), max_size=30)


def index_of(*token_ids: int) -> Ngrams:
    ngrams = Ngrams()
    ngrams.extend(token_ids)
    return ngrams


def searched(text: list[int], last_ids: list[int]) -> Match | None:
    """The definition: longer first, then later first, something must follow."""
    for length in LENGTHS:
        for place in range(len(text) - 1, length - 1, -1):
            if length <= len(last_ids) and text[place - length : place] == last_ids[-length:]:
                return Match(length=length, place=place)
    return None


@pytest.mark.parametrize(
    ("last_ids", "match"),
    [
        # Three tokens before two, though two stood there later.
        ([1, 2, 3], Match(length=3, place=3)),
        ([9, 2, 3], Match(length=2, place=8)),
        # At the end of the text, where nothing follows yet, and nowhere.
        ([7, 6], None),
        ([3, 1], None),
        ([3], None),
        ([], None),
    ],
)
def test_the_longest_match_counts_and_of_several_the_last(last_ids: list[int], match: Match | None) -> None:
    assert index_of(1, 2, 3, 4, 5, 8, 2, 3, 7, 6).find(last_ids) == match


@given(text=TEXTS, last_ids=TEXTS)
def test_the_index_finds_what_a_search_finds(text: list[int], last_ids: list[int]) -> None:
    assert index_of(*text).find(last_ids) == searched(text, last_ids)


@given(text=TEXTS, split=st.integers(0, 30), last_ids=TEXTS)
def test_a_text_may_come_in_parts(text: list[int], split: int, last_ids: list[int]) -> None:
    ngrams = index_of(*text[:split])
    ngrams.extend(text[split:])
    assert ngrams.token_ids == text
    assert ngrams.find(last_ids) == index_of(*text).find(last_ids)
