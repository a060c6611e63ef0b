"""Token for token: real weights, wherever they are held, against transformers and against each other. float32.

A sample of what tools/exactness.py compares in full. Streamed rows keep most layers resident: they cost what they stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload_sirius
from offload_sirius.engine import Engine, open_model

PROMPTS = (
    "What is the capital of France? Answer with one word.",
    "What is 2 + 2? Answer with one number.",
    "Why is the sky blue?",
)
NUM_NEW = 16

CONTEXT = 128
OPENING = "My favourite"
"""A beginning that goes on in many ways."""

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "ignore_eos": True}
SEEDS = (0, 1, 2)
NUM_SAMPLED = 3

MOST_LAYERS = "545MB"
"""Device memory for all but a few of the 30 layers, slots included; a layer of SmolLM2-135M has 14.2 MB in float32."""

MOST_BLOCKS = "100MB"
"""The same for about half of the layers in the blocks of the file, 2.2 MB each."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to hold the weights, and the tiers its plan must have."""

    kind: str
    """gguf or safetensors"""
    settings: Mapping[str, Any]
    tiers: frozenset[str]


RESIDENT = Row(kind="gguf", settings={}, tiers=frozenset({"resident"}))
LINK: dict[str, Any] = {"device_memory": MOST_LAYERS, "link_gbps": 8.0}
ROWS = {
    "gguf resident": RESIDENT,
    "gguf over a link": Row(kind="gguf", settings=LINK | {"device_memory": MOST_BLOCKS}, tiers=frozenset({"resident", "host"})),
    "gguf from disk": Row(
        kind="gguf",
        settings={"device_memory": MOST_BLOCKS, "host_memory": "52MB"},
        tiers=frozenset({"resident", "host", "disk"}),
    ),
    "safetensors resident": Row(kind="safetensors", settings={}, tiers=frozenset({"resident"})),
    "safetensors over a link": Row(kind="safetensors", settings=LINK, tiers=frozenset({"resident", "host"})),
    "safetensors from disk": Row(
        kind="safetensors",
        settings={"device_memory": MOST_LAYERS, "host_memory": "90MB"},
        tiers=frozenset({"resident", "host", "disk"}),
    ),
}


@pytest.fixture(scope="session")
def gguf(smollm2_gguf: Path) -> Path:
    return smollm2_gguf


@pytest.fixture(scope="session")
def folder(smollm2_folder: Path) -> Path:
    return smollm2_folder


@pytest.fixture(scope="session")
def prompts(gguf: Path) -> list[list[int]]:
    """Token ids, through the chat template."""
    model = open_model(str(gguf))
    return [model.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def opening(gguf: Path) -> list[int]:
    """Token ids, as text."""
    return open_model(str(gguf)).encode(OPENING, chat=False)


@pytest.fixture(scope="session")
def expected(gguf: Path, folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers answers."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end_token_ids = sorted(open_model(str(gguf)).end_token_ids)
    return [greedy_answer(reference, prompt, end_token_ids) for prompt in prompts]


def greedy_answer(reference: Any, prompt: Sequence[int], end_token_ids: list[int]) -> list[int]:
    output = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=end_token_ids,
        pad_token_id=end_token_ids[0],
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def resident(gguf: Path) -> Iterator[Engine]:
    with load(gguf) as engine:
        yield engine


@pytest.fixture(scope="session")
def sampled(resident: Engine, opening: list[int]) -> list[tuple[int, ...]]:
    """What the resident model draws, one answer a seed."""
    return sampled_answers(resident, opening)


@pytest.fixture(scope="session")
def uninterrupted(resident: Engine, opening: list[int]) -> tuple[int, ...]:
    return resident.generate(opening, seed=7, max_new_tokens=40 + NUM_SAMPLED, **SAMPLED).token_ids


@pytest.fixture(scope="module", params=list(ROWS.values()), ids=list(ROWS))
def row(request: pytest.FixtureRequest) -> Row:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def engine(row: Row, gguf: Path, folder: Path, resident: Engine) -> Iterator[Engine]:
    """One after the other, so that no more than two models are in memory."""
    if row is RESIDENT:
        yield resident
        return
    with load(gguf if row.kind == "gguf" else folder, **row.settings) as engine:
        yield engine


def load(path: Path, **settings: Any) -> Engine:
    # One thread: nearly as fast for a model of this size, and not held up where other processes share the cores.
    given: dict[str, Any] = {"mode": "full", "dtype": "float32", "device": "cpu", "max_context": CONTEXT, "threads": 1}
    return offload_sirius.load(str(path), **given | settings)


def sampled_answers(engine: Engine, prompt: Sequence[int]) -> list[tuple[int, ...]]:
    return [engine.generate(prompt, seed=seed, max_new_tokens=NUM_SAMPLED, **SAMPLED).token_ids for seed in SEEDS]


def test_the_weights_are_where_the_row_says(row: Row, engine: Engine) -> None:
    plan = engine.plan
    tiers = {"resident": plan.resident_layers, "host": plan.host_layers, "disk": plan.disk_layers}
    assert {tier for tier, layers in tiers.items() if layers} == row.tiers


def test_greedy_answers_are_those_of_transformers(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    answers = [list(engine.generate(prompt, max_new_tokens=NUM_NEW).token_ids) for prompt in prompts]
    assert answers == expected


def test_sampled_answers_do_not_depend_on_where_the_weights_are(
    engine: Engine, opening: list[int], sampled: list[tuple[int, ...]]
) -> None:
    assert sampled_answers(engine, opening) == sampled


def test_the_sample_has_answers_that_end_and_answers_that_are_cut(gguf: Path, expected: list[list[int]]) -> None:
    end_token_ids = open_model(str(gguf)).end_token_ids
    assert {answer[-1] in end_token_ids for answer in expected} == {True, False}


def test_seeds_differ(sampled: list[tuple[int, ...]]) -> None:
    assert len(set(sampled)) == len(SEEDS)


@pytest.mark.parametrize("num_before", [1, 40])
def test_a_sampled_token_does_not_depend_on_how_much_before_it_was_generated(
    uninterrupted: tuple[int, ...], resident: Engine, opening: list[int], num_before: int
) -> None:
    before = [*opening, *uninterrupted[:num_before]]
    answer = resident.generate(before, seed=7, max_new_tokens=NUM_SAMPLED, **SAMPLED)
    assert answer.token_ids == uninterrupted[num_before : num_before + NUM_SAMPLED]


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """One cell of the grid of tools/sirius_exactness.py."""

    decoding: Mapping[str, Any]
    place: Mapping[str, Any]
    sampling: Mapping[str, Any]


GREEDY: dict[str, Any] = {}
DRAWN: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5}
FROM_DISK: dict[str, Any] = {"device_memory": MOST_LAYERS, "host_memory": "90MB"}
NUM_DRAFTED = 16

GRID = {
    "griffin .5, window 4, resident": Drafted(decoding={"window": 4}, place={}, sampling=GREEDY),
    "griffin .75, tree of 3, over a link": Drafted(
        decoding={"keep": 0.75, "window": 6, "tree_width": 3}, place=LINK, sampling=DRAWN
    ),
    "griffin .3, window 2, from disk": Drafted(decoding={"keep": 0.3, "window": 2}, place=FROM_DISK, sampling=GREEDY),
    "griffin .6, window 8, hot, over a link": Drafted(
        decoding={"keep": 0.6, "window": 8, "draft": "resident"}, place=LINK, sampling=GREEDY
    ),
    "griffin .5, tree of 2, hot as the prompt chose": Drafted(
        decoding={"window": 5, "tree_width": 2, "draft": "resident", "refresh": False},
        place={"device_memory": MOST_LAYERS},
        sampling=DRAWN,
    ),
    "griffin .7, window 4, part of the layers hot": Drafted(
        decoding={"keep": 0.7, "window": 4, "draft": "resident"},
        place={"device_memory": "270MB", "link_gbps": 8.0},
        sampling=DRAWN,
    ),
    "cats .75, window 16, over a link": Drafted(
        decoding={"sparsity": "cats", "keep": 0.75, "window": 16}, place=LINK, sampling=GREEDY
    ),
    "cats .5, tree of 2, resident": Drafted(
        decoding={"sparsity": "cats", "window": 5, "tree_width": 2}, place={}, sampling=DRAWN
    ),
}


@pytest.mark.parametrize("drafted", GRID.values(), ids=list(GRID))
def test_corrected_drafts_are_the_full_model_s_answer(
    drafted: Drafted, folder: Path, resident: Engine, opening: list[int]
) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NUM_DRAFTED, "ignore_eos": True, **drafted.sampling}
    expected = resident.generate(opening, **asked)
    with load(folder, **{"mode": "sirius", "draft": "streamed", **drafted.decoding, **drafted.place}) as engine:
        assert bool(engine.plan.streamed_layers) == bool(drafted.place)
        assert (engine.plan.hot is not None) == (drafted.decoding.get("draft") == "resident")
        if engine.plan.hot is not None:
            assert (len(engine.plan.hot.layers) == engine.spec.num_layers) == (drafted.place["device_memory"] == MOST_LAYERS)
        found = engine.generate(opening, **asked)
    assert found.token_ids == expected.token_ids
    assert found.passes.full == 0
    assert found.acceptance is not None
    assert 0 < found.acceptance < 1, "some drafts stood and some did not"


HOT_MEMORY = {"int8": "210MB", "int4": "180MB"}
"""Device memory for attention, half of the neurons of every layer, and some slots."""
STREAMED_MEMORY = {"int8": "180MB", "int4": "165MB"}
"""Less than all layers take."""

NUM_FORCED = 48
LEAST_AGREEMENT = {"int8": 0.95, "int4": 0.6}
"""With the unquantised model, whose file is in 4 bits itself: 93 of 96 tokens in int8."""


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """All layers resident in that many bits."""
    with load(folder, quantize=request.param) as engine:
        yield engine


@pytest.mark.parametrize(
    ("decoding", "sampling", "memory"),
    [
        ({"keep": 0.5, "window": 5, "tree_width": 2, "draft": "resident"}, DRAWN, HOT_MEMORY),
        ({"keep": 0.75, "window": 6, "draft": "streamed"}, GREEDY, STREAMED_MEMORY),
    ],
    ids=["hot", "streamed"],
)
def test_corrected_drafts_of_quantised_weights_are_the_answer_of_all_of_them(
    decoding: dict[str, Any],
    sampling: dict[str, Any],
    memory: dict[str, str],
    quantised: Engine,
    folder: Path,
    opening: list[int],
) -> None:
    kind = quantised.config.quantize
    asked: dict[str, Any] = {"max_new_tokens": NUM_DRAFTED, "ignore_eos": True, **sampling}
    expected = quantised.generate(opening, **asked)
    place = {"device_memory": memory[kind], "link_gbps": 8.0}
    with load(folder, mode="sirius", quantize=kind, **decoding, **place) as engine:
        assert engine.plan.host_layers
        assert (engine.plan.hot is not None) == (decoding["draft"] == "resident")
        found = engine.generate(opening, **asked)
    assert found.token_ids == expected.token_ids
    assert found.passes.full == 0
    assert found.acceptance is not None
    assert 0 < found.acceptance < 1, "some drafts stood and some did not"


def test_quantised_weights_find_the_tokens_of_the_unquantised_model(
    quantised: Engine, resident: Engine, prompts: list[list[int]], opening: list[int]
) -> None:
    num_same = 0
    for prompt in (prompts[2], opening):  # whose answers are long
        answer = resident.generate(prompt, max_new_tokens=NUM_FORCED, ignore_eos=True).token_ids
        num_same += sum(here == there for here, there in zip(likeliest(quantised, prompt, answer), answer, strict=True))
    assert num_same / (2 * NUM_FORCED) >= LEAST_AGREEMENT[quantised.config.quantize]


def likeliest(engine: Engine, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """What a model would say instead of each token of an answer, having read prompt and answer so far."""
    transformer = engine._transformer
    transformer.cache.truncate(0)
    first = transformer.prefill(torch.tensor(prompt))
    return [int(first.argmax()), *transformer.step(torch.tensor(answer[:-1])).argmax(dim=1).tolist()]
