"""A model that is open and not loaded: prompts of every kind become ids, or are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.engine import Model, Prompt, open_model
from offload_sirius.errors import CheckpointError, PromptError
from offload_sirius.model.tokenizer import Message, Tokenizer

NAME = "synthetic:tiny?positions=32"


class ChatTokenizer:
    """Writes a conversation as `role:content;`, and `~` where the answer begins."""

    has_chat_template = True
    end_token_ids = frozenset({3})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def apply_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.encode("".join(f"{message['role']}:{message['content']};" for message in messages) + "~")


@pytest.fixture(scope="module")
def plain() -> Model:
    return open_model(NAME)


@pytest.fixture(scope="module")
def chatty(plain: Model) -> Model:
    return Model(checkpoint=plain.checkpoint, tokenizer=cast(Tokenizer, ChatTokenizer()))


def text_of(token_ids: list[int]) -> str:
    return bytes(token_ids).decode()


def message_of(model: Model, prompt: Any) -> str:
    with pytest.raises(PromptError) as caught:
        model.encode(prompt)
    return str(caught.value)


def test_opening_reads_no_weight() -> None:
    assert open_model("synthetic:llama-3-70b").spec.num_layers == 80


def test_a_model_that_is_not_known_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'nothing' is not a known model"):
        open_model("nothing")


def test_a_text_becomes_a_message_where_the_model_has_a_template(chatty: Model) -> None:
    assert text_of(chatty.encode("hi")) == "user:hi;~"


def test_a_text_stays_as_it_is_without_chat_or_without_a_template(chatty: Model, plain: Model) -> None:
    assert text_of(chatty.encode("hi", chat=False)) == text_of(plain.encode("hi")) == "hi"


def test_a_conversation_goes_through_the_template_whatever_chat_says(chatty: Model) -> None:
    conversation = [Message(role="system", content="s"), Message(role="user", content="u")]
    for chat in (True, False):
        assert text_of(chatty.encode(conversation, chat=chat)) == "system:s;user:u;~"


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), range(1, 4)])
def test_token_ids_stay_as_they_are(prompt: Prompt, chatty: Model) -> None:
    assert chatty.encode(prompt) == [1, 2, 3]


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused_even_where_a_template_would_make_something_of_it(prompt: Prompt, chatty: Model) -> None:
    assert message_of(chatty, prompt) == "the prompt is empty; give --prompt TEXT, --prompt-file FILE, or text on standard input"


def test_a_prompt_must_leave_a_position_for_the_answer(plain: Model) -> None:
    assert len(plain.encode("x" * 31)) == 31
    assert message_of(plain, "x" * 32) == (
        f"the prompt has 32 tokens, {NAME} takes 32 positions, prompt and answer together; shorten the prompt"
    )


@pytest.mark.parametrize("token_id", [-1, 512])
def test_a_token_outside_the_vocabulary_is_refused(token_id: int, plain: Model) -> None:
    assert message_of(plain, [1, token_id]) == f"token id {token_id} is outside the vocabulary of 512; use this model's tokenizer"


def test_end_tokens_of_model_and_tokenizer_count_together(chatty: Model, plain: Model) -> None:
    assert plain.end_token_ids == frozenset()
    assert chatty.end_token_ids == {3}


@given(num_prompt=st.integers(1, 31), wanted=st.integers(1, 40))
def test_a_full_context_shortens_the_answer_and_is_never_refused(num_prompt: int, wanted: int) -> None:
    room = open_model(NAME).room_for(num_prompt, wanted, 32)
    assert room == min(wanted, 33 - num_prompt)


@given(num_prompt=st.integers(1, 31), wanted=st.integers(1, 40), context=st.integers(1, 31))
def test_a_smaller_context_has_room_for_the_whole_answer_or_is_refused(num_prompt: int, wanted: int, context: int) -> None:
    model = open_model(NAME)
    if num_prompt + wanted - 1 <= context:
        assert model.room_for(num_prompt, wanted, context) == wanted
    else:
        with pytest.raises(PromptError, match=rf"take {num_prompt + wanted} positions, {context} were planned for; shorten them"):
            model.room_for(num_prompt, wanted, context)
