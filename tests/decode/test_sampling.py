"""The sampler against Hugging Face's logits processors, against torch.multinomial, and against itself called in another order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload_sirius.config import SamplingConfig
from offload_sirius.decode.sampling import Sampler, uniform
from offload_sirius.errors import WeightReadError

NUM_DRAWS = 20_000


def random_logits(seed: int, vocab_size: int = 500) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def reference(config: SamplingConfig, logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """The distribution that transformers draws from, in the order in which it applies its processors."""
    steps: list[LogitsProcessor] = []
    if config.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(MinPLogitsWarper(config.min_p))
    scores = logits[None]
    for step in steps:
        scores = step(torch.tensor([list(token_ids)], dtype=torch.int64), scores)
    return scores[0].softmax(dim=0)


def assert_same_as_reference(config: SamplingConfig, logits: Tensor, token_ids: Sequence[int] = (0,)) -> None:
    ours, theirs = Sampler(config).distribution(logits, token_ids), reference(config, logits, token_ids)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-7)


def kept(config: SamplingConfig, logits: Tensor) -> list[int]:
    return Sampler(config).distribution(logits, ()).nonzero().flatten().tolist()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_bound(num_outcomes: int) -> float:
    """Five standard deviations above the mean of the chi-square distribution."""
    degrees = num_outcomes - 1
    return degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=0.3),
        SamplingConfig(temperature=2.5),
        SamplingConfig(temperature=1.0, top_k=1),
        SamplingConfig(temperature=1.0, top_k=40),
        SamplingConfig(temperature=1.0, top_k=10_000),
        SamplingConfig(temperature=1.0, top_p=0.9),
        SamplingConfig(temperature=1.0, top_p=0.2),
        SamplingConfig(temperature=1.0, top_p=1e-6),
        SamplingConfig(temperature=1.0, min_p=0.05),
        SamplingConfig(temperature=1.0, min_p=1.0),
        SamplingConfig(temperature=1.0, repetition_penalty=1.3),
        SamplingConfig(temperature=1.0, repetition_penalty=0.7),
        SamplingConfig(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_each_option_gives_the_distribution_of_transformers(config: SamplingConfig, seed: int) -> None:
    assert_same_as_reference(config, random_logits(seed), token_ids=[3, 1, 4, 1, 5, 9, 2, 6, 499])


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-4, 4).map(lambda half: half / 2), min_size=1, max_size=12),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.01, 0.35, 0.63, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.13, 0.7, 1.0]),
    penalty=st.sampled_from([1.0, 1.25, 2.0]),
)
def test_options_together_agree_with_transformers_on_ties(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    assert_same_as_reference(config, torch.tensor(logits))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(temperature=1.0), [0, 1, 2, 3, 4]),
        (SamplingConfig(temperature=1.0, top_k=2), [0, 2, 3]),  # ties with the second stay
        (SamplingConfig(temperature=1.0, top_k=99), [0, 1, 2, 3, 4]),
        (SamplingConfig(temperature=1.0, top_p=0.5), [2, 3]),  # .41 .15 .15 .15 .14: of equals the lower ids go first
        (SamplingConfig(temperature=1.0, top_p=1e-9), [2]),
        (SamplingConfig(temperature=1.0, min_p=0.36), [0, 2, 3]),
        (SamplingConfig(temperature=1.0, min_p=1.0), [2]),
        (SamplingConfig(temperature=0.0), [2]),
    ],
    ids=str,
)
def test_options_keep_these_tokens(config: SamplingConfig, expected: list[int]) -> None:
    assert kept(config, torch.tensor([0.0, -0.1, 1.0, 0.0, -0.1])) == expected


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert Sampler(SamplingConfig()).choose(torch.tensor([0.0, 2.0, -1.0, 2.0]), 0, ()) == 1


def test_greedy_is_argmax_after_the_penalty() -> None:
    logits = torch.tensor([3.0, 2.0, -1.0])
    assert Sampler(SamplingConfig(repetition_penalty=2.0)).choose(logits, 5, [0, 0, 2]) == 1


def test_penalty_divides_positive_logits_and_multiplies_negative_ones_once() -> None:
    logits = torch.tensor([4.0, -1.0, 1.0])
    ours = Sampler(SamplingConfig(temperature=1.0, repetition_penalty=2.0)).distribution(logits, [0, 0, 1, 0])
    torch.testing.assert_close(ours, torch.tensor([2.0, -2.0, 1.0]).double().softmax(dim=0))


def test_penalty_passes_over_ids_beyond_the_vocabulary() -> None:
    sampler = Sampler(SamplingConfig(repetition_penalty=3.0))
    assert sampler.choose(torch.tensor([3.0, 2.0]), 0, [0, 2, 77]) == 1


def test_penalty_without_any_token_before_changes_nothing() -> None:
    assert Sampler(SamplingConfig(repetition_penalty=3.0)).choose(torch.tensor([3.0, 2.0]), 0, []) == 0


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(0)
    before = logits.clone()
    config = SamplingConfig(temperature=0.7, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.5)
    Sampler(config).choose(logits, 0, [1, 2, 3])
    assert torch.equal(logits, before)


def test_temperatures_too_small_for_float32_act_as_greedy() -> None:
    logits = random_logits(0)
    assert Sampler(SamplingConfig(temperature=1e-60)).choose(logits, 0, ()) == int(logits.argmax())


@pytest.mark.parametrize("varied", ["position", "seed"])
def test_draws_follow_the_distribution_as_those_of_torch_do(varied: str) -> None:
    config = SamplingConfig(temperature=1.0, top_k=30)
    distribution = Sampler(config).distribution(random_logits(1), ())
    if varied == "position":
        tokens = [Sampler(config).draw(distribution, position) for position in range(NUM_DRAWS)]
    else:
        tokens = [Sampler(SamplingConfig(seed=seed)).draw(distribution, 7) for seed in range(NUM_DRAWS)]
    of_torch = torch.multinomial(distribution, NUM_DRAWS, replacement=True, generator=torch.Generator().manual_seed(0))

    possible = distribution > 0
    for drawn in (torch.tensor(tokens), of_torch):
        counts = drawn.bincount(minlength=len(distribution))
        assert counts[~possible].sum() == 0
        assert chi_square(counts[possible], distribution[possible]) < chi_square_bound(30)


def test_neighbouring_positions_are_independent() -> None:
    numbers = torch.tensor([uniform(0, position) for position in range(NUM_DRAWS)], dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(NUM_DRAWS)


def test_the_token_at_a_position_does_not_depend_on_earlier_draws() -> None:
    config = SamplingConfig(temperature=1.0, seed=11)
    logits = [random_logits(seed) for seed in range(40)]
    in_order, sampler = Sampler(config), Sampler(config)
    forwards = [in_order.choose(logits[position], position, ()) for position in range(40)]
    backwards = [sampler.choose(logits[position], position, ()) for position in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert Sampler(config).choose(logits[23], 23, ()) == forwards[23]


def test_seeds_and_positions_give_different_draws() -> None:
    level = torch.zeros(10_000)

    def sequence(seed: int, first_position: int) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sampler.choose(level, position, ()) for position in range(first_position, first_position + 8)]

    assert len({*sequence(0, 0), *sequence(1, 0), *sequence(0, 8), *sequence(2**64 - 1, 10**9)}) == 32


def test_numbers_of_a_seed_and_position_never_change() -> None:
    """Written out once: another numpy, machine or year draws the same text."""
    assert uniform(7, 3) == 0.44205212947108785
    assert uniform(2**64 - 1, 10**9) == 11782123196329114100 // 2**11 / 2**53


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 1.0, 3.0]), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
)
def test_a_token_without_probability_is_never_drawn(weights: list[float], seed: int, position: int) -> None:
    token_id = Sampler(SamplingConfig(seed=seed)).draw(torch.tensor(weights, dtype=torch.float64), position)
    assert weights[token_id] > 0


def test_the_only_possible_token_is_drawn() -> None:
    logits = torch.full((50,), -torch.inf)
    logits[31] = -4.0
    config = SamplingConfig(temperature=0.9, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    assert {Sampler(config).choose(logits, position, [31]) for position in range(20)} == {31}


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(repetition_penalty=1.5),
        SamplingConfig(temperature=0.7, top_k=5),
        SamplingConfig(temperature=0.7, top_p=0.8, repetition_penalty=1.5),
    ],
    ids=str,
)
def test_branches_are_worth_the_log_of_what_is_drawn_from_or_of_the_models_own_where_that_is_one_token(
    config: SamplingConfig,
) -> None:
    sampler, logits, befores = Sampler(config), torch.stack([random_logits(0), random_logits(1)]), [[3, 4], [5, 6, 7]]
    worth = sampler.log_probabilities(logits, befores)
    own = SamplingConfig(temperature=1.0, repetition_penalty=config.repetition_penalty) if config.temperature == 0 else config
    expected = torch.stack([Sampler(own).distribution(*each) for each in zip(logits, befores, strict=True)]).log()
    torch.testing.assert_close(worth.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "is_greedy", "is_argmax"),
    [
        (SamplingConfig(), True, True),
        (SamplingConfig(repetition_penalty=1.1), True, False),
        (SamplingConfig(temperature=0.5), False, False),
        (SamplingConfig(top_k=3, top_p=0.5, min_p=0.5), True, True),
    ],
)
def test_a_sampler_knows_whether_it_takes_the_likeliest_token(config: SamplingConfig, is_greedy: bool, is_argmax: bool) -> None:
    assert (Sampler(config).is_greedy, Sampler(config).is_argmax) == (is_greedy, is_argmax)


@pytest.mark.parametrize("broken", [[1.0, math.nan, 0.0], [1.0, math.inf, 0.0], [-math.inf] * 3], ids=["nan", "inf", "nothing"])
@pytest.mark.parametrize(
    "config",
    [SamplingConfig(), SamplingConfig(temperature=1.0), SamplingConfig(temperature=1.0, top_k=2, top_p=0.9, min_p=0.1)],
    ids=["greedy", "sampled", "filtered"],
)
def test_logits_that_are_no_numbers_are_one_clear_line(broken: list[float], config: SamplingConfig) -> None:
    with pytest.raises(WeightReadError) as error:
        Sampler(config).choose(torch.tensor(broken), 12, [0])
    assert str(error.value) == (
        "position 12: the logits hold NaN or infinity where numbers are needed; the weights are damaged "
        "or too large for their dtype: download them again, or try --dtype float32"
    )
