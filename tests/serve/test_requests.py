"""What is asked for, and what cannot be."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.serve.errors import ApiError
from offload_sirius.serve.requests import IGNORED, read_chat, read_completion

HI: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PROMPT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def body(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def refused(content: bytes, read: Any = read_chat) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(content)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_chat_is_read_with_everything_that_can_be_asked_for() -> None:
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 7, "stop": ["a", "b"]}
    asked = read_chat(body(HI | more | {"max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}, "user": "u"}))
    assert asked.prompt == [{"role": "user", "content": "hi"}]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (0.5, 0.9, 3, 0.1, 7)
    assert (sampling.repetition_penalty, asked.stop, asked.max_new_tokens) == (1.1, ("a", "b"), 9)
    assert asked.stream
    assert asked.include_usage
    assert asked.client == "u"


def test_without_a_seed_each_request_draws_its_own() -> None:
    assert len({read_chat(body(HI)).sampling.seed for _ in range(20)}) == 20


@pytest.mark.parametrize(("given", "seed"), [(0, 0), (-1, 2**64 - 1), (2**64 - 1, 2**64 - 1)])
def test_every_seed_of_64_bits_is_one(given: int, seed: int) -> None:
    assert read_chat(body(HI | {"seed": given})).sampling.seed == seed


def test_the_smaller_of_two_limits_counts() -> None:
    assert read_chat(body(HI | {"max_tokens": 5, "max_completion_tokens": 3})).max_new_tokens == 3


def test_a_chat_has_no_limit_of_its_own_and_a_completion_has_that_of_openai() -> None:
    assert read_chat(body(HI)).max_new_tokens is None
    assert read_completion(body(PROMPT)).max_new_tokens == 16


def test_parts_of_text_are_joined_and_a_developer_speaks_as_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": None, "tool_calls": []}]
    asked = read_chat(body({"model": "m", "messages": messages}))
    assert asked.prompt == [{"role": "system", "content": "ab"}, {"role": "assistant", "content": ""}]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [1, 2], [[1, 2]]])
def test_a_prompt_may_be_text_or_tokens_and_stand_in_a_list(prompt: Any) -> None:
    assert read_completion(body(PROMPT | {"prompt": prompt})).prompt in ("hi", [1, 2])


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_fields_that_say_nothing_of_the_answer_are_accepted(name: str) -> None:
    assert read_chat(body(HI | {name: "x"})).model == "m"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"1": 5}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("reasoning_effort", "low"),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_an_error(field: str, value: Any) -> None:
    error = refused(body(HI | {field: value}))
    assert (error.code, error.param) == ("unsupported_parameter", field)
    assert str(error).startswith(f"{field} is ")


@pytest.mark.parametrize(
    "neutral", [{"n": 1}, {"tools": []}, {"presence_penalty": 0.0}, {"logit_bias": None}, {"response_format": {"type": "text"}}]
)
def test_the_same_fields_with_values_that_ask_for_nothing_are_accepted(neutral: dict[str, Any]) -> None:
    assert read_chat(body(HI | neutral)).model == "m"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": HI["messages"]}, "model", "missing_required_parameter"),
        ({"model": "m"}, "messages", "missing_required_parameter"),
        ({"model": "m", "messages": []}, "messages", "invalid_value"),
        (HI | {"model": 5}, "model", "invalid_value"),
        (HI | {"temperature": 2.5}, "temperature", "invalid_value"),
        (HI | {"temperature": "1"}, "temperature", "invalid_value"),
        (HI | {"top_p": 0}, "top_p", "invalid_value"),
        (HI | {"seed": 2**64}, "seed", "invalid_value"),
        (HI | {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (HI | {"max_tokens": True}, "max_tokens", "invalid_value"),
        (HI | {"stop": ""}, "stop", "invalid_value"),
        (HI | {"stop": ["a"] * 17}, "stop", "invalid_value"),
        (HI | {"stream": 1}, "stream", "invalid_value"),
        (HI | {"top_logprobs": 3}, "top_logprobs", None),
        (HI | {"tempreature": 1}, "tempreature", "unknown_parameter"),
        ({"model": "m", "messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"model": "m", "messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        (
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"model": "m", "messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(fields: dict[str, Any], param: str, code: str | None) -> None:
    error = refused(body(fields))
    assert (error.param, error.code) == (param, code)


def test_several_prompts_are_several_requests() -> None:
    assert "prompt has 2 prompts" in str(refused(body(PROMPT | {"prompt": ["a", "b"]}), read_completion))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nul",
        b"[]",
        b'"text"',
        b"{}" * 2,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b'{"seed": NaN}',
        b"1" * 100_000,
    ],
)
def test_what_is_no_json_object_is_told_so(content: bytes) -> None:
    assert refused(content).code == "invalid_json"


@given(st.binary(max_size=200) | st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=5).map(body))
def test_any_bytes_are_a_request_or_an_error(content: bytes) -> None:
    for read in (read_chat, read_completion):
        refused(content, read)


FIELDS = st.sampled_from(
    ["temperature", "stop", "messages", "seed", "stream", "n", "user", "logprobs", "stream_options", "max_tokens"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=4,
)


@given(st.dictionaries(FIELDS, VALUES))
def test_any_values_of_known_fields_are_settings_or_an_error(fields: dict[str, Any]) -> None:
    with contextlib.suppress(ApiError):
        asked = read_chat(body(HI | fields))
        assert all(asked.stop)
        assert asked.max_new_tokens is None or asked.max_new_tokens >= 1
