"""The next token from the logits, in two steps that can be taken apart: a distribution, and a draw from it.

The distribution follows Hugging Face, step for step: repetition penalty, temperature, top-k, top-p, min-p. The draw uses one
number that is a pure function of seed and position: what was drawn before changes nothing. Knows no model and no text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offload_sirius.config import SamplingConfig
from offload_sirius.errors import WeightReadError

_COLDEST = 1e-5
"""Temperatures below this one act like it: dividing by less overflows float32, and a gap of 0.001 already decides every draw."""


class Sampler:
    """Chooses tokens by one set of rules. Holds no state: every answer follows from the arguments."""

    def __init__(self, config: SamplingConfig) -> None:
        self._config = config

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, behind the repetition penalty if there is one."""
        return self._config.temperature == 0

    @property
    def is_argmax(self) -> bool:
        """Whether the token of the largest logit is taken as it is."""
        return self.is_greedy and self._config.repetition_penalty == 1

    def choose(self, logits: Tensor, position: int, token_ids: Sequence[int]) -> int:
        """The token at `position`: waits for the device once.

        logits: float32 [V], on any device. token_ids: all before `position`, prompt and answer, for the repetition penalty.
        Raises WeightReadError where the logits hold NaN or plus infinity, or nothing above minus infinity.
        """
        if self.is_argmax:  # a distribution in float64 over all tokens would say the same
            [[largest, token_id]] = likeliest(logits[None]).tolist()
            return checked_id(largest, token_id, position)
        return self.draw(self.distribution(logits, token_ids), position)

    def distribution(self, logits: Tensor, token_ids: Sequence[int]) -> Tensor:
        """Probabilities float64 [V] from logits float32 [V]; greedy puts all on the likeliest token.

        Logits that are no numbers give probabilities that are no numbers, which `draw` refuses: finding out here would wait for
        the device once more.
        """
        scores = self.penalised(logits, token_ids)
        if self.is_greedy:
            scores = keep_likeliest(scores)
        else:
            scores = self._keep_candidates(scores / max(self._config.temperature, _COLDEST))
        return scores.softmax(dim=0, dtype=torch.float64)

    def penalised(self, logits: Tensor, token_ids: Sequence[int]) -> Tensor:
        """Logits [V] behind the repetition penalty for all tokens before; the same tensor where there is none."""
        if self._config.repetition_penalty == 1:
            return logits
        return penalise_repeats(logits, token_ids, self._config.repetition_penalty)

    def log_probabilities(self, logits: Tensor, befores: Sequence[Sequence[int]]) -> Tensor:
        """What a branch of a draft is worth, [S, V] from logits float32 [S, V]: the log of the distribution that is drawn from.

        Greedy, where that is one token, the log of the model's own behind the penalty. befores: for each row all tokens before.
        Rows of logits that are no numbers are NaN.
        """
        rows = zip(logits, befores, strict=True)
        if not self.is_greedy:
            return torch.stack([self.distribution(row, before) for row, before in rows]).log()
        if not self.is_argmax:
            logits = torch.stack([self.penalised(row, before) for row, before in rows])
        return logits.log_softmax(dim=1)

    def draw(self, probabilities: Tensor, position: int) -> int:
        """The token at `position` by inverse CDF over the vocabulary in id order. probabilities: float [V], need not sum to 1.

        Raises WeightReadError where they are no numbers or all zero. Waits for the device once.
        """
        cumulative = probabilities.cumsum(dim=0, dtype=torch.float64)  # [V]
        total = cumulative[-1:]  # [1]
        token_id = torch.searchsorted(cumulative, total * uniform(self._config.seed, position), right=True)  # [1]
        # One read for both: each read waits for the device.
        chosen, mass = torch.cat([token_id.double(), total]).tolist()
        if not mass > 0:  # NaN too
            raise no_numbers(position)
        return int(chosen)

    def _keep_candidates(self, scores: Tensor) -> Tensor:
        config = self._config
        if config.top_k:
            scores = keep_top_k(scores, config.top_k)
        if config.top_p < 1:
            scores = keep_top_p(scores, config.top_p)
        if config.min_p:
            scores = keep_min_p(scores, config.min_p)
        return scores


def no_numbers(position: int) -> WeightReadError:
    """The error for logits from which no token at that position can be chosen."""
    return WeightReadError(
        f"position {position}: the logits hold NaN or infinity where numbers are needed; the weights are damaged "
        "or too large for their dtype: download them again, or try --dtype float32"
    )


def likeliest(logits: Tensor) -> Tensor:
    """Logits [S, V] -> float64 [S, 2]: the largest of each row, NaN if there is one, and the first token that has it."""
    largest, token_ids = logits.max(dim=1)  # [S]
    return torch.stack((largest.double(), token_ids.double()), dim=1)


def checked_id(largest: float, token_id: float, position: int) -> int:
    """A token that `likeliest` found. Raises WeightReadError where greedy `Sampler.choose` does."""
    if not math.isfinite(largest):
        raise no_numbers(position)
    return int(token_id)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a pure function of seed and position: the first output of Philox with that key and counter.

    Made of the raw 64 bits, which numpy promises to keep across versions, and not of a distribution, which it does not.
    """
    raw = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (raw >> 11) * 2.0**-53


def penalise_repeats(scores: Tensor, token_ids: Sequence[int], penalty: float) -> Tensor:
    """Scores [V] with those of the given tokens weakened, once each however often they occur: divided, or multiplied if negative.

    Ids past the vocabulary (a tokenizer with more tokens than the head has rows) are passed over.
    """
    unique = np.fromiter(set(token_ids), dtype=np.int64)
    seen = torch.from_numpy(unique[unique < scores.shape[0]]).to(scores.device)  # [unique]
    old = scores.gather(0, seen)  # [unique]
    return scores.scatter(0, seen, torch.where(old < 0, old * penalty, old / penalty))


def keep_likeliest(scores: Tensor) -> Tensor:
    """Scores [V] with all but the largest, the first of several, at minus infinity. NaN counts as largest and so shows."""
    largest, token_id = scores.max(dim=0, keepdim=True)  # [1]
    return torch.full_like(scores, -torch.inf).scatter(0, token_id, largest)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Scores [V] with those below the k-th largest at minus infinity; ties with the k-th stay."""
    kth = scores.topk(min(k, scores.shape[0])).values[-1]
    return scores.masked_fill(scores < kth, -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Scores [V] with only the likeliest tokens whose probabilities reach p together; at least one stays."""
    # Stable, so that among equals the lower id is dropped first on every device.
    ascending, token_ids = scores.sort(stable=True)
    dropped = ascending.softmax(dim=0).cumsum(dim=0) <= 1 - p
    dropped[-1:] = False
    return scores.masked_fill(dropped.scatter(0, token_ids, dropped), -torch.inf)


def keep_min_p(scores: Tensor, share: float) -> Tensor:
    """Scores [V] with tokens less likely than this share of the likeliest one at minus infinity."""
    probabilities = scores.softmax(dim=0)
    return scores.masked_fill(probabilities < share * probabilities.max(), -torch.inf)
