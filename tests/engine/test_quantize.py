"""Weights in 8 and 4 bits through the whole engine: the plain model of the same numbers, and every byte of the formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine
from offload_sirius.engine.placement import Placement, place
from offload_sirius.errors import BudgetError, ConfigError
from offload_sirius.kernels.matrix import project
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.model.dense import DenseSource
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius.quantization import WeightFormat
from offload_sirius.weights.layout import layer_layout
from offload_sirius.weights.quant import dequantise_rows, quantise_rows
from offload_sirius_loaders import open_checkpoint

from .conftest import CONTEXT, TINY, Load

NUM_NEW = 20
ASKED: dict[str, Any] = {"max_new_tokens": NUM_NEW, "ignore_eos": True}
FORMATS = [{"quantize": "int8"}, {"quantize": "int4"}, {"quantize": "int4", "quantize_group": 32}]
TIED = "synthetic:llama-3.2-1b?layers=2&width=64&heads=4&kv_heads=2&ffn=128&vocab=384&positions=256&dtype=F32"
"""Head and embedding are one."""
SAMPLED = {"temperature": 1.1, "top_p": 0.95, "seed": 5}


def whole(kind: dict[str, Any]) -> Iterator[Engine]:
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT, **kind) as engine:
        yield engine


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def plain(kind: dict[str, Any]) -> Iterator[Engine]:
    """The model by itself, resident, in that format."""
    yield from whole(kind)


def placed(kind: dict[str, Any], **decoding: Any) -> Placement:
    config = EngineConfig(model=TINY, device="cpu", max_context=CONTEXT, decoding=DecodingConfig(**decoding), **kind)
    return place(open_checkpoint(TINY), config)


def streaming(kind: dict[str, Any], room: int = 2, **decoding: Any) -> dict[str, Any]:
    """Settings with which that many layers have room on the device, and caches where drafts want some."""
    plan = placed(kind, **decoding).plan
    fixed = sum(plan.device_bill[what] for what in plan.device_bill if what not in ("resident_layers", "slots", "neuron_cache"))
    caches = 4 * plan.num_cached_neurons * 1000
    return {**kind, **decoding, "device_memory": str(fixed + room * plan.layer_nbytes + caches), "host_memory": "200MB"}


def hot(kind: dict[str, Any], num_slots: int = 3, **decoding: Any) -> dict[str, Any]:
    """Settings with which a share of the neurons of every layer is hot, beside slots for all neurons of a layer."""
    decoding = {"mode": "sirius", "draft": "resident", "keep": 0.5} | decoding
    placement = placed(kind, **decoding)
    plan, layout = placement.plan, placement.layout
    fixed = sum(nbytes for what, nbytes in plan.device_bill.items() if what not in ("attention", "hot_neurons", "slots"))
    resident = layout.of(placement.planned.spec).attention_nbytes + plan.hot.num_hot * layout.neuron_nbytes  # type: ignore[union-attr]
    memory = fixed + 4 * (resident + 64) + num_slots * layout.records_nbytes
    return {**kind, **decoding, "device_memory": str(memory), "host_memory": "200MB"}


def test_the_full_model_is_that_of_the_numbers_that_the_rows_stand_for(kind: dict[str, Any], plain: Engine) -> None:
    checkpoint = open_checkpoint(TINY)
    form = EngineConfig(**kind).weight_format
    assert form is not None

    def rounded(tensor: Tensor) -> Tensor:
        return dequantise_rows(quantise_rows(tensor, form), tensor.shape[1], form)

    tensors = {key: torch.from_numpy(checkpoint.read(*key)).float() for key in checkpoint.tensors}
    for (layer, role), tensor in tensors.items():
        if layer is not None and tensor.dim() == 2:
            tensors[layer, role] = rounded(tensor.t().contiguous()).t() if role == "down" else rounded(tensor)
    model = Transformer(
        checkpoint.spec, DenseSource(checkpoint.spec, tensors), KVCache(checkpoint.spec, CONTEXT, dtype=torch.float32)
    )
    prompt_ids = plain.model.encode("hello", chat=True)
    logits, expected = model.prefill(torch.tensor(prompt_ids)), []
    for _ in range(NUM_NEW):
        expected.append(int(logits.argmax()))
        logits = model.step(torch.tensor(expected[-1:]))[0]
    assert plain.generate("hello", **ASKED).token_ids == tuple(expected)


@pytest.mark.parametrize(
    "decoding",
    [
        {"mode": "full"},
        {"mode": "sirius", "draft": "streamed", "keep": 0.4, "window": 5},
        {"mode": "sirius", "draft": "streamed", "keep": 0.4, "window": 5, "tree_width": 3},
        {"mode": "sirius", "draft": "streamed", "sparsity": "cats", "keep": 0.4, "window": 5},
        {"mode": "sirius", "draft": "streamed", "sparsity": "cats", "keep": 0.4, "window": 5, "tree_width": 3},
    ],
    ids=str,
)
def test_exact_answers_over_a_link_are_the_full_model_s(
    decoding: dict[str, Any], kind: dict[str, Any], plain: Engine, load: Load
) -> None:
    engine = load(**streaming(kind, **decoding))
    assert len(engine.plan.streamed_layers) >= 2
    for sampling in ({}, SAMPLED):
        expected = plain.generate("hello", **ASKED, **sampling).token_ids
        assert engine.generate("hello", **ASKED, **sampling).token_ids == expected


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("tree_width", [1, 3])
def test_exact_answers_with_a_hot_set_are_the_full_model_s(
    refresh: bool, tree_width: int, kind: dict[str, Any], plain: Engine, load: Load
) -> None:
    engine = load(**hot(kind, refresh=refresh, tree_width=tree_width, window=5))
    assert engine.plan.hot is not None
    for sampling in ({}, SAMPLED):
        expected = plain.generate("hello", **ASKED, **sampling).token_ids
        found = engine.generate("hello", **ASKED, **sampling)
        assert found.token_ids == expected
        assert_bytes(found, engine)


@pytest.mark.parametrize("kind", [{}, {"quantize": "int4"}], ids=str)
@pytest.mark.parametrize("model", [TINY, TIED])
def test_a_head_in_8_bits_is_that_of_the_numbers_that_its_rows_stand_for(model: str, kind: dict[str, Any], load: Load) -> None:
    checkpoint, form = open_checkpoint(model), WeightFormat(kind="int8", group=64)
    engine = load(model, quantize_head="int8", mode="sirius", window=5, **kind)
    embedding = torch.from_numpy(checkpoint.read(None, "embedding")).float()
    head = embedding if checkpoint.spec.tied_head else torch.from_numpy(checkpoint.read(None, "head")).float()
    plain = load(model, **kind)
    expected = dequantise_rows(quantise_rows(head, form), checkpoint.spec.width, form)
    found = engine._streamer.head
    assert isinstance(found, QuantizedRows)
    assert torch.equal(found.dequantised(), expected)
    token = torch.tensor([7])
    assert torch.equal(engine._streamer.embed(token), plain._streamer.embed(token))
    hidden = torch.randn(3, checkpoint.spec.width)
    torch.testing.assert_close(project(hidden, found), hidden @ expected.t(), rtol=1e-4, atol=1e-4)
    plan, nbytes = engine.plan, checkpoint.spec.vocab_size * form.row_nbytes(checkpoint.spec.width)
    assert (plan.device_bill["head"], plan.embedding_place) == (nbytes, "host")
    asked = ASKED | SAMPLED
    full = engine.generate("hello", **asked, mode="full")
    assert engine.generate("hello", **asked).token_ids == full.token_ids
    assert full.memory.device_peak_bytes <= full.memory.device_plan_bytes


def assert_bytes(found: Generation, engine: Engine) -> None:
    """Of drafts that bring nothing, and corrections that bring what is cold."""
    assert engine.plan.hot is not None
    assert found.link.bytes.draft == 0
    assert found.link.bytes.correction == found.passes.correction * engine.plan.pass_nbytes
    assert engine.plan.pass_nbytes == 4 * engine.plan.hot.cold_nbytes


def test_a_pass_over_the_link_takes_the_format_s_bytes(kind: dict[str, Any], load: Load) -> None:
    engine = load(**streaming(kind, mode="full"))
    found, spec, form = engine.generate("hello", **ASKED), engine.spec, EngineConfig(**kind).weight_format
    assert form is not None
    row, mixed = form.row_nbytes(spec.width), form.row_nbytes(spec.num_heads * spec.head_dim)
    heads = spec.num_heads + 2 * spec.num_kv_heads
    norms = 2 * spec.width * 4
    layer = norms + heads * spec.head_dim * row + spec.width * mixed + 3 * spec.ffn_width * row
    assert engine.plan.layer_nbytes == layer, "every field of the tiny shape fills whole cache lines"
    assert found.link.bytes.full == found.passes.full * len(engine.plan.streamed_layers) * layer


@pytest.mark.parametrize("decoding", [{"mode": "full"}, {"mode": "sirius", "draft": "streamed", "window": 4}], ids=str)
def test_memory_stays_within_the_plan_and_the_plan_within_the_budgets(
    decoding: dict[str, Any], kind: dict[str, Any], load: Load
) -> None:
    settings = streaming(kind, **decoding)
    memory = load(**settings).generate("hello", **ASKED).memory
    assert memory.device_peak_bytes <= memory.device_plan_bytes <= int(settings["device_memory"])


def test_layers_that_would_stay_on_disk_are_refused_and_what_is_said_to_do_does(kind: dict[str, Any], load: Load) -> None:
    settings = streaming(kind, mode="full")
    placement = placed(kind, mode="full")
    plan, readers = placement.plan, placement.planned.demand.reading.nbytes(2)
    beside = plan.host_bill["quantising"] + plan.host_bill["embedding"]
    with pytest.raises(BudgetError, match=r"too small for --quantize, which needs all streamed layers in host memory") as caught:
        load(**settings | {"host_memory": str(readers + beside + plan.layer_nbytes)})
    needed = str(caught.value).partition("at least --host-memory ")[2].partition(",")[0]
    assert load(**settings | {"host_memory": needed}).plan.disk_layers == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int3"}, "--quantize is int3; it must be one of none, int8, int4"),
        ({"quantize_group": 32}, "--quantize-group is 32; it must be left out without --quantize"),
        ({"quantize_head": "int4"}, "--quantize-head is int4; it must be one of none, int8"),
        ({"quantize": "int4", "quantize_group": 48}, "--quantize-group is 48; it must be one of 32, 64, 128"),
    ],
)
def test_formats_that_do_not_exist_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)
    assert str(caught.value) == message


def test_a_70b_in_four_bits_has_the_bytes_of_its_arithmetic() -> None:
    spec = open_checkpoint("synthetic:llama-3-70b").spec
    layout = layer_layout(spec, 2, 0, WeightFormat(kind="int4", group=128))
    row, norms = 4096 + 64 * 2 + 4 + 64 + 12, 2 * 8192 * 2  # integers, scales, outlier, zeros, padding
    assert layout.attention_nbytes == norms + (8192 + 2 * 1024 + 8192) * row
    assert layout.records_nbytes == 3 * 28672 * row
    assert layout.neuron_nbytes == 3 * row
    assert 80 * layout.nbytes == pytest.approx(35.6e9, rel=0.015)


def test_weights_are_quantised_by_as_many_threads_as_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[int]()

    def counting(*arguments: Any) -> Tensor:
        found.append(torch.get_num_threads())
        return quantise_rows(*arguments)

    monkeypatch.setattr("offload_sirius.weights.load.quantise_rows", counting)
    before = torch.get_num_threads()
    try:
        with offload_sirius.load(TINY, mode="full", device="cpu", threads=3, max_context=CONTEXT, quantize="int4"):
            assert set(found) == {3}
    finally:
        torch.set_num_threads(before)
