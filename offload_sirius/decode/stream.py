"""One answer while it is written: tokens become text, ends are watched for, times are taken. Knows no model and no weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from offload_sirius.decode.emitted import Emitted
from offload_sirius.decode.result import FinishReason, Generation
from offload_sirius.decode.text import Detokenizer, StopMatcher


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """What one token added. The text may be empty: half a character, or the possible beginning of a stop string."""

    text: str
    token_id: int | None
    """None for the rest that comes out at the end."""
    new_tokens: int
    """Tokens so far."""
    seconds: float
    """Since the prompt was given."""
    logprob: float | None = None
    """The token's log-probability by the full model; None where nobody wants it, and of the rest at the end."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, and theirs."""


@dataclass(kw_only=True)
class Outcome:
    """An answer as far as it has come."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    began: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None


class Writer:
    """Turns the tokens of an answer into pieces of text, and finds where it ends."""

    def __init__(
        self, *, detokenizer: Detokenizer, stops: StopMatcher, end_token_ids: frozenset[int], max_new_tokens: int
    ) -> None:
        self.outcome = Outcome()
        self.ended: FinishReason | None = None
        """Why no further token is wanted; None while one is."""
        self._detokenizer = detokenizer
        self._stops = stops
        self._end_token_ids = end_token_ids
        self._max_new_tokens = max_new_tokens

    def push(self, token: Emitted) -> Iterator[TextPiece]:
        """What a token adds: one piece, and at the end perhaps another of the text that was held back."""
        self._count(token.token_id)
        if token.token_id in self._end_token_ids:
            yield from self._rest("stop", token)
            return
        text, stopped = self._stops.push(self._detokenizer.push(token.token_id))
        yield self._piece(text, token)
        if stopped:
            self.ended = "stop"
        elif len(self.outcome.token_ids) >= self._max_new_tokens:
            yield from self._rest("length")

    def _count(self, token_id: int) -> None:
        self.outcome.token_ids.append(token_id)
        self.outcome.last_token_at = time.perf_counter()
        self.outcome.first_token_at = self.outcome.first_token_at or self.outcome.last_token_at

    def _rest(self, reason: FinishReason, token: Emitted | None = None) -> Iterator[TextPiece]:
        """What was held back for want of more text."""
        text, _ = self._stops.push(self._detokenizer.finish())
        yield self._piece(text + self._stops.flush(), token)
        self.ended = "stop" if self._stops.stopped else reason

    def _piece(self, text: str, token: Emitted | None) -> TextPiece:
        self.outcome.text += text
        return TextPiece(
            text=text,
            token_id=None if token is None else token.token_id,
            new_tokens=len(self.outcome.token_ids),
            seconds=time.perf_counter() - self.outcome.began,
            logprob=None if token is None else token.logprob,
            top_logprobs=() if token is None else token.top_logprobs,
        )


class TextStream:
    """Iterate over the pieces of an answer; `result` has the figures when it has ended or was interrupted.

    After an exception from iterating, KeyboardInterrupt for one, `interrupt` gives what there is.
    """

    def __init__(
        self, *, tokens: Generator[Emitted, None, None], writer: Writer, finish: Callable[[Outcome], Generation]
    ) -> None:
        """tokens: taken one by one and closed at the end, so that no pass is begun for tokens that nobody wants.

        finish: makes the result of an outcome; called once, when the tokens are closed.
        """
        self._tokens = tokens
        self._writer = writer
        self._finish = finish
        self._result: Generation | None = None
        self._pieces: Generator[TextPiece, None, None] = self._run()

    def __iter__(self) -> Iterator[TextPiece]:
        return self

    def __next__(self) -> TextPiece:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """The figures. Raises RuntimeError while the answer is still being written."""
        if self._result is None:
            raise RuntimeError("the answer is not finished: iterate to its end first, or call interrupt()")
        return self._result

    def interrupt(self) -> Generation:
        """End the answer where it is."""
        if self._result is None:
            self._pieces.close()
            self._end("interrupted")
        return self.result

    def _run(self) -> Generator[TextPiece, None, None]:
        for token in self._tokens:
            yield from self._writer.push(token)
            if self._writer.ended is not None:
                self._end(self._writer.ended)
                return

    def _end(self, reason: FinishReason) -> None:
        self._tokens.close()
        self._writer.outcome.finish_reason = reason
        self._result = self._finish(self._writer.outcome)
