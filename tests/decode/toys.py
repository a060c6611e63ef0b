"""Models that are a rule for the next token and a list for a KV cache, which refuse whatever a real one would get wrong."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from offload_sirius.decode import loop
from offload_sirius.decode.loop import alone
from offload_sirius.decode.model import Ask, Pass
from offload_sirius.model.transformer import TokenTree

VOCAB = 16

Rule = Callable[[tuple[int, ...]], Tensor]
"""All tokens so far -> logits float32 [V]."""


@dataclass(frozen=True)
class Slot:
    """A position of the cache."""

    token_id: int
    position: int
    exact: bool
    """Whether a full pass has written it."""


@dataclass(frozen=True)
class Called:
    """A pass as it was asked for."""

    kind: Pass
    token_ids: list[int]
    following: Pass
    is_tree: bool


class ToyModel:
    """Logits are a function of the tokens that a slot sees through the mask, in the order of their positions."""

    device = torch.device("cpu")

    def __init__(self, target: Rule, draft: Rule | None = None, *, capacity: int = 10_000) -> None:
        self.calls: list[Called] = []
        self.cache: list[Slot] = []
        self.capacity = capacity
        self._target = target
        self._draft = draft or target

    @property
    def length(self) -> int:
        return len(self.cache)

    @property
    def room(self) -> int:
        return self.capacity - len(self.cache)

    def run(self, asks: Sequence[Ask]) -> list[Tensor]:
        """As one pass: each slot is a toy of its own."""
        return [ask.slot.computed(ask) for ask in asks]  # type: ignore[attr-defined]

    def computed(self, ask: Ask) -> Tensor:
        assert ask.kind != "prefill" or not self.cache
        if ask.kind == "correction":
            assert all(slot.exact for slot in self.cache), "the draft's keys and values are still there"
        logits = self._append(ask.kind, torch.tensor(ask.token_ids), ask.tree, ask.following)
        return logits[-1:] if ask.kind == "prefill" else logits

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        assert list(offsets) == sorted(set(offsets)), "offsets ascend"
        self.cache = self.cache[:length] + [self.cache[length + offset] for offset in offsets]
        assert [slot.position for slot in self.cache] == list(range(len(self.cache))), "what is kept is a line"

    @property
    def kept_ids(self) -> list[int]:
        """The tokens in the cache, all of which a full pass has written last."""
        assert all(slot.exact for slot in self.cache)
        return [slot.token_id for slot in self.cache]

    def kinds(self) -> list[Pass]:
        return [call.kind for call in self.calls]

    def _append(self, kind: Pass, token_ids: Tensor, tree: TokenTree | None, following: Pass) -> Tensor:
        assert token_ids.dtype == torch.int64
        assert len(token_ids) > 0
        self.calls.append(Called(kind, token_ids.tolist(), following, tree is not None))
        start, stop = self.length, self.length + len(token_ids)
        assert stop <= self.capacity, "no room"
        positions = list(range(start, stop)) if tree is None else tree.positions.tolist()[-len(token_ids) :]
        self.cache += [Slot(*each, kind != "draft") for each in zip(token_ids.tolist(), positions, strict=True)]
        mask = torch.ones(stop - start, stop, dtype=torch.bool).tril(start) if tree is None else tree.mask
        assert mask.shape == (stop - start, stop)
        assert mask.dtype == torch.bool
        rule = self._draft if kind == "draft" else self._target
        return torch.stack([rule(self._seen(start + row, mask[row])) for row in range(stop - start)])

    def _seen(self, own: int, row: Tensor) -> tuple[int, ...]:
        """The tokens that a slot sees: a whole line of positions that ends with its own, sparse ones only at its end."""
        seen = sorted((self.cache[column] for column in row.nonzero().flatten().tolist()), key=lambda slot: slot.position)
        assert [slot.position for slot in seen] == list(range(len(seen)))
        assert seen[-1] == self.cache[own]
        exact = [slot.exact for slot in seen]
        assert exact == sorted(exact, reverse=True)
        return tuple(slot.token_id for slot in seen)


def successor(sequence: tuple[int, ...]) -> Tensor:
    """The next number is the likeliest."""
    return torch.nn.functional.one_hot(torch.tensor((sequence[-1] + 1) % VOCAB), VOCAB).float()


def jumble(seed: int) -> Rule:
    """Logits that differ for every sequence; whole numbers every now and then, so that there are ties."""

    @cache
    def rule(sequence: tuple[int, ...]) -> Tensor:
        key = hash((seed, *sequence)) % 2**63
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(key)) * 2
        return logits.round() if key % 5 == 0 else logits

    return rule


def forgetful(rule: Rule, num_tokens: int) -> Rule:
    """The rule with the last tokens alone: so what followed them once follows them again."""
    return lambda sequence: rule(sequence[-num_tokens:])


def mostly(rule: Rule, other: Rule, share: float) -> Rule:
    """The first rule for that share of sequences, the other for the rest."""
    return lambda sequence: (rule if hash((7, *sequence)) % 1000 < share * 1000 else other)(sequence)


def decode_full(model: Any, *arguments: Any, **settings: Any) -> Generator[int, None, None]:
    """Token ids of an answer in mode full that a toy writes by itself."""
    return token_ids(model, loop.decode_full(model, *arguments, **settings))


def decode_sparse(model: Any, *arguments: Any, **settings: Any) -> Generator[int, None, None]:
    """The same in mode sparse."""
    return token_ids(model, loop.decode_sparse(model, *arguments, **settings))


def decode_sirius(model: Any, *arguments: Any, **settings: Any) -> Generator[int, None, None]:
    """The same in mode sirius."""
    return token_ids(model, loop.decode_sirius(model, *arguments, **settings))


def token_ids(model: Any, steps: Any) -> Generator[int, None, None]:
    """What is emitted, one by one."""
    for token in alone(model, steps):
        yield token.token_id
