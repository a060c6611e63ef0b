"""Decoding allocates nothing but activations, and keeps nothing: seen from outside, by every tensor that comes to be.

What kernels take for themselves is not a tensor and not seen here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import offload_sirius
from offload_sirius.decode.stream import TextPiece
from offload_sirius.engine import Engine
from offload_sirius.model.costs import activation_nbytes
from offload_sirius.weights.plan import MIN_SLOTS

PROMPT = [1, 2, 3, 4, 5]
CONTEXT = 64
NUM_STEPS = 20
NUM_WARM = 3
"""Tokens before those that count: the prompt's, and steps in which libraries set themselves up."""


class AllocationMeter(TorchDispatchMode):
    """Watches every operation of this thread for results in memory that none of its arguments had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest_nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in storages((args, kwargs))}
        fresh = [storage.nbytes() for storage in storages(result) if storage.data_ptr() not in given]
        self.largest_nbytes = max([self.largest_nbytes, *fresh])
        return result


def storages(values: Any) -> list[torch.UntypedStorage]:
    """The memory of all tensors in nested values."""
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def live_nbytes() -> int:
    """Bytes of all tensors that exist, memory that several share counted once."""
    found = [each.untyped_storage() for each in gc.get_objects() if type(each) is Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


SETTINGS: dict[str, Any] = {"model": "synthetic:tiny", "mode": "full", "device": "cpu", "max_context": CONTEXT, "threads": 1}


def two_slots(settings: dict[str, Any]) -> str:
    """A device budget with room for two slots and no layer."""
    with offload_sirius.load(**settings) as resident:
        bill = resident.plan.device_bill
        fixed_nbytes = resident.plan.device_nbytes - bill["resident_layers"] - bill["slots"]
        return f"{fixed_nbytes + 2 * resident.plan.layer_nbytes}B"


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A small model of which the device has room for two slots and no layer."""
    with offload_sirius.load(**SETTINGS, device_memory=two_slots(SETTINGS)) as engine:
        yield engine


@pytest.fixture(params=[{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
def steps(request: pytest.FixtureRequest, engine: Engine) -> Iterator[TextPiece]:
    """Tokens of an answer, from where every step is like the one before."""
    stream = engine.stream(PROMPT, ignore_eos=True, max_new_tokens=NUM_WARM + NUM_STEPS, **request.param)
    for _ in range(NUM_WARM):
        next(stream)
    return islice(stream, NUM_STEPS)


def test_every_layer_is_streamed_from_host_memory(engine: Engine) -> None:
    assert len(engine.plan.host_layers) == engine.spec.num_layers
    assert engine.plan.num_slots == MIN_SLOTS


def test_a_step_allocates_nothing_larger_than_its_activations_and_logits(engine: Engine, steps: Iterator[TextPiece]) -> None:
    with AllocationMeter() as meter:
        assert len(list(steps)) == NUM_STEPS
    logits_nbytes = engine.spec.vocab_size * torch.float32.itemsize
    assert 0 < meter.largest_nbytes <= activation_nbytes(engine.spec, 1, torch.bfloat16.itemsize) + logits_nbytes


@pytest.mark.parametrize(
    "decoding", [{}, {"tree_width": 3}, {"sparsity": "cats"}, {"sparsity": "cats", "tree_width": 3}], ids=str
)
def test_drafts_and_corrections_allocate_nothing_larger_than_their_activations_and_logits(decoding: dict[str, Any]) -> None:
    settings = SETTINGS | {"mode": "sirius", "window": 5} | decoding
    with offload_sirius.load(**settings, device_memory=two_slots(settings)) as engine:
        assert len(engine.plan.streamed_layers) == engine.spec.num_layers
        stream = engine.stream(PROMPT, ignore_eos=True, max_new_tokens=NUM_WARM + NUM_STEPS)
        for _ in range(NUM_WARM):
            next(stream)
        with AllocationMeter() as meter:
            assert len([piece for piece in stream if piece.token_id is not None]) == NUM_STEPS
        num_nodes = engine.config.decoding.max_nodes
        activations = activation_nbytes(engine.spec, 1, torch.bfloat16.itemsize, step_rows=num_nodes)
    logits_nbytes = num_nodes * engine.spec.vocab_size * torch.float32.itemsize
    assert 0 < meter.largest_nbytes <= activations + logits_nbytes


def test_steps_keep_nothing(steps: Iterator[TextPiece]) -> None:
    gc.collect()  # what earlier tests left behind shall not disappear between two steps
    live = [live_nbytes() for _ in steps]
    assert live == [live[0]] * NUM_STEPS


def test_the_meter_sees_what_is_allocated_and_not_what_is_overwritten() -> None:
    source, destination = torch.ones(100), torch.empty(100)
    with AllocationMeter() as meter:
        destination.copy_(source)
        destination.view(10, 10).add_(1)
        assert meter.largest_nbytes == 0
        torch.cat([source, destination])
        assert meter.largest_nbytes == 800


def test_live_bytes_count_memory_once() -> None:
    gc.collect()
    before = live_nbytes()
    kept = torch.ones(100)
    views = [kept[:50], kept.view(10, 10)]
    assert live_nbytes() == before + 400
    del kept, views
    assert live_nbytes() == before
