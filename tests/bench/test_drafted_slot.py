"""Corrections that leave the drafts' keys and values: what is in the cache behind them, and whom that changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import offload_sirius
from offload_sirius.bench.accept_all import accept_all
from offload_sirius.bench.drafted_slot import DraftedSlot, keeping_drafted
from offload_sirius.decode.model import Pass
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine
from offload_sirius.model.kv_cache import KVCache
from offload_sirius_loaders import open_checkpoint

MODEL = "synthetic:tiny?dtype=F32&layers=3&positions=128"
NUM_NEW, WINDOW = 14, 5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Keeps that share of the neurons."""
    settings = {"keep": request.param, "window": WINDOW, "draft": "streamed", "lookup": False}
    with offload_sirius.load(MODEL, device="cpu", threads=1, max_context=64, **settings) as loaded:
        yield loaded


def answer(engine: Engine) -> Generation:
    """Of which all that is drafted stands, so that both ways emit tokens of the same windows."""
    stream = engine.stream("hello", max_new_tokens=NUM_NEW, ignore_eos=True, reuse=False, rule=accept_all)
    list(stream)
    return stream.result


def computed(slot: DraftedSlot, kind: Pass, value: float, num_tokens: int) -> None:
    """As after a pass, which has written that value everywhere behind what was there."""
    cache = slot.cache
    keys = torch.full((1, cache.keys.shape[2], num_tokens, cache.keys.shape[4]), value)
    for layer in range(cache.keys.shape[0]):
        cache.write(layer, cache.length, keys, -keys)
    cache.advance(num_tokens)
    slot.appended(kind, [7] * num_tokens)


def held(slot: DraftedSlot, num_positions: int) -> list[float]:
    """The value at each of the first positions, in all layers and heads the same."""
    keys, values = slot.cache.keys[:, :, :, :num_positions], slot.cache.values[:, :, :, :num_positions]
    assert torch.equal(keys, -values)
    assert torch.equal(keys.amax(dim=(0, 1, 2, 4)), keys.amin(dim=(0, 1, 2, 4)))
    return keys[0, 0, 0, :, 0].tolist()


@pytest.fixture
def slot() -> DraftedSlot:
    return DraftedSlot(KVCache(open_checkpoint(MODEL).spec, 16, dtype=torch.float32))


def test_what_a_draft_step_has_written_is_put_back_and_the_last_token_keeps_the_corrections(slot: DraftedSlot) -> None:
    computed(slot, "prefill", 1.0, 4)
    computed(slot, "draft", 2.0, 1)
    computed(slot, "draft", 3.0, 1)
    slot.keep(4)
    computed(slot, "correction", 9.0, 3)
    slot.keep(4, [0, 1, 2])
    assert held(slot, 7) == [1, 1, 1, 1, 2, 3, 9]
    assert (slot.length, slot.token_ids) == (7, [7] * 4)


def test_what_does_not_stand_is_not_put_back(slot: DraftedSlot) -> None:
    computed(slot, "draft", 2.0, 3)
    slot.keep(0)
    computed(slot, "correction", 9.0, 4)
    slot.keep(0, [0])
    assert slot.length == 1
    assert held(slot, 4) == [2, 9, 9, 9]


def cached(engine: Engine) -> torch.Tensor:
    """Keys of the answer behind its first token, [L, B, K, T, E]."""
    with engine.answering(None) as streamed:
        slot = streamed.slots[0]
        return slot.cache.keys.narrow(3, slot.length - NUM_NEW + 1, NUM_NEW - 1).clone()


@pytest.mark.parametrize("engine", [1.0], indirect=True)
def test_drafts_with_all_neurons_leave_what_a_correction_would(engine: Engine) -> None:
    rewritten, keys = answer(engine), cached(engine)
    with keeping_drafted(engine):
        assert answer(engine).token_ids == rewritten.token_ids
        assert torch.allclose(cached(engine), keys, atol=1e-6)


@pytest.mark.parametrize("engine", [0.1], indirect=True)
def test_sparse_drafts_leave_other_keys_and_the_next_answer_is_as_before(engine: Engine) -> None:
    rewritten, keys = answer(engine), cached(engine)
    with keeping_drafted(engine):
        drafted = answer(engine)
        assert drafted.token_ids[: WINDOW + 1] == rewritten.token_ids[: WINDOW + 1]
        alike = (cached(engine) - keys).abs().amax(dim=(0, 1, 2, 4)) < 1e-6
        # Of each window the last drafted token, which no draft step computes; what follows rests on what was left before it.
        assert alike.tolist() == [False] * 4 + [True] + [False] * (NUM_NEW - 6)
    assert answer(engine).token_ids == rewritten.token_ids
    assert torch.equal(cached(engine), keys)
