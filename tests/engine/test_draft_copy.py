"""Drafts on a quantised copy through the whole engine: exact answers, and every byte."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

import offload_sirius
from offload_sirius.config import DRAFT_GROUPS, DecodingConfig, EngineConfig
from offload_sirius.decode.model import Ask
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine
from offload_sirius.engine.placement import place
from offload_sirius.engine.planning import alternatives
from offload_sirius.errors import BudgetError, ConfigError
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import WeightFormat
from offload_sirius.sparsity.copied import CopiedSet
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.draft_copy import CopyStreamer
from offload_sirius.weights.quant import dequantise_rows, quantise_rows
from offload_sirius_loaders import open_checkpoint

from ..model.recording import TapeRecorder
from .conftest import CONTEXT, TINY, Load

ASKED: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 11}
TARGETS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
}
NUM_LAYERS, ALL, HALF = 4, 176, 88
DEEP = "synthetic:tiny?dtype=F32&layers=24"


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[int, ...]]]:
    """Answers of each target by itself, resident: greedy, and drawn."""
    answers = {}
    for name, target in TARGETS.items():
        with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT, **target) as engine:
            answers[name] = [engine.generate("hello", **ASKED | sampling).token_ids for sampling in ({}, SAMPLED)]
    return answers


def settings(
    num_copied: int = ALL, num_slots: int = 2, draft_quantize: str = "int4", model: str = TINY, **more: Any
) -> dict[str, Any]:
    """With room for so many neurons of each layer in the copy, and for slots."""
    own = {name: more.pop(name) for name in ("dtype", "quantize", "link_gbps", "parallel", "kv_dtype") if name in more}
    decoding = DecodingConfig(**{"window": 5, "draft": "resident", "draft_quantize": draft_quantize} | more)  # type: ignore[arg-type]
    config = EngineConfig(model=model, device="cpu", max_context=CONTEXT, decoding=decoding, **own)
    plan = place(open_checkpoint(model), config).plan
    assert plan.hot is not None
    left_out = plan.device_bill["slots"] + (ALL - num_copied) * plan.device_bill["hot_neurons"] // ALL
    memory = plan.device_nbytes - left_out + num_slots * plan.layer_nbytes
    return {**own, "decoding": decoding, "mode": decoding.mode, "draft": decoding.draft, "device_memory": str(memory)}


def load_copied(load: Load, **more: Any) -> Engine:
    engine = load(**settings(**more))
    assert engine.plan.hot is not None
    assert engine.plan.hot.num_hot == more.get("num_copied", ALL)
    assert engine.plan.num_slots == more.get("num_slots", 2)
    return engine


def assert_bytes(engine: Engine, found: Generation) -> None:
    """Drafts move nothing, a correction all of every layer, and what was copied is what was computed on or is in a slot."""
    streamer = engine._streamer
    assert isinstance(streamer, CopyStreamer)
    assert found.link.bytes.draft == 0 < found.passes.draft
    assert found.link.bytes.correction == found.passes.correction * NUM_LAYERS * engine.plan.layer_nbytes
    for flight in streamer._ring:
        flight.neurons.wait()
    in_flight = sum(flight.nbytes for flight in streamer._ring)
    assert streamer.copied_nbytes == sum(streamer.pass_nbytes.values()) + streamer.discarded_nbytes + in_flight
    assert found.memory.device_peak_bytes <= found.memory.device_plan_bytes


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_copied": HALF},
        {"num_copied": HALF, "refresh": False},
        {"num_copied": HALF, "tree_width": 3},
        {"num_slots": 3, "tree_width": 3, "refresh": False},
        {"num_copied": HALF, "window": "auto", "overlap": False},
        {"window": "auto", "lookup": True, "tree_width": 2},
        {"num_copied": 20, "window": 2, "lookup": False, "prior": False},
        {"num_copied": HALF, "draft_quantize": "int8"},
    ],
    ids=str,
)
def test_exact_answers_are_those_of_the_full_model(
    more: dict[str, Any], load: Load, expected: dict[str, list[tuple[int, ...]]]
) -> None:
    engine = load_copied(load, **more)
    for number, sampling in ((0, {}), (1, SAMPLED), (0, {})):
        found = engine.generate("hello", **ASKED | sampling)
        assert found.token_ids == expected["float32"][number]
        assert_bytes(engine, found)
    full = engine.generate("hello", **ASKED, mode="full")
    assert full.token_ids == expected["float32"][0]


@pytest.mark.parametrize("num_copied", [ALL, HALF])
@pytest.mark.parametrize("target", ["bfloat16", "int8"])
def test_a_copy_of_a_16_bit_or_8_bit_target_leaves_its_answers_as_they_are(
    target: str, num_copied: int, load: Load, expected: dict[str, list[tuple[int, ...]]]
) -> None:
    engine = load_copied(load, num_copied=num_copied, **TARGETS[target])
    for sampling, ids in zip(({}, SAMPLED), expected[target], strict=True):
        found = engine.generate("hello", **ASKED | sampling)
        assert found.token_ids == ids
        assert_bytes(engine, found)


@pytest.mark.parametrize("more", [{"num_copied": HALF}, {"num_copied": HALF, "tree_width": 3, "kv_dtype": "int8"}], ids=str)
def test_answers_written_together_are_those_written_alone(more: dict[str, Any], load: Load) -> None:
    alone = load(**{name: value for name, value in more.items() if name == "kv_dtype"})
    engine = load_copied(load, parallel=3, **more)
    batch, prompts = engine.batch(), ["hello", "hello world", "good bye", "hello"]
    samplings = [{}, SAMPLED, {}, SAMPLED]
    answers = [batch.submit(prompt, **ASKED | sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
    while batch.step():
        pass
    for answer, prompt, sampling in zip(answers, prompts, samplings, strict=True):
        assert answer.result.token_ids == alone.generate(prompt, **ASKED | sampling).token_ids
        assert answer.result.passes.draft > 0
        assert answer.result.churn is not None
        assert answer.result.memory.device_peak_bytes <= answer.result.memory.device_plan_bytes
    assert engine._streamer.pass_nbytes["correction"] % (NUM_LAYERS * engine.plan.layer_nbytes) == 0
    num_corrections = engine._streamer.pass_nbytes["correction"] // (NUM_LAYERS * engine.plan.layer_nbytes)
    assert num_corrections < sum(answer.result.passes.correction for answer in answers)


def test_what_was_looked_up_is_not_learnt(load: Load) -> None:
    engine = load_copied(load, num_copied=HALF)
    engine.generate("hello", **ASKED)
    copied, model = engine._streamed.sparsity, engine._streamed
    assert isinstance(copied, CopiedSet)
    assert copied.decay is not None
    before = copied.squared_scores.sum(dim=1)  # [L]
    ask = Ask(slot=model.slots[0], kind="correction", token_ids=list(b"abcde"), following="draft", num_grafted=2)
    model.run([ask])
    # The shares of a token are 1 together.
    assert torch.allclose(copied.squared_scores.sum(dim=1), before * copied.decay + 3, rtol=1e-3)


def test_places_hold_the_quantised_neurons_that_are_chosen_whatever_was_answered_before(load: Load) -> None:
    engine = load_copied(load, num_copied=HALF, prior=False)
    copied = engine._streamed.sparsity
    assert isinstance(copied, CopiedSet)
    chosen = []
    for prompt in ("hello", "another prompt", "hello"):
        found = engine.generate(prompt, **ASKED)
        assert found.churn is not None
        assert all(layer_is_copied(engine, layer) for layer in range(NUM_LAYERS))
        chosen.append([set(copied.hot_ids(layer).tolist()) for layer in range(NUM_LAYERS)])
    assert chosen[0] == chosen[2] != chosen[1], "which they are depends on the answer alone"


def layer_is_copied(engine: Engine, layer: int) -> bool:
    """Whether the places of a layer hold what the ids say."""
    copied, streamer = engine._streamed.sparsity, engine._streamer
    assert isinstance(copied, CopiedSet)
    assert isinstance(streamer, CopyStreamer)
    form, ids = WeightFormat(kind="int4", group=DRAFT_GROUPS["int4"]), copied.hot_ids(layer)
    assert sorted([*ids.tolist(), *copied.cold_ids(layer).tolist()]) == list(range(ALL))
    for role, rows in zip(("gate", "up", "down"), _neurons(streamer, layer), strict=True):
        tensor = torch.from_numpy(engine.checkpoint.read(layer, role)).float()  # type: ignore[arg-type]
        own = tensor.t().contiguous() if role == "down" else tensor
        expected = dequantise_rows(quantise_rows(own[ids], form), own.shape[1], form)
        if not torch.equal(rows.dequantised(), expected):
            return False
    return True


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("phase", ["prefill", "correction"])
def test_neurons_that_could_not_be_copied_are_so_for_the_next_prompt(
    phase: str, error: type[BaseException], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_copied(load, num_copied=HALF, prior=False)
    copied, streamer, asked = engine._streamed.sparsity, engine._streamer, ASKED | {"reuse": False}
    assert isinstance(copied, CopiedSet)
    assert isinstance(streamer, CopyStreamer)
    engine.generate("hello", **asked)

    def broken(layer: int, *_: object) -> None:
        if layer == 2 and streamer._phase == phase:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(copied.source, "copy", broken)
        with pytest.raises(error):
            engine.generate("another prompt", **asked)
    assert not layer_is_copied(engine, 2)
    engine.generate("another prompt", **asked | {"max_new_tokens": 1})
    assert layer_is_copied(engine, 2)
    assert not copied.broken_layers


def test_ctrl_c_while_neurons_are_copied_comes_when_they_are(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_copied(load, num_copied=HALF, prior=False)
    copied = engine._streamed.sparsity
    assert isinstance(copied, CopiedSet)
    copy = copied.source.copy

    def pressed(layer: int, places: torch.Tensor, neuron_ids: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        copy(layer, places, neuron_ids)

    monkeypatch.setattr(copied.source, "copy", pressed)
    with pytest.raises(KeyboardInterrupt):
        engine.generate("hello", **ASKED)
    assert all(layer_is_copied(engine, layer) for layer in range(NUM_LAYERS))
    assert not copied.broken_layers


def _neurons(streamer: CopyStreamer, layer: int) -> list[QuantizedRows]:
    copy = streamer._copies[layer]
    assert isinstance(copy.gate, QuantizedRows)
    assert isinstance(copy.up, QuantizedRows)
    assert isinstance(copy.down, QuantizedRows)
    return [copy.gate, copy.up, copy.down]


def test_drafts_alone_are_those_of_the_copy_and_leave_the_link_alone(load: Load) -> None:
    engine = load_copied(load, mode="sparse")
    found = engine.generate("hello", **ASKED)
    assert (found.passes.draft, found.passes.correction, found.link.bytes.draft) == (19, 0, 0)
    again = engine.generate("hello", **ASKED)
    assert again.token_ids == found.token_ids


def test_draft_steps_are_recorded_on_the_copy_s_own_buffers(
    load: Load, monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[tuple[int, ...]]]
) -> None:
    recorder = TapeRecorder()
    monkeypatch.setattr("offload_sirius.engine.building.recorder_on", lambda device: recorder)
    monkeypatch.setattr("offload_sirius.model.costs.LEAST_EXTENT", 8)
    # The tape writes down torch's operations, and so does a GPU its own: not those of the CPU's library.
    monkeypatch.setattr("offload_sirius.kernels.quantized._by_library", lambda x: False)
    engine = load_copied(load, num_copied=HALF)
    found = engine.generate("hello", **ASKED | SAMPLED)
    assert found.token_ids == expected["float32"][1]
    assert recorder.num_played == found.passes.draft > 0


def test_the_link_fetches_for_the_correction_while_drafts_compute(load: Load) -> None:
    found = [load_copied(load, num_slots=3, overlap=overlap)._streamer for overlap in (True, False)]
    for streamer, under_way in zip(found, (3, 0), strict=True):
        assert isinstance(streamer, CopyStreamer)
        streamer.begin("draft", "hot")
        assert len(list(streamer._ring)) == under_way


def test_auto_considers_copies_of_fewer_bits_than_the_target_and_takes_what_is_predicted_to_be_faster(load: Load) -> None:
    spec = open_checkpoint(TINY).spec

    def kinds(**more: Any) -> list[tuple[str, str]]:
        decoding = DecodingConfig(draft_quantize="auto", resident_first="neurons")
        config = EngineConfig(model=TINY, decoding=decoding, **more)
        return [(each.decoding.draft, each.decoding.draft_quantize) for each in alternatives(config, spec)]

    shared = [("streamed", "none"), ("resident", "none")]
    assert kinds() == [*shared, ("resident", "int8"), ("resident", "int4")]
    assert kinds(quantize="int8") == [*shared, ("resident", "int4")]
    assert kinds(quantize="int4") == shared
    slow = settings(model=DEEP, link_gbps=1e-3)
    engine = load(DEEP, **slow | {"draft": "auto", "decoding": DecodingConfig(window=5, draft_quantize="auto")})
    assert engine.plan.hot is not None
    assert engine.plan.hot.draft_format == WeightFormat(kind="int4", group=32), "there is no room for all attention blocks else"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"draft_quantize": "int3"}, "--draft-quantize is int3; it must be one of none, int8, int4, auto"),
        (
            {"draft_quantize": "int4", "draft": "streamed"},
            "--draft-quantize is int4 with --draft streamed and --sparsity griffin; it must be none, or with --draft resident "
            "and --sparsity griffin",
        ),
        ({"draft_quantize": "int4", "draft_keep": 0.25}, "--draft-keep is 0.25; it must be left out with --draft-quantize"),
    ],
)
def test_what_cannot_be_copied_is_one_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DecodingConfig(**more)
    assert str(caught.value) == message


def test_a_copy_of_as_many_bits_as_the_target_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(quantize="int8", decoding=DecodingConfig(draft_quantize="int8"))
    assert str(caught.value) == (
        "--draft-quantize is int8, and --quantize is int8; a copy for drafts must have fewer bits, or --draft-quantize be none"
    )


def test_an_engine_answers_with_the_copy_that_it_was_loaded_with(load: Load) -> None:
    engine = load_copied(load)
    with pytest.raises(ConfigError, match="the model was loaded with draft_quantize int4 and is asked for none"):
        engine.generate("hello", draft_quantize="none", **ASKED)


def test_a_device_that_is_too_small_is_one_line_with_what_would_do(load: Load) -> None:
    given = settings()
    with pytest.raises(BudgetError, match=r"too small for --draft-quantize int4: .*, or --draft-quantize none"):
        load(**given | {"device_memory": str(int(given["device_memory"]) // 2)})


def test_a_correction_that_is_given_up_half_way_leaves_the_next_answer_as_it_is(
    load: Load, monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[tuple[int, ...]]]
) -> None:
    engine = load_copied(load, num_copied=HALF)
    streamer = engine._streamer
    assert isinstance(streamer, CopyStreamer)
    neurons = streamer.neurons

    def interrupted(layer: int) -> LayerBuffer:
        if streamer._phase == "correction" and layer == 2:
            raise KeyboardInterrupt
        return neurons(layer)

    with monkeypatch.context() as patched:
        patched.setattr(streamer, "neurons", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate("hello", **ASKED)
    for _ in range(2):
        found = engine.generate("hello", **ASKED)
        assert found.token_ids == expected["float32"][0]
        assert_bytes(engine, found)
