"""A GGUF file as a list of its fields, so that one can be changed and the rest stay as they are. Knows no meaning of any."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType

WIDTHS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass
class Piece:
    """Some bytes of the header."""

    kind: str
    """magic, version, count, length, text, type, number, dimensions, dimension or offset."""
    content: bytes


def split(data: bytes) -> tuple[list[Piece], bytes]:
    """The pieces of a good file's header in their order, and everything behind it."""
    reader = _Reader(data)
    reader.take("magic", 4)
    reader.take("version", 4)
    num_tensors, num_fields = reader.number("count", "<Q"), reader.number("count", "<Q")
    for _ in range(num_fields):
        reader.text()
        kind = reader.number("type", "<I")
        if kind == GGUFValueType.ARRAY:
            kind, count = reader.number("type", "<I"), reader.number("length", "<Q")
            for _ in range(count):
                reader.value(kind)
        else:
            reader.value(kind)
    for _ in range(num_tensors):
        reader.text()
        for _ in range(reader.number("dimensions", "<I")):
            reader.number("dimension", "<Q")
        reader.number("type", "<I")
        reader.number("offset", "<Q")
    return reader.pieces, data[reader.position :]


def joined(pieces: list[Piece], rest: bytes) -> bytes:
    """The file again."""
    return b"".join(piece.content for piece in pieces) + rest


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.pieces: list[Piece] = []

    def take(self, kind: str, nbytes: int) -> bytes:
        content = self.data[self.position : self.position + nbytes]
        self.position += nbytes
        self.pieces.append(Piece(kind, content))
        return content

    def number(self, kind: str, form: str) -> Any:
        return struct.unpack(form, self.take(kind, struct.calcsize(form)))[0]

    def text(self) -> None:
        self.take("text", self.number("length", "<Q"))

    def value(self, kind: int) -> None:
        if kind == GGUFValueType.STRING:
            self.text()
        else:
            self.number("number", WIDTHS[GGUFValueType(kind)])
