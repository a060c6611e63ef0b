"""The models that are broken: small, good ones of every kind that can be opened, as the files of a folder each."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers

from offload_sirius.config import EngineConfig
from offload_sirius.engine import NoProgress
from offload_sirius.engine.packing import pack
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.writer import write_checkpoint
from tests.loaders.quantised import WAYS, write_pair

SHAPE = "layers=1&width=32&heads=2&kv_heads=1&ffn=48&vocab=300&positions=64"
QUANTISED = (
    "awq",
    "gptq, any order",
    "int4 groups with zero points",
    "int4 groups in any order",
    "fp8 blocks",
    "int8 with zero points",
)
BLOCK_TYPES = ("Q8_0", "Q4_1", "Q4_K", "Q6_K")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{% if loop.last %}{{ bos_token }}{% endif %}{% endfor %}"
)
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

Corpus = dict[str, dict[str, bytes]]
"""Name of a model -> its files by name."""


def make_corpus(folder: Path) -> Corpus:
    """Write them to the folder, which is new, and read them."""
    folder.mkdir(parents=True)
    _write_plain(folder / "plain")
    _write_windows(folder / "windows")
    for way in QUANTISED:
        write_pair(WAYS[way], _made(folder / f"{way} pair"))[0].rename(folder / way)
        _write_tokenizer(folder / way)
    for kind in ("gpt2", "llama"):
        _write_gguf(_made(folder / f"gguf {kind}") / "model.gguf", kind)
    for quantize in ("none", "int8", "int4"):
        group = None if quantize == "none" else 32
        config = EngineConfig(model=str(folder / "plain"), quantize=quantize, quantize_group=group)  # type: ignore[arg-type]
        pack(config, folder / f"packed {quantize}", NoProgress())
    packed_gguf = EngineConfig(model=str(folder / "gguf gpt2" / "model.gguf"))
    pack(packed_gguf, folder / "packed gguf", NoProgress())
    return read_corpus(folder)


def read_corpus(folder: Path) -> Corpus:
    """What make_corpus has written."""
    models = sorted(each for each in folder.iterdir() if not each.name.endswith(" pair"))
    return {model.name: {file.name: file.read_bytes() for file in sorted(model.iterdir())} for model in models}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write_plain(folder: Path) -> None:
    """Two shards and an index, a tokenizer and a template; RoPE with parameters."""
    write_checkpoint(open_checkpoint(f"synthetic:tiny?{SHAPE}&dtype=F32"), folder, max_shard_nbytes=50_000)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": ROPE}))
    _write_tokenizer(folder)


def _write_windows(folder: Path) -> None:
    """One file, another architecture, layers with windows."""
    write_checkpoint(open_checkpoint(f"synthetic:tiny?{SHAPE}&dtype=BF16"), folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
    windows = {"model_type": "mistral", "sliding_window": 8, "rope_scaling": rope, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | windows))
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    words = {f"w{token_id}": token_id for token_id in range(60)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _write_gguf(path: Path, kind: str) -> None:
    """One layer, matrices of several types, a tokenizer of the given kind."""
    width, ffn, heads, kv_rows = 256, 256, 4, 128
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_chat_template(TEMPLATE)
    vocabulary = _add_tokens(writer, kind)
    shapes = {
        "token_embd.weight": (vocabulary, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (kv_rows, width),
        "blk.0.attn_v.weight": (kv_rows, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.ffn_gate.weight": (ffn, width),
        "blk.0.ffn_up.weight": (ffn, width),
        "blk.0.ffn_down.weight": (width, ffn),
    }
    random = np.random.default_rng(0)
    types = iter(BLOCK_TYPES * 3)
    for name, shape in shapes.items():
        values = random.normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            continue
        form = gguf.GGMLQuantizationType[next(types)]
        # The package quantises the simple types only; of the others any bytes are weights.
        rows = (shape[0], gguf.quants.quant_shape_to_byte_shape(shape, form)[-1])
        writer.add_tensor(name, random.integers(0, 60, rows, np.uint8), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: gguf.GGUFWriter, kind: str) -> int:
    """A small vocabulary; returns its size."""
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        tokens = ["<s>", "</s>", *"abcdefgh", "ab", "abc"]
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(["a b", "ab c"])
    else:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(0, 256, 16)), "▁", "a", "b", "ab", "▁ab"]
        writer.add_token_scores([-float(place) for place in range(len(tokens))])
        writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    return len(tokens)
