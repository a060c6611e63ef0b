"""What clients ask for: the bytes of a request, checked, as settings of an answer. Knows no model and no HTTP.

Fields and ranges are those of https://platform.openai.com/docs/api-reference/chat and .../completions. A field that would change
the answer and is not supported is an error, never ignored; one that would not is accepted.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

from offload_sirius.config import SamplingConfig
from offload_sirius.engine import Prompt
from offload_sirius.model.tokenizer import Message
from offload_sirius.serve.errors import ApiError

NUM_COMPLETION_TOKENS = 16
"""Of a completion where nobody says how many, as in OpenAI's API."""

IGNORED = frozenset(("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")) | frozenset(
    ("prompt_cache_retention", "parallel_tool_calls", "prediction")
)
"""Fields of OpenAI's API that say nothing of the answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields that are not supported: the values that ask for nothing."""

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Limit = Annotated[int, Field(ge=1, le=10**7)]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request."""

    model: str
    prompt: Prompt
    is_chat: bool
    max_new_tokens: int | None
    """None: as many as there is room for."""
    temperature: float | None
    sampling: SamplingConfig
    """All of it but the temperature, where that is None."""
    stop: tuple[str, ...]
    num_top_logprobs: int | None
    """Alternatives to each token whose log-probabilities are asked for; None: not even the token's."""
    stream: bool
    include_usage: bool
    """At the end of a stream; an answer in one piece always has it."""
    client: str | None
    """Whom the request is for, where it says so."""


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Request(_Model):
    """What both kinds have in common."""

    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10**6)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    max_tokens: Limit | None = None
    user: str | None = None

    def asked(self, **own: Any) -> Asked:
        """own: what the kinds do not have in common."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Asked(
            model=self.model,
            temperature=self.temperature,
            sampling=self._sampling(),
            stop=stop,
            stream=bool(self.stream),
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
            client=self.user,
            **own,
        )

    def _sampling(self) -> SamplingConfig:
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        # Without a seed each answer is another one, as in OpenAI's API; a negative one is as good as any.
        seed = secrets.randbits(64) if self.seed is None else self.seed % 2**64
        return SamplingConfig(seed=seed, **{name: value for name, value in given.items() if value is not None})


class _TextPart(_Model):
    type: Literal["text"]
    text: str


class _Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    function_call: None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)

    def as_message(self) -> Message:
        """As chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _Chat(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def as_asked(self) -> Asked:
        """Raises ApiError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is given and logprobs is not; send logprobs: true", param="top_logprobs")
        limits = [each for each in (self.max_tokens, self.max_completion_tokens) if each is not None]
        return self.asked(
            prompt=[message.as_message() for message in self.messages],
            is_chat=True,
            max_new_tokens=min(limits, default=None),
            num_top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class _Completion(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def as_asked(self) -> Asked:
        """Raises ApiError."""
        return self.asked(
            prompt=self._one_prompt(),
            is_chat=False,
            max_new_tokens=self.max_tokens or NUM_COMPLETION_TOKENS,
            num_top_logprobs=self.logprobs,
        )

    def _one_prompt(self) -> str | list[int]:
        if isinstance(self.prompt, str):
            return self.prompt
        token_ids = [each for each in self.prompt if isinstance(each, int)]
        if len(token_ids) == len(self.prompt):
            return token_ids
        if len(self.prompt) != 1:
            found = f"prompt has {len(self.prompt)} prompts"
            raise ApiError(400, f"{found}; this server answers one a request: send several requests", param="prompt")
        only = self.prompt[0]
        assert not isinstance(only, int)
        return only


_Kind = TypeVar("_Kind", _Chat, _Completion)


def read_chat(body: bytes) -> Asked:
    """A request to /v1/chat/completions. Raises ApiError."""
    return _read(_Chat, body).as_asked()


def read_completion(body: bytes) -> Asked:
    """A request to /v1/completions. Raises ApiError."""
    return _read(_Completion, body).as_asked()


def _read(kind: type[_Kind], body: bytes) -> _Kind:
    fields = _supported(_object(body))
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        # Nesting is limited, NaN and bytes that are not UTF-8 are refused, while it is read.
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}; send a JSON object in UTF-8", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is a JSON {type(fields).__name__}; send an object", code="invalid_json")
    return fields


def _supported(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what asks for nothing. Raises ApiError for what asks for something that there is not."""
    for name, neutral in NEUTRAL.items():
        if name in fields and fields[name] not in neutral:
            allowed = neutral[-1]
            remedy = "leave it out" if allowed is None else f"leave it out, or send {allowed!r}"
            found = f"{name} is {str(fields[name])[:40]!r}"
            raise ApiError(400, f"{found}, which is not supported; {remedy}", code="unsupported_parameter", param=name)
    return {name: value for name, value in fields.items() if name not in NEUTRAL and name not in IGNORED}


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its place in the request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        param = ".".join(dict.fromkeys((param, str(first["loc"][-1])[:100])))
        return ApiError(400, f"unrecognized request argument supplied: {param}", code="unknown_parameter", param=param)
    missing = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {first['msg']}", code=missing, param=param)


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`; pydantic also names the type that it tried of several, which is no place."""
    kinds = (_Chat, _Completion, _Message, _TextPart, _StreamOptions)
    known = {name for kind in kinds for name in kind.model_fields}
    place = str(loc[0])
    for part in loc[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in known:
            place += f".{part}"
    return place
