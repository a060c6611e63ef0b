"""The index of a packed model: what it is a copy of, how its layers are held, and a seal for each of its files.

It is written last. While a folder has none, its place is taken by a marker that says what is being written there, so that packing
can go on behind an interruption and nobody takes the folder for a model. Knows neither weights nor numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offload_sirius_loaders.checkpoint import BLOCK_TYPES
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.pack_file import Seal
from offload_sirius_loaders.shown import short

INDEX_NAME = "pack.json"
MARKER_NAME = "packing.json"
"""Of a folder that is not finished."""

FORMAT = "offload-sirius-pack"
VERSION = 2
"""Another one is not read: what it would mean is not known."""

OUTSIDE_NAME = "outside.safetensors"
"""What no layer has: embedding, head, final norm."""

GGUF_TOKENIZER_NAME = "tokenizer.gguf.json"
"""The `tokenizer.*` fields of a GGUF file, where the model was packed from one."""

AGAIN = "remove the folder and pack the model again"

PACK_DTYPES = ("bfloat16", "float32")
PACK_QUANTIZES = ("none", "int8", "int4")
PACK_QUANTIZE_HEADS = ("none", "int8")


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """What is packed and how. Copies with the same job have the same bytes."""

    source: str
    """What the model that is packed is called."""
    fingerprint: str
    """Of its shape and some of its weights."""
    dtype: str
    """bfloat16 or float32: what is plain is stored so."""
    quantize: str
    """none, int8 or int4: how the layers' matrices are stored."""
    quantize_group: int | None
    """Weights that share a scale; None where none do."""
    fields: Mapping[str, tuple[int, ...]]
    """Name of a tensor in a layer -> byte at which it begins, then its shape: of numbers, or of bytes where it is quantised."""
    attention_nbytes: int
    records_nbytes: int
    blocks: tuple[Mapping[str, str], ...] = ()
    """Of each layer, role of a matrix -> type of its blocks, where some are kept in them; `fields` is then room for any layer."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Of each layer, bytes of attention block and records, where they differ."""
    outside_blocks: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Role of embedding or head -> type of its blocks and bytes of a row, where it is kept in them."""
    quantize_head: str = "none"
    """none or int8: how the head is stored."""
    head_row_nbytes: int = 0
    """Of a row of the head, where it is quantised."""

    @property
    def layer_nbytes(self) -> int:
        """Of a whole layer, or of room for any."""
        return self.attention_nbytes + self.records_nbytes

    def part_nbytes(self, layer: int) -> tuple[int, int]:
        """Of the attention block and of the records of a layer."""
        return self.sizes[layer] if self.sizes else (self.attention_nbytes, self.records_nbytes)

    def as_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        lists = {"fields": self.fields, "outside_blocks": self.outside_blocks}
        plain = {name: {key: list(value) for key, value in each.items()} for name, each in lists.items()}
        blocks, sizes = [dict(each) for each in self.blocks], [list(each) for each in self.sizes]
        return {"format": FORMAT, "version": VERSION, **asdict(self), **plain, "blocks": blocks, "sizes": sizes}

    def difference(self, other: PackJob) -> str:
        """What this one is and the other is not, in words; empty where they are the same."""
        if self.source != other.source:
            return f"of {self.source}, and one of {other.source} is asked for"
        if self.fingerprint != other.fingerprint:
            return f"of another {self.source}, whose weights are not those of this one"
        if self.dtype != other.dtype:
            return f"in {self.dtype}, and {other.dtype} is asked for"
        if (self.quantize, self.quantize_group) != (other.quantize, other.quantize_group):
            return f"with --quantize {self._quantising}, and {other._quantising} is asked for"
        if self.quantize_head != other.quantize_head:
            return f"with --quantize-head {self.quantize_head}, and {other.quantize_head} is asked for"
        return "" if self == other else "with another layout of layers than this program's"

    @property
    def _quantising(self) -> str:
        return self.quantize if self.quantize_group is None else f"{self.quantize} in groups of {self.quantize_group}"


@dataclass(frozen=True, kw_only=True)
class PackIndex:
    """All of it."""

    job: PackJob
    num_byte_ids: int | None
    """Of a synthetic model, whose token ids are bytes; None where the model has a tokenizer of its own or none."""
    seals: Mapping[str, Seal]
    """By name of the file."""

    def to_text(self) -> bytes:
        """As it stands in the file, with a checksum of its own."""
        seals = {name: asdict(seal) for name, seal in self.seals.items()}
        content = self.job.as_json() | {"num_byte_ids": self.num_byte_ids, "files": seals}
        return json.dumps(content | {"crc32": _checksum(content)}, indent=1).encode() + b"\n"


def layer_file_name(layer: int) -> str:
    """The file of a layer."""
    return f"layer-{layer:05d}.safetensors"


def is_packed(path: Path) -> bool:
    """Whether a folder is a packed model, or was to become one."""
    return any((path / name).is_file() for name in (INDEX_NAME, MARKER_NAME))


def read_index(directory: Path) -> PackIndex:
    """Read and check the index. Raises CheckpointError, also for a folder that was to become a packed model."""
    if not (directory / INDEX_NAME).is_file():
        raise CheckpointError(
            f"{directory}: is a packed copy that was not finished; run the same `offload-sirius pack` again, which completes it"
        )
    fields = JsonObject.read(directory / INDEX_NAME)
    job = _job(fields)
    content = {name: value for name, value in fields.fields.items() if name != "crc32"}
    if fields.fields.get("crc32") != _checksum(content):
        raise fields.error(f"is not as it was written, its checksum is another one; {AGAIN}")
    byte_ids = fields.count("num_byte_ids") if fields.has("num_byte_ids") else None
    return PackIndex(job=job, num_byte_ids=byte_ids, seals=_seals(fields))


def read_marker(directory: Path) -> PackJob:
    """What was being written to the folder. Raises CheckpointError."""
    return _job(JsonObject.read(directory / MARKER_NAME))


def marker_text(job: PackJob) -> bytes:
    """The content of a marker."""
    return json.dumps(job.as_json(), indent=1).encode() + b"\n"


def _job(fields: JsonObject) -> PackJob:
    if fields.text("format") != FORMAT:
        raise fields.error(f"format is {short(fields.text('format'))}, {FORMAT} is needed; give the folder of a packed model")
    if (version := fields.count("version")) != VERSION:
        raise fields.error(f"version of the format is {version}, {VERSION} is known; pack the model again with this program")
    for name, known in (("dtype", PACK_DTYPES), ("quantize", PACK_QUANTIZES)):
        if fields.text(name) not in known:
            raise fields.error(f"{name} is {short(fields.text(name))}; it must be one of {', '.join(known)}")
    quantize_head = fields.text("quantize_head") if fields.has("quantize_head") else "none"  # older copies have a plain one
    if quantize_head not in PACK_QUANTIZE_HEADS:
        raise fields.error(f"quantize_head is {short(quantize_head)}; it must be one of {', '.join(PACK_QUANTIZE_HEADS)}")
    return PackJob(
        source=fields.text("source"),
        fingerprint=fields.text("fingerprint"),
        dtype=fields.text("dtype"),
        quantize=fields.text("quantize"),
        quantize_group=None if fields.text("quantize") == "none" else fields.count("quantize_group"),
        fields=_places(fields),
        attention_nbytes=fields.count("attention_nbytes", most=2**60),
        records_nbytes=fields.count("records_nbytes", most=2**60),
        blocks=_blocks(fields),
        sizes=_sizes(fields),
        outside_blocks=_outside_blocks(fields),
        quantize_head=quantize_head,
        head_row_nbytes=0 if quantize_head == "none" else fields.count("head_row_nbytes", most=2**30),
    )


def _blocks(fields: JsonObject) -> tuple[Mapping[str, str], ...]:
    found = fields.fields.get("blocks", [])
    if not isinstance(found, list) or not all(_is_texts(each) for each in found):
        raise fields.error(f"blocks is no list of types; {AGAIN}")
    return tuple(found)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) and each in BLOCK_TYPES for each in value.values())


def _sizes(fields: JsonObject) -> tuple[tuple[int, int], ...]:
    found = fields.fields.get("sizes", [])
    if not isinstance(found, list) or not all(_are_counts(each) and len(each) == 2 for each in found):
        raise fields.error(f"sizes is no list of pairs; {AGAIN}")
    return tuple((attention, records) for attention, records in found)


def _outside_blocks(fields: JsonObject) -> Mapping[str, tuple[str, int]]:
    found = fields.fields.get("outside_blocks", {})
    if not isinstance(found, dict) or not all(_is_row_type(each) for each in found.values()):
        raise fields.error(f"outside_blocks is no list of types; {AGAIN}")
    return {role: (kind, row_nbytes) for role, (kind, row_nbytes) in found.items()}


def _is_row_type(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in BLOCK_TYPES and type(value[1]) is int and value[1] > 0


def _places(fields: JsonObject) -> dict[str, tuple[int, ...]]:
    found = fields.fields.get("fields")
    if not isinstance(found, dict) or not all(_are_counts(place) for place in found.values()):
        raise fields.error(f"fields is no list of places; {AGAIN}")
    return {name: tuple(place) for name, place in found.items()}


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _seals(fields: JsonObject) -> dict[str, Seal]:
    found = fields.fields.get("files")
    if not isinstance(found, dict):
        raise fields.error(f"names no files; {AGAIN}")
    seals: dict[str, Seal] = {}
    for name, entry in found.items():
        # A plain name: an index from elsewhere has no business with files outside its folder.
        if not isinstance(entry, dict) or Path(name).name != name or not name.isprintable() or len(name) > 255:
            raise fields.error(f"file {short(name)} is described by {short(entry)}; {AGAIN}")
        seal = JsonObject(f"{fields.source}: file {name}", entry)
        seals[name] = Seal(
            nbytes=seal.count("nbytes", least=0, most=2**60),
            head_nbytes=seal.count("head_nbytes", least=0, most=seal.count("nbytes", least=0, most=2**60)),
            crc32=seal.count("crc32", least=0, most=2**32 - 1),
        )
    return seals


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
