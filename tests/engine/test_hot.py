"""Drafts that are on the device, through the whole engine: the full model's own answers, and every byte of the link counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offload_sirius
from offload_sirius.config import DecodingConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine, NoProgress
from offload_sirius.errors import BudgetError, ConfigError
from offload_sirius.sparsity.costs import draft_density
from offload_sirius.sparsity.hot import HotSet
from offload_sirius.sparsity.prior import prior_path
from offload_sirius.weights.hotset import HotStreamer
from offload_sirius_loaders import open_checkpoint

from .conftest import CONTEXT, TINY, Budgets, Load, hot_budgets

LONG = "synthetic:tiny?dtype=F32&layers=7"
PARTS = {2: 0.7, 3: 0.35, 4: 0.2, 5: 0.07}
"""Hot layers of seven -> neurons of each that drafts keep: all that may be kept where no layer more has room for some."""
PARTLY = pytest.mark.parametrize(("num_hot_layers", "keep"), PARTS.items())

NUM_NEW = 20
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 11}
ASKED: dict[str, Any] = {"max_new_tokens": NUM_NEW, "ignore_eos": True}
LAYERS = 4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder; nothing is left there."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """The model by itself, resident."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain_long() -> Iterator[Engine]:
    """The same of seven layers."""
    with offload_sirius.load(LONG, mode="full", device="cpu", threads=1, max_context=CONTEXT) as engine:
        yield engine


class Loaded:
    """An engine with a hot set, and what it is."""

    def __init__(self, engine: Engine, decoding: DecodingConfig) -> None:
        self.engine = engine
        self.decoding = decoding
        assert engine.plan.hot is not None
        self.num_hot = engine.plan.hot.num_hot
        hot_set, streamer = engine._streamed.sparsity, engine._streamer
        assert isinstance(hot_set, HotSet)
        assert isinstance(streamer, HotStreamer)
        self.hot_set, self.streamer = hot_set, streamer

    @property
    def neuron_nbytes(self) -> int:
        """Of a gate row, an up row and a down column, float32."""
        return 3 * self.engine.spec.width * 4

    @property
    def cold_nbytes(self) -> int:
        """What a correction brings of a layer."""
        return (self.engine.spec.ffn_width - self.num_hot) * self.neuron_nbytes

    @property
    def num_hot_layers(self) -> int:
        """Of which attention block and hot neurons are on the device."""
        assert self.engine.plan.hot is not None
        return len(self.engine.plan.hot.layers)

    def generate(self, **settings: Any) -> Generation:
        return self.engine.generate("hello", **ASKED | settings)

    def assert_sums_up(self) -> None:
        """What was copied since the model was loaded is what was computed on, thrown away, or is in a slot for what comes."""
        for flight in self.streamer._ring:
            flight.neurons.wait()
        in_flight = sum(flight.nbytes for flight in self.streamer._ring)
        assert in_flight <= self.engine.plan.device_bill["slots"]
        counted = sum(self.streamer.pass_nbytes.values()) + self.streamer.discarded_nbytes
        assert self.streamer.copied_nbytes == counted + in_flight


@pytest.fixture
def hot(load: Load) -> Any:
    """Load with the draft on the device."""

    def load_hot(
        *,
        num_hot: int | None = None,
        num_slots: int = 2,
        num_hot_layers: int | None = None,
        more: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Loaded:
        decoding = DecodingConfig(**{"window": 5, "keep": 0.5, "draft": "resident"} | settings)
        given = hot_budgets(decoding, num_hot=num_hot, num_slots=num_slots, num_hot_layers=num_hot_layers) | (more or {})
        return Loaded(load(mode=decoding.mode, draft=decoding.draft, decoding=decoding, **given), decoding)

    return load_hot


@pytest.fixture
def partly(load: Load) -> Any:
    """Load seven layers with the draft's part of some of them on the device, and two slots."""

    def load_partly(num_hot_layers: int, keep: float, more: dict[str, Any] | None = None, **settings: Any) -> Loaded:
        decoding = DecodingConfig(**{"window": 5, "keep": keep, "draft": "resident"} | settings)
        given = hot_budgets(decoding, num_hot_layers=num_hot_layers, model=LONG) | (more or {})
        loaded = Loaded(load(LONG, mode=decoding.mode, draft=decoding.draft, decoding=decoding, **given), decoding)
        assert loaded.num_hot_layers == num_hot_layers
        assert loaded.num_hot == decoding.num_kept(loaded.engine.spec.ffn_width)
        return loaded

    return load_partly


def expected_of(plain: Engine, **settings: Any) -> tuple[int, ...]:
    return plain.generate("hello", **ASKED | settings).token_ids


# Answers.


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("window", [2, 5, 16, "auto"])
def test_exact_answers_are_those_of_the_full_model(
    window: int | str, tree_width: int, refresh: bool, hot: Any, plain: Engine
) -> None:
    loaded = hot(window=window, tree_width=tree_width, refresh=refresh)
    for sampling in (GREEDY, SAMPLED):
        found = loaded.generate(**sampling)
        assert found.token_ids == expected_of(plain, **sampling)
        assert (found.mode, found.passes.full) == ("sirius", 0)
        assert found.passes.correction == found.windows > 0
        assert found.passes.draft > 0
    assert (loaded.hot_set.num_exchanged > 0) == refresh


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("share", [1 / 16, 0.25, 0.6, 0.99])
def test_exact_answers_do_not_depend_on_how_much_is_on_the_device(share: float, num_slots: int, hot: Any, plain: Engine) -> None:
    num_hot = int(plain.spec.ffn_width * share)
    loaded = hot(keep=(num_hot + 0.5) / plain.spec.ffn_width, num_slots=num_slots)
    room = num_slots * plain.spec.ffn_width // (plain.spec.ffn_width - num_hot)
    assert (loaded.num_hot, loaded.engine.plan.hot.num_cold_slots) == (num_hot, min(room, LAYERS))
    assert loaded.generate().token_ids == expected_of(plain)
    assert loaded.generate(**SAMPLED).token_ids == expected_of(plain, **SAMPLED)
    loaded.assert_sums_up()


@pytest.mark.parametrize(
    "settings",
    [{"keep": 0.002}, {"keep": 0.999}, {"refresh_decay": 0.0}, {"refresh_decay": 0.99}, {"overlap": False}],
    ids=str,
)
def test_exact_answers_do_not_depend_on_the_settings_of_the_set(settings: dict[str, Any], hot: Any, plain: Engine) -> None:
    loaded = hot(**settings)
    for _ in range(2):
        assert loaded.generate().token_ids == expected_of(plain)


def test_answers_over_an_emulated_link_are_the_same(hot: Any, plain: Engine) -> None:
    assert hot(more={"link_gbps": 1.0}).generate().token_ids == expected_of(plain)


@PARTLY
@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("tree_width", [1, 3])
def test_exact_answers_do_not_depend_on_how_many_layers_are_hot(
    tree_width: int, refresh: bool, num_hot_layers: int, keep: float, partly: Any, plain_long: Engine
) -> None:
    loaded = partly(num_hot_layers, keep, tree_width=tree_width, refresh=refresh)
    for sampling in (GREEDY, SAMPLED):
        assert loaded.generate(**sampling).token_ids == expected_of(plain_long, **sampling)
        loaded.assert_sums_up()
    assert (loaded.hot_set.num_exchanged > 0) == refresh


@PARTLY
def test_drafts_do_not_depend_on_how_many_layers_are_hot(num_hot_layers: int, keep: float, partly: Any, hot: Any) -> None:
    everything = hot(keep=keep, more={"model": LONG, **hot_budgets(DecodingConfig(keep=keep, draft="resident"), model=LONG)})
    assert everything.num_hot_layers == 7
    loaded = partly(num_hot_layers, keep)
    for settings in ({"mode": "sparse"}, {}, {"mode": "sparse"}, {"mode": "full"}):
        # What pays to be looked up depends on times.
        expected, found = (each.generate(lookup=False, **settings) for each in (everything, loaded))
        assert found.token_ids == expected.token_ids
        assert (found.passes, found.aal) == (expected.passes, expected.aal)
        assert loaded.hot_set.num_exchanged == everything.hot_set.num_exchanged
        loaded.assert_sums_up()


def test_answers_with_part_of_the_layers_hot_are_the_same_over_an_emulated_link(partly: Any, plain_long: Engine) -> None:
    assert partly(3, 0.35, more={"link_gbps": 1.0}).generate().token_ids == expected_of(plain_long)


def test_modes_may_take_turns(hot: Any, plain: Engine) -> None:
    loaded = hot()
    expected, sparse = expected_of(plain), loaded.generate(mode="sparse").token_ids
    assert sparse != expected
    turns = [("full", expected), ("sirius", expected), ("sparse", sparse), ("full", expected), ("sparse", sparse)]
    for mode, answer in turns:
        found = loaded.generate(mode=mode)
        assert (found.token_ids, found.mode) == (answer, mode)
        loaded.assert_sums_up()


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_a_sparse_answer_is_that_of_the_same_neurons_streamed(mode: str, hot: Any, load: Load, budgets: Budgets) -> None:
    decoding = DecodingConfig(mode="sparse", keep=0.3, draft="streamed")
    streamed = load(mode="sparse", decoding=decoding, **budgets("host", decoding=decoding))
    loaded = hot(keep=0.3, mode="sparse")
    expected = streamed.generate("hello", mode=mode, **ASKED).token_ids
    assert loaded.generate(mode=mode).token_ids == expected


# What is left after an answer.


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7])
def test_an_answer_after_one_that_was_interrupted_is_that_of_a_fresh_engine(num_tokens: int, hot: Any, plain: Engine) -> None:
    loaded = hot()
    fresh = loaded.generate(mode="sparse").token_ids
    for mode in ("sirius", "sparse", "full"):
        stream = loaded.engine.stream("something else", mode=mode, **ASKED)
        for _ in range(num_tokens):
            next(stream)
        assert stream.interrupt().new_tokens == num_tokens
        assert loaded.generate().token_ids == expected_of(plain)
        assert loaded.generate(mode="sparse").token_ids == fresh
        loaded.assert_sums_up()


@pytest.mark.parametrize("asked_for", ["attention", "neurons", "cold_neurons", "choose", "exchange"])
@pytest.mark.parametrize("moment", [1, 3, 6, 10])
def test_an_answer_after_one_that_broke_off_within_a_pass_is_that_of_a_fresh_engine(
    asked_for: str, moment: int, hot: Any, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = hot(refresh_decay=0.0)
    fresh = loaded.generate(mode="sparse").token_ids
    with monkeypatch.context() as patched:
        interrupt_at(asked_for, moment, patched)
        stream = loaded.engine.stream("something else", **ASKED)
        if asked_for == "choose" and moment > LAYERS:
            assert list(stream)
        else:
            with pytest.raises(KeyboardInterrupt):
                list(stream)
            assert stream.interrupt().finish_reason == "interrupted"
    assert loaded.generate(mode="sparse").token_ids == fresh, "drafts find nothing wrong in places and slots either"
    assert loaded.generate().token_ids == expected_of(plain)
    loaded.assert_sums_up()


@pytest.mark.parametrize("asked_for", ["attention", "neurons", "cold_neurons", "choose", "exchange"])
@pytest.mark.parametrize("moment", [1, 3, 7, 8, 12, 17])
def test_where_part_of_the_layers_is_hot_an_answer_after_one_that_broke_off_is_that_of_a_fresh_engine(
    asked_for: str, moment: int, partly: Any, plain_long: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = partly(3, 0.35, refresh_decay=0.0)
    fresh = loaded.generate(mode="sparse").token_ids
    with monkeypatch.context() as patched:
        interrupt_at(asked_for, moment, patched)
        stream = loaded.engine.stream("something else", **ASKED)
        if asked_for == "choose" and moment > 7:
            assert list(stream)
        else:
            with pytest.raises(KeyboardInterrupt):
                list(stream)
    assert loaded.generate(mode="sparse").token_ids == fresh
    assert loaded.generate().token_ids == expected_of(plain_long)
    loaded.assert_sums_up()


def interrupt_at(asked_for: str, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when that has been asked for so many times."""
    asked = 0
    original = getattr(HotStreamer, asked_for)

    def watched(self: HotStreamer, *arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == moment:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(HotStreamer, asked_for, watched)


# Bytes.


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("keep", [0.25, 0.75])
def test_a_draft_moves_nothing_and_a_correction_what_is_cold(keep: float, tree_width: int, refresh: bool, hot: Any) -> None:
    loaded = hot(keep=keep, tree_width=tree_width, refresh=refresh)
    layout = loaded.engine._placement.layout
    assert loaded.engine.plan.pass_nbytes == LAYERS * loaded.cold_nbytes
    for _ in range(2):
        found = loaded.generate()
        counted, passes = found.link.bytes, found.passes
        assert passes.draft > passes.correction > 1
        assert counted.prefill == LAYERS * layout.records_nbytes
        assert (counted.draft, counted.full) == (0, 0)
        assert counted.correction == passes.correction * LAYERS * loaded.cold_nbytes
        loaded.assert_sums_up()


@PARTLY
@pytest.mark.parametrize("refresh", [True, False])
def test_a_draft_moves_attention_and_kept_neurons_of_layers_that_are_not_hot_and_a_correction_all_of_these(
    refresh: bool, num_hot_layers: int, keep: float, partly: Any
) -> None:
    loaded = partly(num_hot_layers, keep, refresh=refresh)
    layout, num_streamed = loaded.engine._placement.layout, 7 - num_hot_layers
    drafted = num_streamed * (layout.attention_nbytes + loaded.num_hot * loaded.neuron_nbytes)
    corrected = num_hot_layers * loaded.cold_nbytes + num_streamed * layout.nbytes
    assert loaded.engine.plan.pass_nbytes == corrected
    for _ in range(2):
        found = loaded.generate()
        counted, passes = found.link.bytes, found.passes
        assert passes.draft > passes.correction > 1
        assert counted.prefill == num_hot_layers * layout.records_nbytes + num_streamed * layout.nbytes
        assert counted.draft == passes.draft * drafted
        assert counted.correction == passes.correction * corrected
        loaded.assert_sums_up()
    full = loaded.generate(mode="full")
    assert full.link.bytes.full == full.passes.full * corrected


def test_a_full_step_brings_what_is_cold_and_a_sparse_answer_no_more_than_the_prompt_does(hot: Any) -> None:
    loaded = hot()
    records = loaded.engine._placement.layout.records_nbytes
    full = loaded.generate(mode="full")
    assert full.link.bytes.full == full.passes.full * LAYERS * loaded.cold_nbytes
    sparse = loaded.generate(mode="sparse").link.bytes
    assert (sparse.prefill, sparse.draft, sparse.correction, sparse.full) == (LAYERS * records, 0, 0, 0)


def test_a_sparse_answer_fetches_nothing_for_corrections_that_do_not_come(hot: Any) -> None:
    loaded = hot()
    loaded.generate(mode="sparse")
    assert loaded.streamer.copied_nbytes == loaded.streamer.pass_nbytes["prefill"]
    assert loaded.generate().link.bytes.discarded == 0


def test_nothing_is_fetched_in_vain_but_what_waits_for_a_correction_when_the_answer_ends(hot: Any) -> None:
    loaded = hot()
    assert loaded.generate().link.bytes.discarded == 0
    waiting = sum(flight.nbytes for flight in loaded.streamer._ring)
    assert loaded.generate().link.bytes.discarded == waiting > 0


def test_without_overlap_nothing_is_fetched_before_a_correction_asks_for_it(hot: Any) -> None:
    loaded = hot(overlap=False)
    found = loaded.generate()
    assert (found.link.bytes.draft, found.link.bytes.discarded) == (0, 0)
    assert list(loaded.streamer._ring) == []
    assert loaded.streamer.copied_nbytes == sum(loaded.streamer.pass_nbytes.values())


def test_phases_and_what_was_discarded_add_up_to_what_was_copied_whatever_follows_what(hot: Any) -> None:
    loaded = hot(num_slots=3)
    for mode in ("sirius", "full", "sparse", "sirius", "sparse", "full"):
        before = loaded.streamer.copied_nbytes
        found = loaded.generate(mode=mode)
        assert found.link.copied_bytes <= loaded.streamer.copied_nbytes - before
        loaded.assert_sums_up()


def test_the_density_is_that_of_the_neurons_that_are_hot_not_of_those_that_were_asked_for(hot: Any) -> None:
    fewer, asked = hot(keep=0.9, num_hot=44).generate(), hot(keep=44.5 / 176).generate()
    assert fewer.effective_density == asked.effective_density is not None


# Memory.


@pytest.mark.parametrize("share", [1 / 16, 0.5, 0.99])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_device_memory_stays_within_the_plan_and_the_plan_within_the_budgets(share: float, num_slots: int, hot: Any) -> None:
    loaded = hot(keep=share, num_slots=num_slots, tree_width=8, window=4)
    memory = loaded.engine.generate("x" * 20, max_new_tokens=8).memory
    config = loaded.engine.config
    assert 0 < memory.device_peak_bytes <= memory.device_plan_bytes <= int(config.device_memory)
    assert memory.host_plan_bytes <= int(config.host_memory)


@PARTLY
def test_with_part_of_the_layers_hot_device_memory_stays_within_the_plan_which_takes_all_of_the_budget(
    num_hot_layers: int, keep: float, partly: Any
) -> None:
    loaded = partly(num_hot_layers, keep, tree_width=8, window=4)
    memory = loaded.engine.generate("x" * 20, max_new_tokens=8).memory
    config = loaded.engine.config
    assert 0 < memory.device_peak_bytes <= memory.device_plan_bytes == int(config.device_memory)
    assert memory.host_plan_bytes <= int(config.host_memory)


def test_too_little_device_memory_is_one_line_and_what_it_says_would_do_does(hot: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        hot(num_hot=1, num_hot_layers=1)
    line = str(caught.value)
    assert re.match(r"device budget \S+ \S+ is too small for --draft resident: head, KV cache, ", line)
    assert re.search(r", or --draft streamed, or --max-context \d+ at most$", line)
    assert "neurons of some layers" in line
    said = re.search(r"give at least --device-memory (\S+),", line)
    assert said
    assert hot(more={"device_memory": said[1]}).generate().new_tokens == NUM_NEW


@pytest.mark.parametrize("where", ["host and disk", "disk with the embedding"])
def test_layers_for_which_host_memory_has_no_room_are_one_line_and_what_it_says_would_do_does(
    where: str, hot: Any, budgets: Budgets
) -> None:
    with pytest.raises(BudgetError) as caught:
        hot(more={"host_memory": budgets(where)["host_memory"]})
    line = str(caught.value)
    assert re.match(r"host budget \S+ \S+ is too small for --draft resident, which needs all layers in host memory: ", line)
    said = re.search(r"give at least --host-memory (\S+), or --draft streamed$", line)
    assert said
    assert hot(more={"host_memory": said[1]}).generate().new_tokens == NUM_NEW


# What is chosen, and what was not loaded for.


@pytest.mark.parametrize("where", ["resident", "host", "host and disk"])
def test_where_nobody_says_where_drafts_live_one_of_both_is_taken_and_runs(
    where: str, load: Load, budgets: Budgets, plain: Engine
) -> None:
    decoding = DecodingConfig(window=5)
    engine = load(mode="sirius", draft="auto", decoding=decoding, **budgets(where, decoding=decoding))
    assert engine._placement.planned.config.decoding.draft in ("streamed", "resident")
    assert engine.plan.hot is None or not engine.plan.disk_layers
    assert engine.generate("hello", **ASKED).token_ids == expected_of(plain)


@pytest.mark.parametrize("settings", [{"keep": 1}, {"mode": "full"}], ids=str)
def test_where_drafts_leave_nothing_out_there_is_no_hot_set(settings: dict[str, Any], load: Load, plain: Engine) -> None:
    engine = load(**{"mode": "sirius", "draft": "resident"} | settings)
    assert engine.plan.hot is None
    assert engine.generate("hello", **ASKED).token_ids == expected_of(plain)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"draft": "streamed"}, "the model was loaded with draft resident and is asked for streamed; load it with that"),
        ({"refresh": False}, "the model was loaded with refresh True and is asked for False; load it with that"),
        ({"draft_keep": 0.6}, "--draft-keep is 0.6; it must be above 0 and at most --keep 0.5"),
        ({"refresh_decay": 0.5}, "the model was loaded with refresh_decay 0.7 and is asked for 0.5; load it with that"),
    ],
    ids=str,
)
def test_what_was_not_loaded_for_is_one_clear_line(asked: dict[str, Any], message: str, hot: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        hot().engine.generate("hello", **asked)
    assert str(caught.value) == message


def test_layers_that_share_host_buffers_may_have_a_hot_set(load: Load) -> None:
    engine = load(mode="sirius", draft="resident", shared_host_buffers=2)
    assert engine.plan.hot is not None
    assert engine.generate("hello", **ASKED).new_tokens == NUM_NEW


# Drafts that compute fewer neurons than are resident.


def assert_residents_are_those_that_are_said_to_be(loaded: Loaded) -> None:
    """Each place holds the neuron that the hot set says, by the checkpoint."""
    checkpoint = open_checkpoint(TINY)
    for layer, buffer in loaded.streamer._layers.items():
        ids = loaded.hot_set.hot_ids(layer)
        gate, up, down = (torch.from_numpy(checkpoint.read(layer, role)) for role in ("gate", "up", "down"))
        assert torch.equal(buffer.gate, gate[ids])
        assert torch.equal(buffer.up, up[ids])
        assert torch.equal(buffer.down, down.t()[ids])


@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("draft_keep", [0.002, 0.25, 0.5])
def test_exact_answers_do_not_depend_on_how_many_resident_neurons_a_draft_computes(
    draft_keep: float, tree_width: int, hot: Any, plain: Engine
) -> None:
    loaded = hot(draft_keep=draft_keep, tree_width=tree_width, refresh_decay=0.0)
    for sampling in (GREEDY, SAMPLED):
        found = loaded.generate(**sampling)
        assert found.token_ids == expected_of(plain, **sampling)
        assert found.link.bytes.draft == 0
        assert found.link.bytes.correction == found.passes.correction * LAYERS * loaded.cold_nbytes
        assert_residents_are_those_that_are_said_to_be(loaded)


def test_a_draft_of_fewer_neurons_is_that_of_those_alone_streamed(hot: Any, load: Load, budgets: Budgets) -> None:
    loaded = hot(keep=0.5, mode="sparse")
    answers = set()
    for keep in (0.1, 0.3, 0.5):
        decoding = DecodingConfig(mode="sparse", keep=keep, draft="streamed")
        streamed = load(mode="sparse", decoding=decoding, **budgets("host", decoding=decoding))
        answers.add(streamed.generate("hello", **ASKED).token_ids)
        assert loaded.generate(draft_keep=keep).token_ids in answers
        assert hot(keep=0.5, mode="sparse", draft_keep=keep).generate().token_ids in answers
    assert len(answers) == 3


def test_a_draft_never_computes_more_than_there_is_room_for(hot: Any, plain: Engine) -> None:
    loaded = hot(keep=0.9, draft_keep=0.8, num_hot=44)
    assert loaded.generate().token_ids == expected_of(plain)
    assert loaded.hot_set.num_drafted == 44


def test_density_and_prediction_are_of_the_neurons_that_a_draft_computes(hot: Any) -> None:
    loaded = hot(keep=0.5)
    spec, layout = loaded.engine.spec, loaded.engine._placement.layout
    assert draft_density(spec, replace(loaded.decoding, draft_keep=0.25), loaded.num_hot) == draft_density(
        spec, DecodingConfig(keep=0.25)
    )
    whole = loaded.engine._placement.predict(8)
    for draft_keep in (0.25, 0.002, 0.5):
        num_drafted = max(1, int(spec.ffn_width * draft_keep))
        predicted = loaded.engine._placement.predict(8, replace(loaded.decoding, draft_keep=draft_keep))
        nbytes = LAYERS * (layout.attention_nbytes + num_drafted * loaded.neuron_nbytes)
        assert predicted.draft.bill.weights_nbytes == pytest.approx(nbytes, rel=0.01)
        assert predicted.draft.nbytes == 0
        assert predicted.windows[0].correction.nbytes == whole.windows[0].correction.nbytes
        assert (predicted.draft.seconds < whole.draft.seconds) == (draft_keep < 0.5)


# What earlier runs say.


class Warned(NoProgress):
    """Writes down what it was warned of."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, line: str) -> None:
        self.lines.append(line)


def kept(cache: Path) -> torch.Tensor:
    """What is kept of the one model there."""
    [file] = (cache / "priors").iterdir()
    return load_file(file)["sums"]


def keep_absurd(cache: Path, seed: int) -> torch.Tensor:
    """Have the prior say that half of the neurons are all that matters. Returns its sums."""
    checkpoint = open_checkpoint(TINY)
    sums = torch.rand(LAYERS, checkpoint.spec.ffn_width, generator=torch.Generator().manual_seed(seed))
    sums = (sums > sums.median(dim=1, keepdim=True).values) * 1e30
    (cache / "priors").mkdir(parents=True, exist_ok=True)
    save_file({"sums": sums}, prior_path(cache, checkpoint))
    return sums


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_exact_answers_do_not_depend_on_what_the_prior_holds(
    seed: int, refresh: bool, hot: Any, plain: Engine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sirius.sparsity.prior.PSEUDO_TOKENS", 10**6)
    sums = keep_absurd(cache, seed)
    loaded = hot(refresh=refresh)
    for sampling in (GREEDY, SAMPLED):
        stream = loaded.engine.stream("hello", **ASKED | sampling)
        next(stream)
        for layer in range(LAYERS):
            assert loaded.hot_set.hot_ids(layer).tolist() == sums[layer].nonzero().flatten().tolist()
        list(stream)
        assert stream.result.token_ids == expected_of(plain, **sampling)


def test_an_answer_teaches_the_next_run_what_was_corrected(hot: Any, cache: Path) -> None:
    total = 0
    for _ in range(2):
        found = hot(lookup=False).generate()
        total += found.passes.draft + found.passes.correction
        assert kept(cache).sum(dim=1).tolist() == pytest.approx([total] * LAYERS, rel=1e-4)


def test_an_interrupted_answer_teaches_as_far_as_it_came(hot: Any, cache: Path) -> None:
    stream = hot().engine.stream("hello", **ASKED)
    next(stream)
    next(stream)
    found = stream.interrupt()
    assert found.passes.correction == 1
    num_tokens = found.passes.draft + found.passes.correction
    assert kept(cache).sum(dim=1).tolist() == pytest.approx([num_tokens] * LAYERS, rel=1e-4)


@pytest.mark.parametrize("settings", [{"mode": "sparse"}, {"accept": "threshold"}, {"mode": "full"}, {"prior": False}], ids=str)
def test_answers_that_would_depend_on_it_do_not_know_the_prior(settings: dict[str, Any], hot: Any, cache: Path) -> None:
    loaded = hot()
    expected = hot(prior=False).generate(**settings).token_ids
    assert not (cache / "priors").exists() or not list((cache / "priors").iterdir())
    keep_absurd(cache, 1)
    before = kept(cache)
    for each in (loaded, hot(), hot(**settings) if settings != {"mode": "full"} else hot()):
        assert each.generate(**settings).token_ids == expected
    assert torch.equal(kept(cache), before)


@pytest.mark.parametrize("settings", [{"mode": "sparse"}, {"accept": "threshold"}, {"prior": False}], ids=str)
def test_in_a_batch_the_prior_has_no_say_while_one_drafts_that_would_depend_on_it(
    settings: dict[str, Any], hot: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sirius.sparsity.prior.PSEUDO_TOKENS", 10**6)
    expected = hot(prior=False).generate(**settings).token_ids
    sums = keep_absurd(cache, 1)
    loaded = hot()
    batch = loaded.engine.batch()
    lossy = batch.submit("hello", **ASKED | settings)
    while batch.step():
        pass
    assert lossy.result.token_ids == expected
    assert torch.equal(kept(cache), sums)
    batch.submit("hello", **ASKED)
    batch.step()
    assert loaded.hot_set.prior is not None


def test_where_it_is_asked_for_a_lossy_answer_depends_on_the_prior(
    hot: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sirius.sparsity.prior.PSEUDO_TOKENS", 10**6)
    answers = set()
    for seed in range(3):
        keep_absurd(cache, seed)
        answers.add(hot(mode="sparse", prior=True).generate().token_ids)
    assert len(answers) > 1


@pytest.mark.parametrize("broken", ["file", "folder"])
def test_a_prior_that_cannot_be_used_is_one_line_and_stops_no_answer(broken: str, hot: Any, cache: Path, plain: Engine) -> None:
    if broken == "file":
        keep_absurd(cache, 1)
        prior_path(cache, open_checkpoint(TINY)).write_bytes(b"nonsense")
    else:
        (cache / "priors").touch()
    warned = Warned()
    loaded = hot(more={"progress": warned})
    for _ in range(2):
        assert loaded.generate().token_ids == expected_of(plain)
    [line] = warned.lines
    assert str(cache / "priors") in line


@pytest.mark.parametrize("prior", [True, False])
def test_what_choosing_neurons_takes_is_on_the_bill(prior: bool, hot: Any) -> None:
    loaded = hot(prior=prior)
    hot_set = loaded.hot_set
    loaded.generate()
    assert (hot_set.prior is not None) == prior
    nbytes = hot_set.squared_scores.nbytes + hot_set.ids.nbytes + (hot_set.prior.sums.nbytes if hot_set.prior else 0)
    assert loaded.engine.plan.device_bill["sparsity"] == nbytes


def test_a_prior_that_was_not_loaded_is_one_clear_line(hot: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        hot(prior=False).engine.generate("hello", prior=True)
    assert str(caught.value) == "the model was loaded without a prior and is asked for one; load it with prior"
