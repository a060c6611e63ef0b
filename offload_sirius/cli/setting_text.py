"""Settings as somebody types them: which there are, and what a text means for each, by the type of its field."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from offload_sirius.config import DecodingConfig, GenerationConfig, SamplingConfig
from offload_sirius.errors import ConfigError

NONE = "none"
SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
UNSETTABLE = frozenset(("chat", "decoding", "logprobs", "sampling"))
"""Fields that are no setting of a chat, or have no effect there."""


def settable() -> dict[str, Any]:
    """Names of the settings, each with the type of its field."""
    hints = get_type_hints(GenerationConfig) | get_type_hints(DecodingConfig) | get_type_hints(SamplingConfig)
    return {name: hints[name] for name in sorted(hints) if name not in UNSETTABLE}


def require_settable(name: str) -> None:
    """Raises ConfigError for a name that is none of them."""
    if name not in settable():
        raise ConfigError(f"there is no setting {name}; known are {', '.join(settable())}")


def parse_value(name: str, text: str) -> Any:
    """What a text means for that setting; ranges are the configs' to check. Raises ConfigError."""
    require_settable(name)
    kinds = _alternatives(settable()[name])
    if name == "max_new_tokens":
        kinds.insert(0, types.NoneType)  # as many as there is room for
    for value in (value for kind in kinds for value in _readings(kind, text)):
        return value
    raise ConfigError(f"{name} cannot be {text!r}; it must be {' or '.join(map(_told, kinds))}")


def shown(name: str, value: Any) -> str:
    """As one would type it."""
    if isinstance(value, tuple):
        value = ", ".join(json.dumps(each, ensure_ascii=False) for each in value) or None
    if isinstance(value, bool):
        value = "on" if value else "off"
    return f"{name} {NONE if value is None else value}"


def _alternatives(kind: Any) -> list[Any]:
    """The types that a value may have; those that take least text come first."""
    kinds = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
    order = [types.NoneType, bool, int, float]
    return sorted(kinds, key=lambda each: order.index(each) if each in order else len(order))


def _readings(kind: Any, text: str) -> list[Any]:
    """The text as a value of that type, if it is one."""
    if kind is types.NoneType:
        return [None] if text == NONE else []
    if kind is bool:
        return [SWITCHES[text.lower()]] if text.lower() in SWITCHES else []
    if kind in (int, float):
        return _number(kind, text)
    if get_origin(kind) is tuple:
        return [() if text == NONE else (_string(text),)]
    return [text]


def _number(kind: Callable[[str], Any], text: str) -> list[Any]:
    try:
        return [kind(text)]
    except ValueError:
        return []


def _string(text: str) -> str:
    r"""A text as it stands, or, in double quotes, with escapes such as \n. Raises ConfigError."""
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        raise ConfigError(f"{text} is no text in double quotes; write it as in JSON") from None


def _told(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return {bool: "on or off", int: "a whole number", float: "a number", types.NoneType: NONE}.get(kind, "a text")
