"""Opening Hugging Face folders: what is read, and that every broken file gives one clear line and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_sirius_loaders.arch import model_spec, tensor_names, tensor_shapes
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.safetensors import open_safetensors
from offload_sirius_loaders.shard import read_shard

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}
SPEC = model_spec(CONFIG, None, name="m")
SHAPES = {name: tensor_shapes(SPEC)[key] for key, name in tensor_names(SPEC).items()}
ITEM_NBYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "F8_E4M3": 1}

Fields = dict[str, Any]


def values_of(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    first = sorted(SHAPES).index(name) * 1000
    return np.arange(first, first + math.prod(SHAPES[name]), dtype=np.float32).reshape(SHAPES[name])


def encode(header: Fields | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def header_of(names: list[str], dtype: str = "F32") -> Fields:
    header, cursor = {}, 0
    for name in names:
        end = cursor + math.prod(SHAPES[name]) * ITEM_NBYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(SHAPES[name]), "data_offsets": [cursor, end]}
        cursor = end
    return header


def write_shard(path: Path, names: list[str], **changes: Any) -> None:
    """Write tensors; changes: the header's entries by tensor name, None leaves it out."""
    data = b"".join(values_of(name).tobytes() for name in names)
    path.write_bytes(encode(header_of(names) | changes, data))


def write_model(directory: Path, names: list[str] | None = None, config: Fields | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    write_shard(directory / "model.safetensors", list(SHAPES) if names is None else names)
    return directory


def write_sharded(directory: Path) -> Path:
    """Two shards and their index."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    names = list(SHAPES)
    halves = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for shard, part in halves.items():
        write_shard(directory / shard, part)
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def edit_index(directory: Path, **changes: Any) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(path, "m")
    message = str(caught.value)
    assert "\n" not in message
    return message


def error_of(action: Callable[[], object]) -> str:
    """The message of its CheckpointError, empty where it succeeds. Any other error fails the test."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def read_all(directory: Path) -> list[Any]:
    checkpoint = open_safetensors(directory, "m")
    return [checkpoint.read(*key) for key in checkpoint.tensors]


@pytest.mark.parametrize("write", [write_model, write_sharded])
def test_every_tensor_of_a_folder_is_read_as_written(write: Any, tmp_path: Path) -> None:
    checkpoint = open_safetensors(write(tmp_path), "m")
    for (layer, role), name in tensor_names(SPEC).items():
        np.testing.assert_array_equal(checkpoint.read(layer, role), values_of(name))
    assert checkpoint.spec.stored_dtype == "F32"
    assert checkpoint.spec.name == "m"


@pytest.mark.parametrize("file", ["model.safetensors", "other.safetensors"])
def test_a_single_file_is_opened_with_the_config_beside_it(file: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    assert open_safetensors(tmp_path / file, "m").tensors.keys() == tensor_names(SPEC).keys()
    assert open_safetensors(tmp_path, "m").tensors.keys() == tensor_names(SPEC).keys()


def test_an_index_is_opened_by_its_own_path(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    checkpoint = open_safetensors(tmp_path / "model.safetensors.index.json", "m")
    assert {info.file and info.file.name for info in checkpoint.tensors.values()} == {"a.safetensors", "b.safetensors"}


def test_rows_are_decoded_without_a_copy_from_any_alignment(tmp_path: Path) -> None:
    checkpoint = open_safetensors(write_model(tmp_path), "m")
    info = checkpoint.tensors[0, "down"]
    raw = np.zeros(2 * info.row_nbytes + 1, np.uint8)[1:]
    rows = checkpoint.decode(info, raw, 3, 2)
    raw.view(np.float32)[13] = 5.0
    assert rows.shape == (2, 12)
    assert rows[1, 1] == 5.0


def test_bfloat16_is_carried_in_uint16(tmp_path: Path) -> None:
    write_model(tmp_path)
    header = header_of(list(SHAPES), "BF16")
    nbytes = sum(math.prod(shape) * 2 for shape in SHAPES.values())
    (tmp_path / "model.safetensors").write_bytes(encode(header, bytes(nbytes)))
    checkpoint = open_safetensors(tmp_path, "m")
    assert checkpoint.read(0, "q").dtype == np.uint16
    assert checkpoint.spec.stored_dtype == "BF16"


def test_tensors_that_the_model_does_not_have_are_ignored(tmp_path: Path) -> None:
    write_model(tmp_path, config={"tie_word_embeddings": True})
    checkpoint = open_safetensors(tmp_path, "m")
    assert checkpoint.spec.tied_head
    assert (None, "head") not in checkpoint.tensors


def test_a_tokenizer_is_named_only_where_there_is_one(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert open_safetensors(tmp_path, "m").tokenizer.directory is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_safetensors(tmp_path, "m").tokenizer.directory == tmp_path


def test_end_tokens_of_generation_config_are_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert open_safetensors(tmp_path, "m").spec.eos_token_ids == (4, 5)


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    assert message_of(tmp_path).startswith(f"{tmp_path}: has no .safetensors file; download the weights")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert message_of(tmp_path / "x.safetensors").startswith(f"{tmp_path}/x.safetensors: no such file or directory")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a .safetensors file" in message_of(tmp_path / "notes.txt")


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "has 2 .safetensors files and no model.safetensors.index.json" in message_of(tmp_path)


@pytest.mark.parametrize("given", ["pytorch_model.bin", "."])
def test_pickled_weights_are_refused_with_the_reason(given: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = message_of(tmp_path / given)
    assert message.startswith(f"{tmp_path}/pytorch_model.bin: pickled weights are refused, because a pickle can run code")
    assert "convert" in message


def test_a_missing_config_says_where_it_is_needed(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").unlink()
    assert message_of(tmp_path).startswith(f"{tmp_path}: has no config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b" 2}', "broken JSON at line 2 column 6: Expecting ':' delimiter; download the file again"),
        ("", "broken JSON at line 1 column 1"),
        ("[1]", "holds [1], a JSON object is needed"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "key 'model_type' stands twice"),
        ("[" * 100_000, "no JSON that can be read"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "no JSON that can be read"),
    ],
)
def test_a_broken_config_is_told_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert message_of(tmp_path).startswith(f"{tmp_path}/config.json: {message}")


def test_a_config_that_is_not_text_is_told_with_its_place(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a\xff": 1}')
    assert message_of(tmp_path) == f"{tmp_path}/config.json: not UTF-8 at byte 3; download the file again"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, [name for name in SHAPES if "up_proj" not in name])
    message = message_of(tmp_path)
    assert message == (
        f"{tmp_path}: tensor model.layers.0.mlp.up_proj.weight is missing, which config.json asks for; "
        "download the checkpoint again"
    )


def test_a_missing_head_of_an_untied_model_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    write_model(tmp_path, [name for name in SHAPES if name != "lm_head.weight"])
    assert "tensor lm_head.weight is missing" in message_of(tmp_path)
    assert "tie_word_embeddings" in message_of(tmp_path)


def test_a_tensor_of_another_shape_is_told_with_both_shapes(tmp_path: Path) -> None:
    write_model(tmp_path, config={"vocab_size": 11})
    assert "tensor model.embed_tokens.weight has shape [10, 8], config.json asks for [11, 8]" in message_of(tmp_path)


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3"])
def test_a_tensor_of_another_dtype_is_refused_by_name(dtype: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    header = header_of(list(SHAPES), dtype)
    nbytes = max(entry["data_offsets"][1] for entry in header.values())
    (tmp_path / "model.safetensors").write_bytes(encode(header, bytes(nbytes)))
    assert f"tensor model.embed_tokens.weight is stored as {dtype}; F32, F16, BF16 are supported" in message_of(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, a safetensors file has at least 8; download it again"),
        (b"1234567", "has 7 bytes, a safetensors file has at least 8"),
        (b"<!DOCTYPE html><html></html>", "is not a safetensors file: its header would have"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the weights; run `git lfs pull`"),
        ((2).to_bytes(8, "little") + b"{", "its header ends at byte 10, the file has 9; download the file again"),
        (encode(b"{]", b""), "header: broken JSON at line 1 column 2"),
        (encode(b"[]", b""), "header: holds [], a JSON object is needed"),
        (encode(b'{"t": {}, "t": {}}', b""), "header: key 't' stands twice"),
        (
            encode({"t" * 501: {}}, b""),
            "tensor 'tttttttttttt...ttttttttttttt' is described by {}; a printable name and an object",
        ),
        (encode({"t": 3}, b""), "tensor t is described by 3; a printable name and an object are needed"),
        (encode({"a\nb": ENTRY}, bytes(16)), "tensor 'a\\nb' is described by"),
        (encode({"t": {}}, b""), "tensor t has dtype None; known are F4,"),
        (encode({"t": ENTRY | {"dtype": "F7"}}, bytes(16)), "tensor t has dtype 'F7'; known are F4,"),
        (encode({"t": ENTRY | {"shape": [2, -2]}}, bytes(16)), "tensor t has shape [2, -2]; at most 16 whole numbers"),
        (encode({"t": ENTRY | {"shape": [2, 2.0]}}, bytes(16)), "tensor t has shape [2, 2.0];"),
        (encode({"t": ENTRY | {"shape": [1] * 17}}, bytes(16)), "tensor t has shape [1, 1,"),
        (encode({"t": ENTRY | {"shape": 4}}, bytes(16)), "tensor t has shape 4;"),
        (encode({"t": ENTRY | {"data_offsets": [16, 0]}}, bytes(16)), "tensor t has data_offsets [16, 0]; first byte and end"),
        (encode({"t": ENTRY | {"data_offsets": [0]}}, bytes(16)), "tensor t has data_offsets [0];"),
        (encode({"t": ENTRY | {"data_offsets": [0, 12]}}, bytes(16)), "tensor t has 12 bytes, F32 [2, 2] needs 16;"),
        (encode({"t": ENTRY}, bytes(15)), "tensor t ends at byte 89, the file has 88; download the file again"),
        (encode({"t": ENTRY}, bytes(17)), "its tensors end at byte 89, the file has 90; download the file again"),
        (encode({"t": ENTRY | {"data_offsets": [1, 17]}}, bytes(17)), "tensor t leaves a gap before it: it starts at byte 74,"),
        (
            encode({"t": ENTRY, "u": ENTRY | {"data_offsets": [8, 24]}}, bytes(24)),
            "tensor u overlaps the tensor before it: it starts at byte 146, 154 is needed",
        ),
    ],
)
def test_a_broken_shard_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_shard(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="its header would have 100000001 bytes, the limit is 100000000"):
        read_shard(path)


def test_metadata_and_empty_tensors_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    empty = {"dtype": "F32", "shape": [0, 4], "data_offsets": [16, 16]}
    path.write_bytes(encode({"__metadata__": {"format": "pt"}, "t": ENTRY, "e": empty}, bytes(16)))
    assert {name: tensor.nbytes for name, tensor in read_shard(path).items()} == {"t": 16, "e": 0}


FIRST = next(iter(SHAPES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FIRST: "c.safetensors"}, "names c.safetensors, which is not in the folder; download that shard"),
        ({FIRST: "b.safetensors"}, f"says that tensor {FIRST} is in b.safetensors, which does not hold it"),
        ({"extra": "a.safetensors"}, "says that tensor extra is in a.safetensors, which does not hold it"),
        ({FIRST: "../a.safetensors"}, f"puts tensor {FIRST!r} in '../a.safetensors'; a .safetensors file of the same folder"),
        ({FIRST: "/etc/passwd"}, f"puts tensor {FIRST!r} in '/etc/passwd';"),
        ({FIRST: ".."}, f"puts tensor {FIRST!r} in '..';"),
        ({FIRST: 3}, f"puts tensor {FIRST!r} in 3;"),
        ({FIRST: "a\n.safetensors"}, f"puts tensor {FIRST!r} in 'a\\n.safetensors';"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(changes: Fields, message: str, tmp_path: Path) -> None:
    edit_index(write_sharded(tmp_path), **changes)
    assert message_of(tmp_path).startswith(f"{tmp_path}/model.safetensors.index.json: {message}")


def test_an_index_without_a_weight_map_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "has no weight_map" in message_of(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_shard(tmp_path / "b.safetensors", [FIRST, *list(SHAPES)[4:]])
    assert f"b.safetensors: tensor {FIRST} is also in a.safetensors" in message_of(tmp_path)


def test_a_file_that_shrank_after_opening_is_an_error_when_read(tmp_path: Path) -> None:
    checkpoint = open_safetensors(write_model(tmp_path), "m")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight ended after 316 of 320 bytes; download the file again"):
        checkpoint.read(None, "head")


VALID = encode(header_of(list(SHAPES)), b"".join(values_of(name).tobytes() for name in SHAPES))
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")
DIGITS_AND_MARKS = b'0123456789-.eE"[]{},: x\x00\xff'


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.sampled_from(DIGITS_AND_MARKS)), min_size=1, max_size=4),
    num_cut=st.integers(-3, 40),
)
def test_no_corruption_of_a_file_raises_anything_but_a_checkpoint_error(
    edits: list[tuple[int, int]], num_cut: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    content = bytearray(VALID)
    for position, byte in edits:
        content[position] = byte
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) - num_cut] if num_cut > 0 else content + bytes(-num_cut))
    assert "\n" not in error_of(lambda: read_all(tmp_path))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(SHAPES)), field=st.sampled_from(["dtype", "shape", "data_offsets", None]), value=JSON_VALUES)
def test_no_value_in_a_header_raises_anything_but_a_checkpoint_error(
    name: str, field: str | None, value: Any, tmp_path: Path
) -> None:
    header = header_of(list(SHAPES))
    header[name] = header[name] | {field: value} if field else value
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(encode(header, VALID[HEADER_END:]))
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path, "m")
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(st.sampled_from([*CONFIG, "rope_scaling", "eos_token_id", "layer_types"]), JSON_VALUES))
def test_no_value_in_a_config_raises_anything_but_a_checkpoint_error(fields: Fields) -> None:
    for model_type in ("llama", "qwen3"):
        config = CONFIG | {"model_type": model_type, "use_sliding_window": True} | fields
        assert "\n" not in error_of(partial(model_spec, config, None, name="m"))
