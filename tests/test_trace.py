"""Traces: what a span becomes in the file, how busy a row was, and the trace of a model that is really streamed."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import Engine
from offload_sirius.engine.placement import place
from offload_sirius.trace import ROWS, Tracer, during
from offload_sirius.weights.plan import MIN_READERS
from offload_sirius_loaders import open_checkpoint

Event = dict[str, Any]

NUMBER = (int, float)
COMMON = {"name": str, "ph": str, "ts": NUMBER, "pid": int, "tid": int, "args": dict}
FIELDS: dict[str, dict[str, Any]] = {"X": COMMON | {"cat": str, "dur": NUMBER}, "M": COMMON}
"""Kind of event -> its fields, none missing and none more."""


def events_of(tracer: Tracer, folder: Path) -> list[Event]:
    """Write a trace, and read what a viewer reads of it."""
    tracer.write(folder / "trace.json")
    trace = json.loads((folder / "trace.json").read_bytes(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    events = trace["traceEvents"]
    assert isinstance(events, list)
    assert_schema(events)
    return events


def assert_schema(events: list[Event]) -> None:
    """Fields and their types; every row is named, its events lie one behind the other, and its name is the events' category."""
    for event in events:
        assert {name: isinstance(value, FIELDS[event["ph"]][name]) for name, value in event.items()} == dict.fromkeys(
            FIELDS[event["ph"]], True
        )
    names = names_of_rows(events)
    rows: dict[int, list[Event]] = defaultdict(list)
    for event in complete(events):
        rows[event["tid"]].append(event)
    for thread_id, row in rows.items():
        assert {each["cat"] for each in row} == {names[thread_id].split()[0]}
        assert all(each["dur"] >= 0 and each["ts"] >= 0 for each in row)
        assert all(after["ts"] >= before["ts"] + before["dur"] - 1e-4 for before, after in pairwise(row))
    assert len({event["pid"] for event in events}) == 1


def complete(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def names_of_rows(events: list[Event]) -> dict[int, str]:
    """Thread id -> name."""
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def test_a_span_is_a_complete_event_in_microseconds_from_the_first_one_on(tmp_path: Path) -> None:
    tracer = Tracer()
    tracer.span("compute", "layer 0 attention", 100.5, 100.75, layer=0)
    tracer.span("copy", "layer 1 records", 100.25, 100.625, layer=1, bytes=1000)
    copy, compute = complete(events_of(tracer, tmp_path))
    assert (copy["name"], copy["cat"], copy["ts"], copy["dur"]) == ("layer 1 records", "copy", 0, 375_000)
    assert (compute["name"], compute["cat"], compute["ts"], compute["dur"]) == ("layer 0 attention", "compute", 250_000, 250_000)
    assert (copy["args"], compute["args"]) == ({"layer": 1, "bytes": 1000}, {"layer": 0})


def test_the_process_and_all_rows_are_named_in_order_even_where_nothing_happened(tmp_path: Path) -> None:
    events = events_of(Tracer(), tmp_path)
    assert complete(events) == []
    assert [event["args"] for event in events if event["name"] == "process_name"] == [{"name": "offload-sirius"}]
    assert list(names_of_rows(events).values()) == list(ROWS) == ["copy", "compute", "wait", "sample"]
    order = [event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"]
    assert order == sorted(order)


def test_spans_of_a_row_that_overlap_are_drawn_on_lanes_of_their_own(tmp_path: Path) -> None:
    tracer = Tracer()
    for began, ended in ((0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75), (3.0, 4.0)):
        tracer.span("copy", f"{began} to {ended}", began, ended)
    events = events_of(tracer, tmp_path)
    names = names_of_rows(events)
    assert [(names[event["tid"]], event["name"]) for event in complete(events)] == [
        ("copy", "0.0 to 2.0"),
        ("copy", "2.0 to 4.0"),
        ("copy 2", "1.0 to 3.0"),
        ("copy 2", "3.0 to 4.0"),
        ("copy 3", "2.5 to 2.75"),
    ]


@settings(deadline=None)
@given(spans=st.lists(st.tuples(st.sampled_from(ROWS), st.integers(0, 10**12), st.integers(0, 10**9)), max_size=20))
def test_any_spans_make_a_trace_that_can_be_drawn(spans: list[tuple[Any, int, int]], tmp_path_factory: Any) -> None:
    tracer = Tracer()
    for row, began, length in spans:  # in microseconds
        tracer.span(row, "something", began / 1e6, (began + length) / 1e6)
    assert len(complete(events_of(tracer, tmp_path_factory.mktemp("trace")))) == len(spans)


class LateClock:
    """Marks that are not known before they are asked for: what events on a device are."""

    def __init__(self) -> None:
        self.known: dict[int, float] = {}
        self._num_marks = 0

    def mark(self) -> Callable[[], float]:
        index = self._num_marks
        self._num_marks += 1
        return lambda: self.known[index]


def test_moments_are_asked_for_their_time_only_when_the_spans_are_wanted() -> None:
    clock = LateClock()
    tracer = Tracer(clock)
    with during(tracer, "sample", "choose"):
        pass
    clock.known = {0: 3.0, 1: 5.0}
    [span] = tracer.spans()
    assert (span.row, span.name, span.began, span.ended) == ("sample", "choose", 3.0, 5.0)


def test_a_block_without_a_tracer_is_only_a_block() -> None:
    with during(None, "compute", "head"):
        pass


def test_the_host_clock_tells_the_time_at_which_it_was_marked() -> None:
    tracer = Tracer()
    first, second = tracer.clock.mark(), tracer.clock.mark()
    assert first() == first() <= second()


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], 0.0),
        ([(10.0, 20.0)], 1.0),
        ([(5.0, 12.0), (18.0, 30.0)], 0.4),
        ([(11.0, 15.0), (12.0, 13.0), (14.0, 16.0)], 0.5),
        ([(0.0, 10.0), (20.0, 30.0)], 0.0),
    ],
)
def test_busy_is_the_union_of_what_a_row_did_within_the_time(spans: list[tuple[float, float]], share: float) -> None:
    tracer = Tracer()
    tracer.span("compute", "another row", 0.0, 100.0)
    for began, ended in spans:
        tracer.span("copy", "part", began, ended)
    assert tracer.busy_share("copy", 10.0, 20.0) == pytest.approx(share)


def test_many_threads_may_tell_at_once() -> None:
    tracer = Tracer()

    def tell(first: int) -> None:
        for index in range(200):
            tracer.span("copy", str(first + index), float(first + index), float(first + index))

    threads = [threading.Thread(target=tell, args=(200 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [span.name for span in tracer.spans()] == [str(index) for index in range(1600)]


NUM_PASSES = 6
MODEL = "synthetic:tiny?dtype=F32&layers=8"
STREAMED: dict[str, Any] = {"device": "cpu", "threads": 1, "max_context": 32, "device_memory": "1.2MiB"}
"""Less than the layers below take."""


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Engine, Tracer]]]:
    """Load a small model that does not fit, with a tracer."""
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))
    engines: list[Engine] = []

    def load(**settings: Any) -> tuple[Engine, Tracer]:
        tracer = Tracer()
        engines.append(offload_sirius.load(MODEL, tracer=tracer, **{"mode": "full"} | STREAMED | settings))
        assert engines[-1].plan.streamed_layers
        return engines[-1], tracer

    yield load
    for engine in engines:
        engine.close()


def test_full_passes_keep_the_copy_row_of_an_emulated_link_busy(
    streamed: Callable[..., tuple[Engine, Tracer]], tmp_path: Path
) -> None:
    engine, tracer = streamed(link_gbps=0.01)  # a layer takes some 18 ms: computing it never takes as long
    result = engine.generate([1, 2, 3], max_new_tokens=NUM_PASSES + 1, ignore_eos=True)
    chosen = [span.ended for span in tracer.spans() if span.row == "sample"]
    assert len(chosen) == NUM_PASSES + 1
    assert tracer.busy_share("copy", chosen[0], chosen[-1]) >= 0.95
    events = complete(events_of(tracer, tmp_path))
    per_pass = [event for event in events if event["cat"] == "copy" and event["args"]["part"] == "attention"]
    assert result.link.bytes.full == NUM_PASSES * engine.plan.pass_nbytes
    assert {event["args"]["layer"] for event in per_pass} == set(engine.plan.streamed_layers)


def smallest_host_memory() -> str:
    """Room for two readers and nothing else."""
    placement = place(open_checkpoint(MODEL), EngineConfig(model=MODEL, decoding=DecodingConfig(mode="full"), **STREAMED))
    return str(placement.planned.demand.reading.nbytes(MIN_READERS))


def test_the_copy_row_has_the_neurons_of_a_draft_that_is_on_the_device(
    streamed: Callable[..., tuple[Engine, Tracer]], tmp_path: Path
) -> None:
    engine, tracer = streamed(mode="sirius", draft="resident", resident_first="neurons", window=4)
    engine.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True)
    copied_nbytes = engine._streamer.copied_nbytes
    engine.close()
    copies = [event["args"] for event in complete(events_of(tracer, tmp_path)) if event["cat"] == "copy"]
    assert {copy["part"] for copy in copies} == {"neurons"}
    assert copied_nbytes <= sum(copy["bytes"] for copy in copies) <= engine._streamer.copied_nbytes


@pytest.mark.parametrize("tier", ["host", "disk", "paced"])
def test_the_copy_row_has_every_byte_once(tier: str, streamed: Callable[..., tuple[Engine, Tracer]], tmp_path: Path) -> None:
    given_for: dict[str, dict[str, Any]] = {"disk": {"host_memory": smallest_host_memory()}, "paced": {"link_gbps": 1.0}}
    engine, tracer = streamed(**given_for.get(tier, {}))
    assert engine.plan.streamed_layers == (engine.plan.disk_layers if tier == "disk" else engine.plan.host_layers)
    engine.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)
    engine.close()  # the prefetch for a next pass has ended: what was begun is counted and drawn
    copies = [event["args"] for event in complete(events_of(tracer, tmp_path)) if event["cat"] == "copy"]
    num_layers = 4 * len(engine.plan.streamed_layers)
    sizes: dict[tuple[int, str], set[int]] = defaultdict(set)
    for copy in copies:
        sizes[copy["layer"], copy["part"]].add(copy["bytes"])
    assert all(len(each) == 1 for each in sizes.values())
    assert num_layers <= len(copies) / 2 <= num_layers + engine.plan.num_slots
    assert sum(next(iter(each)) for each in sizes.values()) == engine.plan.pass_nbytes


@pytest.mark.parametrize(("sparsity", "parts"), [("griffin", {"kept"}), ("cats", {"gate", "neurons"})])
def test_the_copy_row_has_the_slices_of_drafts_too(
    sparsity: str, parts: set[str], streamed: Callable[..., tuple[Engine, Tracer]], tmp_path: Path
) -> None:
    engine, tracer = streamed(mode="sirius", sparsity=sparsity, draft="streamed", window=4)
    engine.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True)
    engine.close()
    events = complete(events_of(tracer, tmp_path))
    copies = [event["args"] for event in events if event["cat"] == "copy"]
    assert {copy["part"] for copy in copies} == {"attention", "records"} | parts
    assert sum(copy["bytes"] for copy in copies) == engine._streamer.copied_nbytes
    waited = {event["args"]["part"] for event in events if event["cat"] == "wait"}
    assert waited == {"attention", "records"} | parts
    chosen = {event["name"] for event in events if event["cat"] == "sample"}
    assert chosen == {"choose a token", "choose drafted tokens", "accept drafted tokens"}


def test_every_layer_is_waited_for_and_computed_and_every_token_chosen(
    streamed: Callable[..., tuple[Engine, Tracer]], tmp_path: Path
) -> None:
    engine, tracer = streamed()
    engine.generate([1, 2, 3], max_new_tokens=3, ignore_eos=True)
    events = complete(events_of(tracer, tmp_path))
    layers = range(engine.spec.num_layers)
    a_pass = [f"layer {layer} {what}" for layer in layers for what in ("attention", "neurons")] + ["head"]
    waits = [f"layer {layer} {part}" for layer in engine.plan.streamed_layers for part in ("attention", "records")]
    assert [event["name"] for event in events if event["cat"] == "compute"] == 3 * a_pass
    assert [event["name"] for event in events if event["cat"] == "wait"] == 3 * waits
    assert [event["name"] for event in events if event["cat"] == "sample"] == 3 * ["choose a token"]


def test_a_token_is_the_same_with_a_tracer_and_without(streamed: Callable[..., tuple[Engine, Tracer]]) -> None:
    engine, _ = streamed()
    with offload_sirius.load(MODEL, mode="full", **STREAMED) as plain:
        wanted: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0}
        assert engine.generate("hello", **wanted).token_ids == plain.generate("hello", **wanted).token_ids
