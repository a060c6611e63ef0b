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

Drafts take slices of those layers of which slices can cross alone, and compute on nothing else there: attention and the kept
neurons, or attention, all gates, and the records that are sent for once the gates are known, which queue behind what is on its
way for the layers that follow. Other layers come whole, and like resident ones they are computed whole.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, get_args

from offload_sirius.quantization import FEW_TOKENS, WeightFormat
from offload_sirius.rates import Rates
from offload_sirius.weights.layout import PARTS, Cargo, LayerLayout, Part, slice_of
from offload_sirius.weights.plan import NUM_STAGING, HeadFormat, Plan

Bound = Literal["link", "disk", "compute"]

SETTLING_PASSES, COUNTED_PASSES = 8, 16
"""Passes until the ring repeats itself, and those over which a pass's time is taken: a ring whose slots do not divide the number
of streamed layers repeats only after several passes."""

DRAFTS_OF_A_WINDOW, SETTLING_WINDOWS, COUNTED_WINDOWS = 4, 2, 4
"""The same of corrections, each behind so many draft steps: enough for the ring to forget the correction before."""

Step = Literal["attention", "records", "gate", "kept", "held", "fetched", "hot", "cold"]
"""What is computed of a layer at once: a part of it, records of neurons that are in a cache, or those that were sent for."""


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
    cargo: Cargo = "records"
    """What the pass takes of layers of which slices can cross the link alone, or that are partly resident."""
    num_fetched: int = 0
    """Of `gate`: neurons of each such layer whose records are sent for."""
    num_drafted: int | None = None
    """Of `hot`: neurons of each layer that are computed; None: all that are resident."""


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
    head_format: HeadFormat = None
    """How the head is held; None: as plain numbers."""
    overlap: bool = True
    """Where layers are partly resident: the link fetches for a pass before it begins."""


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
    weights_nbytes: int
    """Weights of layers that are computed on."""
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
        return bound_of((1, self))

    @property
    def bound_seconds(self) -> float:
        """How long that takes: a pass takes as long, or longer where it has to wait."""
        return self.seconds[self.bound]

    @property
    def seconds(self) -> dict[Bound, float]:
        """Everything that a pass may be bound by."""
        return {"link": self.link_seconds, "disk": self.disk_seconds, "compute": self.compute_seconds}


def bound_of(*passes: tuple[int, PassBill]) -> Bound:
    """What takes longest over so many passes of each kind."""
    totals = {kind: sum(count * bill.seconds[kind] for count, bill in passes) for kind in get_args(Bound)}
    return max(totals, key=lambda each: totals[each])


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """A pass among others of its kind, or of its window."""

    seconds: float
    nbytes: int
    """Bytes of layers that come into slots for it."""
    bill: PassBill


@dataclass(frozen=True, kw_only=True)
class WindowSpeed:
    """Windows of drafts and their corrections, for an acceptance."""

    acceptance: float
    """Share of drafted tokens that stand, each given that the one before it did."""
    window: int
    num_tokens: float
    """What a window gives, the full model's own token included."""
    seconds_per_token: float
    correction: PassTime


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is to be expected of a plan."""

    seconds_per_pass: float
    """Of the full model for one token more, once an answer is under way."""
    seconds_per_token: float
    """Between two tokens of an answer: such a pass over the sequences that it gives a token each, or what drafts make of it."""
    first_token_seconds: float
    """From a prompt to its first token, the ring being empty."""
    load_seconds: float | None
    """None where nothing is read: synthetic weights are computed."""
    bound: Bound
    """What takes longest in the passes that give tokens."""
    token: PassBill
    """The pass of the full model."""
    prompt: PassBill
    draft: PassTime | None = None
    """A draft step, where there are any."""
    windows: tuple[WindowSpeed, ...] = ()
    """Where drafts are corrected: what is to be expected of them, by acceptance. The first is the one that is assumed."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Rate -> where it comes from."""


def predict(setting: Setting, token: Work, prompt: Work) -> Prediction:
    """Expected times of the full model. token: the pass of one new token; prompt: the pass over the prompt."""
    token_bill, prompt_bill = pass_bill(setting, token, decoding=True), pass_bill(setting, prompt, decoding=False)
    replay = _replay_of(setting)
    token_seconds = _pass_seconds(setting, token, decoding=True)
    first = replay.run(_pass_seconds(setting, prompt, decoding=False), token_seconds)
    seconds_per_pass = _steady_seconds(replay, token_seconds)
    return Prediction(
        seconds_per_pass=seconds_per_pass,
        seconds_per_token=seconds_per_pass / token.num_head_rows,
        first_token_seconds=first,
        load_seconds=load_seconds(setting),
        bound=token_bill.bound,
        token=token_bill,
        prompt=prompt_bill,
        sources=_sources(setting),
    )


def _sources(setting: Setting) -> dict[str, str]:
    """Where the rates come from, those of quantised weights included where there are any."""
    copied = None if setting.plan.hot is None else setting.plan.hot.draft_format
    forms = [form for form in (setting.layout.format, copied, setting.head_format) if isinstance(form, WeightFormat)]
    quantized = {f"{form.kind}_weights": setting.rates.of_quantized(form.kind).source for form in forms}
    return {**setting.rates.sources, **quantized}


def predict_draft(setting: Setting, draft: Work) -> PassTime:
    """A draft step among others."""
    seconds = _steady_seconds(_replay_of(setting), _pass_seconds(setting, draft, decoding=True))
    return PassTime(seconds=seconds, nbytes=pass_nbytes(setting, draft), bill=pass_bill(setting, draft, decoding=True))


def predict_correction(
    setting: Setting, correction: Work, draft: Work, draft_seconds: float, num_drafts: int = DRAFTS_OF_A_WINDOW
) -> PassTime:
    """What a correction adds to the draft steps of its window. draft_seconds: of one of them among others.

    num_drafts: of the window; they matter where the link works for the correction meanwhile.
    """
    replay = _replay_of(setting)
    drafting, correcting = (_pass_seconds(setting, work, decoding=True) for work in (draft, correction))
    ends = []
    for _ in range(SETTLING_WINDOWS + COUNTED_WINDOWS):
        for num_left in reversed(range(num_drafts)):
            replay.run(drafting, drafting if num_left else correcting)
        ends.append(replay.run(correcting, drafting))
    seconds_per_window = (ends[-1] - ends[SETTLING_WINDOWS - 1]) / COUNTED_WINDOWS
    return PassTime(
        seconds=seconds_per_window - num_drafts * draft_seconds,
        nbytes=pass_nbytes(setting, correction),
        bill=pass_bill(setting, correction, decoding=True),
    )


def _steady_seconds(replay: _Replay, seconds: _PassSeconds) -> float:
    for _ in range(SETTLING_PASSES):
        began = replay.run(seconds)
    for _ in range(COUNTED_PASSES):
        ended = replay.run(seconds)
    return (ended - began) / COUNTED_PASSES


def load_seconds(setting: Setting) -> float | None:
    """Seconds until everything is where the plan wants it; on a device with its own memory one layer is read while another is
    uploaded.

    read   = stored bytes / disk rate
    upload = (head + final norm + residents, or of layers that are partly resident their attention blocks, or the copy for
             drafts) / link rate
    """
    if setting.load_nbytes is None:
        return None
    bill, rates = setting.plan.device_bill, setting.rates
    read_seconds = setting.load_nbytes / rates.disk_bytes_per_second
    uploaded = bill["head"] + bill["final_norm"] + bill["resident_layers"] + bill.get("attention", 0)
    if setting.plan.hot is not None and setting.plan.hot.draft_format is not None:
        uploaded += bill["hot_neurons"]
    return max(read_seconds, uploaded / rates.link_bytes_per_second) if setting.own_memory else read_seconds


def pass_nbytes(setting: Setting, work: Work) -> int:
    """Bytes of layers that come into slots in a pass."""
    work = replace(work, num_drafted=None)  # all hot neurons come, whether or not a draft computes them
    num_sliced = len(_sliced_layers(setting, work))
    num_whole = len(setting.plan.streamed_layers) - num_sliced
    whole_nbytes = sum(_step_nbytes(setting, work, sliced=False).values())
    return num_whole * whole_nbytes + num_sliced * _slice_nbytes(setting, work)


def pass_bill(setting: Setting, work: Work, *, decoding: bool) -> PassBill:
    """Seconds of one pass. decoding: a pass of one token, during which the readers have a core to themselves.

    pacing   = bytes of all streamed layers / rate of the emulated link
    copy     = bytes of layers in host memory (on a device with its own memory: of all streamed layers) / link rate
    disk     = layers from disk * stored bytes / disk rate
    weights  = layers * parts, each: max(chunks * bytes / memory rate, 2 * tokens * elements / arithmetic rate);
               quantised ones as `_quantized_seconds` says
    mixing   = layers * max(bytes of keys and values / memory rate, arithmetic / arithmetic rate)
    overhead = layers * chunks * a layer's + a step's
    head     = max(bytes / memory rate, 2 * tokens * elements / arithmetic rate), or as quantised layers
    drags    as above: what copying takes from computing, and computing from copying

    Of layers of which the pass takes slices, bytes and parts are those of the slices.
    """
    plan, rates, pace = setting.plan, setting.rates, setting.paced_bytes_per_second
    num_layers = len(plan.resident_layers) + len(plan.streamed_layers)
    num_sliced = len(_sliced_layers(setting, work))
    whole, sliced = (_step_seconds(setting, work, sliced=each, decoding=decoding) for each in (False, True))
    weights = (num_layers - num_sliced) * sum(whole.values()) + num_sliced * sum(sliced.values())
    whole_nbytes, sliced_nbytes = (sum(_step_nbytes(setting, work, sliced=each).values()) for each in (False, True))
    mixing = num_layers * _mixing_seconds(setting, work, decoding=decoding)
    overhead = num_layers * work.num_chunks * rates.layer_overhead_seconds + rates.step_overhead_seconds
    head = _head_seconds(setting, work, decoding=decoding)
    nbytes, copy_nbytes = pass_nbytes(setting, work), _copy_nbytes(setting, work)
    copying = copy_nbytes / rates.link_bytes_per_second
    drag, copy_drag = drags(weights + mixing + overhead + head, copying, rates)
    disk_nbytes = _disk_nbytes(setting, work)
    return PassBill(
        link_nbytes=nbytes if pace else copy_nbytes,
        pacing_seconds=nbytes / pace if pace else 0.0,
        copy_nbytes=copy_nbytes,
        copy_seconds=copying,
        copy_drag_seconds=copy_drag,
        disk_nbytes=disk_nbytes,
        disk_seconds=disk_nbytes / rates.disk_bytes_per_second,
        weights_nbytes=(num_layers - num_sliced) * whole_nbytes + num_sliced * sliced_nbytes,
        weights_seconds=weights,
        mixing_seconds=mixing,
        overhead_seconds=overhead,
        head_seconds=head,
        drag_seconds=drag,
    )


def _sliced_layers(setting: Setting, work: Work) -> frozenset[int]:
    """Layers of which the pass brings and computes slices only; where layers are partly resident, these."""
    if setting.plan.hot is not None:
        return frozenset(setting.plan.hot.layers)
    return frozenset(setting.plan.sliceable_layers) if work.cargo != "records" else frozenset()


def _step_nbytes(setting: Setting, work: Work, *, sliced: bool) -> dict[Step, int]:
    """What is computed of a layer, one after the other, each with the bytes of its weights."""
    layout = setting.layout
    if work.cargo == "hot" or (sliced and setting.plan.hot is not None):
        return _partly_resident_nbytes(setting.plan, layout, work)
    if not sliced:
        return {part: _part_nbytes(layout, part) for part in PARTS}
    part = slice_of(work.cargo)
    steps: dict[Step, int] = {"attention": _part_nbytes(layout, "attention"), part: _part_nbytes(layout, part)}
    if work.cargo == "gate":
        # All records in a cache are computed on, and those that the tokens do not need are silenced.
        steps["held"] = setting.plan.num_cached_neurons * _record_nbytes(layout)
        steps["fetched"] = work.num_fetched * _record_nbytes(layout)
    return steps


def _partly_resident_nbytes(plan: Plan, layout: LayerLayout, work: Work) -> dict[Step, int]:
    """Of a layer whose attention block and hot neurons are on the device, or come for a draft step.

    All neurons at once while the hot ones are chosen, else those, or the best of them, and, where all are needed, the others.
    Where there is a copy, that in a draft step, and else all of the layer itself.
    """
    assert plan.hot is not None
    cargo = work.cargo
    if plan.hot.draft_format is not None and cargo == "hot":
        return {"attention": plan.device_bill["attention"] // len(plan.hot.layers), "hot": _hot_nbytes(plan)}
    steps: dict[Step, int] = {"attention": _part_nbytes(layout, "attention")}
    if cargo == "records":
        return steps | {"records": _part_nbytes(layout, "records")}
    steps["hot"] = _hot_nbytes(plan) * (work.num_drafted or plan.hot.num_hot) // plan.hot.num_hot
    return steps | {"cold": plan.hot.cold_nbytes} if cargo == "cold" else steps


def _part_nbytes(layout: LayerLayout, part: Part) -> int:
    """Of a layer, or their mean."""
    return layout.mean(lambda each: each.part_nbytes(part))


def _record_nbytes(layout: LayerLayout) -> int:
    return layout.mean(lambda each: each.record_nbytes)


def _hot_nbytes(plan: Plan) -> int:
    """Bytes of the hot neurons of a layer."""
    assert plan.hot is not None
    return plan.device_bill["hot_neurons"] // len(plan.hot.layers)


def _slice_nbytes(setting: Setting, work: Work) -> int:
    """Bytes of a layer's slices: of what is computed, all that is not on the device already."""
    steps, hot = _step_nbytes(setting, work, sliced=True), setting.plan.hot
    if hot is not None and hot.draft_format is not None:
        return 0 if work.cargo == "hot" else sum(steps.values())
    there: tuple[Step, ...] = ("held",) if hot is None else ("attention", "hot")
    return sum(nbytes for step, nbytes in steps.items() if step not in there)


def _copy_nbytes(setting: Setting, work: Work) -> int:
    """Bytes that the link's copier copies: on a device with its own memory all, else only what is in host memory."""
    plan, sliced = setting.plan, _sliced_layers(setting, work)
    if setting.own_memory or plan.hot is not None:
        return pass_nbytes(setting, work)
    if not sliced:
        return len(plan.host_layers) * setting.layout.mean_nbytes
    num_gathered = len(sliced.intersection(plan.disk_layers))
    return len(plan.host_layers) * _slice_nbytes(setting, work) + num_gathered * _part_nbytes(setting.layout, "kept")


def _disk_nbytes(setting: Setting, work: Work) -> int:
    """Stored bytes that are read: of layers whose kept neurons are gathered in host memory, the attention block alone."""
    num_gathered = len(_sliced_layers(setting, work).intersection(setting.plan.disk_layers))
    num_read = len(setting.plan.disk_layers) - num_gathered
    return num_read * sum(setting.stored_nbytes.values()) + num_gathered * setting.stored_nbytes["attention"]


def drags(computing: float, copying: float, rates: Rates) -> tuple[float, float]:
    """Seconds by which copying prolongs computing, and computing copying, where each takes so long alone."""
    left_to_computing, left_to_copies = rates.compute_share_beside_copies, rates.copy_share_beside_computing
    together = min(computing / left_to_computing, copying / left_to_copies)
    return together * (1 - left_to_computing), together * (1 - left_to_copies)


def _step_seconds(setting: Setting, work: Work, *, sliced: bool, decoding: bool) -> dict[Step, float]:
    """Computing the steps of a layer, but for attention over the cache."""
    form, weight_nbytes = _format_of(setting, work), setting.layout.nbytes_per_weight

    def seconds(nbytes: int) -> float:
        return _weights_seconds(setting, nbytes, form, weight_nbytes, work.num_rows, work.num_chunks, decoding=decoding)

    return {step: seconds(nbytes) for step, nbytes in _step_nbytes(setting, work, sliced=sliced).items()}


def _format_of(setting: Setting, work: Work) -> WeightFormat | None:
    """How the weights are held that the pass computes on."""
    hot = setting.plan.hot
    return setting.layout.format if hot is None or work.cargo != "hot" else hot.draft_format or setting.layout.format


def _head_seconds(setting: Setting, work: Work, *, decoding: bool) -> float:
    nbytes, form = setting.plan.device_bill["head"], setting.head_format
    weight_nbytes = setting.layout.element_nbytes if form is None else form.bits_per_weight / 8
    quantized = form if isinstance(form, WeightFormat) else None
    return _weights_seconds(setting, nbytes, quantized, weight_nbytes, work.num_head_rows, 1, decoding=decoding)


def _weights_seconds(
    setting: Setting,
    nbytes: int,
    form: WeightFormat | None,
    weight_nbytes: float,
    num_rows: int,
    num_chunks: int,
    *,
    decoding: bool,
) -> float:
    """Products of tokens with so many bytes of weights, read once a chunk.

    Weights are quantised, or of weight_nbytes each, plain or in blocks: blocks are taken to be as fast as as many plain bytes.
    """
    rates, share = setting.rates, _share_of_cores(setting, decoding=decoding)
    if form is not None:
        return _quantized_seconds(rates, nbytes, form, num_rows, num_chunks) / share
    reading = num_chunks * nbytes / rates.device_bytes_per_second
    return max(reading, 2 * num_rows * nbytes / weight_nbytes / rates.device_flops_per_second) / share


def _quantized_seconds(rates: Rates, nbytes: int, form: WeightFormat, num_rows: int, num_chunks: int) -> float:
    """The same with quantised weights.

    few tokens  = chunks * bytes / their rate + 2 * (tokens - chunks) * elements / their arithmetic rate
    many tokens = chunks * bytes / unpacking rate + 2 * tokens * elements / arithmetic rate

    The first token is bound by what it reads, or by making floats of it, and those beside it add their arithmetic. Measured on a
    core of a Xeon, that is within 16 % for 2 to 64 tokens, where the longer of both is 18 % too short for 8 of them.
    """
    quantized, flops = rates.of_quantized(form.kind), 2 * nbytes / (form.bits_per_weight / 8)
    if num_rows <= FEW_TOKENS * num_chunks:
        return num_chunks * nbytes / quantized.bytes_per_second + (num_rows - num_chunks) * flops / quantized.flops_per_second
    return num_chunks * nbytes / quantized.unpacking_bytes_per_second + num_rows * flops / rates.device_flops_per_second


def _mixing_seconds(setting: Setting, work: Work, *, decoding: bool) -> float:
    reading = work.mixing_nbytes / setting.rates.device_bytes_per_second
    seconds = max(reading, work.mixing_flops / setting.rates.device_flops_per_second)
    return seconds / _share_of_cores(setting, decoding=decoding)


def _share_of_cores(setting: Setting, *, decoding: bool) -> float:
    return setting.rates.compute_share_beside_readers if decoding and setting.plan.disk_layers else 1.0


@dataclass(frozen=True, kw_only=True)
class _PassSeconds:
    """A pass as the replay needs it. Seconds are of computing alone, without what copies take from it."""

    cargo: Cargo
    fetched_nbytes: int
    """Records of a layer that are sent for."""
    whole: Mapping[Step, float]
    """Steps of a layer; the layer's overhead is counted with its attention."""
    sliced: Mapping[Step, float]
    """The same of a layer of which slices were brought."""
    behind_layers: float
    """Head, and what a step takes."""


def _pass_seconds(setting: Setting, work: Work, *, decoding: bool) -> _PassSeconds:
    def steps(*, sliced: bool) -> dict[Step, float]:
        seconds = _step_seconds(setting, work, sliced=sliced, decoding=decoding)
        seconds["attention"] += _mixing_seconds(setting, work, decoding=decoding)
        seconds["attention"] += work.num_chunks * setting.rates.layer_overhead_seconds
        return seconds

    head = _head_seconds(setting, work, decoding=decoding)
    return _PassSeconds(
        cargo=work.cargo,
        fetched_nbytes=work.num_fetched * _record_nbytes(setting.layout),
        whole=steps(sliced=False),
        sliced=steps(sliced=True),
        behind_layers=head + setting.rates.step_overhead_seconds,
    )


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
        self._sliceable = frozenset(setting.plan.sliceable_layers)
        self._disk_layers = frozenset(setting.plan.disk_layers)
        self._num_layers = len(setting.plan.resident_layers) + len(self._streamed)
        self._ring: deque[dict[Step, Arrival]] = deque()
        self._early: Arrival | None = None
        """The attention block of the layer that will be sent for next, where the link goes on with it behind fetched records."""
        self._next = 0
        self._starting: Cargo = "records"
        """Of the pass whose layers are being sent for."""
        self._following: Cargo = "records"
        self._now = 0.0

    def run(self, seconds: _PassSeconds, following: _PassSeconds | None = None) -> float:
        """One pass more. following: the one that will come next; None: its like. Returns the time at its end."""
        self._following = (following or seconds).cargo
        if self._streamed and not self._ring:
            self._starting = seconds.cargo
            for _ in range(self._setting.plan.num_slots):
                self._start()
        streamed = set(self._streamed)
        for layer in range(self._num_layers):
            steps = seconds.sliced if self._is_sliced(layer, seconds.cargo) else seconds.whole
            for step, computing in steps.items():
                if step == "held" and seconds.fetched_nbytes:  # the gates are known: what is not in the cache is sent for
                    self._fetch(seconds.fetched_nbytes)
                if layer in streamed and step in self._ring[0]:
                    self._now = self._thread.idle_until(max(self._now, self._ring[0][step]()))
                self._now = self._thread.compute(computing)
            if layer in streamed:
                self._ring.popleft()
                self._start()
        self._now = self._thread.compute(seconds.behind_layers)
        return self._now

    def _is_sliced(self, layer: int, cargo: Cargo) -> bool:
        return cargo != "records" and layer in self._sliceable

    def _fetch(self, nbytes: int) -> None:
        self._ring[0]["fetched"] = self._bring_from_host(nbytes)
        if self._setting.layout.frees_attention:
            self._early = self._early or self._bring(self._streamed[self._next], "attention")

    def _start(self) -> None:
        """A slot is free: bring the next layer of the cycle into it, attention first."""
        layer = self._streamed[self._next]
        part = slice_of(self._starting) if self._is_sliced(layer, self._starting) else "records"
        self._next = (self._next + 1) % len(self._streamed)
        if self._next == 0:
            self._starting = self._following
        attention = self._early or self._bring(layer, "attention")
        self._early = None
        self._ring.append({"attention": attention, part: self._bring(layer, part)})

    def _bring(self, layer: int, part: Part) -> Arrival:
        nbytes = _part_nbytes(self._setting.layout, part)
        if layer not in self._disk_layers or part == "kept":
            return self._bring_from_host(nbytes)
        return self._paced(nbytes, self._from_disk(part))

    def _bring_from_host(self, nbytes: int) -> Arrival:
        seconds = nbytes / self._setting.rates.link_bytes_per_second
        own_memory = self._setting.own_memory
        return self._paced(nbytes, self._link.carry(self._now, seconds) if own_memory else self._thread.carry(seconds))

    def _paced(self, nbytes: int, arrival: Arrival) -> Arrival:
        if self._setting.paced_bytes_per_second is None:
            return arrival
        paced = self._pace.carry(self._now, nbytes / self._setting.paced_bytes_per_second)
        return lambda: max(arrival(), paced())

    def _from_disk(self, part: Part) -> Arrival:
        """Into the slot, or into a staging buffer that is free again once it has been uploaded."""
        seconds = self._setting.stored_nbytes[part] / self._setting.rates.disk_bytes_per_second
        if not self._setting.own_memory:
            return self._disk.carry(self._now, seconds)
        staged = self._staged[part]
        ready = max(self._now, staged.popleft()()) if len(staged) == NUM_STAGING else self._now
        upload_seconds = _part_nbytes(self._setting.layout, part) / self._setting.rates.link_bytes_per_second
        staged.append(self._link.carry(self._disk.carry(ready, seconds)(), upload_seconds))
        return staged[-1]


class _HotReplay(_Replay):
    """The same where layers are partly resident. See weights/hotset.py."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        hot = setting.plan.hot
        assert hot is not None
        self._hot = frozenset(hot.layers)
        streamed = [layer for layer in self._streamed if layer not in self._hot]
        self._passing: dict[Cargo, Sequence[int]] = {"records": self._streamed, "cold": self._streamed}
        self._num_slots: dict[Cargo, int] = {"records": setting.plan.num_slots, "cold": hot.num_cold_slots}
        if streamed:
            self._passing["hot"], self._num_slots["hot"] = streamed, setting.plan.num_slots
        self._same_slots = bool(streamed)
        """In any pass; else the memory of those that the prompt's pass has is cut anew."""

    def run(self, seconds: _PassSeconds, following: _PassSeconds | None = None) -> float:
        """One pass more. While nothing has to arrive for it, the link works for the next that needs something."""
        cargo = self._moving(seconds.cargo)
        self._following = self._moving((following or seconds).cargo)
        self._starting = cargo if self._next else self._following
        if not self._ring and (self._setting.overlap or cargo == seconds.cargo):
            self._starting, self._next = cargo, 0
            for _ in range(min(self._num_slots[cargo], len(self._passing[cargo]))):
                self._start()
        passing = frozenset(self._passing.get(seconds.cargo, ()))
        for layer in range(self._num_layers):
            passes = layer in passing
            for step, computing in (seconds.sliced if layer in self._hot else seconds.whole).items():
                if passes and step in self._ring[0]:
                    self._now = self._thread.idle_until(max(self._now, self._ring[0][step]()))
                self._now = self._thread.compute(computing)
            if passes:
                self._ring.popleft()
                if (self._same_slots or self._starting == cargo) and (self._setting.overlap or self._next):
                    self._start()
        self._now = self._thread.compute(seconds.behind_layers)
        return self._now

    def _moving(self, cargo: Cargo) -> Cargo:
        return cargo if cargo in self._passing else "cold"

    def _start(self) -> None:
        layers, cargo = self._passing[self._starting], self._starting
        layer = layers[self._next]
        self._next = (self._next + 1) % len(layers)
        if self._next == 0:
            self._starting = self._following
        self._ring.append(self._bring_hot(cargo) if layer in self._hot else self._bring_streamed(cargo))

    def _bring_hot(self, cargo: Cargo) -> dict[Step, Arrival]:
        hot = self._setting.plan.hot
        assert hot is not None
        if cargo == "cold":
            return {"cold": self._bring_from_host(hot.cold_nbytes)}
        return {"records": self._bring_from_host(_part_nbytes(self._setting.layout, "records"))}

    def _bring_streamed(self, cargo: Cargo) -> dict[Step, Arrival]:
        layout, plan = self._setting.layout, self._setting.plan
        attention = self._bring_from_host(_part_nbytes(layout, "attention"))
        if cargo == "hot":
            return {"attention": attention, "hot": self._bring_from_host(_hot_nbytes(plan))}
        return {"attention": attention, "records": self._bring_from_host(_part_nbytes(layout, "records"))}


class _CopyReplay(_HotReplay):
    """The same where drafts compute on a copy: all of each layer passes, but for draft steps. See weights/draft_copy.py."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._passing = {"records": self._streamed}
        self._num_slots = {"records": setting.plan.num_slots}
        self._same_slots = True

    def _moving(self, cargo: Cargo) -> Cargo:
        return "records"

    def _bring_hot(self, cargo: Cargo) -> dict[Step, Arrival]:
        return {part: self._bring_from_host(self._setting.layout.part_nbytes(part)) for part in PARTS}


def _replay_of(setting: Setting) -> _Replay:
    hot = setting.plan.hot
    if hot is None:
        return _Replay(setting)
    return _HotReplay(setting) if hot.draft_format is None else _CopyReplay(setting)
