"""How many reads at a time a disk likes best, found while it does its work. Knows no files and no threads."""

from __future__ import annotations

WINDOW_NBYTES = 256 << 20
"""Bytes over which one depth is timed: a few layers, whose parts do not come at one rate, and a fraction of any model worth
streaming."""

NOISE = 0.05
"""Differences in rate below this share are taken for chance."""

ROUNDS = 2
"""In which all depths are tried, one behind the other. They are compared within a round: a disk that shares its host has fast and
slow minutes."""


class DepthTuner:
    """Tries a few queue depths in turn, over real reads, and then keeps the fastest.

    All of the readers, half of them, a quarter and an eighth are each timed over a few windows. What is kept is the smallest that
    is as fast as any but for the noise: fewer buffers go round then, which stay in the caches. Some virtual disks like very few:
    one was seen to read 4 MiB at a time 1.2 times as fast by 3 readers as by 20.

    Reads that were asked for at the depth before do not count: where 32 end while 16 are
    timed, 16 look a third faster than they are.
    """

    def __init__(self, num_readers: int, window_nbytes: int = WINDOW_NBYTES) -> None:
        shares = (num_readers // 8, num_readers // 4, num_readers // 2, num_readers)
        self._candidates = sorted({max(share, 1) for share in shares}, reverse=True)
        self._rates: list[float] = []
        """Of the trials that are over."""
        self._window_nbytes = window_nbytes
        self.best_bytes_per_second: float | None = None
        self.depth = 0
        """Reads that may be under way at a time."""
        self.restart(0.0)

    def restart(self, busy_seconds: float) -> None:
        """Begin the trials anew: what is read from now on is another kind of work. busy_seconds: the running total so far."""
        self._trials = self._candidates * ROUNDS
        self._rates.clear()
        self._nbytes, self._since = 0, busy_seconds
        self._go_to(self._trials[0])

    def record(self, nbytes: int, busy_seconds: float) -> None:
        """A read of nbytes has ended; busy_seconds is the running total of time in which the disk was reading."""
        if self._num_before:
            self._num_before -= 1
            self._since = busy_seconds
            return
        self._nbytes += nbytes
        seconds = busy_seconds - self._since
        if self._nbytes < self._window_nbytes or seconds <= 0:
            return
        self._close_window(self._nbytes / seconds)
        self._nbytes, self._since = 0, busy_seconds

    def _close_window(self, bytes_per_second: float) -> None:
        self.best_bytes_per_second = max(bytes_per_second, self.best_bytes_per_second or 0.0)
        if not self._trials:
            return
        self._trials.pop(0)
        self._rates.append(bytes_per_second)
        self._go_to(self._trials[0] if self._trials else self._choose())

    def _go_to(self, depth: int) -> None:
        """From now on."""
        self._num_before = self.depth if depth != self.depth else 0
        """Reads that may have been asked for at another depth and have not ended."""
        self.depth = depth

    def _choose(self) -> int:
        count = len(self._candidates)
        rounds = [self._rates[start : start + count] for start in range(0, len(self._rates), count)]
        # Of each depth the share of its round's fastest, all rounds together.
        shares = [sum(rates[index] / max(rates) for rates in rounds) for index in range(count)]
        enough = max(shares) * (1 - NOISE)
        return min(depth for depth, share in zip(self._candidates, shares, strict=True) if share >= enough)
