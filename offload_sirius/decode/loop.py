"""The way of a token: prefill, choose, emit, step. Knows the model only as logits, and text only through ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.decode.sampling import Sampler
from offload_sirius.trace import Tracer, during


class Model(Protocol):
    """What decoding needs of a model with a KV cache."""

    def prefill(self, token_ids: Tensor) -> Tensor:
        """Append a prompt, int64 [S] in host memory -> logits float32 [V] behind its last token."""

    def step(self, token_ids: Tensor) -> Tensor:
        """Append a few tokens, int64 [S] in host memory -> logits float32 [S, V]."""


def decode_full(model: Model, sampler: Sampler, prompt_ids: Sequence[int], tracer: Tracer | None = None) -> Iterator[int]:
    """The tokens that follow the prompt, by the full model, one pass each, without end: the caller stops.

    A token is yielded before the pass that would follow it is begun, so that nothing is computed for a token nobody wants.
    """
    sequence = list(prompt_ids)
    logits = model.prefill(torch.tensor(sequence))
    while True:
        with during(tracer, "sample", "choose a token"):
            token_id = sampler.choose(logits, len(sequence), sequence)
        sequence.append(token_id)
        yield token_id
        logits = model.step(torch.tensor([token_id]))[0]
