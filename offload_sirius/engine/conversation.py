"""A conversation as a model has read and written it: messages, and the token ids of its beginning, which stay what they were.

A template writes the whole conversation anew for every turn, and an answer's text may be cut into other tokens than those
that were generated. Where the new text begins with what the model has seen, the old ids are kept and only the rest is encoded:
then the prompt begins with what the KV cache holds, and a turn computes its own tokens alone. Templates that write earlier turns
otherwise (some leave out what a model thought, say) keep as much as they leave unchanged. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from offload_sirius.model.tokenizer import Message


class ChatTokenizer(Protocol):
    """What a conversation needs of a tokenizer."""

    def render_chat(self, messages: Sequence[Message]) -> str: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def is_hidden(self, token_id: int) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """A user's message behind the conversation so far, ready to be answered."""

    content: str
    text: str
    """The whole conversation, up to where the answer begins."""
    token_ids: list[int]
    """The same."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A user's message and its answer."""

    question: str
    answer: str
    interrupted: bool = False
    """The answer was stopped before its end."""
    text: str = ""
    """What the model had read before it answered; empty where it was another model, or an earlier run."""
    prompt_ids: Sequence[int] = ()
    """The same."""
    answer_ids: Sequence[int] = ()
    """What it wrote, without the token that ended it; empty where that is not exactly the answer's text."""


class Conversation:
    """Turns behind an optional system message. `ask` changes nothing; `add` does, once there is an answer."""

    def __init__(self, tokenizer: ChatTokenizer, *, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.system = system
        self.turns: list[Turn] = []

    def messages(self) -> list[Message]:
        """All that was said, in order."""
        said: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            said += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return said

    def ask(self, content: str) -> Question:
        """The prompt for a further message. Raises PromptError where the template does not accept the conversation."""
        text = self._tokenizer.render_chat([*self.messages(), {"role": "user", "content": content}])
        return Question(content=content, text=text, token_ids=self._encode(text))

    def add(self, question: Question, answer: str, token_ids: Sequence[int], *, interrupted: bool = False) -> None:
        """Append a turn. token_ids: all that were generated for the answer, an end token included."""
        written = list(token_ids)
        while written and self._tokenizer.is_hidden(written[-1]):
            written.pop()  # the template writes the end itself
        # Not so where a stop string cut the text, or where a hidden token stands within: then the text alone counts.
        same = self._tokenizer.decode(written, skip_special_tokens=False) == answer
        turn = Turn(
            question=question.content,
            answer=answer,
            interrupted=interrupted,
            text=question.text,
            prompt_ids=question.token_ids,
            answer_ids=written if same else (),
        )
        self.turns.append(turn)

    def _encode(self, text: str) -> list[int]:
        """Ids of the whole text, which begin with those that are known where that gives the same text."""
        for known, rest in self._known(text):
            token_ids = [*known, *self._encoded(rest)]
            if self._decoded(token_ids) == self._decoded(known) + rest:
                return token_ids
        return self._encoded(text)

    def _known(self, text: str) -> Iterator[tuple[list[int], str]]:
        """(ids of a beginning of the text, what of the text is behind it), the longest first."""
        for turn in reversed(self.turns):
            if not turn.prompt_ids or not text.startswith(turn.text):
                continue
            behind = text[len(turn.text) :]
            if turn.answer_ids and (rest := _behind_answer(behind, turn.answer)) is not None:
                yield [*turn.prompt_ids, *turn.answer_ids], rest
            yield list(turn.prompt_ids), behind

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _behind_answer(text: str, answer: str) -> str | None:
    """What follows the answer that a text begins with; None where it begins otherwise.

    A template may put white space before an answer, or trim it: what the model wrote stays as it is.
    """
    trimmed = answer.strip()
    text = text.lstrip()
    if not trimmed or not text.startswith(trimmed):
        return None
    trailing = answer[len(answer.rstrip()) :]
    return text[len(trimmed) :].removeprefix(trailing)


def turns_of(messages: Iterable[tuple[Message, bool]]) -> tuple[str | None, list[Turn]]:
    """(system message, turns). messages: each with whether it was interrupted. Raises ValueError where they do not take turns."""
    remaining = list(messages)
    system = remaining.pop(0)[0]["content"] if remaining and remaining[0][0]["role"] == "system" else None
    roles = [message["role"] for message, _ in remaining]
    expected = ["user", "assistant"] * ((len(roles) + 1) // 2)
    for index, (found, needed) in enumerate(zip(roles, expected, strict=False), start=1 if system is None else 2):
        if found != needed:
            raise ValueError(f"message {index} is of role {found}, {needed} is needed there")
    if len(roles) % 2:
        raise ValueError("the last message is the user's, its answer is missing")
    pairs = zip(remaining[::2], remaining[1::2], strict=True)
    return system, [
        Turn(question=user["content"], answer=assistant["content"], interrupted=cut) for (user, _), (assistant, cut) in pairs
    ]
