"""Kept neurons in host memory: what is gathered from where, and what there is where there is no room."""

from __future__ import annotations

import pytest
import torch

from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.kept import KeptStore, gather_neurons, gather_rows
from offload_sirius.weights.layout import PAGE_NBYTES, layer_layout
from offload_sirius_loaders import open_checkpoint

from .simulated import SimulatedUplink

SPEC = open_checkpoint("synthetic:tiny?ffn=16&width=32&heads=4&kv_heads=2").spec
LAYOUT = layer_layout(SPEC, 2, 5)
IDS = torch.tensor([0, 3, 4, 9, 15])


def layer_buffer(layer: int) -> LayerBuffer:
    """Neuron j of layer l has the number 16 l + j everywhere."""
    buffer = LayerBuffer(torch.zeros(LAYOUT.nbytes, dtype=torch.uint8), SPEC, LAYOUT, torch.bfloat16)
    numbers = 16.0 * layer + torch.arange(16)
    buffer.gate.copy_(numbers[:, None])
    buffer.up_down.copy_(numbers[:, None, None])
    return buffer


def store(layers: tuple[int, ...] = (1, 4)) -> KeptStore:
    return KeptStore(layers, LAYOUT, torch.bfloat16)


def slot_holding(kept: torch.Tensor) -> LayerBuffer:
    """A slot into which the gathered bytes were copied."""
    slot = layer_buffer(7)
    slot.parts["kept"].copy_(kept)
    return slot


def test_chosen_neurons_are_gathered_into_bytes_that_a_slot_takes_as_they_are() -> None:
    kept = store()
    for layer in (1, 4):
        kept.choose(layer, IDS, layer_buffer(layer))
        place = kept.place(layer)
        assert place is not None
        assert place.numel() == LAYOUT.kept_nbytes
        neurons = slot_holding(place).kept
        assert neurons is not None
        for rows in (neurons.gate, neurons.up, neurons.down):
            assert rows.shape == (5, 32)
            assert (rows == (16.0 * layer + IDS)[:, None]).all()
        assert kept.ids(layer).tolist() == IDS.tolist()


def test_the_next_choice_takes_the_place_of_the_last() -> None:
    kept = store()
    kept.choose(1, IDS, layer_buffer(1))
    kept.choose(4, IDS, layer_buffer(4))
    other = torch.tensor([1, 2, 5, 6, 7])
    kept.choose(1, other, layer_buffer(1))
    gates = [slot_holding(place).kept.gate[:, 0].tolist() for place in (kept.place(1), kept.place(4))]  # type: ignore[arg-type, union-attr]
    assert gates == [(16 + other).tolist(), (64 + IDS).tolist()]


def test_a_layer_without_room_is_remembered_and_not_gathered() -> None:
    kept = store()
    kept.choose(2, IDS, layer_buffer(2))
    assert kept.ids(2).tolist() == IDS.tolist()
    assert kept.place(2) is None


def test_places_are_whole_pages_that_do_not_overlap() -> None:
    kept = store()
    assert kept.nbytes == 2 * PAGE_NBYTES
    first, second = kept.place(1), kept.place(4)
    assert first is not None
    assert second is not None
    assert second.data_ptr() - first.data_ptr() == PAGE_NBYTES
    assert first.data_ptr() % PAGE_NBYTES == 0


def test_without_layers_there_is_nothing() -> None:
    kept = store(())
    assert kept.nbytes == 0
    assert kept.pin_report().reason is None
    kept.close()


def test_places_are_pinned_and_given_back() -> None:
    uplink = SimulatedUplink()
    kept = KeptStore((1, 4), LAYOUT, torch.bfloat16, registrar=uplink)
    report = kept.pin_report()
    assert (report.num_pinned, report.pageable_nbytes, report.reason) == (2, 0, None)
    assert len(uplink.pinned) == 2
    assert uplink.reads(kept.place(1))  # type: ignore[arg-type]
    kept.close()
    kept.close()
    assert uplink.pinned == {}
    assert kept.nbytes == 0
    uplink.close()


def test_what_cannot_be_pinned_is_told() -> None:
    uplink = SimulatedUplink(max_pinned_nbytes=0)
    kept = KeptStore((1,), LAYOUT, torch.bfloat16, registrar=uplink)
    assert kept.pin_report().reason == "simulated error 2"
    kept.close()
    uplink.close()


@pytest.mark.parametrize("ids", [[0], [3, 1, 2], list(range(16))])
def test_gathering_takes_rows_in_the_order_given(ids: list[int]) -> None:
    records, place = torch.arange(16 * 6).view(16, 2, 3), torch.zeros(len(ids), 2, 3, dtype=torch.int64)
    gather_rows(records, torch.tensor(ids), place)
    assert place.tolist() == [records[each].tolist() for each in ids]


def test_gathering_between_devices_goes_through_a_copy() -> None:
    place = torch.empty(2, 3, device="meta")
    gather_rows(torch.ones(4, 3), torch.tensor([1, 2]), place)  # a device of its own, which holds nothing


def test_a_slot_s_own_place_may_be_gathered_into_from_another_buffer() -> None:
    slot, source = layer_buffer(2), layer_buffer(3)
    assert slot.kept is not None
    gather_neurons(source, IDS, slot.kept)
    assert slot.kept.down[:, 0].tolist() == (48 + IDS).tolist()
