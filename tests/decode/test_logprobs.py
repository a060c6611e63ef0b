"""Log-probabilities are those of the full model's own logits, in whichever way a token was found."""

from __future__ import annotations

import pytest
import torch

from offload_sirius.config import DecodingConfig, GenerationConfig, SamplingConfig
from offload_sirius.decode.emitted import Emitted
from offload_sirius.decode.logprobs import emitted
from offload_sirius.decode.loop import alone, decode_full, decode_sirius
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.errors import ConfigError

from .toys import VOCAB, ToyModel, jumble, mostly

COUNT = 20


def test_a_token_has_its_own_and_those_of_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + 3  # raw: they need not sum to 1
    found = emitted(2, logits, 2)
    assert found.logprob == pytest.approx(-2.0794415, abs=1e-6)
    assert [token_id for token_id, _ in found.top_logprobs] == [0, 1]
    assert [logprob for _, logprob in found.top_logprobs] == pytest.approx([-0.6931472, -1.3862944], abs=1e-6)
    assert len(emitted(0, logits, 9).top_logprobs) == 4
    assert emitted(0, logits, 0).top_logprobs == ()
    assert emitted(2, logits, None) == Emitted(token_id=2)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("accept", ["exact", "threshold"])
def test_every_mode_gives_those_of_the_full_model(width: int, accept: str) -> None:
    target, stats = jumble(5), DecodeStats()
    sampler = Sampler(SamplingConfig(temperature=0.0 if accept == "threshold" else 0.8, repetition_penalty=1.2, seed=3))
    toy = ToyModel(target, mostly(target, jumble(6), 0.7))
    decoding = DecodingConfig(window=4, tree_width=width, accept=accept)  # type: ignore[arg-type]
    steps = decode_sirius(
        toy,
        sampler,
        [1, 2],
        decoding=decoding,
        end_token_ids=frozenset(),
        max_new_tokens=COUNT,
        stats=stats,
        num_alternatives=3,
    )
    assert_full_models(target, list(alone(toy, steps)))
    assert 0 < (stats.acceptance or 0) < 1
    toy = ToyModel(target)
    tokens = alone(toy, decode_full(toy, sampler, [1, 2], DecodeStats(), None, 3))
    assert_full_models(target, [next(tokens) for _ in range(COUNT)])


def assert_full_models(target: object, tokens: list[Emitted]) -> None:
    assert len(tokens) == COUNT
    sequence = [1, 2]
    for token in tokens:
        logprobs = target(tuple(sequence)).log_softmax(dim=0)  # type: ignore[operator]
        assert token.logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-6)
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(logprobs.topk(3).values.tolist(), abs=1e-6)
        assert all(logprobs[token_id] == pytest.approx(logprob, abs=1e-6) for token_id, logprob in token.top_logprobs)
        sequence.append(token.token_id)


def test_more_alternatives_than_anybody_reads_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(logprobs=VOCAB + 5)
    assert str(caught.value) == "--logprobs is 21; it must be between 0 and 20"
