"""Whose turn it is."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.serve.fair_queue import FairQueue

CLIENTS = st.lists(st.sampled_from("abc"), max_size=30)


def filled(clients: list[str]) -> FairQueue[tuple[str, int]]:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for place, client in enumerate(clients):
        queue.push(client, (client, place))
    return queue


def drained(queue: FairQueue[tuple[str, int]]) -> list[tuple[str, int]]:
    return [queue.pop() for _ in range(len(queue))]


def test_clients_take_turns_and_a_busy_one_holds_up_nobody() -> None:
    assert "".join(client for client, _ in drained(filled(list("aaaabbc")))) == "abcabaa"


@given(CLIENTS)
def test_each_client_is_served_in_its_own_order_and_nothing_is_lost(clients: list[str]) -> None:
    popped = drained(filled(clients))
    assert sorted(popped) == sorted((client, place) for place, client in enumerate(clients))
    for client in set(clients):
        places = [place for each, place in popped if each == client]
        assert places == sorted(places)


@given(CLIENTS)
def test_nobody_has_a_second_turn_before_all_that_wait_have_had_one(clients: list[str]) -> None:
    order = [client for client, _ in drained(filled(clients))]
    for client in set(clients):
        turns = [turn for turn, each in enumerate(order) if each == client]
        for first, second in pairwise(turns):
            between, still_waiting = order[first + 1 : second], set(order[second:]) - {client}
            assert still_waiting <= set(between)
            assert len(between) == len(set(between))


@given(CLIENTS, st.data())
def test_what_is_removed_does_not_come_and_all_else_does(clients: list[str], data: st.DataObject) -> None:
    queue, items = filled(clients), [(client, place) for place, client in enumerate(clients)]
    removed = data.draw(st.sets(st.sampled_from(items))) if items else set()
    assert all(queue.remove(client, (client, place)) for client, place in removed)
    assert not any(queue.remove(client, (client, place)) for client, place in removed)
    assert set(drained(queue)) == set(items) - removed


def test_an_empty_queue_has_nothing_to_give() -> None:
    with pytest.raises(IndexError, match="the queue is empty"):
        FairQueue[int]().pop()
