"""Up and down records of neurons that the last tokens needed, kept on the device: one cache a streamed layer, of fixed size.

A token needs much of what the tokens before it needed (LLM in a flash, arXiv 2312.11514, calls it windowing), so only what is not
here crosses the link. What was used longest ago makes room. Knows no scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NeuronCache:
    """Records of some neurons of one layer. All bookkeeping is in tensors on the records' device."""

    def __init__(self, records: Tensor, num_neurons: int) -> None:
        """records: [C, 2, D], contiguous, the place for them; num_neurons: F of the layer."""
        self._records = records
        self._ids = torch.full((len(records),), num_neurons, device=records.device)  # [C]; F where there is none yet
        self._last_used = torch.full_like(self._ids, -1)  # [C]
        self._present = torch.zeros(num_neurons + 1, dtype=torch.bool, device=records.device)  # [F + 1]; the last is nobody's
        self._num_held = 0
        self._now = 0

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return sum(each.nbytes for each in (self._records, self._ids, self._last_used, self._present))

    def missing(self, needed: Tensor) -> Tensor:
        """Of the needed neurons, bool [F], those that are not here, int64 [M]; the others count as used now."""
        self._now += 1
        ids = self._ids[: self._num_held]
        self._last_used[: self._num_held].masked_fill_(needed[ids], self._now)
        return (needed & ~self._present[:-1]).nonzero().squeeze(1)

    def held(self) -> tuple[Tensor, Tensor]:
        """Neurons that are here, int64 [c], and their records [c, 2, D]: views."""
        return self._ids[: self._num_held], self._records[: self._num_held]

    def insert(self, neuron_ids: Tensor, records: Tensor) -> None:
        """Take in neurons, int64 [M], that were missing, records [M, 2, D], in the places of those used longest ago. Those for
        which only neurons used now would have to go are left out."""
        num_replaceable = int((self._last_used < self._now).sum())
        count = min(len(neuron_ids), num_replaceable)
        # Empty places come first, and in order: what is held stays in front.
        rows = self._last_used.sort(stable=True).indices[:count]
        try:
            self._put(rows, neuron_ids[:count], records[:count])
        except BaseException:  # an interruption half-way: places and what is said of them may no longer fit
            self._clear()
            raise

    def _put(self, rows: Tensor, neuron_ids: Tensor, records: Tensor) -> None:
        self._num_held = min(len(self._ids), self._num_held + len(rows))
        self._present[self._ids[rows]] = False
        self._ids[rows] = neuron_ids
        self._present[neuron_ids] = True
        self._last_used[rows] = self._now
        self._records.index_copy_(0, rows, records)

    def _clear(self) -> None:
        self._num_held = 0
        self._ids.fill_(len(self._present) - 1)
        self._last_used.fill_(-1)
        self._present.fill_(False)
