"""A JSON object read from a file, with typed fields. Every message names the file. Knows nothing of what the fields mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.shown import short

MAX_COUNT = 2**31 - 1
"""Largest count believed: no shape or position of a model comes near it."""


@dataclass(frozen=True)
class JsonObject:
    """Fields of one JSON object; a field that is null counts as absent."""

    source: str
    """What messages call it: the path of its file."""
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        """Read a file that holds one object. Raises CheckpointError, with line and column where the JSON is broken."""
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: bytes, source: str) -> JsonObject:
        """Parse UTF-8 text. A key that stands twice is an error, because readers disagree about which one counts."""
        try:
            value = json.loads(text.decode(), object_pairs_hook=lambda pairs: _without_duplicates(pairs, source))
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}"
            raise CheckpointError(f"{source}: broken JSON at {where}: {error.msg}; download the file again") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{source}: not UTF-8 at byte {error.start}; download the file again") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested thousands deep
            raise CheckpointError(f"{source}: no JSON that can be read: {error}; download the file again") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{source}: holds {short(value)}, a JSON object is needed; download the file again")
        return cls(source, value)

    def error(self, text: str) -> CheckpointError:
        """The error that says `text` of this file."""
        return CheckpointError(f"{self.source}: {text}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def count(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_COUNT) -> int:
        """A whole number between `least` and `most`; without default the field is required."""
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(f"{name} is {short(value)}; it must be a whole number between {least} and {most}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A number above a bound and far from overflow; without default the field is required."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not above < value < 1e30:
            raise self.error(f"{name} is {short(value)}; it must be a number above {above:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; absent is false."""
        value = self._value(name, False)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {short(value)}; it must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; without default the field is required."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(f"{name} is {short(value)}; it must be a text")
        return value

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{name} is missing, and nothing else says it; download the file again")
        return value


def _without_duplicates(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise CheckpointError(f"{source}: key {short(key)} stands twice; download the file again")
        fields[key] = value
    return fields
