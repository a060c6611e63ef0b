"""Answers one after the other, as `Batcher` wants them, by the engine's own stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from offload_sirius.config import GenerationConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece, TextStream
from offload_sirius.engine import Engine, Prompt


class SequentialAnswer:
    """One answer; a step writes one piece of it."""

    def __init__(self, begin: Callable[[], TextStream], on_piece: Callable[[TextPiece], None]) -> None:
        self.state: Literal["waiting", "active", "done"] = "waiting"
        self.error: Exception | None = None
        self._begin = begin
        self._on_piece = on_piece
        self._stream: TextStream | None = None
        self._cancelled = False

    @property
    def result(self) -> Generation:
        """The figures, when it has ended."""
        assert self._stream is not None
        return self._stream.result

    def cancel(self) -> None:
        """End it at the next step."""
        self._cancelled = True

    def step(self) -> None:
        """Write a piece, or end."""
        self.state = "active"
        self._stream = self._stream or self._begin()
        if self._cancelled:
            self._stream.interrupt()
            self.state = "done"
            return
        piece = next(self._stream, None)
        if piece is None:
            self.state = "done"
        else:
            self._on_piece(piece)


class Sequential:
    """A batch of one."""

    max_answers = 1

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answers: deque[SequentialAnswer] = deque()

    def submit(self, prompt: Prompt, config: GenerationConfig, *, on_piece: Callable[[TextPiece], None]) -> SequentialAnswer:
        """Queue an answer."""
        answer = SequentialAnswer(lambda: self._engine.stream(prompt, config), on_piece)
        self._answers.append(answer)
        return answer

    def step(self) -> bool:
        """One piece of the first answer. False when there was nothing to do."""
        if not self._answers:
            return False
        answer = self._answers[0]
        try:
            answer.step()
        except Exception:
            answer.state = "done"
            raise
        finally:
            if answer.state == "done":
                self._answers.popleft()
        return True

    def close(self) -> None:
        """Forget what is left."""
        for answer in self._answers:
            answer.cancel()
        while self.step():
            pass
