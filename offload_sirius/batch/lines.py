"""The input of a batch: a JSON object a line, checked before anything is loaded. Knows no model.

A line has `prompt` (a text) or `messages` (objects with `role` and `content`), and may have `id` and settings of its answer:
fields of GenerationConfig and SamplingConfig. `max_tokens` and `max_completion_tokens`, as OpenAI's API has them, are
`max_new_tokens`. A setting that is null is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from offload_sirius.config import GenerationConfig, SamplingConfig, names_of
from offload_sirius.errors import ConfigError

if TYPE_CHECKING:
    from offload_sirius.model.tokenizer import Message

Id = str | int
"""A text and a number are never the same id."""

NOT_OF_A_LINE = frozenset(("decoding", "sampling", "logprobs", "reuse"))
SYNONYMS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
KINDS = {
    name: kind
    for config in (GenerationConfig, SamplingConfig)
    for name, kind in get_type_hints(config).items()
    if name not in NOT_OF_A_LINE
}
"""Settings of a line, each with the type of its field."""

CALLED = {bool: "true or false", int: "a whole number", float: "a number"}
REMEDY = "correct the line"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One prompt."""

    number: int
    """Of the file's lines, from 1."""
    id: Id
    """What its answer is called: the line's number, where the line does not say."""
    prompt: str | list[Message]
    config: GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Input:
    """All prompts of a file."""

    lines: list[Line]
    digest: str
    """SHA-256 of the file."""


def read_input(path: Path, defaults: GenerationConfig) -> Input:
    """Read and check all lines; empty ones are none. defaults: settings where a line says nothing.

    Raises ConfigError, which names file, line and field.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--in {path}: cannot be read: {error.strerror}; give a file with a JSON object a line") from error
    numbered = enumerate(content.split(b"\n"), start=1)
    lines = [_line(path, number, raw, defaults) for number, raw in numbered if raw.strip()]
    if not lines:
        raise ConfigError(f'--in {path}: has no lines; give a JSON object a line, such as {{"prompt": "Hello"}}')
    seen = dict[Id, int]()
    for line in lines:
        if line.id in seen:
            shown = json.dumps(line.id)[:100]
            _refuse(path, line.number, f"id {shown} is that of line {seen[line.id]} already; give each line its own")
        seen[line.id] = line.number
    return Input(lines=lines, digest=hashlib.sha256(content).hexdigest())


def _line(path: Path, number: int, raw: bytes, defaults: GenerationConfig) -> Line:
    fields = _object(path, number, raw)
    found_id, prompt, messages = fields.pop("id", None), fields.pop("prompt", None), fields.pop("messages", None)
    if found_id is not None and (not isinstance(found_id, str | int) or isinstance(found_id, bool)):
        _refuse(path, number, f"id is {_shown(found_id)}; it must be a text or a whole number")
    if (prompt is None) == (messages is None):
        which = "neither prompt nor messages" if prompt is None else "prompt and messages"
        _refuse(path, number, f"has {which}; it must have one of them")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        _refuse(path, number, f"prompt is {_shown(prompt)}; it must be a text that is not empty")
    if messages is not None:
        _check_messages(path, number, messages)
    return Line(
        number=number,
        id=number if found_id is None else found_id,
        prompt=messages if prompt is None else prompt,
        config=_config(path, number, fields, defaults),
    )


def _object(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_number)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        _refuse(path, number, f"is no JSON in UTF-8: {why[:200]}; {REMEDY}")
    if not isinstance(fields, dict):
        _refuse(path, number, f"is {_shown(fields)}; it must be a JSON object")
    return fields


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is there twice")
    return fields


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _check_messages(path: Path, number: int, messages: Any) -> None:
    needed = "a list of objects with role and content, both text, and nothing else"
    if not isinstance(messages, list) or not messages:
        _refuse(path, number, f"messages is {_shown(messages)}; it must be {needed}")
    for place, each in enumerate(messages):
        is_object = isinstance(each, dict) and set(each) == {"role", "content"}
        if not is_object or not all(isinstance(text, str) for text in each.values()):
            _refuse(path, number, f"messages[{place}] is {_shown(each)}; messages must be {needed}")


def _config(path: Path, number: int, fields: dict[str, Any], defaults: GenerationConfig) -> GenerationConfig:
    if unknown := sorted(set(fields) - set(KINDS) - set(SYNONYMS)):
        known = ", ".join(("id", "messages", "prompt", *sorted((*KINDS, *SYNONYMS))))
        _refuse(path, number, f"unknown field {unknown[0][:100]}; known are {known}")
    settings = dict[str, Any]()
    for field, found in fields.items():
        name = SYNONYMS.get(field, field)
        if name in settings:
            _refuse(path, number, f"{field} is given beside another name of {name}; give one of them")
        if found is not None:
            settings[name] = _value(path, number, field, KINDS[name], found)
    own = {name: value for name, value in settings.items() if name in names_of(GenerationConfig)}
    drawn = {name: value for name, value in settings.items() if name in names_of(SamplingConfig)}
    try:
        return replace(defaults, sampling=replace(defaults.sampling, **drawn), **own)
    except ConfigError as error:
        _refuse(path, number, str(error))


def _value(path: Path, number: int, field: str, kind: Any, found: Any) -> Any:
    if kind in CALLED:
        whole = isinstance(found, int) and not isinstance(found, bool)
        if isinstance(found, kind) and (whole or kind is not int):
            return found
        if kind is float and whole:
            try:
                return float(found)
            except OverflowError:
                pass
        _refuse(path, number, f"{field} is {_shown(found)}; it must be {CALLED[kind]}")
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        _refuse(path, number, f"{field} is {_shown(found)}; it must be a text or a list of texts")
    return tuple(texts)


def _shown(found: Any) -> str:
    return json.dumps(found, ensure_ascii=False)[:80]


def _refuse(path: Path, number: int, what: str) -> NoReturn:
    raise ConfigError(f"--in {path}: line {number}: {what}") from None
