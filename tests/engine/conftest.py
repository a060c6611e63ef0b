"""What the tests of the engine share: the tiny synthetic model, with budgets that put its layers where a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import Engine
from offload_sirius.engine.placement import place
from offload_sirius.weights.layout import PAGE_NBYTES, align
from offload_sirius.weights.plan import neuron_cache_nbytes
from offload_sirius_loaders import open_checkpoint

TINY = "synthetic:tiny?dtype=F32"
CONTEXT = 48
NUM_LAYERS = 4
PLACES = ["resident", "one resident, rest on the host", "host", "host and disk", "disk", "disk with the embedding"]

Load = Callable[..., Engine]
Budgets = Callable[..., dict[str, str]]


FULL = DecodingConfig(mode="full")


def budgets_for(where: str, dtype: str = "float32", decoding: DecodingConfig = FULL, parallel: int = 1) -> dict[str, str]:
    """Budgets, to the byte, that put the tiny model's four layers and its embedding there; of those on disk, where drafts keep a
    fixed set of neurons, these in host memory, except where it is the disk alone.

    Ending in `+ kept`: those of all streamed layers. Ending in `+ caches`: a cache of neurons on the device for each layer.
    """
    decoding = replace(decoding, draft="streamed")
    dtypes: Any = {"dtype": dtype}
    config = EngineConfig(model=TINY, device="cpu", max_context=CONTEXT, parallel=parallel, decoding=decoding, **dtypes)
    checkpoint = open_checkpoint(TINY)
    placement = place(checkpoint, config)
    plan, layout = placement.plan, placement.layout
    assert len(plan.resident_layers) == NUM_LAYERS, "this machine has no room for the tiny model"
    where, _, extra = where.partition(" + ")
    fixed = plan.device_nbytes - plan.device_bill["resident_layers"]
    room = {"resident": 4, "one resident, rest on the host": 3}.get(where, 2)
    num_host = {"host and disk": 2, "disk": 0, "disk with the embedding": 0}.get(where, 4)
    embedding = 0 if where == "disk with the embedding" else plan.host_bill["embedding"]
    readers = placement.planned.demand.reading.nbytes(2)
    num_kept = 4 if extra == "kept" else 2 if where == "host and disk" else 0
    caches = 4 * neuron_cache_nbytes(layout, decoding.num_kept(checkpoint.spec.ffn_width)) if extra == "caches" else 0
    host_layers = num_host * align(plan.layer_nbytes, PAGE_NBYTES)
    return {
        "device_memory": str(fixed + room * plan.layer_nbytes + caches),
        "host_memory": str(readers + embedding + host_layers + num_kept * layout.kept_host_nbytes),
    }


def hot_budgets(
    decoding: DecodingConfig,
    *,
    num_hot: int | None = None,
    num_slots: int = 2,
    num_hot_layers: int | None = None,
    model: str = TINY,
    parallel: int = 1,
) -> dict[str, str]:
    """Budgets, to the byte, for all layers in host memory, and on the device for so many hot neurons of each layer and for slots
    of all neurons of a layer. Slots beyond two become hot neurons, until there are as many as drafts keep.

    num_hot_layers: there is room for no more hot layers; slots have room for whole layers then.
    """
    config = EngineConfig(model=model, device="cpu", max_context=CONTEXT, parallel=parallel, decoding=decoding)
    placement = place(open_checkpoint(model), config)
    plan, layout, spec = placement.plan, placement.layout, placement.planned.spec
    num_hot = decoding.num_kept(spec.ffn_width) if num_hot is None else num_hot
    fixed = plan.device_nbytes - sum(plan.device_bill[what] for what in ("attention", "hot_neurons", "slots"))
    neuron_nbytes = layout.records_nbytes // spec.ffn_width
    slot_nbytes = layout.records_nbytes if num_hot_layers is None else layout.nbytes
    layer_nbytes = layout.attention_nbytes + num_hot * neuron_nbytes
    layers = (spec.num_layers if num_hot_layers is None else num_hot_layers) * layer_nbytes
    readers = placement.planned.demand.reading.nbytes(2)
    host_layers = spec.num_layers * align(plan.layer_nbytes, PAGE_NBYTES)
    return {
        "device_memory": str(fixed + layers + num_slots * slot_nbytes),
        "host_memory": str(4 * readers + plan.host_bill["embedding"] + host_layers),
    }


@pytest.fixture
def budgets() -> Budgets:
    """See budgets_for."""
    return budgets_for


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, of each test its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(folder))
    return folder


@pytest.fixture
def load() -> Iterator[Load]:
    """Load the tiny model, the plain one unless a test says otherwise; drafts are streamed. Closed at the end of the test."""
    with ExitStack() as engines:

        def load(model: str = TINY, **settings: Any) -> Engine:
            plain = {"mode": "full", "draft": "streamed", "device": "cpu", "threads": 1, "max_context": CONTEXT}
            return engines.enter_context(offload_sirius.load(model, **plain | settings))

        yield load
