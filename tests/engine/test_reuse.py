"""What a prompt shares with what was computed before is not computed again, and the answer is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch

import offload_sirius
from offload_sirius.config import DecodingConfig
from offload_sirius.engine import Engine
from offload_sirius.engine.kv_slot import KVSlot
from offload_sirius.errors import WeightReadError
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Tokens, Transformer
from offload_sirius.sparsity.hot import HotSet
from offload_sirius.weights.hotset import HotStreamer
from offload_sirius.weights.streamer import WeightStreamer

from .conftest import CONTEXT, TINY, Budgets, Load, hot_budgets

ASKED: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.1, "seed": 4}
HELLO = list(b"hello world")


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """The model by itself, which computes every prompt anew."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT) as engine:
        yield engine


def anew(plain: Engine, prompt: list[int], **settings: Any) -> tuple[int, ...]:
    return plain.generate(prompt, **ASKED | settings | {"reuse": False}).token_ids


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an engine drafts."""

    hot: bool = False
    settings: dict[str, Any]


WAYS = {
    "full": Way(settings={"mode": "full"}),
    "kept neurons": Way(settings={"window": 4, "keep": 0.3}),
    "kept neurons in trees": Way(settings={"window": 4, "keep": 0.3, "tree_width": 3}),
    "by token": Way(settings={"window": 4, "keep": 0.3, "sparsity": "cats", "cats_threshold": "auto"}),
    "hot": Way(hot=True, settings={"window": 4, "keep": 0.3}),
    "hot in trees": Way(hot=True, settings={"window": 4, "keep": 0.3, "tree_width": 3}),
    "hot as the prompt says": Way(hot=True, settings={"window": 4, "keep": 0.3, "refresh": False, "prior": False}),
}


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def engine(request: pytest.FixtureRequest, load: Load, budgets: Budgets) -> Engine:
    """Streams its layers."""
    way: Way = request.param
    return loaded(way, load, budgets)


def loaded(way: Way, load: Load, budgets: Budgets) -> Engine:
    decoding = DecodingConfig(**{"draft": "resident" if way.hot else "streamed"} | way.settings)
    given = hot_budgets(decoding) if way.hot else budgets("host", decoding=decoding)
    return load(mode=decoding.mode, draft=decoding.draft, decoding=decoding, **given)


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each prompt's pass has computed."""
    lengths: list[int] = []
    prefill = Transformer.prefill_all

    def watched(self: Transformer, prompts: Sequence[Tokens], *arguments: Any) -> torch.Tensor:
        lengths.extend(len(prompt.token_ids) for prompt in prompts)
        return prefill(self, prompts, *arguments)

    monkeypatch.setattr(Transformer, "prefill_all", watched)
    return lengths


def test_a_second_turn_computes_its_new_tokens_only(engine: Engine, plain: Engine, prefilled: list[int]) -> None:
    prompt, expected = HELLO, []
    for turn, more in enumerate((b" and you", b" again")):
        expected = anew(plain, prompt, **SAMPLED)
        prefilled.clear()
        found = engine.generate(prompt, **ASKED, **SAMPLED)
        assert found.token_ids == expected
        assert (found.prompt_tokens, found.passes.prefill) == (len(prompt), 1)
        assert found.prompt_tokens - found.cached_tokens == sum(prefilled) == (len(HELLO) if turn == 0 else 1 + len(b" and you"))
        # The last token of an answer has no keys yet.
        prompt = [*prompt, *expected, *more]


def test_whatever_was_asked_before_an_answer_is_that_of_a_model_that_knows_nothing(engine: Engine, plain: Engine) -> None:
    random, heard = Random(3), [HELLO]
    for _ in range(24):
        before = random.choice(heard)
        prompt = [*before[: random.randint(0, len(before))], *random.choices(range(97, 103), k=random.randint(1, 3))][-34:]
        mode = random.choice(["full", "sirius", "sirius", "sparse"]) if engine.config.decoding.drafts else "full"
        settings = {"mode": mode, "reuse": random.random() < 0.9} | (SAMPLED if random.random() < 0.5 else {})
        if mode == "sirius" and "seed" not in settings and random.random() < 0.2:
            settings["accept"] = "threshold"
        stream = engine.stream(prompt, **ASKED | settings)
        for _ in range(random.randint(1, 8)):
            next(stream)
        found = stream.interrupt()
        if mode != "sparse" and settings.get("accept") != "threshold":
            assert found.token_ids == anew(plain, prompt, **settings | {"mode": "full"})[: found.new_tokens]
        else:
            assert found.cached_tokens == 0
        assert found.cached_tokens < len(prompt)
        heard.append([*prompt, *found.token_ids])


@pytest.mark.parametrize("way", ["kept neurons in trees", "hot", "hot in trees"])
@pytest.mark.parametrize("moment", [2, 7, 11, 18, 25])
def test_an_answer_that_goes_on_where_one_broke_off_within_a_pass_is_the_same(
    moment: int, way: str, load: Load, budgets: Budgets, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, expected, asked = loaded(WAYS[way], load, budgets), anew(plain, HELLO), 0
    streamer = HotStreamer if WAYS[way].hot else WeightStreamer
    neurons = streamer.neurons

    def watched(self: Any, layer: int) -> Any:
        nonlocal asked
        asked += 1
        if asked == moment:
            raise KeyboardInterrupt
        return neurons(self, layer)

    monkeypatch.setattr(streamer, "neurons", watched)
    stream = engine.stream(HELLO, **ASKED)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    broken = stream.interrupt()
    assert broken.token_ids == expected[: broken.new_tokens]
    for prompt in ([*HELLO, *expected, 97], HELLO):
        found = engine.generate(prompt, **ASKED)
        assert found.token_ids == anew(plain, prompt)
        assert (found.cached_tokens > 0) == (moment > 4 or prompt is HELLO)


def test_after_broken_weights_everything_is_computed_anew(load: Load, budgets: Budgets, plain: Engine) -> None:
    engine = load(**budgets("host"))
    norm = engine._streamer.final_norm
    with torch.inference_mode():
        kept = norm.clone()
        norm.fill_(torch.nan)
    with pytest.raises(WeightReadError):
        engine.generate(HELLO, **ASKED)
    with torch.inference_mode():
        norm.copy_(kept)
    found = engine.generate(HELLO, **ASKED)
    assert (found.cached_tokens, found.token_ids) == (0, anew(plain, HELLO))


def test_positions_whose_rotation_depends_on_the_prompt_are_computed_anew(load: Load) -> None:
    engine = load("synthetic:tiny?dtype=F32&positions=32", max_context=32)
    engine.spec.rope.__dict__.update(kind="dynamic", parameters={"factor": 2.0})
    engine.generate(HELLO, **ASKED)
    assert engine.generate(HELLO, **ASKED).cached_tokens == 0


def test_the_statistic_of_what_is_shared_counts_when_hot_neurons_are_chosen(load: Load, budgets: Budgets) -> None:
    engine = loaded(WAYS["hot as the prompt says"], load, budgets)
    hot_set = engine._streamed.sparsity
    assert isinstance(hot_set, HotSet)
    engine.generate(HELLO, max_new_tokens=1)
    # The shares of a token are 1 together.
    assert torch.allclose(hot_set.squared_scores.sum(dim=1), torch.tensor(11.0))
    engine.generate([*HELLO, 97, 98], max_new_tokens=1)
    assert torch.allclose(hot_set.squared_scores.sum(dim=1), torch.tensor(13.0))
    engine.generate([*HELLO[:6], 97], max_new_tokens=1)
    assert torch.allclose(hot_set.squared_scores.sum(dim=1), torch.tensor(7.0))
    engine.generate([*HELLO[:6], 97], max_new_tokens=1, reuse=False)
    assert torch.allclose(hot_set.squared_scores.sum(dim=1), torch.tensor(7.0))
    engine.generate([5, 6], max_new_tokens=1)
    assert torch.allclose(hot_set.squared_scores.sum(dim=1), torch.tensor(2.0))


def test_what_a_slot_shares_is_what_the_full_model_has_computed(plain: Engine) -> None:
    slot = KVSlot(KVCache(plain.spec, 16, dtype=torch.float32))

    def computed(kind: Any, *token_ids: int) -> None:
        slot.cache.advance(len(token_ids))
        slot.appended(kind, token_ids)

    computed("prefill", 1, 2, 3)
    assert (slot.shared([1, 2, 3]), slot.shared([1, 2, 3, 4]), slot.shared([1, 5]), slot.shared([2])) == (2, 3, 1, 0)
    computed("draft", 4)
    computed("draft", 5)
    assert slot.token_ids == [1, 2, 3]
    slot.keep(3)
    computed("correction", 4, 5, 6, 7)  # a tree
    assert slot.token_ids == [1, 2, 3], "nobody has said what stands"
    slot.keep(3, [0, 2])
    assert (slot.token_ids, slot.length, slot.room) == ([1, 2, 3, 4, 6], 5, 11)
    computed("full", 8)
    assert slot.token_ids == [1, 2, 3, 4, 6, 8]
    slot.begin(2)
    assert (slot.token_ids, slot.length) == ([1, 2], 2)
