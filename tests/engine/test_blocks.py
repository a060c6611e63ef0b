"""Models in the blocks of a GGUF file through the whole engine: the dequantised model's logits, and every byte of the formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from offload_sirius import load as load_model
from offload_sirius.blocks import BLOCK_FORMATS
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.decode.model import Ask
from offload_sirius.engine import Engine
from offload_sirius.engine.packing import pack
from offload_sirius.engine.placement import Placement, place
from offload_sirius.engine.progress import NoProgress
from offload_sirius.errors import ConfigError
from offload_sirius_loaders import open_checkpoint

from ..weights.simulated import SimulatedUplink
from .conftest import CONTEXT, Load

WIDTH, HEADS, KV_HEADS, FFN, VOCAB, LAYERS = 256, 4, 2, 512, 64, 4
NUM_NEW = 12
ASKED: dict[str, Any] = {"max_new_tokens": NUM_NEW, "ignore_eos": True}
PROMPT = [5, 3, 60, 22, 7, 7, 41]
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "attn_output": "Q5_0", "ffn_up": "Q8_0", "attn_k": "F32"}
MATRICES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
BY_LAYER = {"attn_v": "Q5_K", **{f"blk.{layer}.{name}": "Q6_K" for layer in (0, 2) for name in ("attn_v", "ffn_down")}}
BY_LAYER |= {"blk.3.ffn_down": "F32", "blk.3.attn_v": "Q8_0"}
"""As llama.cpp mixes them: some layers have more bits for some matrices than others."""


def stored(name: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Weights as a file has them. The library writes no super-blocks: any bits are some, with small halves."""
    generator = np.random.default_rng(list(name.encode()))
    if dtype in ("F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        values = generator.standard_normal(shape).astype(np.float32) * 0.06
        return quants.quantize(values, GGMLQuantizationType[dtype])
    form = BLOCK_FORMATS[dtype]
    raw = generator.integers(0, 256, (shape[0], shape[1] // form.block, form.block_nbytes), np.uint8)
    halves = generator.uniform(1, 2, (*raw.shape[:2], 2)) * ((2e-4, 1e-4) if dtype == "Q4_K" else (1e-4, 5e-5))
    if dtype == "Q6_K":
        raw[..., -2:] = (halves * 0.3).astype(np.float16).view(np.uint8)[..., :2]
    else:
        raw[..., :4] = halves.astype(np.float16).view(np.uint8)
    return raw.reshape(shape[0], -1)


def write_model(path: Path, dtype: str, changed: dict[str, str] | None = None) -> str:
    """A small llama of one type; changed: name of a tensor, of all layers or one, -> another type."""
    writer = GGUFWriter(path, "llama")
    for key, value in {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": WIDTH // HEADS,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", [*(chr(ord("0") + index) for index in range(VOCAB - 1)), "01"])
    writer.add_array("tokenizer.ggml.merges", ["0 1"])
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH)}
    shapes |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    named = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {"token_embd": (VOCAB, WIDTH), **named}.items():
        kind = (changed or {}).get(name, (changed or {}).get(name.rpartition(".")[2], dtype))
        writer.add_tensor(f"{name}.weight", stored(name, shape, kind), raw_dtype=GGMLQuantizationType[kind])
    for name in ["output_norm", *(f"blk.{layer}.{norm}" for layer in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def logits_of(engine: Engine) -> torch.Tensor:
    """Of a prompt, and of a step of three tokens behind it."""
    model = engine._streamed
    model.prepare(engine.config.decoding)
    model.slots[0].begin(0)
    (first,) = model.run([Ask(slot=model.slots[0], kind="prefill", token_ids=PROMPT, following="full")])  # [1, V]
    (behind,) = model.run([Ask(slot=model.slots[0], kind="full", token_ids=[1, 2, 3], following="full")])  # [3, V]
    return torch.cat((first, behind))


def placed(model: str, **decoding: Any) -> Placement:
    config = EngineConfig(model=model, device="cpu", max_context=CONTEXT, dtype="float32", decoding=DecodingConfig(**decoding))
    return place(open_checkpoint(model), config)


def streaming(model: str, room: int = 2, **decoding: Any) -> dict[str, Any]:
    """Settings with which that many layers have room on the device, and caches where drafts want some."""
    plan = placed(model, **decoding).plan
    fixed = sum(plan.device_bill[what] for what in plan.device_bill if what not in ("resident_layers", "slots", "neuron_cache"))
    caches = 4 * plan.num_cached_neurons * 2000
    return {**decoding, "model": model, "device_memory": str(fixed + room * plan.layer_nbytes + caches), "host_memory": "300MB"}


def hot(model: str, num_slots: int = 3, **decoding: Any) -> dict[str, Any]:
    """Settings with which a share of the neurons of every layer is hot, beside slots for all neurons of a layer."""
    decoding = {"mode": "sirius", "draft": "resident", "keep": 0.5} | decoding
    placement = placed(model, **decoding)
    plan, layout = placement.plan, placement.layout
    fixed = sum(nbytes for what, nbytes in plan.device_bill.items() if what not in ("attention", "hot_neurons", "slots"))
    resident = layout.attention_nbytes + plan.hot.num_hot * layout.neuron_nbytes + 64  # type: ignore[union-attr]
    memory = fixed + LAYERS * resident + num_slots * layout.records_nbytes
    return {**decoding, "model": model, "device_memory": str(memory), "host_memory": "300MB"}


@pytest.mark.parametrize("dtype", list(BLOCK_FORMATS))
def test_blocks_give_the_logits_of_the_numbers_that_they_stand_for(dtype: str, tmp_path: Path, load: Load) -> None:
    model = write_model(tmp_path / "m.gguf", dtype)
    kept, plain = load(model, dtype="float32"), load(model, dtype="float32", keep_blocks=False)
    assert kept.plan.layer_nbytes < plain.plan.layer_nbytes / 3
    expected = logits_of(plain)
    assert expected.std() > 0.05
    torch.testing.assert_close(logits_of(kept), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=[("Q4_1", {}), ("Q4_K", MIXED), ("Q4_K", BY_LAYER)], ids=["Q4_1", "mixed", "by layer"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("blocks") / "m.gguf", *request.param)


@pytest.fixture(scope="module")
def plain(model: str) -> Iterator[Engine]:
    """The model by itself, resident, in its blocks."""
    with load_model(model, mode="full", device="cpu", threads=1, max_context=CONTEXT, dtype="float32") as engine:
        yield engine


@pytest.mark.parametrize(
    "decoding",
    [
        {"mode": "full"},
        {"mode": "sirius", "draft": "streamed", "keep": 0.4, "window": 5},
        {"mode": "sirius", "draft": "streamed", "keep": 0.4, "window": 5, "tree_width": 3},
        {"mode": "sirius", "draft": "streamed", "sparsity": "cats", "keep": 0.4, "window": 5, "tree_width": 2},
    ],
    ids=str,
)
def test_exact_answers_over_a_link_are_the_full_model_s(decoding: dict[str, Any], model: str, plain: Engine, load: Load) -> None:
    engine = load(**streaming(model, **decoding), dtype="float32")
    assert len(engine.plan.streamed_layers) >= 2
    found = engine.generate(PROMPT, **ASKED)
    assert found.token_ids == plain.generate(PROMPT, **ASKED).token_ids
    assert found.link.bytes.full == found.passes.full * engine.plan.pass_nbytes
    assert found.memory.device_peak_bytes <= found.memory.device_plan_bytes


@pytest.mark.parametrize("refresh", [True, False])
def test_exact_answers_with_a_hot_set_are_the_full_model_s(refresh: bool, model: str, plain: Engine, load: Load) -> None:
    engine = load(**hot(model, refresh=refresh, tree_width=2, window=5, refresh_decay=0.2), dtype="float32")
    assert engine.plan.hot is not None
    expected = plain.generate(PROMPT, **ASKED).token_ids
    found = engine.generate(PROMPT, **ASKED)
    assert found.token_ids == expected
    assert found.link.bytes.draft == 0
    assert found.link.bytes.correction == found.passes.correction * engine.plan.pass_nbytes


@pytest.mark.parametrize("own_memory", [False, True], ids=["same memory", "own memory"])
@pytest.mark.parametrize("packed", [False, True], ids=["the file", "a copy"])
def test_layers_in_blocks_may_stay_on_disk(
    own_memory: bool, packed: bool, model: str, plain: Engine, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink = SimulatedUplink()
    if own_memory:
        monkeypatch.setattr("offload_sirius.engine.building.uplink_to", lambda device: uplink)
    if packed:
        pack(EngineConfig(model=model, dtype="float32"), tmp_path / "packed", NoProgress())
        model = str(tmp_path / "packed")
    settings = streaming(model, mode="full")
    placement = placed(model, mode="full")
    host_nbytes = placement.planned.demand.reading.nbytes(2) + placement.plan.host_bill["embedding"]
    engine = load(**settings | {"host_memory": str(host_nbytes)}, dtype="float32")
    assert len(engine.plan.disk_layers) == LAYERS - len(engine.plan.resident_layers) >= 3
    for _ in range(3):
        assert torch.equal(logits_of(engine), logits_of(plain))
    engine.close()
    uplink.close()


@pytest.mark.parametrize("packed", [False, True], ids=["the file", "a copy"])
def test_kept_neurons_of_layers_on_disk_find_their_own_table(packed: bool, load: Load, tmp_path: Path) -> None:
    """A file has the table in the blocks of the down projection, which all of a layer is read for; a copy has it by itself."""
    model = write_model(tmp_path / "m.gguf", "Q4_1")
    if packed:
        pack(EngineConfig(model=model, dtype="float32"), tmp_path / "packed", NoProgress())
        model = str(tmp_path / "packed")
    decoding: dict[str, Any] = {"mode": "sparse", "draft": "streamed", "keep": 0.4}
    placement = placed(model, **decoding)
    readers, embedding = placement.planned.demand.reading.nbytes(2), placement.plan.host_bill["embedding"]
    host_nbytes = readers + embedding + LAYERS * placement.layout.kept_host_nbytes
    engine = load(**streaming(model, **decoding) | {"host_memory": str(host_nbytes)}, dtype="float32")
    assert engine.plan.disk_layers
    assert len(engine.plan.kept_layers) == (LAYERS if packed else 0)
    resident = load(model, dtype="float32", **decoding)
    assert engine.generate(PROMPT, **ASKED).token_ids == resident.generate(PROMPT, **ASKED).token_ids


def test_layers_of_different_blocks_give_the_logits_of_their_numbers(tmp_path: Path, load: Load) -> None:
    model = write_model(tmp_path / "m.gguf", "Q4_K", BY_LAYER)
    kept, plain = load(model, dtype="float32"), load(model, dtype="float32", keep_blocks=False)
    torch.testing.assert_close(logits_of(kept), logits_of(plain), rtol=0, atol=1e-4)


def test_a_pass_over_the_link_takes_the_bytes_of_the_blocks(tmp_path: Path, load: Load) -> None:
    """Of each matrix its own, of each neuron four more, norms, and what fills cache lines: none here."""
    model = write_model(tmp_path / "m.gguf", "Q5_K", {"attn_v": "Q6_K", "blk.1.ffn_down": "Q6_K", "blk.2.ffn_down": "Q6_K"})
    engine = load(**streaming(model, mode="full"), dtype="float32")
    infos = open_checkpoint(model).tensors
    assert infos[0, "down"].nbytes == WIDTH * FFN // 256 * 176
    assert infos[1, "down"].nbytes == WIDTH * FFN // 256 * 210
    streamed = engine.plan.streamed_layers
    nbytes = sum(info.nbytes for (layer, _), info in infos.items() if layer in streamed) + len(streamed) * 4 * FFN
    found = engine.generate(PROMPT, **ASKED)
    assert found.link.bytes.full == found.passes.full * nbytes == found.passes.full * engine.plan.pass_nbytes


def test_memory_is_that_of_the_file(tmp_path: Path, load: Load) -> None:
    """What the plan has for weights, wherever they are, beside what reading takes."""
    model = write_model(tmp_path / "m.gguf", "Q4_K", {"attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K", "blk.3.ffn_down": "Q6_K"})
    stored = sum(info.nbytes for info in open_checkpoint(model).tensors.values())
    for settings in ({"mode": "full", "model": model}, streaming(model, mode="full")):
        plan = load(**settings, dtype="float32").plan
        layers = plan.device_bill["resident_layers"] + plan.host_bill["layers"]
        held = layers + plan.device_bill["head"] + plan.device_bill["final_norm"] + plan.host_bill["embedding"]
        assert stored <= held <= 1.03 * stored


def test_a_packed_copy_keeps_the_blocks_and_answers_as_the_file_does(
    model: str, plain: Engine, tmp_path: Path, load: Load
) -> None:
    pack(EngineConfig(model=model, dtype="float32"), tmp_path / "packed", NoProgress())
    copy = str(tmp_path / "packed")
    stored = sum(info.nbytes for info in open_checkpoint(model).tensors.values())
    assert sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors")) < 1.03 * stored + 5 * 3 * 4096
    resident = load(copy)
    assert resident.plan == plain.plan
    assert torch.equal(logits_of(resident), logits_of(plain))
    placement = placed(copy)
    host_nbytes = placement.planned.demand.reading.nbytes(2) + placement.plan.host_bill["embedding"]
    from_disk = load(**streaming(copy, mode="full") | {"host_memory": str(host_nbytes)})
    assert len(from_disk.plan.disk_layers) >= 2
    assert torch.equal(logits_of(from_disk), logits_of(plain))


@pytest.mark.parametrize("changed", [{}, dict.fromkeys(MATRICES, "F32")], ids=["everywhere", "outside of layers"])
def test_blocks_of_a_packed_copy_cannot_be_left(changed: dict[str, str], tmp_path: Path) -> None:
    pack(EngineConfig(model=write_model(tmp_path / "m.gguf", "Q8_0", changed)), tmp_path / "packed", NoProgress())
    with pytest.raises(ConfigError, match="--no-keep-blocks is given, and packed is packed in blocks; leave it out, or pack"):
        load_model(str(tmp_path / "packed"), keep_blocks=False, device="cpu")
