"""The cache of neuron records, against one made of plain Python: what is held, what has to go, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.weights.neuron_cache import NeuronCache

NUM_NEURONS, WIDTH = 12, 3


def record(neuron_id: int, version: int = 0) -> Tensor:
    """Told apart by its numbers: [2, D]."""
    return torch.full((2, WIDTH), float(100 * version + neuron_id))


def make(capacity: int) -> NeuronCache:
    return NeuronCache(torch.zeros(capacity, 2, WIDTH), NUM_NEURONS)


def needing(*neuron_ids: int) -> Tensor:
    needed = torch.zeros(NUM_NEURONS, dtype=torch.bool)
    needed[list(neuron_ids)] = True
    return needed


def insert(cache: NeuronCache, *neuron_ids: int) -> None:
    if neuron_ids:
        cache.insert(torch.tensor(neuron_ids), torch.stack([record(each) for each in neuron_ids]))


def held_by(cache: NeuronCache) -> dict[int, float]:
    ids, records = cache.held()
    assert len(ids) == len(records)
    assert all((each == each[0, 0]).all() for each in records)
    assert len(set(ids.tolist())) == len(ids), "none is there twice"
    return {neuron_id: float(each[0, 0]) for neuron_id, each in zip(ids.tolist(), records, strict=True)}


def use(cache: NeuronCache, *neuron_ids: int) -> list[int]:
    """What a token does: ask, fetch what is missing, and put it in."""
    missing: list[int] = cache.missing(needing(*neuron_ids)).tolist()
    insert(cache, *missing)
    return missing


class PlainCache:
    """Least recently used goes first; what is needed now does not go; of equals any may."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.last_used: dict[int, int] = {}
        self.now = 0

    def missing(self, needed: set[int]) -> set[int]:
        self.now += 1
        self.last_used |= dict.fromkeys(needed & self.last_used.keys(), self.now)
        return needed - self.last_used.keys()

    def follow(self, held: set[int], inserted: list[int]) -> None:
        """Check what the other has made of an insertion, and do the same."""
        room = self.capacity - len(self.last_used)
        replaceable = [age for age in self.last_used.values() if age < self.now]
        count = min(len(inserted), room + len(replaceable))
        gone, come = self.last_used.keys() - held, held - self.last_used.keys()
        assert come == set(inserted[:count])
        assert len(gone) == max(0, count - room)
        assert sorted(self.last_used[each] for each in gone) == sorted(self.last_used.values())[: len(gone)]
        for each in gone:
            del self.last_used[each]
        self.last_used |= dict.fromkeys(come, self.now)


@settings(deadline=None, max_examples=200)
@given(
    capacity=st.integers(1, NUM_NEURONS),
    tokens=st.lists(st.tuples(st.sets(st.integers(0, NUM_NEURONS - 1)), st.booleans()), max_size=12),
)
def test_it_does_what_a_plain_cache_does(capacity: int, tokens: list[tuple[set[int], bool]]) -> None:
    cache, plain = make(capacity), PlainCache(capacity)
    for needed, given_up in tokens:
        missing = cache.missing(needing(*needed)).tolist()
        assert set(missing) == plain.missing(needed)
        assert missing == sorted(missing)
        if given_up:  # an answer that was interrupted while it waited for the link
            continue
        before = set(plain.last_used)
        insert(cache, *missing)
        held = held_by(cache)
        assert len(held) <= capacity
        assert held == {neuron_id: float(neuron_id) for neuron_id in held}, "each record is its neuron's"
        plain.follow(set(held), missing)
        assert held.keys() == plain.last_used.keys()
        assert needed & before <= held.keys(), "what is needed now has not made room"


def test_at_first_everything_is_missing_and_nothing_is_held() -> None:
    cache = make(3)
    assert cache.missing(needing(4, 7)).tolist() == [4, 7]
    assert held_by(cache) == {}


def test_what_was_used_longest_ago_makes_room() -> None:
    cache = make(3)
    assert [use(cache, *ids) for ids in ([1, 2, 3], [2, 3], [5], [3, 1])] == [[1, 2, 3], [], [5], [1]]
    assert held_by(cache).keys() == {1, 3, 5}


def test_of_more_than_there_is_room_for_some_are_left_out() -> None:
    cache = make(2)
    assert use(cache, 1, 2, 3, 4) == [1, 2, 3, 4]
    assert held_by(cache) == {1: 1.0, 2: 2.0}
    assert use(cache, 1, 2, 3) == [3]
    assert held_by(cache) == {1: 1.0, 2: 2.0}


def test_records_are_held_where_they_were_planned() -> None:
    place = torch.zeros(4, 2, WIDTH)
    cache = NeuronCache(place, NUM_NEURONS)
    use(cache, 6, 8)
    _, records = cache.held()
    assert records.data_ptr() == place.data_ptr()
    assert cache.nbytes == place.nbytes + 4 * 16 + NUM_NEURONS + 1
    assert place[:2, 0, 0].tolist() == [6.0, 8.0]
    assert place[2:].count_nonzero() == 0


def test_an_interruption_half_way_through_an_insertion_leaves_nothing_that_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(3)
    use(cache, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(NeuronCache, "_put", interrupted(NeuronCache._put))
        assert cache.missing(needing(2, 5)).tolist() == [5]
        with pytest.raises(KeyboardInterrupt):
            insert(cache, 5)
    assert held_by(cache) == {}
    assert use(cache, 1, 2, 5) == [1, 2, 5]
    assert held_by(cache) == {1: 1.0, 2: 2.0, 5: 5.0}


def interrupted(put: Any) -> Any:
    """Does its work, and is interrupted before whoever asked knows."""

    def put_and_stop(*arguments: Any) -> None:
        put(*arguments)
        raise KeyboardInterrupt

    return put_and_stop
