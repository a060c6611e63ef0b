"""What decoding needs of a model with KV caches: four kinds of passes, and positions that can be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from offload_sirius.model.transformer import TokenTree

Pass = Literal["prefill", "draft", "correction", "full"]
"""What a pass over the layers is for. The last three can follow a pass."""
PASSES: tuple[Pass, ...] = get_args(Pass)


class Slot(Protocol):
    """The KV cache of one answer, which sparse and full passes share."""

    @property
    def length(self) -> int:
        """Positions in it."""

    @property
    def room(self) -> int:
        """Positions that it has room for beyond those."""

    @property
    def device(self) -> torch.device:
        """Where logits are, and where a tree has to be."""

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        """Keep the first `length` positions, and behind them those at length + offset, offsets ascending; take the rest back."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Tokens that an answer wants computed, by the sparse model (`draft`) or the full one."""

    slot: Slot
    """They are appended to what it holds."""
    kind: Pass
    token_ids: Sequence[int]
    """Of a prompt, what of it is not in the slot yet."""
    following: Pass
    """What will come next, so that the link can already fetch for it; a wrong forecast only costs time."""
    tree: TokenTree | None = None
    """Where tokens stand that do not follow each other."""
    num_grafted: int = 0
    """Of a correction: its last tokens, which no draft has proposed."""


class Model(Protocol):
    """Carries passes out."""

    def run(self, asks: Sequence[Ask]) -> list[Tensor]:
        """One pass for all that is asked for: of one kind, or some of corrections and some of single full steps.

        -> for each logits float32 [S, V], of a prompt [1, V] behind its last token.
        """
