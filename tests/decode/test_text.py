"""Text from token ids as they arrive, and stop strings across their borders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from offload_sirius.decode.text import Detokenizer, StopMatcher
from offload_sirius.model.tokenizer import Tokenizer, load_tokenizer
from offload_sirius_loaders.checkpoint import TokenizerFiles
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

BROKEN = "\N{REPLACEMENT CHARACTER}"
SPEC = ModelSpec(
    name="small",
    architecture="llama",
    num_layers=1,
    width=4,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    ffn_width=4,
    vocab_size=300,
    max_positions=64,
    norm_eps=1e-5,
    rope=RopeSpec(),
    layer_windows=(None,),
)


def byte_ids() -> Tokenizer:
    return load_tokenizer(TokenizerFiles(num_bytes_ids=300), SPEC)


def byte_level() -> Tokenizer:
    """Every byte, some words, pieces that begin or end inside a character, and two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġhello", "world", "ĠĠ", "ä½", "łå", "¥½a"]  # the last three: 你好a, cut inside both characters
    tokens = ["<|end|>", "<|pad|>", *letters, *words]
    types = [3, 3, *[1] * (len(letters) + len(words))]
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [], "token_type": types}
    return load_tokenizer(TokenizerFiles(gguf_metadata={f"tokenizer.ggml.{k}": v for k, v in metadata.items()}), SPEC)


SENTENCEPIECE_WORDS = ["▁", "▁▁", "▁hello", "hello", "▁w", "or", "ld", "。", "a"]


def sentencepiece() -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *SENTENCEPIECE_WORDS]
    types = [2, 3, 3, *[6] * 256, *[1] * len(SENTENCEPIECE_WORDS)]
    scores = [0.0] * len(tokens)
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "unknown_token_id": 0}
    return load_tokenizer(TokenizerFiles(gguf_metadata={f"tokenizer.ggml.{k}": v for k, v in metadata.items()}), SPEC)


BYTE_IDS, BYTE_LEVEL, SENTENCEPIECE = byte_ids(), byte_level(), sentencepiece()
SENTENCEPIECE_UNITS = [
    *([token_id] for token_id in (1, 2, *range(259, 259 + len(SENTENCEPIECE_WORDS)))),
    *([3 + byte for byte in character.encode()] for character in "é中🦜"),
]
"""Ids that belong together: a word, or all bytes of one character."""


def pieces_of(tokenizer: Tokenizer, token_ids: Iterable[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@given(st.lists(st.integers(0, 299), max_size=150))
def test_the_pieces_of_any_bytes_are_the_whole_text(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_IDS, token_ids)) == BYTE_IDS.decode(token_ids)


@given(st.lists(st.integers(0, 263), max_size=150))
def test_the_pieces_of_any_byte_level_tokens_are_the_whole_text(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@given(st.lists(st.sampled_from([0xE2, 0x82, 0xF0, 0x9F, 0xFF]), min_size=65, max_size=400))
def test_long_runs_of_broken_bytes_come_out_whole_and_before_the_end(token_ids: list[int]) -> None:
    pieces = pieces_of(BYTE_IDS, token_ids)
    assert "".join(pieces) == BYTE_IDS.decode(token_ids)
    assert len(pieces[-1]) <= 66


@given(st.lists(st.sampled_from(SENTENCEPIECE_UNITS), max_size=80))
def test_the_pieces_of_sentencepiece_tokens_are_the_whole_text(units: list[list[int]]) -> None:
    token_ids = [token_id for unit in units for token_id in unit]
    assert "".join(pieces_of(SENTENCEPIECE, token_ids)) == SENTENCEPIECE.decode(token_ids)


@given(st.text(max_size=40).filter(lambda text: BROKEN not in text))
def test_half_a_character_never_comes_out(text: str) -> None:
    pieces = pieces_of(BYTE_IDS, BYTE_IDS.encode(text))
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)


def test_a_character_comes_out_with_its_last_byte() -> None:
    assert pieces_of(BYTE_IDS, "a🦜b".encode()) == ["a", "", "", "", "🦜", "b", ""]


def test_whole_characters_do_not_wait_for_the_half_one_behind_them() -> None:
    ids = [BYTE_LEVEL.encode(text)[0] for text in ("a", "b")]
    ids += [2 + 256 + 3, 2 + 256 + 4, 2 + 256 + 5]
    assert pieces_of(BYTE_LEVEL, ids) == ["a", "b", "", "你", "好a", ""]


def test_a_character_that_is_never_completed_comes_out_broken_at_the_end() -> None:
    assert pieces_of(BYTE_IDS, [0x61, 0xE2, 0x82]) == ["a", "", "", BROKEN]


def test_a_leading_space_is_shown_only_inside_the_text() -> None:
    word = SENTENCEPIECE.encode("hello")[-1:]
    space, hello = 259, 261
    assert word != [hello]
    assert pieces_of(SENTENCEPIECE, [hello, hello]) == ["hello", " hello", ""]
    assert pieces_of(SENTENCEPIECE, [1, space, hello]) == ["", "", " hello", ""]


def test_special_tokens_give_no_text_and_do_not_slow_what_follows() -> None:
    tokenizer = CountingDecoder(SENTENCEPIECE)
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token_id) for token_id in [261, *[2] * 500, 261]] == ["hello", *[""] * 500, " hello"]
    assert tokenizer.num_decoded < 10


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    tokenizer = CountingDecoder(BYTE_IDS)
    detokenizer = Detokenizer(tokenizer)
    for token_id in b"abc " * 500:
        detokenizer.push(token_id)
    assert tokenizer.num_decoded <= 2000 * 3


class CountingDecoder:
    """A tokenizer that counts the ids it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(token_ids)

    def is_hidden(self, token_id: int) -> bool:
        return self._tokenizer.is_hidden(token_id)


def before_the_first(text: str, stops: Sequence[str]) -> str:
    """The definition: search the whole text."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def emitted(stops: tuple[str, ...], pieces: Iterable[str]) -> str:
    matcher, text = StopMatcher(stops), ""
    for piece in pieces:
        emit_now, stopped = matcher.push(piece)
        text += emit_now
        if stopped:
            return text
    return text + matcher.flush()


few_letters = st.text(alphabet="ab\n", max_size=30)
stop_strings = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4).map(tuple)


@settings(max_examples=400)
@given(few_letters, stop_strings, st.lists(st.integers(0, 30), max_size=30))
def test_any_cutting_of_a_text_gives_what_searching_the_whole_gives(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert emitted(stops, pieces) == before_the_first(text, stops)


@settings(max_examples=200)
@given(few_letters, stop_strings)
def test_at_no_time_is_anything_out_that_a_stop_string_takes_back(text: str, stops: tuple[str, ...]) -> None:
    matcher, out = StopMatcher(stops), ""
    for character in text:
        out += matcher.push(character)[0]
        assert before_the_first(text, stops).startswith(out)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(("\nUser:",))
    assert matcher.push("Hi.") == ("Hi.", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("ing it") == ("\nUsing it", False)
    assert matcher.push(" \n") == (" ", False)
    assert matcher.push("User: and more") == ("", True)


def test_after_a_stop_nothing_comes_any_more() -> None:
    matcher = StopMatcher(("b",))
    assert matcher.push("abc") == ("a", True)
    assert matcher.push("abc") == ("", True)
    assert matcher.flush() == ""
    assert matcher.stopped


@pytest.mark.parametrize("stops", [("abcd", "bc"), ("bc", "abcd")])
def test_the_stop_string_that_begins_first_wins_even_if_it_ends_later(stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    assert matcher.push("xabc") == ("x", False)
    assert matcher.push("d") == ("", True)


def test_a_complete_stop_string_that_waited_for_a_longer_one_counts_when_the_text_ends() -> None:
    matcher = StopMatcher(("abcd", "bc"))
    assert matcher.push("xabc") == ("x", False)
    assert matcher.flush() == "a"
    assert matcher.stopped


def test_of_two_that_begin_together_the_shorter_does_not_wait() -> None:
    assert StopMatcher(("ab", "abc")).push("xab") == ("x", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopMatcher(())
    assert matcher.push("anything") == ("anything", False)
    assert matcher.flush() == ""
    assert not matcher.stopped
