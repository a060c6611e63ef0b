"""Drafts and corrections through the whole engine: the full model's own answers wherever weights are, and every byte counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import offload_sirius
from offload_sirius.config import DecodingConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.sampling import Sampler
from offload_sirius.engine import Engine
from offload_sirius.errors import ConfigError
from offload_sirius.weights.layout import LayerLayout
from offload_sirius.weights.streamer import WeightStreamer

from .conftest import CONTEXT, PLACES, TINY, Budgets, Load

GRIFFIN_PLACES = [*PLACES, "host + kept", "disk + kept"]
# Caches come before residents: there is room for one beside them only.
CATS_PLACES = [f"{place} + caches" if place == "one resident, rest on the host" else place for place in PLACES] + [
    "host + caches"
]
EVERYWHERE = [("griffin", where) for where in GRIFFIN_PLACES] + [("cats", where) for where in CATS_PLACES]
STREAMED = [(sparsity, where) for sparsity, where in EVERYWHERE if where != "resident"]

NUM_NEW = 14
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 11}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is written for all tests that read it from disk."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, one for all tests: none leaves anything else there."""
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """The model by itself, resident."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT) as engine:
        yield engine


class Loaded:
    """An engine for drafts, and what they are."""

    def __init__(self, engine: Engine, decoding: DecodingConfig) -> None:
        self.engine = engine
        self.decoding = decoding

    @property
    def layout(self) -> LayerLayout:
        return self.engine._placement.layout

    def generate(self, **settings: Any) -> Generation:
        return self.engine.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True, **settings)


@pytest.fixture
def drafting(load: Load, budgets: Budgets) -> Any:
    """Load for drafts, with the layers at a place."""

    def load_at(where: str, **settings: Any) -> Loaded:
        decoding = DecodingConfig(**{"window": 5, "keep": 0.3, "draft": "streamed"} | settings)
        # `mode` is the fixture's word for the plain model: it gives way.
        return Loaded(load(mode=decoding.mode, decoding=decoding, **budgets(where, decoding=decoding)), decoding)

    return load_at


def assert_layers_are(where: str, engine: Engine) -> None:
    """The budgets have put everything where the test says."""
    plan = engine.plan
    base, _, extra = where.partition(" + ")
    sizes = (len(plan.resident_layers), len(plan.host_layers), len(plan.disk_layers))
    expected = {"resident": (4, 0, 0), "one resident, rest on the host": (1, 3, 0), "host": (0, 4, 0), "host and disk": (0, 2, 2)}
    assert sizes == expected.get(base, (0, 0, 4))
    griffin = engine.config.decoding.sparsity == "griffin"
    kept = {"host and disk": 2, "one resident, rest on the host": 3} if griffin else {}
    assert len(plan.kept_layers) == (4 if extra == "kept" else kept.get(base, 0))
    assert bool(plan.num_cached_neurons) == (extra == "caches")


# Answers.


@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize(("sparsity", "where"), EVERYWHERE)
def test_exact_answers_are_those_of_the_full_model(
    sparsity: str, where: str, tree_width: int, drafting: Any, plain: Engine
) -> None:
    loaded = drafting(where, sparsity=sparsity, tree_width=tree_width)
    assert_layers_are(where, loaded.engine)
    for sampling in (GREEDY, SAMPLED):
        expected = plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True, **sampling).token_ids
        found = loaded.generate(**sampling)
        assert found.token_ids == expected
        assert (found.mode, found.passes.full) == ("sirius", 0)
        assert found.passes.correction == found.windows > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 2},
        {"window": 16},
        {"window": "auto"},
        {"keep": 0.01},
        {"keep": 0.99},
        {"sparsity": "cats", "keep": 0.01},
        {"sparsity": "cats", "cats_threshold": "auto"},
        {"sparsity": "cats", "cats_threshold": 0.05},
        {"sparsity": "cats", "cats_threshold": 1e9},
        {"window": 3, "tree_width": 8},
    ],
    ids=str,
)
def test_exact_answers_do_not_depend_on_how_they_were_drafted(settings: dict[str, Any], drafting: Any, plain: Engine) -> None:
    for sampling in (GREEDY, SAMPLED):
        expected = plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True, **sampling).token_ids
        assert drafting("host", **settings).generate(**sampling).token_ids == expected


def test_answers_over_an_emulated_link_are_the_same(load: Load, budgets: Budgets, plain: Engine) -> None:
    expected = plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
    for sparsity in ("griffin", "cats"):
        decoding = DecodingConfig(sparsity=sparsity, window=4)
        engine = load(mode="sirius", decoding=decoding, link_gbps=1.0, **budgets("host", decoding=decoding))
        assert engine.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids == expected


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Everything that was sampled from, in order."""
    seen: list[Tensor] = []
    choose = Sampler.choose

    def watched(self: Sampler, logits: Tensor, position: int, token_ids: Sequence[int]) -> int:
        seen.append(logits.clone())
        return choose(self, logits, position, token_ids)

    monkeypatch.setattr(Sampler, "choose", watched)
    return seen


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
@pytest.mark.parametrize("sparsity", ["griffin", "cats"])
def test_drafts_that_keep_all_neurons_are_the_full_model_bit_for_bit(
    sparsity: str, where: str, drafting: Any, plain: Engine, logits: list[Tensor]
) -> None:
    expected = plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True, reuse=False).token_ids
    expected_logits = logits.copy()
    logits.clear()
    loaded = drafting(where, mode="sparse", sparsity=sparsity, keep=1)
    found = loaded.generate()
    assert (found.token_ids, found.passes.draft) == (expected, NUM_NEW - 1)
    assert len(logits) == NUM_NEW
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected_logits, strict=True))


@pytest.mark.parametrize("sparsity", ["griffin", "cats"])
def test_drafts_that_keep_all_neurons_are_all_accepted(sparsity: str, drafting: Any, plain: Engine) -> None:
    found = drafting("host", sparsity=sparsity, keep=1).generate()
    assert found.token_ids == plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
    assert (found.acceptance, found.aal) == (1, (NUM_NEW - 1) / found.windows)
    # The prompt's pass gives one token, three windows 5 tokens each but the last, which has 3 left.
    assert (found.windows, found.passes.draft) == (3, 4 + 4 + 2)


@pytest.mark.parametrize(("sparsity", "where"), STREAMED)
def test_sparse_answers_do_not_depend_on_where_the_layers_are(
    sparsity: str, where: str, drafting: Any, logits: list[Tensor], plain: Engine
) -> None:
    resident = drafting("resident", mode="sparse", sparsity=sparsity).generate()
    expected = logits.copy()
    logits.clear()
    found = drafting(where, mode="sparse", sparsity=sparsity).generate()
    assert found.token_ids == resident.token_ids
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(logits, expected, strict=True))
    assert found.token_ids != plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids


@pytest.mark.parametrize("max_new_tokens", range(1, 9))
def test_an_answer_may_end_anywhere_within_a_window(max_new_tokens: int, drafting: Any, plain: Engine) -> None:
    expected = plain.generate("hello", max_new_tokens=max_new_tokens, ignore_eos=True)
    for tree_width in (1, 2):
        found = drafting("host", keep=0.9, tree_width=tree_width).engine.generate(
            "hello", max_new_tokens=max_new_tokens, ignore_eos=True
        )
        assert (found.token_ids, found.text, found.finish_reason) == (expected.token_ids, expected.text, "length")


def test_a_stop_string_may_stand_anywhere_within_a_window(drafting: Any, plain: Engine) -> None:
    engine = drafting("host", keep=0.9).engine
    text = plain.generate("hello", max_new_tokens=NUM_NEW).text
    for length in (1, 3):
        for start in range(len(text) - length):
            stop = text[start : start + length]
            expected = plain.generate("hello", max_new_tokens=NUM_NEW, stop=stop)
            found = engine.generate("hello", max_new_tokens=NUM_NEW, stop=stop)
            assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
            assert found.finish_reason == expected.finish_reason == "stop"


def test_an_answer_may_fill_the_context_even_where_a_tree_has_no_room_at_the_end(drafting: Any, plain: Engine) -> None:
    num_new = CONTEXT - 5
    expected = plain.generate("hello", max_new_tokens=num_new, ignore_eos=True).token_ids
    found = drafting("host", tree_width=4).engine.generate("hello", max_new_tokens=num_new, ignore_eos=True)
    assert (found.token_ids, found.new_tokens) == (expected, num_new)


# What is left after an answer.


@pytest.mark.parametrize(("sparsity", "where"), EVERYWHERE)
def test_an_answer_after_one_that_was_interrupted_within_a_window_is_that_of_a_fresh_engine(
    sparsity: str, where: str, drafting: Any, plain: Engine
) -> None:
    loaded = drafting(where, sparsity=sparsity, keep=0.8)
    for num_tokens in (1, 3):
        stream = loaded.engine.stream("something else", max_new_tokens=20, ignore_eos=True)
        for _ in range(num_tokens):
            next(stream)
        assert stream.interrupt().new_tokens == num_tokens
        assert loaded.generate().token_ids == plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids


@pytest.mark.parametrize("moment", [6, 10, 16, 22])
@pytest.mark.parametrize(
    ("sparsity", "where"), [("griffin", "host and disk"), ("griffin", "host + kept"), ("cats", "host"), ("cats", "host + caches")]
)
def test_an_answer_after_one_that_broke_off_within_a_pass_is_that_of_a_fresh_engine(
    sparsity: str, where: str, moment: int, drafting: Any, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four layers a pass: moments lie in the prompt's second pass on, in drafts (5 to 20) and corrections (21 to 24)."""
    loaded = drafting(where, sparsity=sparsity)
    sparse = loaded.generate(mode="sparse").token_ids
    with monkeypatch.context() as patched:
        interrupt_at(moment, patched)
        stream = loaded.engine.stream("something else", max_new_tokens=20, ignore_eos=True)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        assert stream.interrupt().finish_reason == "interrupted"
    assert loaded.generate(mode="sparse").token_ids == sparse, "drafts find nothing wrong in slots and caches either"
    assert loaded.generate().token_ids == plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids


def interrupt_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when that many layers have been asked for their neurons."""
    asked = 0
    neurons = WeightStreamer.neurons

    def watched(self: WeightStreamer, layer: int) -> Any:
        nonlocal asked
        asked += 1
        if asked == moment:
            raise KeyboardInterrupt
        return neurons(self, layer)

    monkeypatch.setattr(WeightStreamer, "neurons", watched)


@pytest.mark.parametrize(("sparsity", "where"), [("griffin", "host and disk"), ("cats", "host + caches")])
def test_modes_may_take_turns(sparsity: str, where: str, drafting: Any, plain: Engine) -> None:
    loaded = drafting(where, sparsity=sparsity)
    expected = plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
    sparse = loaded.generate(mode="sparse").token_ids
    for mode, answer in [("full", expected), ("sirius", expected), ("sparse", sparse), ("sirius", expected), ("full", expected)]:
        assert loaded.generate(mode=mode).token_ids == answer


# Bytes.


def assert_sums_up(engine: Engine) -> None:
    """What was copied since the model was loaded is what was computed on, thrown away, or is in a slot for what comes."""
    streamer = engine._streamer
    for flight in streamer._ring:
        flight.attention.wait()
        flight.neurons.wait()
    in_flight = sum(flight.nbytes for flight in streamer._ring)
    assert in_flight <= engine.plan.num_slots * engine.plan.layer_nbytes
    assert streamer.copied_nbytes == sum(streamer.pass_nbytes.values()) + streamer.discarded_nbytes + in_flight


@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("where", [where for sparsity, where in STREAMED if sparsity == "griffin"])
def test_a_coarse_draft_brings_the_attention_block_and_the_kept_neurons_of_layers_that_can_be_sliced(
    where: str, tree_width: int, drafting: Any
) -> None:
    loaded = drafting(where, sparsity="griffin", keep=0.25, tree_width=tree_width)
    plan, spec, layout = loaded.engine.plan, loaded.engine.spec, loaded.layout
    # N rows of gate and up and N columns of down are N / F of the feed-forward, without a byte beside them.
    assert spec.ffn_width * layout.kept_nbytes == int(spec.ffn_width * 0.25) * layout.records_nbytes
    slice_nbytes = layout.attention_nbytes + int(spec.ffn_width * 0.25) * 3 * spec.width * 4
    num_sliced = {"disk": 0, "disk with the embedding": 0, "one resident, rest on the host": 3}.get(where, 4)
    assert len(plan.sliceable_layers) == num_sliced
    step_nbytes = num_sliced * slice_nbytes + (len(plan.streamed_layers) - num_sliced) * layout.nbytes
    for _ in range(2):
        found = loaded.generate()
        counted, passes = found.link.bytes, found.passes
        assert passes.draft > passes.correction > 1
        assert counted.draft == passes.draft * step_nbytes
        assert counted.correction == passes.correction * plan.pass_nbytes
        assert (counted.prefill, counted.full) == (plan.pass_nbytes, 0)
        assert_sums_up(loaded.engine)


@pytest.mark.parametrize("where", [where for sparsity, where in STREAMED if sparsity == "cats"])
def test_a_fine_draft_brings_attention_and_gates_and_the_records_that_are_not_there(where: str, drafting: Any) -> None:
    loaded = drafting(where, sparsity="cats", keep=0.25)
    plan, spec, layout = loaded.engine.plan, loaded.engine.spec, loaded.layout
    gate_nbytes, record_nbytes = spec.ffn_width * spec.width * 4, 2 * spec.width * 4
    step_nbytes = (
        len(plan.host_layers) * (layout.attention_nbytes + gate_nbytes)
        + len(plan.disk_layers) * layout.nbytes
    )  # fmt: skip
    counts = loaded.engine._streamed.sparsity.counts
    for _ in range(2):
        missing, needed = counts.missing, counts.needed
        found = loaded.generate()
        missing, needed = counts.missing - missing, counts.needed - needed
        counted, passes = found.link.bytes, found.passes
        assert needed == passes.draft * len(plan.host_layers) * int(spec.ffn_width * 0.25)
        assert counted.draft == passes.draft * step_nbytes + missing * record_nbytes
        assert counted.correction == passes.correction * plan.pass_nbytes
        assert found.link.cache_hit_share == (1 - missing / needed if needed else None)
        assert (0 < missing < needed) if plan.num_cached_neurons else missing == needed
        assert_sums_up(loaded.engine)


@pytest.mark.parametrize(("sparsity", "where"), STREAMED)
def test_bytes_sum_up_whatever_is_asked_for_one_after_the_other(sparsity: str, where: str, drafting: Any) -> None:
    loaded = drafting(where, sparsity=sparsity)
    for mode in ("sirius", "full", "sparse", "sirius"):
        before = loaded.engine._streamer.copied_nbytes
        found = loaded.generate(mode=mode)
        assert before <= loaded.engine._streamer.copied_nbytes
        assert_sums_up(loaded.engine)
        by_phase = vars(found.link.bytes)
        wanted = {"prefill", {"sirius": "correction", "full": "full", "sparse": "draft"}[mode]} | (
            {"draft"} if mode == "sirius" else set()
        )
        assert {phase for phase in ("prefill", "draft", "correction", "full") if by_phase[phase]} == wanted


def test_nothing_is_fetched_in_vain_where_windows_have_the_length_that_was_foreseen(drafting: Any) -> None:
    # Of 16 tokens the prompt's pass gives one, and three windows of which everything is accepted 5 each.
    found = drafting("host", keep=1).engine.generate("hello", max_new_tokens=16, ignore_eos=True)
    assert found.windows == 3
    assert found.link.bytes.discarded == 0


def test_a_resident_model_uses_no_link(drafting: Any) -> None:
    for sparsity in ("griffin", "cats"):
        link = drafting("resident", sparsity=sparsity).generate().link
        assert (link.copied_bytes, sum(vars(link.bytes).values()) - link.bytes.load) == (0, 0)
        assert (link.gbytes_per_second, link.cache_hit_share) == (None, None)


# Memory, and what was not planned for.


@pytest.mark.parametrize(("sparsity", "where"), EVERYWHERE)
def test_device_memory_stays_within_the_plan_and_the_plan_within_the_budgets(sparsity: str, where: str, drafting: Any) -> None:
    loaded = drafting(where, sparsity=sparsity, tree_width=8, window=4)
    memory = loaded.engine.generate("x" * 20, max_new_tokens=8).memory
    config = loaded.engine.config
    assert 0 < memory.device_peak_bytes <= memory.device_plan_bytes <= int(config.device_memory)
    assert memory.host_plan_bytes <= int(config.host_memory)


def test_drafts_that_keep_all_neurons_look_at_none_and_take_no_memory_for_it(load: Load) -> None:
    engine = load(f"{TINY}&ffn=4096", mode="sirius", keep=1.0, window=2)
    memory = engine.generate("x" * 40, max_new_tokens=2).memory
    assert memory.device_peak_bytes <= memory.device_plan_bytes


def test_a_model_that_was_loaded_for_the_full_model_alone_does_not_draft(plain: Engine) -> None:
    for mode in ("sparse", "sirius"):
        with pytest.raises(ConfigError) as caught:
            plain.generate("hello", mode=mode)
        assert str(caught.value) == f"the model was loaded with mode full and is asked for mode {mode}; load it with that mode"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sparsity": "cats"}, "the model was loaded with sparsity griffin and is asked for cats; load it with that"),
        ({"keep": 0.4}, "the model was loaded with keep 0.3 and is asked for 0.4; load it with that"),
        (
            {"cats_threshold": 1},
            "--cats-threshold is 1.0 with --sparsity griffin; it must be left out, or given with --sparsity cats",
        ),
        (
            {"window": 6},
            "the model was loaded for corrections of 5 tokens and is asked for 6; "
            "load it with mode sirius and that window and tree_width",
        ),
        (
            {"window": 4, "tree_width": 2},
            "the model was loaded for corrections of 5 tokens and is asked for 7; "
            "load it with mode sirius and that window and tree_width",
        ),
        (
            {"accept": "threshold", "temperature": 0.5},
            "--accept threshold is greedy, and --temperature is 0.5; use --temperature 0, or --accept exact, which samples",
        ),
    ],
    ids=str,
)
def test_what_was_not_planned_for_is_one_clear_line(asked: dict[str, Any], message: str, drafting: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        drafting("resident").engine.generate("hello", **asked)
    assert str(caught.value) == message


def test_a_model_loaded_for_drafts_alone_does_not_correct_windows(drafting: Any) -> None:
    with pytest.raises(ConfigError, match="loaded for corrections of 1 tokens and is asked for 5; load it with mode sirius"):
        drafting("resident", mode="sparse").engine.generate("hello", mode="sirius")


def test_a_temperature_is_refused_where_the_model_was_loaded_for_a_threshold(drafting: Any) -> None:
    engine = drafting("resident", accept="threshold").engine
    with pytest.raises(ConfigError, match=r"--accept threshold is greedy, and --temperature is 0\.5"):
        engine.generate("hello", temperature=0.5)
    assert engine.generate("hello", temperature=0.5, mode="full", max_new_tokens=3).mode == "full"


def test_what_takes_no_more_memory_may_be_asked_for(drafting: Any, plain: Engine) -> None:
    loaded = drafting("host", window=7)
    expected = plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
    for asked in ({"window": 2}, {"window": 4, "tree_width": 2}, {"accept": "exact"}):
        found = loaded.generate(**asked)
        assert found.token_ids == expected
        assert found.settings["decoding"] == vars(loaded.decoding) | asked


def test_what_is_looked_up_takes_memory_only_where_it_is_planned_for(drafting: Any, plain: Engine) -> None:
    loaded = drafting("host", lookup=False)
    expected = plain.generate("hello", max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
    # Nobody asked for it, so it is left out.
    found = loaded.generate(lookup=None)
    assert (found.token_ids, found.settings["decoding"]["lookup"]) == (expected, False)
    with pytest.raises(ConfigError) as caught:
        loaded.generate(lookup=True)
    assert str(caught.value) == (
        "the model was loaded for corrections of 5 tokens and is asked for 21 with lookup; load it with lookup"
    )
    assert drafting("host", accept="threshold", lookup=True).generate(accept="exact", lookup=True).token_ids == expected


def test_near_ties_are_counted_where_the_dtype_is_short(load: Load) -> None:
    assert load(mode="sirius").generate("hello", max_new_tokens=8).flips is None
    assert load(mode="sirius", dtype="bfloat16").generate("hello", max_new_tokens=8).flips is not None
    assert load(mode="sirius", dtype="bfloat16").generate("hello", max_new_tokens=8, temperature=1.0).flips is None
