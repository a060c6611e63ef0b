"""A batch whose steps the test makes: each writes one token of every answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

from offload_sirius.config import GenerationConfig
from offload_sirius.decode.result import FinishReason, Generation, LinkFigures, MemoryFigures, Passes
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.stream import TextPiece

ENGINE: Any = SimpleNamespace(streamer=SimpleNamespace(copied_nbytes=0, busy_seconds=0.0))
"""As much of an engine as a worker looks at."""


def generation(num_tokens: int, finish_reason: FinishReason) -> Generation:
    """A result with a text of so many letters."""
    memory = dict.fromkeys(MemoryFigures.__dataclass_fields__, 0)
    return Generation(
        model="scripted",
        mode="full",
        text="x" * num_tokens,
        token_ids=(1,) * num_tokens,
        finish_reason=finish_reason,
        prompt_tokens=1,
        ttft_seconds=0.0,
        decode_seconds=1.0,
        load_seconds=0.0,
        passes=Passes(),
        link=LinkFigures(),
        memory=MemoryFigures(**memory),
        plan={},
        settings={},
    )


class ScriptedAnswer:
    """So many tokens."""

    def __init__(self, num_tokens: int, on_piece: Callable[[TextPiece], None]) -> None:
        self.state: Literal["waiting", "active", "done"] = "active"
        self.error: Exception | None = None
        self.stats = DecodeStats()
        self._num_tokens, self._num_written = num_tokens, 0
        self._on_piece = on_piece
        self._cancelled = False

    @property
    def result(self) -> Generation:
        """As far as it has come."""
        return generation(self._num_written, "interrupted" if self._cancelled else "stop")

    def cancel(self) -> None:
        """Before the next step."""
        self._cancelled = True

    def step(self) -> None:
        """Write a token, or end."""
        if not self._cancelled:
            self._num_written += 1
            self._on_piece(TextPiece(text="x", token_id=1, new_tokens=self._num_written, seconds=0.0))
        if self._cancelled or self._num_written == self._num_tokens:
            self.state = "done"


class ScriptedBatch:
    """The first token of a prompt says how many its answer has."""

    def __init__(self, max_answers: int = 1) -> None:
        self.max_answers = max_answers
        self.answers: list[ScriptedAnswer] = []
        self.error: Exception | None = None
        """Raised by the next step."""
        self.fails_late = False
        """Whether answers have taken that step before it fails."""
        self.num_steps = 0
        self._allowed = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._closed = False

    def submit(self, prompt: Any, config: GenerationConfig, *, on_piece: Callable[[TextPiece], None]) -> ScriptedAnswer:
        """See api: begins at once."""
        assert len(self.answers) < self.max_answers, "more answers than slots"
        answer = ScriptedAnswer(prompt[0], on_piece)
        self.answers.append(answer)
        return answer

    def step(self) -> bool:
        """Wait until the test makes it."""
        if not self._closed:
            assert self._allowed.acquire(timeout=20)
        self.num_steps += 1
        answers, error = list(self.answers), self.error
        self.error = None
        if error is None or self.fails_late:
            for answer in answers:
                answer.step()
        self.answers = [] if error else [answer for answer in answers if answer.state != "done"]
        self._done.release()
        if error is not None:
            raise error
        return bool(answers)

    def make_step(self) -> None:
        """Let one step happen, and wait until it has."""
        self._allowed.release()
        assert self._done.acquire(timeout=20)

    def run_free(self) -> None:
        """Steps need nobody any more."""
        self._closed = True
        self._allowed.release()

    def close(self) -> None:
        """Nothing is left behind."""
