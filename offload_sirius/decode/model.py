"""What decoding needs of a model with a KV cache: four kinds of passes, and positions that can be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from offload_sirius.model.transformer import TokenTree

Pass = Literal["prefill", "draft", "correction", "full"]
"""What a pass over the layers is for. The last three can follow a pass."""
PASSES: tuple[Pass, ...] = get_args(Pass)


class Model(Protocol):
    """One sequence in one KV cache, which sparse and full passes share.

    `following` says which pass will come next, so that the link can already fetch for it; a wrong forecast only costs time.
    """

    @property
    def length(self) -> int:
        """Positions in the KV cache."""

    @property
    def room(self) -> int:
        """Positions that the KV cache has room for beyond those."""

    @property
    def device(self) -> torch.device:
        """Where logits are, and where a tree has to be."""

    def prefill(self, token_ids: Tensor, *, following: Pass) -> Tensor:
        """Append a prompt, or what of it is not in the cache yet, int64 [S] in host memory -> logits float32 [V] behind its last
        token."""

    def full(self, token_ids: Tensor, *, following: Pass) -> Tensor:
        """Append a few tokens that follow each other, int64 [S] in host memory -> logits float32 [S, V]."""

    def draft(self, token_ids: Tensor, tree: TokenTree | None = None, *, following: Pass) -> Tensor:
        """The same by the sparse model; a tree says where tokens stand that do not follow each other."""

    def correct(self, token_ids: Tensor, tree: TokenTree | None = None, *, following: Pass, num_grafted: int = 0) -> Tensor:
        """The same by the full model, for a whole window. num_grafted: its last tokens, which no draft has proposed."""

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        """Keep the first `length` positions, and behind them those at length + offset, offsets ascending; take the rest back."""
