"""The ring: order, wrap-around, what is overwritten when, and what is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.errors import WeightReadError
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.layout import Part, layer_layout
from offload_sirius.weights.streamer import WeightStreamer
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:tiny?ffn=16&width=32&heads=4&kv_heads=2").spec
LAYOUT = layer_layout(SPEC, 2)
POISON = 0xFF


class NoEmbedding:
    def rows(self, token_ids: Tensor) -> Tensor:
        return token_ids


@dataclass
class LateTransfer:
    """Writes its layer's number when it is waited for, and not before."""

    destination: Tensor
    value: int
    done: bool = False

    def wait(self) -> None:
        if not self.done:
            self.destination.fill_(self.value)
            self.done = True


@dataclass
class LateCopier:
    """Poisons what it is going to overwrite, and delivers as late as it may."""

    started: list[tuple[int, Part]] = field(default_factory=list)
    nbytes_copied: int = 0
    busy_seconds: float = 0.0
    peak_bytes_per_second: float | None = None

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> LateTransfer:
        destination = slot.parts[part]
        destination.fill_(POISON)
        self.started.append((layer, part))
        self.nbytes_copied += destination.numel()
        return LateTransfer(destination, layer)

    def close(self) -> None:
        pass


@dataclass
class DisorderlyCopier(LateCopier):
    """Delivers in any order, some early and some only when they are waited for."""

    pick: Callable[[int], int] = lambda below: 0
    pending: list[LateTransfer] = field(default_factory=list)

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> LateTransfer:
        assert not any(each.destination.data_ptr() == slot.parts[part].data_ptr() for each in self.pending if not each.done)
        self.pending.append(super().start(layer, part, slot))
        transfer = self.pending[-1]
        for _ in range(self.pick(3)):
            self.pending.pop(self.pick(len(self.pending))).wait()
            if not self.pending:
                break
        return transfer


def buffer(value: int) -> LayerBuffer:
    return LayerBuffer(torch.full((LAYOUT.nbytes,), value, dtype=torch.uint8), SPEC, LAYOUT, torch.bfloat16)


def make(
    num_layers: int, resident: set[int], num_slots: int, copier: LateCopier | None = None
) -> tuple[WeightStreamer, LateCopier]:
    copier = copier or LateCopier()
    streamer = WeightStreamer(
        residents={layer: buffer(layer) for layer in resident},
        streamed_layers=[layer for layer in range(num_layers) if layer not in resident],
        slots=[buffer(POISON) for _ in range(num_slots)],
        copier=copier,
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
    )
    return streamer, copier


def run_pass(streamer: WeightStreamer, num_layers: int) -> None:
    for layer in range(num_layers):
        attention = streamer.attention(layer)
        assert (attention.parts["attention"] == layer).all()
        neurons = streamer.neurons(layer)
        assert (neurons.parts["attention"] == layer).all(), "attention is still in use"
        assert (neurons.parts["records"] == layer).all()
        streamer.release(layer)


@settings(deadline=None)
@given(num_layers=st.integers(1, 9), num_slots=st.integers(2, 5), passes=st.integers(1, 3), data=st.data())
def test_no_layer_is_computed_on_bytes_that_are_not_its_own(
    num_layers: int, num_slots: int, passes: int, data: st.DataObject
) -> None:
    resident = data.draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers))
    streamer, _ = make(num_layers, resident, num_slots)
    for _ in range(passes):
        run_pass(streamer, num_layers)


@settings(deadline=None)
@given(num_slots=st.integers(2, 5), resident=st.sets(st.integers(0, 6)), given_up_at=st.integers(0, 7), data=st.data())
def test_the_order_in_which_transfers_arrive_does_not_matter(
    num_slots: int, resident: set[int], given_up_at: int, data: st.DataObject
) -> None:
    streamer, _ = make(7, resident, num_slots, DisorderlyCopier(pick=lambda below: data.draw(st.integers(0, below - 1))))
    run_pass(streamer, given_up_at)
    run_pass(streamer, 7)
    run_pass(streamer, 7)


@settings(deadline=None)
@given(given_up_at=st.integers(0, 5), half=st.booleans(), num_slots=st.integers(2, 4))
def test_a_pass_that_was_given_up_half_way_does_not_disturb_the_next(given_up_at: int, half: bool, num_slots: int) -> None:
    streamer, _ = make(6, {2}, num_slots)
    run_pass(streamer, given_up_at)
    if half:
        streamer.attention(given_up_at)
    run_pass(streamer, 6)


def test_nothing_is_copied_before_it_is_asked_for() -> None:
    _, copier = make(4, set(), 2)
    assert copier.started == []


def test_the_first_layers_of_the_next_pass_follow_the_last_ones_of_this() -> None:
    streamer, copier = make(3, set(), 2)
    run_pass(streamer, 3)
    assert [layer for layer, part in copier.started if part == "attention"] == [0, 1, 2, 0, 1]


def test_attention_is_copied_before_the_records_of_a_layer() -> None:
    streamer, copier = make(2, set(), 2)
    streamer.attention(0)
    assert copier.started == [(0, "attention"), (0, "records"), (1, "attention"), (1, "records")]


def test_bytes_count_for_the_phase_that_computes_on_them_and_sum_up_with_what_is_under_way() -> None:
    streamer, copier = make(4, {1}, 2)
    streamer.begin("prefill")
    run_pass(streamer, 4)
    for _ in range(2):
        streamer.begin("full")
        run_pass(streamer, 4)
    assert streamer.pass_nbytes == {"prefill": 3 * LAYOUT.nbytes, "draft": 0, "correction": 0, "full": 6 * LAYOUT.nbytes}
    assert streamer.copied_nbytes == copier.nbytes_copied == (9 + 2) * LAYOUT.nbytes


def test_a_model_that_is_resident_needs_no_copier() -> None:
    streamer = WeightStreamer(
        residents={0: buffer(0)},
        streamed_layers=[],
        slots=[],
        copier=None,
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
    )
    run_pass(streamer, 1)
    streamer.close()
    assert streamer.copied_nbytes == 0
    assert streamer.busy_seconds == 0
    assert streamer.peak_bytes_per_second is None


def test_an_error_of_the_link_reaches_the_model() -> None:
    streamer, copier = make(2, set(), 2)

    class Broken(LateTransfer):
        def wait(self) -> None:
            raise OSError("broken")

    copier.start = lambda layer, part, slot: Broken(slot.parts[part], layer)  # type: ignore[method-assign]
    with pytest.raises(OSError, match="broken"):
        streamer.attention(0)


def test_a_pass_that_met_a_read_error_does_not_disturb_the_next() -> None:
    streamer, copier = make(3, set(), 2)
    start = copier.start

    class Broken(LateTransfer):
        def wait(self) -> None:
            raise WeightReadError("broken")

    copier.start = lambda layer, part, slot: Broken(slot.parts[part], layer)  # type: ignore[method-assign]
    with pytest.raises(WeightReadError, match="broken"):
        streamer.attention(0)
    copier.start = start  # type: ignore[method-assign]
    run_pass(streamer, 3)
