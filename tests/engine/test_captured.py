"""Resident draft steps, recorded and played by a recorder that needs no GPU: answers and bytes are those of plain steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload_sirius
from offload_sirius.config import DecodingConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine, NoProgress
from offload_sirius.engine.captured import recorder_on
from offload_sirius.model.costs import fixed_step_nbytes, recorded_steps_nbytes
from offload_sirius.trace import Tracer
from offload_sirius.weights.hotset import HotStreamer

from ..model.recording import TapeRecorder
from .conftest import CONTEXT, TINY, Load, hot_budgets

ASKED: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 11}
LAYERS = 4

LoadHot = Callable[..., Engine]


class Warned(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def plain_answers() -> dict[str, tuple[int, ...]]:
    """Of the model by itself, resident."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT) as engine:
        return {
            name: engine.generate("hello", **ASKED | sampling).token_ids
            for name, sampling in (("greedy", {}), ("drawn", SAMPLED))
        }


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """The device records; extents are 8, 16, 32 and 48."""
    recorder = TapeRecorder()
    monkeypatch.setattr("offload_sirius.engine.building.recorder_on", lambda device: recorder)
    monkeypatch.setattr("offload_sirius.model.costs.LEAST_EXTENT", 8)
    return recorder


@pytest.fixture
def load_hot(load: Load) -> LoadHot:
    """The tiny model with a hot set."""

    def load_hot(more: dict[str, Any] | None = None, **settings: Any) -> Engine:
        decoding = DecodingConfig(**{"window": 5, "keep": 0.5, "draft": "resident"} | settings)
        given = hot_budgets(decoding) | (more or {})
        return load(mode=decoding.mode, draft=decoding.draft, decoding=decoding, **given)

    return load_hot


def answer(engine: Engine, **settings: Any) -> Generation:
    return engine.generate("hello", **ASKED | settings)


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("window", [2, 5, 16, "auto"])
def test_exact_answers_are_those_of_the_full_model(
    window: int | str, refresh: bool, load_hot: LoadHot, recorder: TapeRecorder, plain_answers: dict[str, tuple[int, ...]]
) -> None:
    engine = load_hot(window=window, refresh=refresh)
    num_drafts = 0
    for name, sampling in (("greedy", {}), ("drawn", SAMPLED), ("greedy", {})):
        found = answer(engine, **sampling)
        assert found.token_ids == plain_answers[name]
        num_drafts += found.passes.draft
    assert recorder.num_played == num_drafts > 0, "every draft step was a recorded one"
    assert 1 < recorder.num_recorded <= 4, "one recording an extent, whatever becomes hot"


def test_a_sparse_answer_is_that_of_plain_steps(load_hot: LoadHot, recorder: TapeRecorder) -> None:
    launched = answer(load_hot({"cuda_graphs": False}, mode="sparse")).token_ids
    assert recorder.num_recorded == 0
    assert answer(load_hot(mode="sparse")).token_ids == launched
    assert recorder.num_played == len(launched) - 1


def test_drafts_move_and_prefetch_what_plain_ones_do(load_hot: LoadHot, recorder: TapeRecorder) -> None:
    launched, captured = load_hot({"cuda_graphs": False}), load_hot()
    expected, found = answer(launched), answer(captured)
    assert recorder.num_played == found.passes.draft
    assert found.passes == expected.passes
    assert found.link.bytes == expected.link.bytes
    assert found.link.bytes.draft == 0
    waiting = [sum(flight.nbytes for flight in engine._streamer._ring) for engine in (launched, captured)]  # type: ignore[attr-defined]
    assert waiting[0] == waiting[1] > 0


def test_trees_are_drafted_by_plain_steps(
    load_hot: LoadHot, recorder: TapeRecorder, plain_answers: dict[str, tuple[int, ...]]
) -> None:
    assert answer(load_hot(tree_width=3)).token_ids == plain_answers["greedy"]
    assert recorder.num_recorded == 0


def test_of_a_tree_in_an_engine_for_lines_only_the_root_is_a_recorded_step(
    load_hot: LoadHot, recorder: TapeRecorder, plain_answers: dict[str, tuple[int, ...]]
) -> None:
    found = answer(load_hot(window=16), window=4, tree_width=3)
    assert found.token_ids == plain_answers["greedy"]
    assert recorder.num_played == found.windows < found.passes.draft


def test_answers_together_are_drafted_by_plain_steps_and_one_by_itself_by_recorded_ones(
    load_hot: LoadHot, recorder: TapeRecorder, plain_answers: dict[str, tuple[int, ...]]
) -> None:
    room = hot_budgets(DecodingConfig(window=5, keep=0.5, draft="resident"), parallel=2)
    batch = load_hot({"parallel": 2, **room}, lookup=False).batch()
    for together in (2, 1):
        recorder.num_played = 0
        answers = [batch.submit("hello", **ASKED) for _ in range(together)]
        while batch.step():
            pass
        assert {each.result.token_ids for each in answers} == {plain_answers["greedy"]}
        assert answers[0].result.passes.draft > 0
        assert recorder.num_played == (0 if together == 2 else answers[0].result.passes.draft)


class FailingRecorder(TapeRecorder):
    """Cannot record the second extent it is asked for."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.num_recorded == 1:
            work()
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")
        return super().record(work)


def test_a_device_that_cannot_record_is_one_warning_and_plain_steps(
    load_hot: LoadHot, monkeypatch: pytest.MonkeyPatch, recorder: TapeRecorder, plain_answers: dict[str, tuple[int, ...]]
) -> None:
    failing, progress = FailingRecorder(), Warned()
    monkeypatch.setattr("offload_sirius.engine.building.recorder_on", lambda device: failing)
    engine = load_hot({"progress": progress})
    for _ in range(2):
        assert answer(engine).token_ids == plain_answers["greedy"]
    assert progress.lines == [
        "the draft step could not be recorded as a CUDA graph (operation not permitted when stream is capturing): its kernels "
        "are launched one by one, which is slower; give --no-cuda-graphs to do without from the start"
    ]
    assert failing.num_recorded == 1


def test_a_trace_has_a_span_for_each_step_that_was_played(load_hot: LoadHot, recorder: TapeRecorder) -> None:
    tracer = Tracer()
    found = answer(load_hot({"tracer": tracer}))
    steps = [span for span in tracer.spans() if span.name == "draft step"]
    layers = [span for span in tracer.spans() if span.name == "layer 0 attention" and span.row == "compute"]
    assert len(steps) == found.passes.draft > 0
    assert len(layers) == found.passes.prefill + found.passes.correction


def test_a_streamer_hands_out_in_every_draft_what_the_recording_computes_on(load_hot: LoadHot) -> None:
    engine = load_hot()
    streamer, hot_set = engine._streamer, engine._streamed.sparsity
    assert isinstance(streamer, HotStreamer)
    answer(engine)
    places = []
    for _ in range(2):
        streamer.begin("draft", "hot")
        for layer in range(LAYERS):
            attention = streamer.attention(layer)
            assert streamer.neurons(layer) is attention
            places.append((layer, attention.qkv.data_ptr(), attention.up_down.data_ptr()))
            streamer.release(layer)
        answer(engine)
    assert hot_set is not None
    assert places[:LAYERS] == places[LAYERS:]


def test_device_memory_of_what_goes_in_and_comes_out_is_as_billed(load_hot: LoadHot, recorder: TapeRecorder) -> None:
    engine = load_hot()
    captured = engine._streamed._captured
    assert captured is not None
    assert captured.nbytes == fixed_step_nbytes(engine.spec, 4) < recorded_steps_nbytes(engine.spec, CONTEXT, 4)


def test_a_cpu_records_nothing(load_hot: LoadHot) -> None:
    assert recorder_on(torch.device("cpu")) is None
    assert load_hot()._streamed._captured is None
