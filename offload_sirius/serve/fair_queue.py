"""Who is next: clients take turns, and the requests of one client keep their order. Knows nothing of requests."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A line for each client; the next item comes from the client whose turn is longest ago.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def push(self, client: str, item: Item) -> None:
        """To the end of the client's line; a client that had none comes behind all others."""
        self._lines.setdefault(client, deque()).append(item)
        self._num_items += 1

    def pop(self) -> Item:
        """The next item. Raises IndexError when there is none."""
        if not self._lines:
            raise IndexError("the queue is empty")
        client, line = self._lines.popitem(last=False)
        item = line.popleft()
        if line:
            self._lines[client] = line
        self._num_items -= 1
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Take an item out of its line, whichever place it has. False where it is not there."""
        line = self._lines.get(client)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[client]
        self._num_items -= 1
        return True
