"""A loaded model: the same answer wherever its layers are, figures that add up, and what is left after a break."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import offload_sirius
from offload_sirius.config import DecodingConfig, GenerationConfig, SamplingConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.sampling import Sampler
from offload_sirius.engine import Engine
from offload_sirius.engine.engine import with_settings
from offload_sirius.errors import ConfigError, PromptError
from offload_sirius.model.tokenizer import Message
from offload_sirius.weights.streamer import WeightStreamer

from .conftest import CONTEXT, PLACES, TINY, Budgets, Load

STREAMED = PLACES[1:]
DTYPES = ["float32", "bfloat16"]


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


@pytest.fixture(scope="module")
def resident() -> Iterator[Engine]:
    """An engine for tests that only ask it."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=64) as engine:
        yield engine


def in_flight_bound(engine: Engine) -> int:
    """Bytes of all slots."""
    return engine.plan.num_slots * engine.plan.layer_nbytes


def assert_layers_are(where: str, engine: Engine) -> None:
    plan = engine.plan
    sizes = (len(plan.resident_layers), len(plan.host_layers), len(plan.disk_layers), plan.embedding_place)
    assert (
        sizes
        == {
            "resident": (4, 0, 0, "host"),
            "one resident, rest on the host": (1, 3, 0, "host"),
            "host": (0, 4, 0, "host"),
            "host and disk": (0, 2, 2, "host"),
            "disk": (0, 0, 4, "host"),
            "disk with the embedding": (0, 0, 4, "disk"),
        }[where]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", STREAMED)
def test_streamed_is_resident_bit_for_bit(where: str, dtype: str, load: Load, budgets: Budgets, logits: list[Tensor]) -> None:
    expected = load(dtype=dtype).generate("hello", max_new_tokens=8, temperature=1.0)
    resident_logits = logits.copy()
    logits.clear()
    engine = load(dtype=dtype, **budgets(where, dtype))
    assert_layers_are(where, engine)
    result = engine.generate("hello", max_new_tokens=8, temperature=1.0)
    assert result.token_ids == expected.token_ids
    assert len(logits) == 8
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, resident_logits, strict=True))


def test_an_emulated_link_changes_no_bit(load: Load, budgets: Budgets, logits: list[Tensor]) -> None:
    load().generate("hello", max_new_tokens=4)
    load(link_gbps=1.0, **budgets("host")).generate("hello", max_new_tokens=4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits[4:], logits[:4], strict=True))


@pytest.mark.parametrize("where", STREAMED)
def test_the_bytes_of_an_answer_are_its_passes_times_a_pass(where: str, load: Load, budgets: Budgets) -> None:
    engine = load(**budgets(where))
    pass_nbytes = engine.plan.pass_nbytes
    assert pass_nbytes == len(engine.plan.streamed_layers) * engine.plan.layer_nbytes > 0
    for _ in range(2):  # the second answer finds layers in the slots that the first has asked for
        result = engine.generate("hello", max_new_tokens=6)
        assert (result.passes.prefill, result.passes.full, result.passes.draft, result.passes.correction) == (1, 5, 0, 0)
        counted = result.link.bytes
        assert (counted.prefill, counted.full, counted.draft, counted.correction) == (pass_nbytes, 5 * pass_nbytes, 0, 0)
        assert abs(result.link.copied_bytes - 6 * pass_nbytes) <= in_flight_bound(engine)


@pytest.mark.parametrize("where", STREAMED)
def test_what_was_copied_is_what_was_computed_on_and_what_is_in_flight(where: str, load: Load, budgets: Budgets) -> None:
    engine = load(**budgets(where))
    link = engine.generate("hello", max_new_tokens=6).link
    counted = link.bytes.prefill + link.bytes.full
    assert counted <= link.copied_bytes <= counted + in_flight_bound(engine)


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
def test_what_was_loaded_is_counted_once(where: str, load: Load, budgets: Budgets) -> None:
    engine = load(**budgets(where))
    first, second = (engine.generate("hello", max_new_tokens=2).link.bytes.load for _ in range(2))
    assert first == second > 0
    stored = sum(info.nbytes for info in engine.model.checkpoint.tensors.values())
    num_layers = len(engine.plan.disk_layers)
    on_disk = sum(info.nbytes for (layer, _), info in engine.model.checkpoint.tensors.items() if layer is not None and num_layers)
    assert first == stored - on_disk


def test_a_resident_model_uses_no_link(resident: Engine) -> None:
    link = resident.generate("hello", max_new_tokens=3).link
    assert (link.copied_bytes, link.bytes.prefill, link.bytes.full) == (0, 0, 0)
    assert (link.gbytes_per_second, link.measured_peak_gbytes_per_second, link.busy_share) == (None, None, None)


def test_the_rates_of_an_emulated_link_are_its_own(load: Load, budgets: Budgets) -> None:
    link = load(link_gbps=0.5, **budgets("host")).generate("hello", max_new_tokens=3).link
    assert link.measured_peak_gbytes_per_second == 0.5
    assert link.gbytes_per_second is not None
    assert link.busy_share is not None
    assert 0 < link.busy_share <= 1


def test_times_follow_each_other(resident: Engine) -> None:
    stream = resident.stream("hello", max_new_tokens=5)
    seconds = [piece.seconds for piece in stream]
    result = stream.result
    assert 0 < result.ttft_seconds <= seconds[0]
    assert result.decode_seconds > 0
    assert result.ttft_seconds + result.decode_seconds <= seconds[-1]
    assert result.tokens_per_second == pytest.approx(4 / result.decode_seconds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", PLACES)
def test_device_memory_stays_within_the_plan_and_the_plan_within_the_budgets(
    where: str, dtype: str, load: Load, budgets: Budgets
) -> None:
    given = budgets(where, dtype)
    memory = load(dtype=dtype, **given).generate("x" * 40, max_new_tokens=8).memory
    assert 0 < memory.device_peak_bytes <= memory.device_plan_bytes <= int(given["device_memory"])
    assert memory.host_plan_bytes <= int(given["host_memory"])
    assert memory.host_peak_bytes > 0


@settings(max_examples=10, deadline=None)
@given(
    prompt_ids=st.lists(st.integers(0, 511), min_size=1, max_size=20),
    temperature=st.sampled_from([0.0, 1.0]),
    stops=st.lists(st.text(min_size=1, max_size=2), max_size=2),
)
def test_the_pieces_of_a_stream_together_are_the_text_of_the_whole(
    resident: Engine, prompt_ids: list[int], temperature: float, stops: list[str]
) -> None:
    wanted: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "stop": tuple(stops)}
    stream = resident.stream(prompt_ids, **wanted)
    text = "".join(piece.text for piece in stream)
    whole = resident.generate(prompt_ids, **wanted)
    assert text == stream.result.text == whole.text
    assert stream.result.token_ids == whole.token_ids


def test_the_result_waits_for_the_end(resident: Engine) -> None:
    stream = resident.stream("hello", max_new_tokens=3)
    next(stream)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = stream.result
    stream.interrupt()
    assert stream.result.finish_reason == "interrupted"


def fresh_answer(load: Load) -> Generation:
    return load().generate("hello", max_new_tokens=8)


@pytest.mark.parametrize("where", PLACES)
def test_an_answer_after_an_interrupted_one_is_that_of_a_fresh_engine(where: str, load: Load, budgets: Budgets) -> None:
    engine = load(**budgets(where))
    stream = engine.stream("something else", max_new_tokens=20)
    for _ in range(3):
        next(stream)
    assert stream.interrupt().new_tokens == 3
    assert engine.generate("hello", max_new_tokens=8).token_ids == fresh_answer(load).token_ids


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("moment", [2, 10])
def test_an_answer_after_one_that_broke_off_within_a_pass_is_that_of_a_fresh_engine(
    where: str, moment: int, load: Load, budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(**budgets(where))
    with monkeypatch.context() as patched:
        interrupt_at(moment, patched)
        stream = engine.stream("something else", max_new_tokens=20)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        assert stream.interrupt().finish_reason == "interrupted"
    assert engine.generate("hello", max_new_tokens=8).token_ids == fresh_answer(load).token_ids


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


def test_a_stream_that_was_abandoned_does_not_disturb_the_next_answer(load: Load, budgets: Budgets) -> None:
    engine = load(**budgets("host"))
    next(engine.stream("something else", max_new_tokens=20))
    assert engine.generate("hello", max_new_tokens=8).token_ids == fresh_answer(load).token_ids


@pytest.mark.parametrize("mode", ["full", "sparse", "sirius"])
def test_an_answer_in_whose_place_another_was_begun_says_so(mode: str, load: Load) -> None:
    engine = load(mode="sirius", window=4)
    prompts = ("something else", "hello")
    first, second = (engine.stream(prompt, mode=mode, max_new_tokens=8, ignore_eos=True) for prompt in prompts)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another answer was begun"):
        list(first)
    assert first.interrupt().new_tokens >= 1
    list(second)
    assert second.result.token_ids == engine.generate("hello", mode=mode, max_new_tokens=8, ignore_eos=True).token_ids


def test_the_same_question_has_the_same_answer_again(resident: Engine) -> None:
    first, second = (resident.generate("hello", max_new_tokens=8, temperature=1.0, seed=5) for _ in range(2))
    assert first.token_ids == second.token_ids


def test_token_ids_are_a_prompt_as_they_are(resident: Engine) -> None:
    as_text, as_ids = (resident.generate(prompt, max_new_tokens=4) for prompt in ("hello", list(b"hello")))
    assert as_text.token_ids == as_ids.token_ids
    assert as_ids.prompt_tokens == 5


def test_a_conversation_needs_a_chat_template(resident: Engine) -> None:
    with pytest.raises(PromptError) as caught:
        resident.generate([Message(role="user", content="hello")])
    assert str(caught.value) == f"{TINY} has no chat template; give the prompt as it is with --no-chat"


@pytest.mark.parametrize(
    ("prompt", "length", "message"),
    [
        (
            "x" * 60,
            6,
            "prompt and answer take 66 positions, 64 were planned for; shorten them, or load with a larger --max-context",
        ),
        (
            "x" * 65,
            1,
            "prompt and answer take 66 positions, 64 were planned for; shorten them, or load with a larger --max-context",
        ),
        (
            "x" * 2048,
            1,
            f"the prompt has 2048 tokens, {TINY} takes 2048 positions, prompt and answer together; shorten the prompt",
        ),
        ("", 1, "the prompt is empty; give --prompt TEXT, --prompt-file FILE, or text on standard input"),
        ([], 1, "the prompt is empty; give --prompt TEXT, --prompt-file FILE, or text on standard input"),
        ([5, 512], 1, "token id 512 is outside the vocabulary of 512; use this model's tokenizer"),
        ([-1], 1, "token id -1 is outside the vocabulary of 512; use this model's tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    prompt: str | list[int], length: int, message: str, resident: Engine
) -> None:
    with pytest.raises(PromptError) as caught:
        resident.stream(prompt, max_new_tokens=length)
    assert str(caught.value) == message


def test_the_last_token_of_an_answer_needs_no_position(resident: Engine) -> None:
    assert resident.generate("x" * 60, max_new_tokens=5).new_tokens == 5


def test_an_answer_ends_where_the_model_itself_does(load: Load) -> None:
    result = load("synthetic:tiny?positions=16", max_context=None).generate("x" * 10)
    assert (result.new_tokens, result.finish_reason) == (7, "length")


def test_settings_may_be_given_as_a_config_as_words_or_as_both(resident: Engine) -> None:
    config = GenerationConfig(max_new_tokens=3, sampling=SamplingConfig(temperature=1.0, seed=3))
    result = resident.generate("hello", config, seed=4, stop="never")
    assert result.new_tokens == 3
    assert result.settings["sampling"] == vars(SamplingConfig(temperature=1.0, seed=4))
    assert result.settings["stop"] == ("never",)
    assert (result.settings["model"], result.settings["threads"]) == (TINY, 1)


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(GenerationConfig(), {"temprature": 1.0}, DecodingConfig())
    assert str(caught.value) == (
        "unknown setting temprature; known are accept, cats_threshold, chat, draft, draft_keep, draft_quantize, ignore_eos, "
        "keep, logprobs, lookup, max_new_tokens, min_p, mode, overlap, prior, refresh, refresh_decay, repetition_penalty, "
        "resident_first, reuse, seed, sparsity, stop, temperature, threshold, top_k, top_p, tree_width, window"
    )


def test_decoding_is_that_of_the_model_unless_the_request_says_otherwise() -> None:
    planned = DecodingConfig(keep=0.3, window=4)
    assert with_settings(GenerationConfig(), {}, planned).decoding is None
    assert with_settings(GenerationConfig(), {"window": 3}, planned).decoding == DecodingConfig(keep=0.3, window=3)
    asked = GenerationConfig(decoding=DecodingConfig(mode="full"))
    assert with_settings(asked, {"tree_width": 2}, planned).decoding == DecodingConfig(mode="full", tree_width=2)
    assert with_settings(asked, {"decoding": planned}, DecodingConfig()).decoding == planned


def test_a_setting_outside_its_range_is_refused(resident: Engine) -> None:
    with pytest.raises(ConfigError, match="--top-p is 2; it must be above 0 and at most 1"):
        resident.generate("hello", top_p=2)


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "copier"))]


@pytest.mark.parametrize("where", PLACES)
def test_leaving_the_block_ends_every_thread(where: str, budgets: Budgets) -> None:
    given: dict[str, Any] = budgets(where)
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT, **given) as engine:
        engine.generate("hello", max_new_tokens=3)
        assert bool(threads_of_ours()) == (where != "resident")
    assert threads_of_ours() == []


def test_an_engine_may_be_closed_in_the_middle_of_an_answer_and_twice(load: Load, budgets: Budgets) -> None:
    engine = load(**budgets("host and disk"))
    next(engine.stream("hello", max_new_tokens=20))
    engine.close()
    engine.close()
    assert threads_of_ours() == []


def test_a_closed_engine_does_not_answer(load: Load) -> None:
    engine = load()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed: load the model again"):
        engine.generate("hello")


def test_the_figures_name_the_model_and_its_plan(load: Load, budgets: Budgets) -> None:
    engine = load(**budgets("host and disk"))
    result = engine.generate("hello", max_new_tokens=2)
    assert (result.model, result.mode, engine.spec.num_layers) == (TINY, "full", 4)
    assert (result.plan["device"], result.plan["dtype"], result.plan["context"]) == ("cpu", "float32", 48)
    assert sorted(result.plan["host_layers"] + result.plan["disk_layers"]) == [0, 1, 2, 3]
    assert result.plan["pass_nbytes"] == engine.plan.pass_nbytes
    assert result.load_seconds == engine.load_seconds > 0
