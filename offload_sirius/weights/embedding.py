"""The embedding table, which is never uploaded: a step needs a few of its rows, gathered on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.blocks import BlockFormat
from offload_sirius.kernels.block_products import block_weights
from offload_sirius.kernels.blocks import BlockRows
from offload_sirius.quantization import UNPACKED_ROWS
from offload_sirius.weights.disk import Job, ReaderPool
from offload_sirius.weights.pieces import Piece
from offload_sirius_loaders.checkpoint import TensorInfo

Table = Tensor | BlockRows
"""[V, D]"""

Send = Callable[[Tensor], Tensor]
"""A tensor in host memory, or there already -> the same on the device that computes."""


class Embedding(Protocol):
    """Rows of the table for token ids."""

    def rows(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [S] in host memory -> [S, D] on the device."""


class TableEmbedding:
    """The table in memory: the host's, or the head's own matrix where the two are tied."""

    def __init__(self, table: Table, dtype: torch.dtype, send: Send) -> None:
        """table: on the host or on the device. Rows of blocks become numbers of that type as they are gathered."""
        self._table = table
        self._dtype = dtype
        self._send = send

    def rows(self, token_ids: Tensor) -> Tensor:
        """See Embedding."""
        if isinstance(self._table, BlockRows):
            rows = gathered(self._table, token_ids, self._dtype)
        elif self._table.device == token_ids.device:
            rows = self._table[token_ids]
        else:
            return self._table[self._send(token_ids)]
        return self._send(rows)


def gathered(table: BlockRows, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of blocks as numbers, [S, D], where the table is. Some at a time: a prompt's are not held in float32, too."""
    ids = token_ids.to(table.rows.device)
    rows = torch.empty(len(ids), table.width, dtype=dtype, device=ids.device)
    for part, some in zip(rows.split(UNPACKED_ROWS), ids.split(UNPACKED_ROWS), strict=True):
        part.copy_(block_weights(table.take(some), dtype))
    return rows


class DiskEmbedding:
    """Rows read from the checkpoint as they are needed, for host budgets that the table would exceed."""

    def __init__(
        self, info: TensorInfo, readers: ReaderPool, dtype: torch.dtype, send: Send, form: BlockFormat | None = None
    ) -> None:
        """form: of rows that are blocks."""
        self._info = info
        self._form = form
        self._readers = readers
        self._dtype = dtype
        self._send = send

    def rows(self, token_ids: Tensor) -> Tensor:
        """See Embedding. Each distinct row is read once. Raises WeightReadError."""
        distinct, inverse = token_ids.unique(return_inverse=True)
        # A tensor made in the model's inference mode could not be written by the readers, which are outside of it.
        with torch.inference_mode(False):
            held_as = self._dtype if self._form is None else torch.uint8
            rows = torch.empty(len(distinct), self._info.shape[1], dtype=held_as)
        jobs = [Job(Piece(self._info, token_id, 1), rows, row) for row, token_id in enumerate(distinct.tolist())]
        # Urgent: behind the layers that are being prefetched, a few rows would wait as long as a layer takes.
        self._readers.submit(jobs, urgent=True).wait()
        if self._form is not None:
            width = rows.shape[1] // self._form.block_nbytes * self._form.block
            return self._send(gathered(BlockRows(rows, width, self._form), inverse, self._dtype))
        return self._send(rows[inverse])
