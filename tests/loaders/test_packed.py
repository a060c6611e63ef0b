"""Opening a packed model: what its tensors are, and one line for each way in which a folder can be broken."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius_loaders import CheckpointError, open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint, TokenizerFiles, read_rows
from offload_sirius_loaders.pack_file import CHECKED_NBYTES, OutTensor, Seal, damaged_pieces
from offload_sirius_loaders.pack_index import INDEX_NAME, OUTSIDE_NAME, PackIndex, PackJob, layer_file_name, read_index
from offload_sirius_loaders.packed import open_packed

from .packs import JOB, MODEL, content_of, write_pack

LAYER = layer_file_name(1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A packed model."""
    write_pack(tmp_path / "m")
    return tmp_path / "m"


def flip(path: Path, at: int) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def message_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(directory))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_packed_model_is_what_was_packed_with_layers_as_bytes(directory: Path) -> None:
    packed, source = open_checkpoint(str(directory)), open_checkpoint(MODEL)
    assert packed.spec == replace(source.spec, name="m")
    assert packed.path == directory
    assert packed.packed is not None
    assert (packed.packed.dtype, packed.packed.quantize, packed.packed.quantize_group) == ("float32", "int8", 64)
    assert packed.packed.fields == JOB.fields
    for (layer, part), info in packed.packed.parts.items():
        name = layer_file_name(layer)
        tensor = OutTensor(name=part, dtype="U8", shape=info.shape)
        raw = read_rows(info, 1, 20)
        assert packed.decode(info, raw, 1, 20).tobytes() == content_of(name, tensor)[64 : 21 * 64]
    assert set(packed.tensors) == {key for key in source.tensors if key[0] is None}
    for (_, role), info in packed.tensors.items():
        content = content_of(OUTSIDE_NAME, OutTensor(name=info.name, dtype="F32", shape=info.shape))
        assert packed.read(None, role).tobytes() == content


def test_a_synthetic_model_s_tokens_are_bytes_as_before(directory: Path) -> None:
    assert open_checkpoint(str(directory)).tokenizer == open_checkpoint(MODEL).tokenizer


class WithMetadata:
    """A checkpoint whose tokenizer is that of a GGUF file."""

    def __init__(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> None:
        self.spec, self.tensors = checkpoint.spec, checkpoint.tensors
        self.tokenizer = TokenizerFiles(gguf_metadata=metadata)


def test_a_gguf_file_s_tokenizer_is_the_same_fields(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.tokens": ["a", "\u0120b", "\ud800"], "tokenizer.ggml.scores": [0.1, -1e9], "tokenizer.x": True}
    write_pack(tmp_path / "m", checkpoint=WithMetadata(open_checkpoint(MODEL), metadata))  # type: ignore[arg-type]
    assert open_checkpoint(str(tmp_path / "m")).tokenizer == TokenizerFiles(gguf_metadata=metadata)


def edited(directory: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    """Change the index; sealed: with the checksum that it then has."""
    content = json.loads((directory / INDEX_NAME).read_text())
    change(content)
    if sealed:
        del content["crc32"]
        content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    (directory / INDEX_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "sealed", "message"),
    [
        (lambda index: index.update(version=1), True, "version of the format is 1, 2 is known; pack the model again with this"),
        (
            lambda index: index.update(format="x"),
            True,
            "format is 'x', offload-sirius-pack is needed; give the folder of a packed",
        ),
        (lambda index: index.update(dtype="float64"), True, "dtype is 'float64'; it must be one of bfloat16, float32"),
        (lambda index: index.update(quantize="int3"), True, "quantize is 'int3'; it must be one of none, int8, int4"),
        (
            lambda index: index.update(source="x"),
            False,
            "is not as it was written, its checksum is another one; remove the folder",
        ),
        (lambda index: index.update(fields=3), True, "fields is no list of places; remove the folder and pack the model again"),
        (lambda index: index.update(files=3), True, "names no files; remove the folder and pack the model again"),
        (lambda index: index["files"].update({"../a": {}}), True, "file '../a' is described by {}; remove the folder"),
        (lambda index: index["files"][LAYER].update(nbytes=-1), True, f"file {LAYER}: nbytes is -1; it must be a whole number"),
        (lambda index: index["files"].pop(LAYER), True, f"names no {LAYER}; pack the model again"),
        (lambda index: index.update(records_nbytes=64), True, "does not hold records as U8 [1, 64]; pack the model again"),
    ],
)
def test_an_index_that_is_not_understood_is_one_line(
    change: Callable[[dict[str, Any]], object], sealed: bool, message: str, directory: Path
) -> None:
    edited(directory, change, sealed=sealed)
    assert message in message_of(directory)


@pytest.mark.parametrize("name", [INDEX_NAME, OUTSIDE_NAME, LAYER, "config.json", "generation_config.json"])
@pytest.mark.parametrize("at", [10, 20])
def test_a_flipped_bit_in_what_describes_the_model_is_found_on_opening(name: str, at: int, directory: Path) -> None:
    flip(directory / name, at)
    assert name in message_of(directory)


@pytest.mark.parametrize("name", [OUTSIDE_NAME, LAYER, "config.json"])
def test_a_file_that_is_missing_or_short_is_named_on_opening(name: str, directory: Path) -> None:
    path = directory / name
    nbytes = path.stat().st_size
    os.truncate(path, nbytes - 1)
    assert message_of(directory) == f"{path}: has {nbytes - 1} bytes, {nbytes} were written; pack the model again"
    path.unlink()
    assert message_of(directory) == f"{path}: is missing; pack the model again"


def test_verifying_reads_every_byte_of_weights_and_finds_nothing(directory: Path) -> None:
    counted: list[int] = []
    opened = open_packed(directory, "m")
    assert damaged_pieces(list(opened.files.values()), counted.append) == []
    assert sum(counted) == sum(file.data_nbytes for file in opened.files.values())


def test_verifying_names_what_is_damaged(directory: Path) -> None:
    opened = open_packed(directory, "m")
    head = opened.files[LAYER].head_nbytes
    flip(directory / LAYER, head + 5)
    flip(directory / LAYER, head + CHECKED_NBYTES + 5)
    flip(directory / OUTSIDE_NAME, opened.files[OUTSIDE_NAME].head_nbytes + 5)
    found = damaged_pieces(list(opened.files.values()), lambda nbytes: None)
    assert [file.damage(index).partition(", bytes ")[0] for file, index in found] == [
        f"{OUTSIDE_NAME}: model.embed_tokens.weight and model.norm.weight and lm_head.weight",
        f"{LAYER}: attention and records",
        f"{LAYER}: records",
    ]


NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)


@given(
    source=NAMES,
    group=st.sampled_from([32, 64, 128]),
    fields=st.dictionaries(NAMES, st.lists(st.integers(0, 2**40), max_size=4).map(tuple), max_size=4),
    nbytes=st.integers(1, 2**40),
    byte_ids=st.none() | st.integers(1, 1000),
)
def test_an_index_is_read_as_it_was_written(
    source: str,
    group: int,
    fields: dict[str, tuple[int, ...]],
    nbytes: int,
    byte_ids: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    job = PackJob(
        source=source,
        fingerprint="f",
        dtype="bfloat16",
        quantize="int4",
        quantize_group=group,
        fields=fields,
        attention_nbytes=nbytes,
        records_nbytes=1,
    )
    index = PackIndex(job=job, num_byte_ids=byte_ids, seals={"a": Seal(nbytes=nbytes, head_nbytes=1, crc32=2**32 - 1)})
    directory = tmp_path_factory.mktemp("index")
    (directory / INDEX_NAME).write_bytes(index.to_text())
    assert read_index(directory) == index
