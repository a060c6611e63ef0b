"""One file of a packed model: where its tensors lie, what its checksums find, that it is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.pack_file import (
    BLOCK_NBYTES,
    CHECKED_NBYTES,
    OutTensor,
    Seal,
    read_file,
    seal_of,
    write_file,
)

SHAPES = st.tuples(st.sampled_from(["U8", "F32", "BF16"]), st.integers(1, 40), st.integers(1, 400))
CUTS = st.lists(st.integers(1, 5000), min_size=1, max_size=4)
NOTES = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "crc32"), st.text(max_size=2000), max_size=3)


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8).tobytes()


def cut(content: bytes, lengths: list[int]) -> list[memoryview]:
    """In pieces of these lengths, over and over."""
    pieces, start = [], 0
    while start < len(content):
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(memoryview(content)[start : start + length])
        start += length
    return pieces


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(SHAPES, min_size=1, max_size=5), cuts=CUTS, notes=NOTES)
def test_whatever_is_written_is_read_back_and_each_tensor_begins_at_a_block(
    shapes: list[tuple[str, int, int]], cuts: list[int], notes: dict[str, str], tmp_path: Path
) -> None:
    tensors = [OutTensor(name=f"t{index}", dtype=each[0], shape=each[1:]) for index, each in enumerate(shapes)]
    contents = [random_bytes(tensor.nbytes, index) for index, tensor in enumerate(tensors)]
    path = tmp_path / "f.safetensors"
    write_file(path, [(tensor, cut(content, cuts)) for tensor, content in zip(tensors, contents, strict=True)], notes)
    file, found = read_file(path), path.read_bytes()
    assert file.notes == notes
    assert file.head_nbytes % BLOCK_NBYTES == 0
    assert list(file.tensors) == [tensor.name for tensor in tensors]
    for tensor, content in zip(tensors, contents, strict=True):
        stored = file.tensors[tensor.name]
        assert (stored.dtype, stored.shape, stored.offset % BLOCK_NBYTES) == (tensor.dtype, tensor.shape, 0)
        assert found[stored.offset : stored.end] == content
    assert all(file.is_whole(index) for index in range(file.num_pieces))


def write_one(path: Path, nbytes: int = 2 * CHECKED_NBYTES + 5000) -> bytes:
    content = random_bytes(nbytes)
    write_file(path, [(OutTensor(name="bytes", dtype="U8", shape=(nbytes,)), [memoryview(content)])])
    return content


def test_each_piece_may_be_made_in_the_memory_of_the_one_before(tmp_path: Path) -> None:
    memory = bytearray(100)

    def chunks() -> Iterator[memoryview]:
        for number in range(5):
            memory[:] = bytes([number]) * 100
            yield memoryview(memory)

    write_file(tmp_path / "f.safetensors", [(OutTensor(name="bytes", dtype="U8", shape=(500,)), chunks())])
    assert load_file(tmp_path / "f.safetensors")["bytes"].tobytes() == b"".join(bytes([number]) * 100 for number in range(5))


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    content = write_one(tmp_path / "f.safetensors")
    assert load_file(tmp_path / "f.safetensors")["bytes"].tobytes() == content


@pytest.mark.parametrize(("at", "piece"), [(0, 0), (CHECKED_NBYTES - 1, 0), (CHECKED_NBYTES, 1), (2 * CHECKED_NBYTES + 4999, 2)])
def test_a_flipped_bit_is_found_in_its_piece_and_named(at: int, piece: int, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_one(path)
    file = read_file(path)
    flip(path, file.head_nbytes + at)
    assert [file.is_whole(index) for index in range(file.num_pieces)] == [index != piece for index in range(3)]
    start = file.head_nbytes + piece * CHECKED_NBYTES
    assert file.damage(piece).startswith(f"f.safetensors: bytes, bytes {start} to ")


def flip(path: Path, at: int) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_the_file_that_was_there(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_one(path, 100)
    before = path.read_bytes()

    def chunks() -> object:
        yield memoryview(bytes(50))
        raise error

    with pytest.raises(type(error)):
        write_file(path, [(OutTensor(name="bytes", dtype="U8", shape=(100,)), chunks())])  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, name=name, call=call: (calls.append(name), call(*arguments)))
    write_one(tmp_path / "f.safetensors", 100)
    assert calls == ["fsync", "replace", "fsync"], "the data, the name, the folder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), r"f\.safetensors: is missing; pack the model again"),
        (lambda path: os.truncate(path, 5000), r"has 5000 bytes, 8192 were written; pack the model again"),
        (lambda path: flip(path, 20), r"its first 4096 bytes are not those that were written; pack the model again"),
    ],
)
def test_a_seal_tells_whether_a_file_is_the_one_that_was_written(change: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_one(path, 100)
    seal = seal_of(path, read_file(path).head_nbytes)
    assert (seal.nbytes, seal.head_nbytes) == (2 * BLOCK_NBYTES, BLOCK_NBYTES)
    seal.check(path)
    change(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        seal.check(path)


def test_the_seal_of_a_small_file_is_of_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"123456789")
    assert seal_of(tmp_path / "config.json") == Seal(nbytes=9, head_nbytes=9, crc32=0xCBF43926)


def test_a_safetensors_file_without_checksums_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"bytes": np.zeros(10, np.uint8)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="header: has no checksums of 1 pieces; pack the model again"):
        read_file(tmp_path / "f.safetensors")
