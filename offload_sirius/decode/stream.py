"""One answer while it is written: tokens become text, ends are watched for, times are taken. Knows no model and no weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

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


@dataclass(kw_only=True)
class Outcome:
    """An answer as far as it has come."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    began: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None


class TextStream:
    """Iterate over the pieces of an answer; `result` has the figures when it has ended or was interrupted.

    After an exception from iterating, KeyboardInterrupt for one, `interrupt` gives what there is.
    """

    def __init__(
        self,
        *,
        tokens: Generator[int, None, None],
        detokenizer: Detokenizer,
        stops: StopMatcher,
        end_token_ids: frozenset[int],
        max_new_tokens: int,
        finish: Callable[[Outcome], Generation],
    ) -> None:
        """tokens: taken one by one and closed at the end, so that no pass is begun for tokens that nobody wants.

        finish: makes the result of an outcome; called once, when the tokens are closed.
        """
        self._tokens = tokens
        self._detokenizer = detokenizer
        self._stops = stops
        self._end_token_ids = end_token_ids
        self._max_new_tokens = max_new_tokens
        self._finish = finish
        self._outcome = Outcome()
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
        for token_id in self._tokens:
            self._count(token_id)
            if token_id in self._end_token_ids:
                yield from self._rest("stop", token_id)
                return
            text, stopped = self._stops.push(self._detokenizer.push(token_id))
            yield self._piece(text, token_id)
            if stopped:
                self._end("stop")
                return
            if len(self._outcome.token_ids) >= self._max_new_tokens:
                yield from self._rest("length")
                return

    def _count(self, token_id: int) -> None:
        self._outcome.token_ids.append(token_id)
        self._outcome.last_token_at = time.perf_counter()
        self._outcome.first_token_at = self._outcome.first_token_at or self._outcome.last_token_at

    def _rest(self, reason: FinishReason, token_id: int | None = None) -> Iterator[TextPiece]:
        """What was held back for want of more text."""
        text, _ = self._stops.push(self._detokenizer.finish())
        yield self._piece(text + self._stops.flush(), token_id)
        self._end("stop" if self._stops.stopped else reason)

    def _piece(self, text: str, token_id: int | None) -> TextPiece:
        self._outcome.text += text
        seconds = time.perf_counter() - self._outcome.began
        return TextPiece(text=text, token_id=token_id, new_tokens=len(self._outcome.token_ids), seconds=seconds)

    def _end(self, reason: FinishReason) -> None:
        self._tokens.close()
        self._outcome.finish_reason = reason
        self._result = self._finish(self._outcome)
