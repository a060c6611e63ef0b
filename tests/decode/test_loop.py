"""The decoding loop with models that are a rule for the next token, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.config import SamplingConfig
from offload_sirius.decode.loop import decode_full
from offload_sirius.decode.sampling import Sampler

VOCAB = 16
GREEDY = SamplingConfig()
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


class RuleModel:
    """A model whose logits are a function of all tokens so far; writes down what it was asked to compute."""

    def __init__(self, rule: Callable[[Sequence[int]], Tensor]) -> None:
        self.prefills: list[list[int]] = []
        self.steps: list[list[int]] = []
        self._rule = rule
        self._sequence: list[int] = []

    def prefill(self, token_ids: Tensor) -> Tensor:
        self.prefills.append(token_ids.tolist())
        self._sequence = token_ids.tolist()
        return self._rule(self._sequence)

    def step(self, token_ids: Tensor) -> Tensor:
        self.steps.append(token_ids.tolist())
        self._sequence += token_ids.tolist()
        return self._rule(self._sequence)[None]


class WatchedSampler(Sampler):
    """Writes down what it was asked."""

    def __init__(self, config: SamplingConfig) -> None:
        super().__init__(config)
        self.asked: list[tuple[int, list[int]]] = []

    def choose(self, logits: Tensor, position: int, token_ids: Sequence[int]) -> int:
        self.asked.append((position, list(token_ids)))
        return super().choose(logits, position, token_ids)


def successor(sequence: Sequence[int]) -> Tensor:
    """The next number is the likeliest."""
    return torch.nn.functional.one_hot(torch.tensor((sequence[-1] + 1) % VOCAB), VOCAB).float()


def jumble(sequence: Sequence[int]) -> Tensor:
    """Logits that differ for every sequence."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(sequence)) % 2**63))


def first_tokens(count: int, model: RuleModel, prompt: Sequence[int], config: SamplingConfig = GREEDY) -> list[int]:
    return list(islice(decode_full(model, Sampler(config), prompt), count))


def test_greedy_tokens_are_the_likeliest_ones() -> None:
    assert first_tokens(5, RuleModel(successor), [13]) == [14, 15, 0, 1, 2]


def test_the_prompt_is_computed_in_one_pass_and_each_token_in_one_more() -> None:
    model = RuleModel(successor)
    first_tokens(4, model, [3, 1, 4])
    assert model.prefills == [[3, 1, 4]]
    assert model.steps == [[5], [6], [7]]


def test_no_pass_is_begun_before_its_token_is_wanted() -> None:
    model = RuleModel(successor)
    tokens = decode_full(model, Sampler(GREEDY), [0])
    assert (model.prefills, model.steps) == ([], [])
    next(tokens)
    assert (model.prefills, model.steps) == ([[0]], [])
    next(tokens)
    assert model.steps == [[1]]


@given(prompt=PROMPTS, count=st.integers(1, 8))
def test_the_sampler_is_told_the_position_and_everything_before_it(prompt: list[int], count: int) -> None:
    sampler = WatchedSampler(GREEDY)
    answer = list(islice(decode_full(RuleModel(successor), sampler, prompt), count))
    sequence = prompt + answer
    assert sampler.asked == [(position, sequence[:position]) for position in range(len(prompt), len(sequence))]


@given(prompt=PROMPTS, count=st.integers(1, 8), split=st.integers(0, 8), seed=st.integers(0, 2**64 - 1))
def test_an_answer_goes_on_the_same_when_its_beginning_is_given_as_prompt(
    prompt: list[int], count: int, split: int, seed: int
) -> None:
    config = SamplingConfig(temperature=1.0, seed=seed)
    answer = first_tokens(count, RuleModel(jumble), prompt, config)
    given = answer[: min(split, count - 1)]
    assert given + first_tokens(count - len(given), RuleModel(jumble), prompt + given, config) == answer


def test_the_prompt_that_was_given_is_left_as_it_is() -> None:
    prompt = [1, 2]
    first_tokens(3, RuleModel(successor), prompt)
    assert prompt == [1, 2]
