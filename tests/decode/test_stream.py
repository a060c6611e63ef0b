"""An answer while it is written, from scripted tokens: how it ends, what its pieces say, and what breaking off leaves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius.config import DecodingConfig, SamplingConfig
from offload_sirius.decode.emitted import Emitted
from offload_sirius.decode.loop import alone, decode_full, decode_sirius
from offload_sirius.decode.result import Generation, LinkFigures, MemoryFigures, Passes
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.stream import Outcome, TextPiece, TextStream, Writer
from offload_sirius.decode.text import Detokenizer, StopMatcher

from .toys import VOCAB, ToyModel, jumble, mostly

END = 0
NO_MEMORY = MemoryFigures(
    device_plan_bytes=0, device_peak_bytes=0, host_plan_bytes=0, host_peak_bytes=0, pinned_bytes=0, pageable_bytes=0
)


class ByteDecoder:
    """An id is a byte."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def is_hidden(self, token_id: int) -> bool:
        return False


class Script:
    """Tokens one after the other, which knows how many were taken, and when it was closed."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self.num_taken = 0
        self.closed = False
        self._token_ids = token_ids

    def tokens(self) -> Generator[Emitted, None, None]:
        try:
            for token_id in self._token_ids:
                self.num_taken += 1
                yield Emitted(token_id=token_id)
        finally:
            self.closed = True


def finish(outcome: Outcome) -> Generation:
    assert outcome.finish_reason is not None
    first, last = outcome.first_token_at or outcome.began, outcome.last_token_at or outcome.began
    return Generation(
        model="script",
        mode="full",
        text=outcome.text,
        token_ids=tuple(outcome.token_ids),
        finish_reason=outcome.finish_reason,
        prompt_tokens=1,
        ttft_seconds=first - outcome.began,
        decode_seconds=last - first,
        load_seconds=0.0,
        passes=Passes(),
        link=LinkFigures(),
        memory=NO_MEMORY,
        plan={},
        settings={},
    )


def stream_of(
    script: Script | bytes,
    *stops: str,
    max_new_tokens: int = 100,
    ends: Iterable[int] = (END,),
    finish: Callable[[Outcome], Generation] = finish,
) -> TextStream:
    script = Script(script) if isinstance(script, bytes) else script
    return TextStream(
        tokens=script.tokens(),
        writer=Writer(
            detokenizer=Detokenizer(ByteDecoder()),
            stops=StopMatcher(stops),
            end_token_ids=frozenset(ends),
            max_new_tokens=max_new_tokens,
        ),
        finish=finish,
    )


def written(script: bytes, *stops: str, max_new_tokens: int = 100) -> tuple[list[str], str, str, int]:
    """Text of the pieces, whole text, how it ended, number of tokens."""
    stream = stream_of(script, *stops, max_new_tokens=max_new_tokens)
    pieces = [piece.text for piece in stream]
    result = stream.result
    return pieces, result.text, result.finish_reason, result.new_tokens


@pytest.mark.parametrize(
    ("script", "stops", "length", "pieces", "reason", "num_tokens"),
    [
        # The end token counts, and has no text.
        (b"ab\0cd", (), 9, ["a", "b", ""], "stop", 3),
        (b"\0", (), 9, [""], "stop", 1),
        # As many tokens as are wanted, and no more.
        (b"abcd", (), 2, ["a", "b", ""], "length", 2),
        (b"abcd", (), 1, ["a", ""], "length", 1),
        # A stop string in one token, and across several: its beginning is held back until it is none.
        (b"abcd", ("c",), 9, ["a", "b", ""], "stop", 3),
        (b"abcd", ("bc",), 9, ["a", "", ""], "stop", 3),
        (b"abxd\0", ("bc",), 9, ["a", "", "bx", "d", ""], "stop", 5),
        # What was held back comes out where the text ends before it is a stop string.
        (b"ab\0", ("bc",), 9, ["a", "", "b"], "stop", 3),
        (b"abcd", ("bc",), 2, ["a", "", "b"], "length", 2),
        # The last token that is wanted completes a stop string.
        (b"abcd", ("bc",), 3, ["a", "", ""], "stop", 3),
        # Half a character is held back, and shown as broken where the text ends with it.
        ("é!".encode() + b"\0", (), 9, ["", "é", "!", ""], "stop", 4),
        (b"a\xc3\0", (), 9, ["a", "", "\N{REPLACEMENT CHARACTER}"], "stop", 3),
    ],
)
def test_an_answer_ends(
    script: bytes, stops: tuple[str, ...], length: int, pieces: list[str], reason: str, num_tokens: int
) -> None:
    assert written(script, *stops, max_new_tokens=length) == (pieces, "".join(pieces), reason, num_tokens)


def test_a_stop_string_that_had_to_wait_for_another_ends_the_text_where_no_more_comes() -> None:
    # "b" is complete, but "abc" began before it and may still come.
    assert written(b"xab\0", "abc", "b") == (["x", "", "", "a"], "xa", "stop", 4)


def test_without_end_tokens_the_answer_goes_on_past_them() -> None:
    stream = stream_of(b"a\0b", max_new_tokens=3, ends=())
    assert "".join(piece.text for piece in stream) == "a\0b"
    assert stream.result.finish_reason == "length"


def test_every_end_token_ends() -> None:
    for end in (3, 4):
        stream = stream_of(bytes([65, end, 66]), ends=(3, 4))
        assert [piece.token_id for piece in stream] == [65, end]


def test_pieces_say_which_token_made_them_and_when() -> None:
    pieces = list(stream_of(b"abc", max_new_tokens=3))
    assert [piece.token_id for piece in pieces] == [97, 98, 99, None]
    assert [piece.new_tokens for piece in pieces] == [1, 2, 3, 3]
    assert sorted(piece.seconds for piece in pieces) == [piece.seconds for piece in pieces]


@given(
    script=st.binary(max_size=30),
    stops=st.lists(st.text("ab\0é", min_size=1, max_size=3), max_size=3),
    length=st.integers(1, 30),
)
def test_the_pieces_together_are_the_text_and_no_token_is_taken_that_is_not_told(
    script: bytes, stops: list[str], length: int
) -> None:
    tokens = Script(script + b"\0")
    stream = stream_of(tokens, *stops, max_new_tokens=length)
    pieces: list[TextPiece] = list(stream)
    result = stream.result
    assert "".join(piece.text for piece in pieces) == result.text
    assert result.new_tokens == tokens.num_taken <= length
    assert bytes(result.token_ids) == (script + b"\0")[: result.new_tokens]
    assert not any(stop in result.text for stop in stops)


def test_the_result_waits_for_the_end() -> None:
    stream = stream_of(b"ab\0")
    next(stream)
    with pytest.raises(RuntimeError, match="not finished: iterate to its end first, or call interrupt"):
        _ = stream.result
    assert [piece.text for piece in stream] == ["b", ""]
    assert stream.result.text == "ab"


def test_an_answer_that_has_ended_stays_ended() -> None:
    stream = stream_of(b"a\0b")
    assert len(list(stream)) == 2
    assert list(stream) == []


def test_interrupting_keeps_what_was_written_and_takes_no_more_tokens() -> None:
    script = Script(b"abcd")
    stream = stream_of(script)
    assert next(stream).text + next(stream).text == "ab"
    result = stream.interrupt()
    assert (result.text, result.finish_reason, result.new_tokens) == ("ab", "interrupted", 2)
    assert list(stream) == []
    assert script.num_taken == 2


def test_an_answer_may_be_interrupted_before_it_begins() -> None:
    result = stream_of(b"abcd").interrupt()
    assert (result.text, result.finish_reason, result.new_tokens) == ("", "interrupted", 0)
    assert (result.ttft_seconds, result.decode_seconds, result.tokens_per_second) == (0, 0, None)


def test_interrupting_twice_or_after_the_end_changes_nothing() -> None:
    stream = stream_of(b"a\0")
    list(stream)
    assert stream.interrupt() is stream.result
    assert stream.result.finish_reason == "stop"
    other = stream_of(b"ab")
    assert other.interrupt() is other.interrupt()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_exception_interrupt_gives_what_there_is(error: type[BaseException]) -> None:
    def breaking() -> Iterator[int]:
        yield from b"ab"
        raise error

    stream = stream_of(Script(breaking()))
    with pytest.raises(error):
        list(stream)
    result = stream.interrupt()
    assert (result.text, result.finish_reason) == ("ab", "interrupted")


def test_the_rate_counts_the_tokens_behind_the_first() -> None:
    stream = stream_of(b"abc", max_new_tokens=3)
    list(stream)
    result = stream.result
    assert result.tokens_per_second == pytest.approx(2 / result.decode_seconds)


@pytest.mark.parametrize(("length", "stops"), [(3, ()), (9, ("b",)), (9, ())], ids=["length", "stop string", "end token"])
def test_tokens_are_closed_when_the_answer_has_ended(length: int, stops: tuple[str, ...]) -> None:
    script = Script(b"abcd\0ef")
    list(stream := stream_of(script, *stops, max_new_tokens=length))
    assert script.closed
    assert stream.result.new_tokens < 7


def test_interrupting_closes_the_tokens_before_figures_are_taken() -> None:
    script = Script(b"abcd")
    closed_at_finish = []

    def watch(outcome: Outcome) -> Generation:
        closed_at_finish.append(script.closed)
        return finish(outcome)

    stream = stream_of(script, finish=watch)
    next(stream)
    stream.interrupt()
    assert closed_at_finish == [True]


LETTERS = bytes(range(ord("a"), ord("a") + VOCAB)).decode()


class LetterDecoder:
    """An id is a letter."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(LETTERS[token_id] for token_id in token_ids)

    def is_hidden(self, token_id: int) -> bool:
        return False


def both_modes(seed: int, count: int, stops: tuple[str, ...], ends: frozenset[int]) -> tuple[TextStream, TextStream, DecodeStats]:
    """The same answer in full mode and in windows of six, and the figures of the latter."""
    target, sampler, stats = jumble(seed), Sampler(SamplingConfig(temperature=0.5, seed=seed)), DecodeStats()
    toy, drafting = ToyModel(target), ToyModel(target, mostly(target, jumble(seed + 1), 0.9))
    one_by_one = decode_full(toy, sampler, [1, 2], DecodeStats())
    in_windows = decode_sirius(
        drafting,
        sampler,
        [1, 2],
        decoding=DecodingConfig(mode="sirius", window=6),
        end_token_ids=ends,
        max_new_tokens=count,
        stats=stats,
    )
    full, sirius = (
        TextStream(
            tokens=tokens,
            writer=Writer(
                detokenizer=Detokenizer(LetterDecoder()), stops=StopMatcher(stops), end_token_ids=ends, max_new_tokens=count
            ),
            finish=finish,
        )
        for tokens in (alone(toy, one_by_one), alone(drafting, in_windows))
    )
    return full, sirius, stats


def told(stream: TextStream) -> list[tuple[str, int | None, int]]:
    return [(piece.text, piece.token_id, piece.new_tokens) for piece in stream]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 100),
    count=st.integers(1, 25),
    stops=st.lists(st.text(LETTERS[:6], min_size=1, max_size=2), max_size=3).map(tuple),
    ends=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
)
def test_a_window_is_cut_where_full_mode_would_have_ended(
    seed: int, count: int, stops: tuple[str, ...], ends: frozenset[int]
) -> None:
    full, sirius, stats = both_modes(seed, count, stops, ends)
    assert told(sirius) == told(full)
    for name in ("text", "token_ids", "finish_reason"):
        assert getattr(sirius.result, name) == getattr(full.result, name)
    assert stats.tokens_by_origin.full + stats.tokens_by_origin.draft == sirius.result.new_tokens


@pytest.mark.parametrize("num_pieces", range(1, 12))
def test_interrupting_inside_a_window_leaves_what_full_mode_leaves(num_pieces: int) -> None:
    full, sirius, stats = both_modes(5, 20, (), frozenset())
    for stream in (full, sirius):
        for _ in range(num_pieces):
            next(stream)
        stream.interrupt()
    assert sirius.result.text == full.result.text
    assert sirius.result.token_ids == full.result.token_ids
    assert sum(stats.num_tokens.values()) == sirius.result.new_tokens == num_pieces
