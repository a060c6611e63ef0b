"""A greedy answer of a model that generates as those of transformers do, each token told of as it comes."""

from __future__ import annotations

from typing import Any

import torch
from moments import Moments


def greedy_answer(model: Any, ids: str, num_new: int, moments: Moments) -> list[int]:
    """Ids of so many new tokens behind the prompt. ids: its own, with commas."""
    prompt = torch.tensor([[int(each) for each in ids.split(",")]])
    moments.begin()
    with torch.inference_mode():
        # Without a padding token it would warn; there is nothing to pad.
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            pad_token_id=0,
            streamer=moments,
        )
    return list(found[0, prompt.shape[1] :].tolist())
