"""A chat while it runs: the conversation, how it is decoded, and one answer after the other. Knows no commands."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from offload_sirius.cli.console import TextWriter, say, status
from offload_sirius.cli.setting_text import NONE
from offload_sirius.config import GenerationConfig, SamplingConfig, names_of
from offload_sirius.engine.conversation import Conversation, Question
from offload_sirius.engine.engine import with_settings
from offload_sirius.errors import PromptError
from offload_sirius.weights.interrupts import interrupts_held

if TYPE_CHECKING:
    from offload_sirius.decode.result import Generation
    from offload_sirius.engine import Engine

SAVED_DECODING = ("mode", "window")
"""Settings of decoding that a chat takes along to another run: what the others may be depends on how a model was loaded."""


@dataclass(kw_only=True)
class ChatTotals:
    """Sums over the answers of a chat."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those that were in the KV cache."""
    new_tokens: int = 0
    copied_bytes: int = 0

    def count(self, result: Generation) -> None:
        """Add an answer."""
        self.answers += 1
        self.prompt_tokens += result.prompt_tokens
        self.cached_tokens += result.cached_tokens
        self.new_tokens += result.new_tokens
        self.copied_bytes += result.link.copied_bytes


class ChatSession:
    """One conversation with one loaded model."""

    def __init__(
        self, engine: Engine, conversation: Conversation, config: GenerationConfig, max_new_tokens: int | None = None
    ) -> None:
        """max_new_tokens: of an answer; None: as many as the context has room for."""
        self.engine = engine
        self.conversation = conversation
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.totals = ChatTotals()
        self.last: Generation | None = None
        self._unanswered: str | None = None
        """A message that was taken back as nothing was written for it."""

    @property
    def positions(self) -> int:
        """Positions of the context that were in use after the last answer."""
        return 0 if self.last is None else self.last.prompt_tokens + self.last.new_tokens

    def answer(self, content: str) -> None:
        """Write the answer to a message, and remember both. What there is of an answer that is stopped stays; without any, the
        message is taken back.

        Raises KeyboardInterrupt where it was stopped, at the end, and PromptError where the conversation is too long
        or its template does not accept it; then, too, it stays as it was.
        """
        self._unanswered = content
        question = self.conversation.ask(content)
        room = self._room(question)
        config = replace(self.config, max_new_tokens=min(self.max_new_tokens or room, room))
        result, interruption = self._write(question, config)
        with _uninterrupted():
            self._unanswered = None if result.text else content
            self.last = result
            self.totals.count(result)
            self._say(result, cut_by_context=config.max_new_tokens == room)
        if interruption is not None:
            raise interruption

    def retry(self) -> None:
        """Write the last answer anew, with the next seed where it is drawn. Raises PromptError as `answer` does."""
        turns = self.conversation.turns
        if self._unanswered is None and not turns:
            raise PromptError("there is no message to answer again; write one")
        if (sampling := self.config.sampling).temperature > 0:
            self.config = replace(self.config, sampling=replace(sampling, seed=(sampling.seed + 1) % 2**64))
        if self._unanswered is not None:
            self.answer(self._unanswered)
            return
        before = turns.pop()
        num_turns = len(turns)
        try:
            self.answer(before.question)
        finally:
            if len(turns) == num_turns:  # nothing took its place
                turns.append(before)
                self._unanswered = None

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.conversation.turns.clear()
        self.last, self._unanswered = None, None

    def set_system(self, text: str | None) -> None:
        """Give the model another system message, or none. Raises PromptError where its template takes none."""
        before, self.conversation.system = self.conversation.system, text
        try:
            self.conversation.ask("?")
        except PromptError:
            self.conversation.system = before
            raise

    def change(self, **settings: Any) -> None:
        """Set fields of GenerationConfig, DecodingConfig and SamplingConfig. Raises ConfigError, also where the model was not
        loaded for it."""
        wanted = settings.get("max_new_tokens", self.max_new_tokens)
        if wanted is None:
            settings = {name: value for name, value in settings.items() if name != "max_new_tokens"}
        config = with_settings(self.config, settings, self.engine.config.decoding)
        self.engine.require_planned(config)
        self.config, self.max_new_tokens = config, wanted

    def settings(self) -> dict[str, Any]:
        """What a saved chat takes along."""
        decoding = self.config.decoding or self.engine.config.decoding
        sampling = {name: getattr(self.config.sampling, name) for name in sorted(names_of(SamplingConfig))}
        kept = {name: getattr(decoding, name) for name in SAVED_DECODING}
        return {**kept, **sampling, "max_new_tokens": self.max_new_tokens, "stop": list(self.config.stop)}

    def _room(self, question: Question) -> int:
        """Tokens for which the context has room behind a question. Raises PromptError where there is none."""
        needed, context = len(question.token_ids), self.engine.context
        if needed > context:
            raise PromptError(
                f"the conversation takes {needed} positions with this message, {context} were planned for; shorten it, or begin "
                f"anew with /reset (/save FILE keeps what was said){self._larger()}"
            )
        return context - needed + 1

    def _larger(self) -> str:
        """A remedy, where the model has it."""
        limit = self.engine.spec.max_positions
        return f", or start with --max-context N, at most {limit}" if self.engine.context < limit else ""

    def _write(self, question: Question, config: GenerationConfig) -> tuple[Generation, KeyboardInterrupt | None]:
        """An answer, and what stopped it."""
        writer = TextWriter()
        stream = self.engine.stream(question.token_ids, config)
        interruption = None
        try:
            for piece in stream:
                writer.write(piece)
        except KeyboardInterrupt as error:
            interruption = error
        except BaseException:
            writer.end()  # what was written stays, and the error begins a line of its own
            raise
        with _uninterrupted():
            result = stream.result if interruption is None else stream.interrupt()
            writer.end()
            if result.text:
                interrupted = result.finish_reason == "interrupted"
                self.conversation.add(question, result.text, result.token_ids, interrupted=interrupted)
        return result, interruption

    def _say(self, result: Generation, *, cut_by_context: bool) -> None:
        if not result.text:
            say("nothing was written, the conversation stays as it was; /retry asks again")
        elif result.finish_reason == "interrupted":
            say("interrupted; what was written stays, /retry writes it anew")
        elif result.finish_reason == "length" and cut_by_context:
            say(
                f"the context of {self.engine.context} positions is full; begin anew with /reset "
                f"(/save FILE keeps what was said){self._larger()}"
            )
        elif result.finish_reason == "length":
            say(f"cut at {result.new_tokens} tokens; /set max_new_tokens {NONE} lets answers end by themselves")
        say(status(result, self.engine.context))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C has been heard or is too late: another one does not take what was written. SIGTERM comes at the end."""
    with interrupts_held():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
