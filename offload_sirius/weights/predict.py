"""How long a pass will take, before a weight has been read: arithmetic over a plan and a machine's rates. No torch, no clock.

Computing a part of a layer takes the longer of reading its weights and doing its arithmetic. Bringing it takes its bytes over the
rate of what brings it. What both take together is found by replaying the streamer's ring in imagined time: the same slots, the
same order, the attention block before the neurons, a slot given on at release, the first layers of the next pass under way while
the head is computed. Where the link is the bottleneck the replay gives exactly its bytes over its rate.

Copies within host memory take cores and memory from computing, and computing takes them from the copies: while both run, the one
goes at a share x of its speed, the other at a share z of its own; alone, each has all of it. The replay lets them. Seen from
afar, let C be the seconds of a pass's computing alone and K those of its copying alone; they run together until the first of them
ends, so

    together = min(C / x, K / z)
    computing = C + together * (1 - x)
    copying   = K + together * (1 - z)
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from offload_sirius.rates import Rates
from offload_sirius.weights.layout import PARTS, LayerLayout, Part
from offload_sirius.weights.plan import NUM_STAGING, Plan

Bound = Literal["link", "disk", "compute"]

SETTLING_PASSES, COUNTED_PASSES = 8, 16
"""Passes until the ring repeats itself, and those over which a pass's time is taken: a ring whose slots do not divide the number
of streamed layers repeats only after several passes."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass computes beside its weights, by those who know the model."""

    num_rows: int
    """Tokens that go through each layer."""
    num_chunks: int
    """Times that the weights of each layer are read."""
    num_head_rows: int
    """Tokens whose logits are computed."""
    mixing_nbytes: int
    """Keys and values that attention reads in one layer."""
    mixing_flops: int
    """Arithmetic of attention in one layer, the projections apart."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything about a model, its plan and its device that a prediction needs."""

    plan: Plan
    layout: LayerLayout
    stored_nbytes: Mapping[Part, int]
    """Bytes that are read from disk for each part of a layer."""
    load_nbytes: int | None
    """Stored bytes that are read before the first token; None where nothing is stored (synthetic weights)."""
    own_memory: bool
    """The device has memory of its own: what comes from disk passes through host buffers and the link."""
    paced_bytes_per_second: float | None
    """The rate of an emulated link, which paces real copies."""
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class PassBill:
    """Seconds of one pass by what they go to. Link, disk and computing overlap: a pass takes the longest of them, or more."""

    link_nbytes: int
    """Bytes that cross the link."""
    pacing_seconds: float
    """What an emulated link takes for them; 0 without one."""
    copy_nbytes: int
    """Bytes that the link's copier copies: without memory of its own on the device, only those of host memory."""
    copy_seconds: float
    copy_drag_seconds: float
    """What computing takes from copies."""
    disk_nbytes: int
    """Stored bytes that are read from disk."""
    disk_seconds: float
    weights_seconds: float
    """Layers: the longer of reading their weights and doing their arithmetic."""
    mixing_seconds: float
    """Attention over keys and values."""
    overhead_seconds: float
    """What layers and the step take beside."""
    head_seconds: float
    drag_seconds: float
    """What copies take from computing."""

    @property
    def link_seconds(self) -> float:
        """Time in which the link is busy."""
        return max(self.pacing_seconds, self.copy_seconds + self.copy_drag_seconds)

    @property
    def compute_seconds(self) -> float:
        """Time in which the device computes."""
        alone = self.weights_seconds + self.mixing_seconds + self.overhead_seconds + self.head_seconds
        return alone + self.drag_seconds

    @property
    def bound(self) -> Bound:
        """What takes longest."""
        return max(self._seconds, key=lambda each: self._seconds[each])

    @property
    def bound_seconds(self) -> float:
        """How long that takes: a pass takes as long, or longer where it has to wait."""
        return self._seconds[self.bound]

    @property
    def _seconds(self) -> dict[Bound, float]:
        return {"link": self.link_seconds, "disk": self.disk_seconds, "compute": self.compute_seconds}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is to be expected of a plan."""

    seconds_per_pass: float
    """Between two tokens of an answer, once it is under way."""
    seconds_per_token: float
    """The same over the sequences that a pass gives a token each."""
    first_token_seconds: float
    """From a prompt to its first token, the ring being empty."""
    load_seconds: float | None
    """None where nothing is read: synthetic weights are computed."""
    bound: Bound
    """What takes longest in the pass of a token."""
    token: PassBill
    prompt: PassBill
    sources: Mapping[str, str] = field(default_factory=dict)
    """Rate -> where it comes from."""


def predict(setting: Setting, token: Work, prompt: Work) -> Prediction:
    """Expected times. token: the pass of one new token; prompt: the pass over the prompt."""
    token_bill, prompt_bill = pass_bill(setting, token, decoding=True), pass_bill(setting, prompt, decoding=False)
    replay = _Replay(setting)
    first = replay.run(_pass_seconds(setting, prompt, decoding=False))
    of_token = _pass_seconds(setting, token, decoding=True)
    for _ in range(SETTLING_PASSES):
        began = replay.run(of_token)
    for _ in range(COUNTED_PASSES):
        ended = replay.run(of_token)
    seconds_per_pass = (ended - began) / COUNTED_PASSES
    return Prediction(
        seconds_per_pass=seconds_per_pass,
        seconds_per_token=seconds_per_pass / token.num_head_rows,
        first_token_seconds=first,
        load_seconds=load_seconds(setting),
        bound=token_bill.bound,
        token=token_bill,
        prompt=prompt_bill,
        sources=setting.rates.sources,
    )


def load_seconds(setting: Setting) -> float | None:
    """Seconds until everything is where the plan wants it; on a device with its own memory one layer is read while another is
    uploaded.

    read   = stored bytes / disk rate
    upload = (head + final norm + residents) / link rate
    """
    if setting.load_nbytes is None:
        return None
    bill, rates = setting.plan.device_bill, setting.rates
    read_seconds = setting.load_nbytes / rates.disk_bytes_per_second
    uploaded = bill["head"] + bill["final_norm"] + bill["resident_layers"]
    return max(read_seconds, uploaded / rates.link_bytes_per_second) if setting.own_memory else read_seconds


def pass_bill(setting: Setting, work: Work, *, decoding: bool) -> PassBill:
    """Seconds of one pass. decoding: a pass of one token, during which the readers have a core to themselves.

    pacing   = bytes of all streamed layers / rate of the emulated link
    copy     = bytes of layers in host memory (on a device with its own memory: of all streamed layers) / link rate
    disk     = layers from disk * stored bytes / disk rate
    weights  = layers * parts, each: max(chunks * bytes / memory rate, 2 * tokens * elements / arithmetic rate)
    mixing   = layers * max(bytes of keys and values / memory rate, arithmetic / arithmetic rate)
    overhead = layers * chunks * a layer's + a step's
    head     = max(bytes / memory rate, 2 * tokens * elements / arithmetic rate)
    drags    as above: what copying takes from computing, and computing from copying
    """
    plan, rates, pace = setting.plan, setting.rates, setting.paced_bytes_per_second
    num_layers = len(plan.resident_layers) + len(plan.streamed_layers)
    parts = _part_seconds(setting, work, decoding=decoding)
    weights = num_layers * sum(parts.values())
    mixing = num_layers * _mixing_seconds(setting, work, decoding=decoding)
    overhead = num_layers * work.num_chunks * rates.layer_overhead_seconds + rates.step_overhead_seconds
    head = _weights_seconds(setting, plan.device_bill["head"], work.num_head_rows, decoding=decoding)
    copied_layers = plan.streamed_layers if setting.own_memory else plan.host_layers
    copy_nbytes = len(copied_layers) * plan.layer_nbytes
    copying = copy_nbytes / rates.link_bytes_per_second
    drag, copy_drag = drags(weights + mixing + overhead + head, copying, rates)
    disk_nbytes = len(plan.disk_layers) * sum(setting.stored_nbytes.values())
    return PassBill(
        link_nbytes=plan.pass_nbytes if pace else copy_nbytes,
        pacing_seconds=plan.pass_nbytes / pace if pace else 0.0,
        copy_nbytes=copy_nbytes,
        copy_seconds=copying,
        copy_drag_seconds=copy_drag,
        disk_nbytes=disk_nbytes,
        disk_seconds=disk_nbytes / rates.disk_bytes_per_second,
        weights_seconds=weights,
        mixing_seconds=mixing,
        overhead_seconds=overhead,
        head_seconds=head,
        drag_seconds=drag,
    )


def drags(computing: float, copying: float, rates: Rates) -> tuple[float, float]:
    """Seconds by which copying prolongs computing, and computing copying, where each takes so long alone."""
    left_to_computing, left_to_copies = rates.compute_share_beside_copies, rates.copy_share_beside_computing
    together = min(computing / left_to_computing, copying / left_to_copies)
    return together * (1 - left_to_computing), together * (1 - left_to_copies)


def _part_seconds(setting: Setting, work: Work, *, decoding: bool) -> dict[Part, float]:
    """Computing the parts of a layer, but for attention over the cache."""
    return {
        part: _weights_seconds(
            setting, setting.layout.part_nbytes(part), work.num_rows, decoding=decoding, num_chunks=work.num_chunks
        )
        for part in PARTS
    }


def _weights_seconds(setting: Setting, nbytes: int, num_rows: int, *, decoding: bool, num_chunks: int = 1) -> float:
    reading = num_chunks * nbytes / setting.rates.device_bytes_per_second
    flops = 2 * num_rows * (nbytes // setting.layout.element_nbytes)
    return max(reading, flops / setting.rates.device_flops_per_second) / _share_of_cores(setting, decoding=decoding)


def _mixing_seconds(setting: Setting, work: Work, *, decoding: bool) -> float:
    reading = work.mixing_nbytes / setting.rates.device_bytes_per_second
    seconds = max(reading, work.mixing_flops / setting.rates.device_flops_per_second)
    return seconds / _share_of_cores(setting, decoding=decoding)


def _share_of_cores(setting: Setting, *, decoding: bool) -> float:
    return setting.rates.compute_share_beside_readers if decoding and setting.plan.disk_layers else 1.0


@dataclass(frozen=True, kw_only=True)
class _PassSeconds:
    """Computing, as the replay needs it: alone, without what copies take from it."""

    parts: Mapping[Part, float]
    """A part of a layer; the layer's overhead is counted with its attention."""
    behind_layers: float
    """Head, and what a step takes."""


def _pass_seconds(setting: Setting, work: Work, *, decoding: bool) -> _PassSeconds:
    parts = _part_seconds(setting, work, decoding=decoding)
    parts["attention"] += _mixing_seconds(setting, work, decoding=decoding)
    parts["attention"] += work.num_chunks * setting.rates.layer_overhead_seconds
    head = _weights_seconds(setting, setting.plan.device_bill["head"], work.num_head_rows, decoding=decoding)
    return _PassSeconds(parts=parts, behind_layers=head + setting.rates.step_overhead_seconds)


Arrival = Callable[[], float]
"""When a transfer ends. Asked once, by who waits for it: only then is it known what else was waiting before."""


class _Lane:
    """Something that carries one thing at a time: the first that is ready, then the next."""

    def __init__(self) -> None:
        self._free_at = 0.0
        self._waiting: list[tuple[float, int, float]] = []
        self._ends: dict[int, float] = {}
        self._num_asked = 0

    def carry(self, ready: float, seconds: float) -> Arrival:
        """Something that can begin when it is ready. Whoever waits does not ask for more, so that all that comes before it is
        known by then."""
        ticket = self._num_asked
        self._num_asked += 1
        heapq.heappush(self._waiting, (ready, ticket, seconds))
        return lambda: self._end_of(ticket)

    def _end_of(self, ticket: int) -> float:
        while ticket not in self._ends:
            ready, first, seconds = heapq.heappop(self._waiting)
            self._free_at = max(self._free_at, ready) + seconds
            self._ends[first] = self._free_at
        return self._ends[ticket]


class _CopyingThread:
    """Copies within host memory, in the order asked, by a thread that shares cores and memory with who computes."""

    def __init__(self, rates: Rates) -> None:
        self._compute_share = rates.compute_share_beside_copies
        self._copy_share = rates.copy_share_beside_computing
        self._left: deque[float] = deque()
        """Seconds of copying alone that are left of each copy not yet ended."""
        self._ends: list[float] = []
        self._now = 0.0

    def carry(self, seconds: float) -> Arrival:
        """A copy that takes that long alone. Whoever asks when it ends does not compute until then."""
        self._left.append(seconds)
        ticket = len(self._ends) + len(self._left) - 1
        return lambda: self._end_of(ticket)

    def compute(self, seconds: float) -> float:
        """Computing that takes that long alone. Returns the time at its end."""
        while self._left and seconds / self._compute_share > self._left[0] / self._copy_share:
            together = self._left[0] / self._copy_share
            seconds -= together * self._compute_share
            self._now += together
            self._first_ends()
        together = seconds / self._compute_share if self._left else seconds
        if self._left:
            self._left[0] -= together * self._copy_share
        self._now += together
        return self._now

    def idle_until(self, time: float) -> float:
        """Nobody computes until then. Returns the time."""
        while self._left and self._now + self._left[0] <= time:
            self._now += self._left[0]
            self._first_ends()
        if self._left:
            self._left[0] -= time - self._now
        self._now = time
        return time

    def _first_ends(self) -> None:
        self._left.popleft()
        self._ends.append(self._now)

    def _end_of(self, ticket: int) -> float:
        if ticket < len(self._ends):
            return self._ends[ticket]
        return self._now + sum(islice(self._left, ticket - len(self._ends) + 1))


class _Replay:
    """The ring of the streamer in imagined time. See weights/streamer.py, weights/copiers.py and weights/uploads.py."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._link, self._pace, self._disk = _Lane(), _Lane(), _Lane()
        self._thread = _CopyingThread(setting.rates)
        self._staged: dict[Part, deque[Arrival]] = {part: deque() for part in PARTS}
        self._streamed = setting.plan.streamed_layers
        self._disk_layers = frozenset(setting.plan.disk_layers)
        self._num_layers = len(setting.plan.resident_layers) + len(self._streamed)
        self._ring: deque[dict[Part, Arrival]] = deque()
        self._next = 0
        self._now = 0.0

    def run(self, seconds: _PassSeconds) -> float:
        """One pass more. Returns the time at its end."""
        if self._streamed and not self._ring:
            for _ in range(self._setting.plan.num_slots):
                self._start()
        streamed = set(self._streamed)
        for layer in range(self._num_layers):
            for part in PARTS:
                if layer in streamed:
                    self._now = self._thread.idle_until(max(self._now, self._ring[0][part]()))
                self._now = self._thread.compute(seconds.parts[part])
            if layer in streamed:
                self._ring.popleft()
                self._start()
        self._now = self._thread.compute(seconds.behind_layers)
        return self._now

    def _start(self) -> None:
        """A slot is free: bring the next layer of the cycle into it, attention first."""
        layer = self._streamed[self._next]
        self._next = (self._next + 1) % len(self._streamed)
        self._ring.append({part: self._bring(layer, part) for part in PARTS})

    def _bring(self, layer: int, part: Part) -> Arrival:
        setting = self._setting
        arrival = self._from_disk(part) if layer in self._disk_layers else self._from_host(part)
        if setting.paced_bytes_per_second is None:
            return arrival
        paced = self._pace.carry(self._now, setting.layout.part_nbytes(part) / setting.paced_bytes_per_second)
        return lambda: max(arrival(), paced())

    def _from_host(self, part: Part) -> Arrival:
        seconds = self._upload_seconds(part)
        return self._link.carry(self._now, seconds) if self._setting.own_memory else self._thread.carry(seconds)

    def _upload_seconds(self, part: Part) -> float:
        return self._setting.layout.part_nbytes(part) / self._setting.rates.link_bytes_per_second

    def _from_disk(self, part: Part) -> Arrival:
        """Into the slot, or into a staging buffer that is free again once it has been uploaded."""
        seconds = self._setting.stored_nbytes[part] / self._setting.rates.disk_bytes_per_second
        if not self._setting.own_memory:
            return self._disk.carry(self._now, seconds)
        staged = self._staged[part]
        ready = max(self._now, staged.popleft()()) if len(staged) == NUM_STAGING else self._now
        staged.append(self._link.carry(self._disk.carry(ready, seconds)(), self._upload_seconds(part)))
        return staged[-1]
