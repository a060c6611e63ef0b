"""How near do drafts come to the full model where both read the same text? Knows no settings, only passes and places.

The text is an answer of the full model. The draft is given its tokens one by one, and what it says of the next token is compared
with what the full model says. Behind it are its own keys and values since the last correction, as when it really decodes: those
of the tokens of its window, while all before them are the full model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius.decode.model import Ask, Model
from offload_sirius.engine.kv_slot import KVSlot


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt and what the full model answered."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    """An end token included."""


@dataclass(kw_only=True)
class Nearness:
    """Of one text, over the tokens that the draft proposed."""

    num_tokens: int = 0
    num_same: int = 0
    """Tokens that both find likeliest."""
    kl: float = 0.0
    """Sum over the tokens of the divergence of the draft's distribution from the full model's, in nats."""

    def add(self, drafted: Tensor, full: Tensor) -> None:
        """Logits of both, [P, V] in host memory."""
        self.num_tokens += len(full)
        self.num_same += int((drafted.argmax(dim=1) == full.argmax(dim=1)).sum())
        ours, theirs = drafted.log_softmax(dim=1), full.log_softmax(dim=1)
        self.kl += functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()


def nearness(model: Model, slots: Sequence[KVSlot], texts: Sequence[Text], window: int, num_rows: int) -> list[Nearness]:
    """Of drafts that are corrected after every window of that many tokens; texts: no more than there are slots.

    As in an answer the full model gives the first token and the one behind each window, and what is drafted of the last window
    leaves it the last token: those are not compared. A window that is as long as the answers is never corrected. num_rows: tokens
    of one text that a pass of the full model may have.
    """
    found = [Nearness() for _ in texts]
    places = list(zip(slots, texts, found, strict=False))
    for slot, _, _ in places:
        slot.begin(0)
    model.run([Ask(slot=slot, kind="prefill", token_ids=text.prompt_ids, following="draft") for slot, text, _ in places])
    longest = max(len(text.token_ids) for text in texts)
    for root in range(0, longest - 2, window):
        # Behind the root of the window the full model gives the answer's last token at least.
        windows = [
            _Window(slot, text, own, root, min(window, len(text.token_ids) - 1 - root))
            for slot, text, own in places
            if len(text.token_ids) - 2 > root
        ]
        for step in range(window - 1):
            if not (drafting := [each for each in windows if step < each.num_drafts]):
                break
            for each, logits in zip(drafting, model.run([each.draft(step) for each in drafting]), strict=True):
                each.drafted.append(logits.cpu())  # [1, V]
        for each in windows:
            each.take_back()
        for first in range(0, window, num_rows):
            if not (correcting := [each for each in windows if first <= each.num_drafts]):
                break
            for each, logits in zip(correcting, model.run([each.correct(first, num_rows) for each in correcting]), strict=True):
                each.compare(first, logits.cpu())
    return found


class _Window:
    """Tokens of an answer that a draft and the full model read."""

    def __init__(self, slot: KVSlot, text: Text, found: Nearness, root: int, num_tokens: int) -> None:
        self.num_drafts = num_tokens - 1
        self.drafted: list[Tensor] = []
        """Logits [1, V] of each step."""
        self._slot = slot
        self._start = len(text.prompt_ids) + root
        self._token_ids = text.token_ids[root : root + num_tokens]
        self._found = found

    def draft(self, step: int) -> Ask:
        return Ask(slot=self._slot, kind="draft", token_ids=[self._token_ids[step]], following="draft")

    def take_back(self) -> None:
        """The full model's keys and values take the place of the draft's."""
        self._slot.keep(self._start)

    def correct(self, first: int, num_rows: int) -> Ask:
        token_ids = self._token_ids[first : first + num_rows]
        return Ask(slot=self._slot, kind="correction", token_ids=token_ids, following="draft")

    def compare(self, first: int, logits: Tensor) -> None:
        """logits: of tokens from that one on, [P, V]. Behind the last token of a window nothing was drafted."""
        num_compared = min(len(logits), self.num_drafts - first)
        if num_compared > 0:
            self._found.add(torch.cat(self.drafted[first : first + num_compared]), logits[:num_compared])
