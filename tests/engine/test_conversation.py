"""Conversations: prompts begin with the ids that the model has seen, wherever that gives the text that the template writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from offload_sirius.decode.text import Detokenizer
from offload_sirius.engine.conversation import Conversation, turns_of
from offload_sirius.errors import PromptError
from offload_sirius.model.tokenizer import Message, Tokenizer, load_tokenizer
from offload_sirius_loaders import open_checkpoint

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"


class Templated:
    """A tokenizer with another template: how a user's message, and an answer given before, are written."""

    def __init__(self, tokenizer: Tokenizer, *, before: str = "", trims: bool = False, forgets: bool = False) -> None:
        self._tokenizer = tokenizer
        self._before, self._trims, self._forgets = before, trims, forgets
        self.encode, self.decode, self.is_hidden = tokenizer.encode, tokenizer.decode, tokenizer.is_hidden

    def render_chat(self, messages: Sequence[Message]) -> str:
        if messages[0]["role"] == "system":
            raise PromptError("no system message")
        return "".join(map(self._written, messages)) + ASSISTANT

    def _written(self, message: Message) -> str:
        content = message["content"].strip() if self._trims else message["content"]
        if message["role"] == "user":
            return f"{USER}{content}<|im_end|>\n"
        _thought, mark, said = content.rpartition("!")
        return f"{ASSISTANT}{self._before}{said if self._forgets and mark else content}<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer(chat_directory: Path) -> Tokenizer:
    checkpoint = open_checkpoint(str(chat_directory))
    return load_tokenizer(checkpoint.tokenizer, checkpoint.spec)


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """As an answer's text comes about."""
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of one character each, as no tokenizer would cut a text that has longer tokens."""
    return [token_id for letter in text for token_id in tokenizer.encode(letter)]


def test_an_answer_keeps_the_ids_that_were_generated_for_it(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer)
    first = conversation.ask("what?")
    written = letters(tokenizer, "the tokens")
    assert tokenizer.encode("the tokens") != written
    conversation.add(first, "the tokens", [*written, *tokenizer.encode("<|im_end|>")])
    second = conversation.ask("and?")
    behind = tokenizer.encode(f"<|im_end|>\n{USER}and?<|im_end|>\n{ASSISTANT}")
    assert second.token_ids == [*first.token_ids, *written, *behind]
    assert second.text == first.text + f"the tokens<|im_end|>\n{USER}and?<|im_end|>\n{ASSISTANT}"


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(st.text(max_size=8), st.lists(st.integers(2, 300), min_size=1, max_size=8)), min_size=1, max_size=4),
    ends=st.booleans(),
)
def test_whatever_was_generated_the_next_prompt_begins_with_it_and_is_the_templates_text(
    tokenizer: Tokenizer, turns: list[tuple[str, list[int]]], ends: bool
) -> None:
    conversation = Conversation(tokenizer)
    for question, answer_ids in turns:
        asked = conversation.ask(question)
        answer = text_of(tokenizer, answer_ids)
        conversation.add(asked, answer, [*answer_ids, 1] if ends else answer_ids)
        further = conversation.ask("more")
        seen = [*asked.token_ids, *answer_ids] if answer.strip() else asked.token_ids
        assert further.token_ids[: len(seen)] == seen
        assert tokenizer.decode(further.token_ids, skip_special_tokens=False) == further.text


@pytest.mark.parametrize(
    ("answer", "settings"),
    [
        (" the tokens \n", {"trims": True}),
        ("\nthe tokens", {"trims": True}),
        ("the tokens", {"before": " "}),
        ("the tokens \n", {"before": "\n"}),
        ("the tokens", {}),
    ],
)
def test_white_space_that_a_template_adds_or_takes_does_not_matter(
    answer: str, settings: dict[str, bool | str], tokenizer: Tokenizer
) -> None:
    conversation = Conversation(Templated(tokenizer, **settings))  # type: ignore[arg-type]
    first = conversation.ask("what?")
    written = letters(tokenizer, answer)
    conversation.add(first, answer, written)
    second = conversation.ask("and?")
    assert second.token_ids == [
        *first.token_ids,
        *written,
        *tokenizer.encode(f"<|im_end|>\n{USER}and?<|im_end|>\n{ASSISTANT}"),
    ]


def test_a_template_that_forgets_what_was_thought_keeps_what_is_before_it(tokenizer: Tokenizer) -> None:
    conversation = Conversation(Templated(tokenizer, forgets=True))
    first = conversation.ask("what?")
    conversation.add(first, "hm!that", letters(tokenizer, "hm!that"))
    second = conversation.ask("and?")
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    assert tokenizer.decode(second.token_ids, skip_special_tokens=False) == second.text
    assert "hm" not in second.text
    # The rewritten answer is settled now: a third turn begins with all of the second, and what was written for it.
    conversation.add(second, "so", letters(tokenizer, "so"))
    third = conversation.ask("well?")
    seen = [*second.token_ids, *letters(tokenizer, "so")]
    assert third.token_ids[: len(seen)] == seen


@pytest.mark.parametrize(
    ("answer", "token_text"),
    [("the tok", "the tokens of"), ("a", "<|im_start|>a"), ("ab", "a<|im_end|>b")],
    ids=["cut by a stop string", "behind a hidden token", "around a hidden token"],
)
def test_ids_that_are_not_the_answers_text_are_not_kept(answer: str, token_text: str, tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer)
    conversation.add(conversation.ask("what?"), answer, tokenizer.encode(token_text))
    second = conversation.ask("and?")
    assert tokenizer.decode(second.token_ids, skip_special_tokens=False) == second.text


def test_a_tokenizer_that_puts_a_space_before_every_text_is_asked_for_the_whole() -> None:
    """The rest alone would get such a space in the middle of the conversation."""
    spaced = tokenizers.Tokenizer(models.BPE())
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    spaced.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({*"▁abcdefghijklmnopqrstuvwxyz:?\n"})
    spaced.train_from_iterator(["user: what ok"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))

    class Spaced:
        def render_chat(self, messages: Sequence[Message]) -> str:
            return "".join(f"{each['role']}: {each['content']}\n" for each in messages) + "assistant:"

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return spaced.encode(text).ids

        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return spaced.decode(list(token_ids))

        def is_hidden(self, token_id: int) -> bool:
            return False

    conversation = Conversation(Spaced())
    conversation.add(conversation.ask("what?"), "ok", spaced.encode("ok").ids)
    second = conversation.ask("ok?")
    assert second.token_ids == spaced.encode(second.text).ids


def test_another_system_message_begins_the_text_anew(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, system="a")
    conversation.add(conversation.ask("what?"), "that", letters(tokenizer, "that"))
    conversation.system = "b"
    found = conversation.ask("and?")
    assert found.text.startswith("<|im_start|>system\nb<|im_end|>\n")
    assert found.token_ids == tokenizer.encode(found.text)


def test_a_question_alone_changes_nothing(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer)
    assert conversation.ask("what?") == conversation.ask("what?")
    assert conversation.messages() == []


def said(*roles: str) -> list[tuple[Message, bool]]:
    return [({"role": role, "content": role}, role == "assistant") for role in roles]


def test_messages_become_turns() -> None:
    system, turns = turns_of(said("system", "user", "assistant", "user", "assistant"))
    assert system == "system"
    assert [(turn.question, turn.answer, turn.interrupted) for turn in turns] == [("user", "assistant", True)] * 2
    assert turns_of([]) == (None, [])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("user",), "the last message is the user's, its answer is missing"),
        (("assistant",), "message 1 is of role assistant, user is needed there"),
        (("user", "user"), "message 2 is of role user, assistant is needed there"),
        (("system", "user", "tool"), "message 3 is of role tool, assistant is needed there"),
        (("user", "assistant", "system"), "message 3 is of role system, user is needed there"),
    ],
)
def test_messages_that_do_not_take_turns_are_refused(roles: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        turns_of(said(*roles))
