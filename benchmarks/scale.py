"""How does cost grow? With layers, width, context, window, nodes of a tree, answers together, kept neurons; and as predicted?

    python benchmarks/scale.py                        # ten minutes on two cores
    python benchmarks/scale.py --only nodes batch
    python benchmarks/scale.py --quick --out sample.json

Shapes of random weights, bfloat16. In the setting `link` every layer crosses a link at each pass, and the ceiling of a pass is
its bytes, as counted, over the link's rate; in the setting `resident` nothing does, and computing is all there is. On a CPU the
link is emulated, so slow that it bounds every pass; on a GPU it is its own, and shapes are wider. What is resident is larger than
the device's caches, as models are that people run.

layers, width   A token of the real decode loop. Bytes are layers times those of one, and grow with the square of the width, the
                number of heads being the same; so does the time.
context         A step of one token behind so many positions, random keys and values. Weights are the same: a + b * positions.
                Over the link it does not show, as the link takes longer.
window          W - 1 streamed draft steps and their correction. The correction brings the same bytes whatever it verifies.
nodes           Corrections that verify trees, in turn with each other and with a full step of one token: the same bytes.
batch           Rounds of Engine.batch in which each answer gets a token: the same bytes.
keep            Streamed draft steps: attention blocks and the kept neurons.

Exponents are slopes of a line through the logarithms of medians, each beside the one that is expected; lowest and highest are
those of single runs of all points. Where a part is fixed, it is the exponent of what points have beyond the smallest one. The
plan's prediction stands beside every point, by rates measured in the same run. A point whose runs differ by more than 1.4 times
is measured again, twice at most, and with one that nothing but computing bounds the rates are.

Must hold: time by bytes, of layers and width together, has an exponent of 0.95 to 1.05 over a range of at least 8 times; the
largest tree takes at most 1.1 times a full step of one token over the link; predictions are within 15 % of every point.
Exit status: 0 it holds, 1 something does not, 2 it cannot be measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from asked import exit_status, require
from growth import Line, PowerLaw, beyond_first, line, power_law
from passes import NUM_PROMPT, NUM_WARMUPS, SinglePasses, Timed, loaded, rounds
from rates_now import measured_rates
from report import RESULTS, finish, machine_facts

from offload_sirius.bench.rates import ROUNDS
from offload_sirius.bench.stream import PROMPT, run_passes
from offload_sirius.config import DecodingConfig
from offload_sirius.engine import Engine, NoProgress
from offload_sirius.engine.placement import find_device
from offload_sirius.engine.planning import Planned
from offload_sirius.rates import Rates
from offload_sirius.weights.predict import predict_draft

Setting = Literal["link", "resident"]

EMULATED_GBPS = 0.25
WIDTHS = {"cpu": 1024, "cuda": 4096}
"""Of the sweeps in which it is the same, by kind of device: one whose passes are long beside what a step takes besides."""

RESIDENT_SHAPES = {"cpu": (2, 8), "cuda": (1, 4)}
"""Width of the resident model beside that of others, and its layers: 0.8 GB, more than caches of processors, and 1.6 GB."""

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, VOCAB = 4, 16, 4, 2048
LAYERS = (4, 8, 16, 32)
WIDTH_SHARES = (0.5, 0.75, 1.0, 1.5, 2.0)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
LINK_CONTEXTS = (128, 1024, 8192)
WINDOWS = (2, 4, 8, 16, 32)
NODES = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (1, 2, 4, 8, 16, 32)
KEEPS = (0.125, 0.25, 0.5, 0.75)
BRANCHES = 2
"""Of each node of a tree."""

STEPS_AT_ONCE = 4
"""Resident steps that are timed together: one takes a few milliseconds, on a CPU some ten."""

FULL = DecodingConfig(mode="full")
DRAFTING = DecodingConfig(draft="streamed", lookup=False, prior=False)

STEADY, MOST_ATTEMPTS = 1.4, 3
LEAST_EXPONENT, MOST_EXPONENT, LEAST_RANGE = 0.95, 1.05, 8.0
MOST_TREE_RATIO = 1.1
TOLERANCE = 0.15


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size, measured and predicted."""

    sweep: str
    setting: Setting
    what: str
    """The pass, or the passes."""
    size: float
    nbytes: int
    """Over the link, counted."""
    seconds: float
    all_seconds: list[float]
    predicted_seconds: float
    link_share: float | None
    """Bytes over the link's rate, as a share of the seconds; None where nothing crosses it."""
    num_disturbed: int
    """Measurements before this one that were given up."""

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted_seconds / self.seconds - 1


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How seconds grow in a sweep."""

    sweep: str
    setting: Setting
    what: str
    expected: float
    """Exponent."""
    why: str
    power: PowerLaw | None
    """Where a part is fixed, of what is beyond the smallest point. None where no two differ from that by more than noise."""
    line: Line | None
    """Where a part is fixed."""


class Scale:
    """The measurements, by the options of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = find_device(options.device)
        self.device, self.kind = options.device, device.type
        self.width = options.width or WIDTHS[self.kind]
        self.emulated_gbps: float | None = options.link_gbps or (EMULATED_GBPS if self.kind == "cpu" else None)
        self.num_passes: int = options.passes
        self.quick: bool = options.quick
        self.disk: Path | None = options.disk
        self.rates = self._rates_now(1 if self.quick else ROUNDS)

    @property
    def link_bytes_per_second(self) -> float:
        """The ceiling."""
        return self.rates.link_bytes_per_second if self.emulated_gbps is None else self.emulated_gbps * 1e9

    def layers(self) -> Iterator[Point]:
        width = self.width // 2
        for num_layers in self._some(LAYERS):
            yield self._token("layers", num_layers, self._shape(width=width, layers=num_layers))

    def widths(self) -> Iterator[Point]:
        for share in self._some(WIDTH_SHARES):
            width = int(share * self.width)
            yield self._token("width", width, self._shape(width=width))

    def contexts(self) -> Iterator[Point]:
        times, num_layers = RESIDENT_SHAPES[self.kind]
        resident = self._shape(width=times * self.width, layers=num_layers, kv_heads=NUM_HEADS)
        settings: tuple[tuple[Setting, str, Sequence[int], int], ...]
        settings = (
            ("resident", resident, CONTEXTS, STEPS_AT_ONCE),
            ("link", self._shape(kv_heads=NUM_HEADS), LINK_CONTEXTS, 1),
        )
        for setting, model, contexts, each in settings:
            for positions in self._some(contexts):
                with self._loaded(model, setting, positions + 1, FULL) as (engine, planned):
                    passes = SinglePasses(engine, positions)
                    yield self._steady(
                        partial(passes.timed, "full", self.num_passes, each=each),
                        sweep="context",
                        setting=setting,
                        what="full step",
                        size=positions,
                        predict=partial(self._seconds_per_pass, planned, positions),
                    )

    def windows(self) -> Iterator[Point]:
        windows = self._some(WINDOWS)
        decoding = replace(DRAFTING, window=windows[-1])
        with self._loaded(self._shape(), "link", NUM_PROMPT + windows[-1], decoding) as (engine, planned):
            passes = SinglePasses(engine)
            for window in windows:
                predicted = planned.predict(self.rates, NUM_PROMPT, replace(decoding, window=window))
                assert predicted.draft is not None
                drafts, correction = (window - 1) * predicted.draft.seconds, predicted.windows[0].correction.seconds
                whole, corrected = passes.windows(window, self.num_passes)
                about: dict[str, Any] = {"sweep": "window", "setting": "link", "size": window}
                yield self._point(whole, what="window", predicted=drafts + correction, **about)
                yield self._point(corrected, what="correction", predicted=correction, **about)

    def nodes(self) -> Iterator[Point]:
        sizes = self._some(NODES)
        decoding = replace(DRAFTING, window=sizes[-1])
        with self._loaded(self._shape(), "link", NUM_PROMPT + sizes[-1], decoding) as (engine, planned):
            passes = SinglePasses(engine)
            for size in sizes:  # kernels are loaded when they are first needed
                self._verified(passes, size)
            turns = [[self._verified(passes, size) for size in sizes] for _ in range(self.num_passes)]
            for size, measured in zip(sizes, zip(*turns, strict=True), strict=True):
                yield self._point(
                    Timed(seconds=[each.seconds[0] for each in measured], nbytes=measured[0].nbytes),
                    sweep="nodes",
                    setting="link",
                    what="full step" if size == 1 else "correction",
                    size=size,
                    predicted=self._seconds_of_step(planned, size),
                )

    def batches(self) -> Iterator[Point]:
        for size in self._some(BATCHES):
            context = 2 * size + NUM_WARMUPS + self.num_passes
            with self._loaded(self._shape(), "link", context, FULL, parallel=size) as (engine, planned):
                yield self._steady(
                    partial(rounds, engine, self.num_passes),
                    sweep="batch",
                    setting="link",
                    what="full step",
                    size=size,
                    predict=partial(self._seconds_per_pass, planned, 2),
                )

    def keeps(self) -> Iterator[Point]:
        for keep in self._some(KEEPS):
            with self._loaded(self._shape(), "link", NUM_PROMPT + 2, replace(DRAFTING, keep=keep, window=2)) as (engine, planned):
                yield self._steady(
                    partial(SinglePasses(engine).timed, "draft", self.num_passes),
                    sweep="keep",
                    setting="link",
                    what="draft step",
                    size=keep,
                    predict=partial(self._seconds_of_draft, planned),
                )

    def _token(self, sweep: str, size: float, model: str) -> Point:
        """A token of the decode loop, all layers over the link."""
        with self._loaded(model, "link", len(PROMPT) + NUM_WARMUPS + self.num_passes, FULL) as (engine, planned):

            def tokens() -> Timed:
                found = run_passes(engine, self.num_passes, NoProgress())
                return Timed(seconds=list(found.seconds), nbytes=found.result.link.bytes.full // found.result.passes.full)

            predict = partial(self._seconds_per_pass, planned, len(PROMPT))
            return self._steady(tokens, sweep=sweep, setting="link", what="token", size=size, predict=predict)

    def _verified(self, passes: SinglePasses, size: int) -> Timed:
        return passes.timed_once("full" if size == 1 else "correction", size, branches=BRANCHES)

    def _rates_now(self, num_rounds: int) -> Rates:
        print("measuring the rates of this machine", flush=True)
        return measured_rates("bfloat16", self.disk, device=self.device, rounds=num_rounds)

    def _seconds_per_pass(self, planned: Planned, num_prompt: int) -> float:
        """Predicted, of the full model, as are the others."""
        return planned.predict(self.rates, num_prompt).seconds_per_pass

    def _seconds_of_draft(self, planned: Planned) -> float:
        draft = planned.predict(self.rates, NUM_PROMPT).draft
        assert draft is not None
        return draft.seconds

    def _seconds_of_step(self, planned: Planned, num_tokens: int) -> float:
        """Steps of so many tokens, one behind the other."""
        return predict_draft(planned.setting(self.rates), planned._step_work(NUM_PROMPT, num_tokens)).seconds

    def _steady(self, measure: Callable[[], Timed], predict: Callable[[], float], *, setting: Setting, **about: Any) -> Point:
        """The first of a few measurements during which the machine did nothing else, or the last.

        Where no link bounds a pass, a prediction is as good as the rates: they are then measured again, too.
        """
        for num_disturbed in range(MOST_ATTEMPTS):
            if num_disturbed and setting == "resident":
                self.rates = self._rates_now(1)
            timed = measure()
            if max(timed.seconds) <= STEADY * min(timed.seconds):
                break
        return self._point(timed, predicted=predict(), setting=setting, num_disturbed=num_disturbed, **about)

    def _point(
        self,
        timed: Timed,
        *,
        sweep: str,
        setting: Setting,
        what: str,
        size: float,
        predicted: float,
        num_disturbed: int = 0,
    ) -> Point:
        seconds = median(timed.seconds)
        return Point(
            sweep=sweep,
            setting=setting,
            what=what,
            size=size,
            nbytes=timed.nbytes,
            seconds=seconds,
            all_seconds=[round(each, 7) for each in timed.seconds],
            predicted_seconds=predicted,
            link_share=timed.nbytes / self.link_bytes_per_second / seconds if timed.nbytes else None,
            num_disturbed=num_disturbed,
        )

    def _loaded(
        self, model: str, setting: Setting, context: int, decoding: DecodingConfig, **settings: Any
    ) -> AbstractContextManager[tuple[Engine, Planned]]:
        link = {"link_gbps": self.emulated_gbps} if setting == "link" else {}
        return loaded(
            model,
            streamed=setting == "link",
            context=context,
            decoding=decoding,
            device=self.device,
            dtype="bfloat16",
            **link,
            **settings,
        )

    def _shape(self, *, width: int | None = None, layers: int = NUM_LAYERS, kv_heads: int = NUM_KV_HEADS) -> str:
        """Random weights whose feed-forwards are 2.75 times as wide as they, as those of Llama-2-7B."""
        width = width or self.width
        return (
            f"synthetic:tiny?layers={layers}&width={width}&ffn={11 * width // 4}&heads={NUM_HEADS}&kv_heads={kv_heads}"
            f"&vocab={VOCAB}&positions={2 * CONTEXTS[-1]}"
        )

    def _some(self, sizes: Sequence[Any]) -> Sequence[Any]:
        """All of them, or to be quick the first, the middle and the last one."""
        return sizes if not self.quick else (sizes[0], sizes[len(sizes) // 2], sizes[-1])


SWEEPS: dict[str, Callable[[Scale], Iterator[Point]]] = {
    # First, while the rates are new: its resident points are as fast as the machine is.
    "context": Scale.contexts,
    "layers": Scale.layers,
    "width": Scale.widths,
    "window": Scale.windows,
    "nodes": Scale.nodes,
    "batch": Scale.batches,
    "keep": Scale.keeps,
}


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    return exit_status(lambda: measure(options))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="default: all")
    parser.add_argument("--device", default="auto", help="default %(default)s")
    parser.add_argument(
        "--link-gbps", type=float, help=f"emulate a link of that rate; default: {EMULATED_GBPS} on a CPU, a GPU's own"
    )
    parser.add_argument(
        "--width",
        type=int,
        help=f"of a model (a resident one on a CPU: twice it); default: {WIDTHS['cpu']} on a CPU, {WIDTHS['cuda']} on a GPU",
    )
    parser.add_argument("--passes", type=int, default=7, help="measurements of each point, default %(default)s")
    parser.add_argument("--quick", action="store_true", help="three sizes of each sweep: to see that it works")
    parser.add_argument("--disk", type=Path, help="file or folder whose disk is measured, default a temporary one")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/scale-DATE.json")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> int:
    """All sweeps; what there is so far is kept beside the result file."""
    require(options, passes=1)
    facts, scale = machine_facts(), Scale(options)
    unfinished = (options.out or RESULTS / f"scale-{facts['date']}.json").with_suffix(".partial.json")
    points = list[Point]()
    for name in options.only:
        for point in SWEEPS[name](scale):
            points.append(point)
            print(line_of(point), flush=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(result_of(scale, points) | facts) + "\n")
    for fit in fits_of(points):
        print(fit_line(fit))
    result = result_of(scale, points)
    for held in result["held"]:
        print(f"{held['what']}: {held['found']}: {'holds' if held['holds'] else 'DOES NOT HOLD'}")
    finish("scale", result | facts, options.out)
    unfinished.unlink()
    return int(not all(held["holds"] for held in result["held"]))


def result_of(scale: Scale, points: Sequence[Point]) -> dict[str, Any]:
    """For the result file."""
    rates = asdict(scale.rates)
    return {
        "benchmark": "scale",
        "device": scale.kind,
        "width": scale.width,
        "num_layers": NUM_LAYERS,
        "link_gbps": scale.emulated_gbps,
        "link_bytes_per_second": scale.link_bytes_per_second,
        "passes": scale.num_passes,
        "rates": {name: rate for name, rate in rates.items() if name not in ("sources", "quantized")},
        "points": [asdict(point) | {"error": point.error} for point in points],
        "fits": [asdict(fit) for fit in fits_of(points)],
        "held": [asdict(each) for each in held_of(points)],
    }


def fits_of(points: Sequence[Point]) -> list[Fit]:
    """Of all sweeps that have been measured."""

    def fit(sweep: str, what: str, expected: float, why: str, *, setting: Setting = "link", fixed: bool = False) -> Fit | None:
        chosen = [each for each in points if (each.sweep, each.setting) == (sweep, setting) and what in (each.what, "any")]
        if len(chosen) < 2:
            return None
        sizes, runs = [size_of(each) for each in chosen], [each.all_seconds for each in chosen]
        law = power_law_beyond_first(sizes, runs) if fixed else power_law(sizes, runs)
        straight = line(sizes, runs) if fixed else None
        return Fit(sweep=sweep, setting=setting, what=what, expected=expected, why=why, power=law, line=straight)

    found = (
        fit("layers", "token", 1, "bytes are layers times those of one"),
        fit("width", "token", 2, "matrices are as high as wide, with as many heads"),
        fit("context", "full step", 1, "keys and values, behind what weights take", setting="resident", fixed=True),
        fit("context", "full step", 0, "the link takes longer than attention"),
        fit("window", "correction", 0, "the same bytes"),
        fit("window", "window", 1, "draft steps, behind a correction", fixed=True),
        fit("nodes", "any", 0, "the same bytes"),
        fit("batch", "full step", 0, "the same bytes"),
        fit("keep", "draft step", 1, "bytes of attention blocks and kept neurons"),
    )
    return [each for each in found if each is not None]


def power_law_beyond_first(sizes: Sequence[float], runs: Sequence[Sequence[float]]) -> PowerLaw | None:
    """Of what grows. None where too little does."""
    grown, grown_runs = beyond_first(sizes, runs)
    return power_law(grown, grown_runs) if len(grown) >= 2 else None


def size_of(point: Point) -> float:
    """What the cost of a point is expected to follow: draft steps of a window, bytes where neurons are kept."""
    if point.what == "window":
        return point.size - 1
    return point.nbytes if point.sweep == "keep" else point.size


@dataclass(frozen=True, kw_only=True)
class Held:
    """Something that must hold."""

    what: str
    value: float
    found: str
    """The value in words."""
    holds: bool


def held_of(points: Sequence[Point]) -> list[Held]:
    """Of what has been measured."""
    return [each for each in (linear_in_bytes(points), flat_in_nodes(points), as_planned(points)) if each is not None]


def linear_in_bytes(points: Sequence[Point]) -> Held | None:
    """None without both sweeps."""
    chosen = [point for point in points if point.what == "token"]
    if len({point.sweep for point in chosen}) < 2:
        return None
    sizes = [point.nbytes for point in chosen]
    fit, times = power_law(sizes, [point.all_seconds for point in chosen]), max(sizes) / min(sizes)
    return Held(
        what=f"seconds by bytes, exponent {LEAST_EXPONENT:g} to {MOST_EXPONENT:g} over {LEAST_RANGE:g} times or more",
        value=fit.exponent,
        found=f"{fit.exponent:.3f} ({fit.lowest:.3f} to {fit.highest:.3f}) over {times:.1f} times",
        holds=LEAST_EXPONENT <= fit.exponent <= MOST_EXPONENT and times >= LEAST_RANGE,
    )


def flat_in_nodes(points: Sequence[Point]) -> Held | None:
    """None without that sweep."""
    chosen = {point.size: point for point in points if point.sweep == "nodes"}
    if not chosen:
        return None
    one, most = chosen[min(chosen)], chosen[max(chosen)]
    ratio = median(tree / single for tree, single in zip(most.all_seconds, one.all_seconds, strict=True))
    return Held(
        what=f"a tree of {most.size:g} nodes, at most {MOST_TREE_RATIO:g} of one token with the same bytes",
        value=ratio,
        found=f"{ratio:.3f}",
        holds=ratio <= MOST_TREE_RATIO and most.nbytes == one.nbytes,
    )


def as_planned(points: Sequence[Point]) -> Held:
    worst = max(points, key=lambda point: abs(math.log1p(point.error)))  # half is as wrong as twice
    return Held(
        what=f"predictions within {TOLERANCE:.0%}",
        value=worst.error,
        found=f"worst {worst.error:+.1%}: {worst.sweep} {worst.size:g}, {worst.setting}, {worst.what}",
        holds=abs(worst.error) <= TOLERANCE,
    )


def line_of(point: Point) -> str:
    share = "" if point.link_share is None else f"  link {point.link_share:.0%}"
    again = f"  measured again {point.num_disturbed} times" if point.num_disturbed else ""
    return (
        f"{point.sweep:8} {point.size:6g} {point.setting:8} {point.what:10} {point.nbytes / 1e6:8.2f} MB  {point.seconds:.4f} s "
        f"({min(point.all_seconds):.4f} to {max(point.all_seconds):.4f})  predicted {point.predicted_seconds:.4f} s "
        f"{point.error:+6.1%}{share}{again}"
    )


def fit_line(fit: Fit) -> str:
    power, straight = fit.power, fit.line
    found = "within the noise" if power is None else f"{power.exponent:.3f} ({power.lowest:.3f} to {power.highest:.3f})"
    text = f"{fit.sweep:8} {fit.setting:8} {fit.what:10} exponent {found}, expected {fit.expected:g}: {fit.why}"
    if power is not None:
        text += f"; points within {power.largest_residual:.1%}"
    if straight is not None:
        text += f"; {straight.fixed:.4g} s + {straight.slope:.4g} s each, within {straight.largest_residual:.1%}"
    return text


if __name__ == "__main__":
    sys.exit(main())
