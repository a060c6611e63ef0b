"""What a model says of tokens that somebody else has chosen. Knows the model only as logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from offload_sirius.decode.sampling import no_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScore:
    """Of one token."""

    log_probability: float
    is_likeliest: bool
    """Whether mode full would choose it, greedily."""


class Scorer:
    """Reads logits, position after position."""

    def __init__(self, wanted: Sequence[Sequence[int]], position: int) -> None:
        """wanted: the ids to score at each position; position: the first, for messages."""
        self.scores: list[list[TokenScore]] = []
        """As wanted, of what has been read."""
        self._wanted = wanted
        self._position = position

    def read(self, logits: Tensor) -> None:
        """The next positions: float32 [R, V], which is overwritten, so that nothing else of its size is needed.

        Raises WeightReadError where they are no numbers.
        """
        for row in logits:
            place = len(self.scores)
            self.scores.append(_scores(row, self._wanted[place], self._position + place))


def _scores(logits: Tensor, token_ids: Sequence[int], position: int) -> list[TokenScore]:
    found, likeliest, largest = logits[list(token_ids)].tolist(), int(logits.argmax()), float(logits.max())
    if not math.isfinite(largest):
        raise no_numbers(position)
    # log softmax: the logit less the logarithm of the sum of all exponentials.
    normaliser = largest + float(logits.sub_(largest).exp_().sum().log())
    return [
        TokenScore(log_probability=logit - normaliser, is_likeliest=token_id == likeliest)
        for token_id, logit in zip(token_ids, found, strict=True)
    ]
