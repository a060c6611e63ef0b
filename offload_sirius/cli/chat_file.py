"""A conversation in a file: JSON with the messages and the settings that a chat can change. Knows no engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_sirius.engine.conversation import Conversation, Turn, turns_of
from offload_sirius.errors import ConfigError
from offload_sirius.files import write_whole
from offload_sirius.model.tokenizer import Message

FORMAT = "offload-sirius chat 1"


@dataclass(frozen=True, kw_only=True)
class SavedChat:
    """What a file holds."""

    system: str | None
    turns: list[Turn]
    settings: dict[str, Any]
    """By name; not checked yet."""


def save_chat(path: Path, model: str, conversation: Conversation, settings: Mapping[str, Any]) -> None:
    """Write it whole or not at all; over an earlier saved chat, but over no other file. Raises ConfigError."""
    if path.is_file() and path.stat().st_size > 0:
        load_chat(path, "which is not written over; name another file")
    cut = [turn.interrupted for turn in conversation.turns]
    messages: list[dict[str, Any]] = [dict(message) for message in conversation.messages()]
    answers = (message for message in messages if message["role"] == "assistant")
    for answer, interrupted in zip(answers, cut, strict=True):
        if interrupted:
            answer["interrupted"] = True
    content = {"format": FORMAT, "model": model, "settings": dict(settings), "messages": messages}
    write_whole(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "backslashreplace"))


def load_chat(path: Path, remedy: str = "name one that /save has written") -> SavedChat:
    """Read it. Raises ConfigError, which ends with the remedy, where it cannot be read or is something else."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: is no saved chat: not JSON in UTF-8; {remedy}") from None
    try:
        return _saved(content)
    except ValueError as error:
        raise ConfigError(f"{path}: is no saved chat: {error}; {remedy}") from None


def _saved(content: Any) -> SavedChat:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'"format" is not "{FORMAT}"')
    settings, messages = content.get("settings"), content.get("messages")
    if not isinstance(settings, dict) or not isinstance(messages, list):
        raise ValueError('"settings" must be an object and "messages" a list')
    system, turns = turns_of(_message(number, each) for number, each in enumerate(messages, start=1))
    return SavedChat(system=system, turns=turns, settings=settings)


def _message(number: int, found: Any) -> tuple[Message, bool]:
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("role", "content")):
        raise ValueError(f'message {number} must have "role" and "content", both text')
    return {"role": found["role"], "content": found["content"]}, found.get("interrupted") is True
