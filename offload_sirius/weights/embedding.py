"""The embedding table, which is never uploaded: a step needs a few of its rows, gathered on the host."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.weights.disk import Job, ReaderPool
from offload_sirius.weights.pieces import Piece
from offload_sirius_loaders.checkpoint import TensorInfo


class Embedding(Protocol):
    """Rows of the table for token ids."""

    def rows(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [S] in host memory -> [S, D] on the device."""


class TableEmbedding:
    """The table in memory: the host's, or the head's own matrix where the two are tied."""

    def __init__(self, table: Tensor, device: torch.device) -> None:
        """table: [V, D], on the host or on the device."""
        self._table = table
        self._device = device

    def rows(self, token_ids: Tensor) -> Tensor:
        """See Embedding."""
        return self._table[token_ids.to(self._table.device)].to(self._device)


class DiskEmbedding:
    """Rows read from the checkpoint as they are needed, for host budgets that the table would exceed."""

    def __init__(self, info: TensorInfo, readers: ReaderPool, dtype: torch.dtype, device: torch.device) -> None:
        self._info = info
        self._readers = readers
        self._dtype = dtype
        self._device = device

    def rows(self, token_ids: Tensor) -> Tensor:
        """See Embedding. Each distinct row is read once. Raises WeightReadError."""
        distinct, inverse = token_ids.unique(return_inverse=True)
        # A tensor made in the model's inference mode could not be written by the readers, which are outside of it.
        with torch.inference_mode(False):
            rows = torch.empty(len(distinct), self._info.shape[1], dtype=self._dtype)
        jobs = [Job(Piece(self._info, token_id, 1), rows, row) for row, token_id in enumerate(distinct.tolist())]
        # Urgent: behind the layers that are being prefetched, a few rows would wait as long as a layer takes.
        self._readers.submit(jobs, urgent=True).wait()
        return rows[inverse].to(self._device)
