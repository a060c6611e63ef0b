"""The paper's offloading table, measured by the real decode loop: paper.py runs it and says what it is.

A load is one plan of one model, a case one way to decode with it. Every pass is run and timed. Which tokens random weights draft
means nothing, so a script says how many of a window stand; with weights of their own, models decide themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from budgets import layers_share, share_nbytes
from paper_cases import Case, Timed, measured, nbytes_per_token

import offload_sirius
from offload_sirius.bench.link import pinned_upload_bytes_per_second
from offload_sirius.bench.stream import without_residents
from offload_sirius.bench.variants import FULL
from offload_sirius.config import DecodingConfig, EngineConfig, Quantize, ResidentFirst
from offload_sirius.decode.window import expected_tokens
from offload_sirius.engine import Engine, NoProgress, build, open_model
from offload_sirius.engine.placement import find_device, place
from offload_sirius.engine.planning import DESCRIBED, Planned, plan_model
from offload_sirius.engine.windows import acceptance_of_copy, acceptance_of_share
from offload_sirius.errors import USER_ERRORS
from offload_sirius.quantization import Kind

SEVENTY = "synthetic:llama-3-70b"
SHRUNK = f"{SEVENTY}?width=512&heads=8&kv_heads=1&ffn=1792&vocab=512&positions=1024"
"""All 80 layers, at a sixteenth of the width: bytes, but for head and embedding, are those of the 70B shape by 256."""

SHRUNK_LINK_GBPS = 0.25
"""A hundredth of the paper's link."""

CARD = "24GB"
MOST_OF_FULL, MOST_OF_FULL_HOT = 0.66, 0.30
"""Of mode full's seconds, what the paper's setting may take and what a hot set in 4 bits may, with the paper's AAL."""

KEEP, WINDOW, OWN_WINDOW = 0.5, 16, 8
PAPERS_AAL = Fraction("15.2")
CONTEXT, REAL_CONTEXT = 512, 1024
NUM_SHARED_BUFFERS = 8
COPY: Kind = "int4"

PUBLISHED = {
    "model": "Llama-3-70B-Instruct, bfloat16, 25 GB/s",
    "rows": {
        "full": {"seconds_per_token": 5.72, "ratio_to_full": 1.0, "score": 0.9014},
        "sparse": {"seconds_per_token": 3.57, "ratio_to_full": 3.57 / 5.72, "score": 0.7407},
        "sirius": {"seconds_per_token": 3.68, "ratio_to_full": 3.68 / 5.72, "score": 0.8719},
    },
    "floor_seconds_per_token": (15 * 3.57 + 5.72) / 16,
}
"""arXiv 2409.03856; scores on GSM8K. The floor is that of windows of 16 of which every token stands, from its own sparse and full
steps: its Sirius is below, as its timed loop ends before the last correction."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """One plan, and what is measured with it."""

    group: str
    config: EngineConfig
    cases: list[Case]


@dataclass(frozen=True, kw_only=True)
class Card:
    """How the 70B model is on the card."""

    group: str
    quantize: Quantize
    resident_first: ResidentFirst


PAPER = "paper"
"""The group of the paper's own setting."""

CARDS = (
    Card(group="int4 on the card", quantize="int4", resident_first="neurons"),
    # Not even all attention blocks have room beside slots.
    Card(group="bfloat16 on the card", quantize="none", resident_first="layers"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table. What it does not have is None."""

    group: str
    name: str
    mode: str
    window: int | None
    aal: float | None
    """Tokens that a correction gave."""
    aal_source: str | None
    """script or model"""
    seconds_per_token: float
    """Over all that was timed: every window with its correction."""
    ratio_to_full: float | None
    """Of those seconds, to mode full's with every layer streamed: below 1 is faster."""
    ratio_to_full_same_memory: float | None
    """The same to mode full's with the same device memory, in which layers are resident."""
    nbytes_per_token: float
    """Of layers, over the link."""
    bytes_ratio: float | None
    """Those over what mode full streams with every layer streamed: the ratio that a link-bound run cannot go below."""
    link_share: float
    """Those over the link's rate, as a share of the seconds."""
    without_last_correction: float | None
    """Seconds a token had the clock been stopped before the last correction, as the paper's was."""
    draft_seconds: float | None
    """Median of the draft steps."""
    draft_share: float | None
    """Of all seconds, those of draft steps."""
    correction_seconds: float | None
    num_windows: int
    device_plan_nbytes: int
    num_hot_layers: int | None
    hot_share: float | None
    """Of the neurons of each of those that are on the device."""
    runs: list[float]
    """Seconds a token of each unit."""


def paper_table(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure, group by group. keep: is given what there is so far."""
    is_cuda = find_device(options.device).type == "cuda"
    model = options.model or (SEVENTY if is_cuda else SHRUNK)
    link_gbps = options.link_gbps or (None if is_cuda else SHRUNK_LINK_GBPS)
    shared = options.shared_host_buffers or (NUM_SHARED_BUFFERS if is_cuda and model == SEVENTY else None)
    base = EngineConfig(
        model=model,
        device=options.device,
        link_gbps=link_gbps,
        threads=options.threads,
        max_context=CONTEXT,
        shared_host_buffers=shared,
        decoding=FULL,
    )
    result: dict[str, Any] = {
        "model": model,
        "device": str(find_device(options.device)),
        "link_gbps": link_gbps,
        "link_bytes_per_second": pinned_upload_bytes_per_second(torch.device("cuda")) if link_gbps is None else link_gbps * 1e9,
        "measured_peak_gbytes_per_second": 0.0,
        "keep": KEEP,
        "card": CARD,
        "papers_aal": float(PAPERS_AAL),
        "published": PUBLISHED,
        "cards": {},
        "acceptance": [],
        "rows": [],
        "problems": [],
        "held": [],
    }
    table = _Table(result, keep)
    table.measure(paper_load(base, options))
    for card in CARDS:
        table.plan_and_measure(card.group, "hot set", partial(card_loads, base, card, options, result))
    table.plan_and_measure(CARDS[-1].group, "copy in 4 bits", partial(copy_loads, base, CARDS[-1], options))
    result["held"] = [asdict(each) for each in held_of(result, is_quick=options.quick)]
    keep(result)
    return result


@dataclass(frozen=True, kw_only=True)
class Held:
    """Something that must hold."""

    what: str
    found: str
    holds: bool


def held_of(result: dict[str, Any], *, is_quick: bool) -> list[Held]:
    """Of what has been measured. is_quick: one window is no measurement, and what it takes is not judged."""
    lost = [name for problem in result["problems"] if problem["group"] == PAPER for name in problem["names"]]
    held = [Held(what="every row of the paper's own setting", found=", ".join(lost) or "none is missing", holds=not lost)]
    if is_quick:
        return held
    return [
        *held,
        at_most(result["rows"], PAPER, "sirius", "ratio_to_full", MOST_OF_FULL),
        *(
            at_most(result["rows"], CARDS[0].group, "hot set", ratio, MOST_OF_FULL_HOT)
            for ratio in ("ratio_to_full", "ratio_to_full_same_memory")
        ),
    ]


def at_most(rows: list[dict[str, Any]], group: str, name: str, ratio: str, most: float) -> Held:
    """Of the row with the paper's AAL."""
    found = next((row[ratio] for row in rows if (row["group"], row["name"]) == (group, f"{name}, the paper's AAL")), None)
    return Held(
        what=f"{group}: {name}, the paper's AAL, {ratio} at most {most:g}",
        found="not measured" if found is None else f"{found:.3f}",
        holds=found is not None and found <= most,
    )


class _Table:
    """Rows, as they come."""

    def __init__(self, result: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
        self._result = result
        self._keep = keep
        self._streamed: dict[Quantize, Timed] = {}
        """Mode full with every layer streamed."""
        self._same_memory: dict[str, Timed] = {}
        """Group -> mode full with its device memory."""

    def plan_and_measure(self, group: str, name: str, plan: Callable[[], list[Load]]) -> None:
        """All of a group; where there is no plan, that is said in its place."""
        try:
            loads = plan()
        except USER_ERRORS as error:
            leave_out(self._result, group, [name], error)
            loads = []
        for load in loads:
            self.measure(load)

    def measure(self, load: Load) -> None:
        """All cases of a load; what cannot be loaded is said in its place."""
        try:
            with build(open_model(load.config.model), load.config, NoProgress()) as engine:
                for case in load.cases:
                    self._add(load, engine, case)
        except USER_ERRORS as error:
            leave_out(self._result, load.group, [case.name for case in load.cases], error)
        self._keep(self._result)

    def _add(self, load: Load, engine: Engine, case: Case) -> None:
        timed = measured(engine, case)
        if case.decoding.mode == "full":
            if engine.plan.resident_layers:
                self._same_memory[load.group] = timed
            else:
                self._streamed[load.config.quantize] = timed
        row = row_of(
            load,
            engine,
            case,
            timed,
            self._streamed.get(load.config.quantize),
            self._same_memory.get(load.group),
            self._result["link_bytes_per_second"],
        )
        peak = timed.answers[-1].link.measured_peak_gbytes_per_second or 0.0
        self._result["measured_peak_gbytes_per_second"] = max(peak, self._result["measured_peak_gbytes_per_second"])
        self._result["rows"].append(asdict(row))
        print(line_of(row), flush=True)


def leave_out(result: dict[str, Any], group: str, names: list[str], error: Exception) -> None:
    """What could not be measured, and why."""
    result["problems"].append({"group": group, "names": names, "problem": str(error)})
    print(f"{group}: {', '.join(names)}: not measured: {error}", flush=True)


def paper_load(base: EngineConfig, options: argparse.Namespace) -> Load:
    """The paper's own setting: everything streamed, drafts too."""
    sparse, sirius = drafting(mode="sparse"), drafting(window=WINDOW)
    cases = [
        Case(name="full", decoding=FULL, num_units=options.tokens),
        Case(name="sparse", decoding=sparse, num_units=options.tokens),
        *sirius_cases("sirius", sirius, options, base.model),
    ]
    return Load(group=PAPER, config=without_residents(open_model(base.model), replace(base, decoding=sirius)), cases=cases)


def card_loads(base: EngineConfig, card: Card, options: argparse.Namespace, result: dict[str, Any]) -> list[Load]:
    """With the device memory that the card has for layers beside the 70B model. result: is told what that is, and of a real
    model's acceptance with the same share of its neurons."""
    hot = drafting(draft="resident", resident_first=card.resident_first, window=WINDOW)
    with_memory, share, planned = on_card(base, hot, card.quantize)
    assert planned.plan.hot is not None
    hot_share = planned.plan.hot.num_hot / planned.spec.ffn_width
    result["cards"][card.group] = {
        "layers_share": share,
        "hot_share": hot_share,
        "num_hot_layers": len(planned.plan.hot.layers),
        "num_layers": planned.spec.num_layers,
        "device_budget_nbytes": planned.budgets.device_nbytes,
    }
    acceptance = []
    if base.model.startswith("synthetic:"):
        try:
            acceptance = own_acceptance(options, hot_share)
        except USER_ERRORS as error:  # a machine without it has all rows but those
            leave_out(result, card.group, [f"hot set, {options.real_model}'s AAL"], error)
    result["acceptance"] += acceptance
    loads = []
    if with_memory.quantize != "none":
        streamed = without_residents(open_model(base.model), replace(base, quantize=with_memory.quantize))
        loads.append(Load(group=card.group, config=streamed, cases=[full_case("full, every layer streamed", options)]))
    share_of_kept = planned.plan.hot.num_hot / hot.num_kept(planned.spec.ffn_width)
    cases = [
        *sirius_cases("hot set", hot, options, base.model),
        assumed_case("hot set", hot, options, acceptance_of_share(share_of_kept)),
        *scripted_cases("hot set", hot, options, acceptance),
    ]
    return [
        *loads,
        Load(group=card.group, config=with_memory, cases=[full_case("full, same device memory", options)]),
        Load(group=card.group, config=replace(with_memory, decoding=hot), cases=cases),
    ]


def copy_loads(base: EngineConfig, card: Card, options: argparse.Namespace) -> list[Load]:
    """Drafts on a copy in 4 bits: by the paper's script, and by what the planner expects of a large model's."""
    copied = drafting(draft="resident", draft_quantize=COPY, window=WINDOW)
    with_memory, _, planned = on_card(base, drafting(draft="resident", window=WINDOW), card.quantize)
    config = replace(with_memory, decoding=copied)
    cases = sirius_cases("copy in 4 bits", copied, options, config.model)
    hot = place(planned.checkpoint, config).plan.hot
    assert hot is not None
    cases.append(assumed_case("copy in 4 bits", copied, options, acceptance_of_copy(COPY, hot.num_hot / planned.spec.ffn_width)))
    return [Load(group=card.group, config=config, cases=cases)]


def full_case(name: str, options: argparse.Namespace) -> Case:
    return Case(name=name, decoding=FULL, num_units=options.tokens)


def sirius_cases(name: str, decoding: DecodingConfig, options: argparse.Namespace, model: str) -> list[Case]:
    """By the paper's script; and where weights are real by their own acceptance."""
    cases = [Case(name=f"{name}, the paper's AAL", decoding=decoding, num_units=options.windows, aal=PAPERS_AAL)]
    if not model.startswith("synthetic:"):
        exact, threshold = replace(decoding, window=OWN_WINDOW), replace(decoding, accept="threshold")
        cases += [
            Case(name=f"{name}, its own acceptance, {each.accept}, windows of {each.window}", decoding=each, num_units=3)
            for each in (exact, threshold)
        ]
    return cases


def scripted_cases(
    name: str, decoding: DecodingConfig, options: argparse.Namespace, acceptance: list[dict[str, Any]]
) -> list[Case]:
    """By the tokens that windows of a real model gave."""
    return [
        Case(
            name=f"{name}, {each['model']}'s AAL, {each['accept']}, windows of {each['window']}",
            decoding=replace(decoding, window=each["window"]),
            num_units=options.windows,
            aal=Fraction(str(round(each["aal"], 2))),
        )
        for each in acceptance
    ]


def assumed_case(name: str, decoding: DecodingConfig, options: argparse.Namespace, acceptance: float) -> Case:
    """By the acceptance that the planner assumes of large models' drafts."""
    return Case(
        name=f"{name}, {acceptance:.2f} accepted as the planner assumes, windows of {OWN_WINDOW}",
        decoding=replace(decoding, window=OWN_WINDOW),
        num_units=options.windows,
        aal=Fraction(str(round(expected_tokens(acceptance, OWN_WINDOW), 2))),
    )


def drafting(**settings: Any) -> DecodingConfig:
    """Coarse drafts that keep half of the neurons. Which rule accepts does not matter where a script does."""
    usual: dict[str, Any] = {"mode": "sirius", "keep": KEEP, "draft": "streamed", "lookup": False, "prior": False}
    return DecodingConfig(**usual | settings)


def on_card(base: EngineConfig, hot: DecodingConfig, quantize: Quantize) -> tuple[EngineConfig, float, Planned]:
    """Settings for mode full with as much of the device as the card has for the 70B model -> with the share of the layers that
    this is, and what a hot set gets of it.

    The 70B shape itself is held as it would be there; any other model as it is, with the same share of its own layers.
    """
    described = EngineConfig(
        model=SEVENTY, device_memory=CARD, host_memory="400GB", quantize=quantize, max_context=CONTEXT, decoding=hot
    )
    share = layers_share(plan_model(open_model(SEVENTY).checkpoint, described, DESCRIBED))
    checkpoint, config = open_model(base.model).checkpoint, replace(base, decoding=hot)
    if (checkpoint.spec.num_layers, checkpoint.spec.width) == (80, 8192):
        config = replace(config, device_memory=CARD, quantize=quantize)
    else:
        config = replace(config, device_memory=str(share_nbytes(place(checkpoint, config).planned, share)))
    return replace(config, decoding=FULL), share, place(checkpoint, config).planned


def own_acceptance(options: argparse.Namespace, hot_share: float) -> list[dict[str, Any]]:
    """AAL of a real model whose drafts keep that share of the neurons on the device, and change them behind every window."""
    ways: list[dict[str, Any]] = [
        {"accept": "exact", "window": OWN_WINDOW},
        {"accept": "threshold", "window": WINDOW},
    ]
    prompts, num_tokens = options.prompts, options.max_new_tokens
    found = []
    hot = drafting(draft="resident", keep=hot_share, window=WINDOW)
    loaded: dict[str, Any] = {"keep_blocks": False, "device": options.device, "max_context": REAL_CONTEXT, "decoding": hot}
    with offload_sirius.load(options.real_model, **loaded) as engine:
        for way in ways:
            asked = way | {"max_new_tokens": num_tokens, "ignore_eos": True, "reuse": False}
            answers = [engine.generate(prompt, **asked) for prompt in prompts]
            num_windows = sum(answer.windows for answer in answers)
            aal = sum(round((answer.aal or 0) * answer.windows) for answer in answers) / num_windows
            found.append({"model": engine.spec.name, "keep": hot_share, **way, "aal": aal, "num_windows": num_windows})
            told = f"{engine.spec.name} keeps {hot_share:.3f}, {way['accept']}, windows of {way['window']}"
            print(f"{told}: AAL {aal:.2f}", flush=True)
    return found


def row_of(
    load: Load,
    engine: Engine,
    case: Case,
    timed: Timed,
    streamed: Timed | None,
    same_memory: Timed | None,
    bytes_per_second: float,
) -> Row:
    """streamed, same_memory: mode full with every layer streamed, and with this load's device memory."""
    answers, hot, corrects = timed.answers, engine.plan.hot, case.decoding.mode == "sirius"
    num_windows = sum(answer.windows for answer in answers)
    draft_seconds = [answer.draft_seconds for answer in answers if answer.draft_seconds is not None]
    draft = sum(draft_seconds) / len(draft_seconds) if draft_seconds else None
    correction = next((answer.correction_seconds for answer in answers if answer.correction_seconds is not None), None)
    nbytes = nbytes_per_token(timed)
    seconds, num_tokens = timed.seconds_per_token, sum(timed.sizes)
    return Row(
        group=load.group,
        name=case.name,
        mode=case.decoding.mode,
        window=case.decoding.window if corrects and isinstance(case.decoding.window, int) else None,
        aal=num_tokens / num_windows if corrects else None,
        aal_source=None if not corrects else "model" if case.models_decide else "script",
        seconds_per_token=seconds,
        ratio_to_full=None if streamed is None else seconds / streamed.seconds_per_token,
        ratio_to_full_same_memory=None if same_memory is None else seconds / same_memory.seconds_per_token,
        nbytes_per_token=nbytes,
        bytes_ratio=None if streamed is None else nbytes / nbytes_per_token(streamed),
        link_share=nbytes / bytes_per_second / seconds,
        without_last_correction=seconds - correction * len(answers) / num_tokens if correction is not None else None,
        draft_seconds=draft if corrects else None,
        draft_share=draft * sum(answer.passes.draft for answer in answers) / num_tokens / seconds if draft and corrects else None,
        correction_seconds=correction,
        num_windows=num_windows,
        device_plan_nbytes=engine.plan.device_nbytes,
        num_hot_layers=len(hot.layers) if hot else None,
        hot_share=hot.num_hot / engine.spec.ffn_width if hot else None,
        runs=[spent / size for spent, size in zip(timed.unit_seconds, timed.sizes, strict=True)],
    )


def line_of(row: Row) -> str:
    ratio, same, aal, draft = (
        "    -" if value is None else f"{value:5.3f}"
        for value in (row.ratio_to_full, row.ratio_to_full_same_memory, row.aal, row.draft_seconds)
    )
    return (
        f"{row.group:20} {row.name:66} {row.seconds_per_token:7.4f} s/token  x {ratio} of full streamed, {same} of full with the "
        f"same memory  AAL {aal}  draft {draft} s  {row.nbytes_per_token / 1e6:7.1f} MB/token  link {row.link_share:.1%}"
    )
