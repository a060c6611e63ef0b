"""Log-probabilities of tokens by the model itself: of its raw logits, whatever the sampler makes of them."""

from __future__ import annotations

from torch import Tensor

from offload_sirius.decode.emitted import Emitted


def emitted(token_id: int, logits: Tensor, num_alternatives: int | None) -> Emitted:
    """The token with its log-probability and that of so many of the likeliest ones; None: without. logits: float32 [V].

    Waits for the device once where they are wanted.
    """
    if num_alternatives is None:
        return Emitted(token_id=token_id)
    logprobs = logits.log_softmax(dim=0)  # [V]
    top = logprobs.topk(min(num_alternatives, len(logprobs)))
    logprob, *values = [float(logprobs[token_id]), *top.values.tolist()]
    return Emitted(token_id=token_id, logprob=logprob, top_logprobs=tuple(zip(top.indices.tolist(), values, strict=True)))
