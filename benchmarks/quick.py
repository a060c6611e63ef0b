"""Has anything become slower? The ratios that matter, measured in under three minutes, beside those that were recorded.

    python benchmarks/quick.py --record     # five runs, kept as benchmarks/results/quick-DATE.json
    python benchmarks/quick.py              # fails where a ratio is worse than recorded by more than the recorded spread
    python benchmarks/quick.py --only link products

Every ratio is of two times that were measured in this run, or of one and what bytes and a measured or set rate allow; less is
better. Beside it stands the ratio at its ceiling. Speed of the machine cancels out, as far as it can:

full pass            a token of mode full over the emulated link, to its bytes over the rate
disk pass            the same with layers from disk, to plain reads of as many bytes, in turn
tree of 64           a correction of 64 nodes to a full step of one token over the link, in turn
draft step           a streamed draft step to its bytes over the rate
forced drafts        a token of mode sirius where 15.2 tokens stand of each window of 16, to a full step
hot set              a token of SmolLM2 with resident drafts, float32, to one of mode full with the same device memory
int4 link            a token of mode full in 4 bits to one in bfloat16, over the link
eight together       a token of each of eight answers to a token of one, over the link
products             a row, or 16, with 5632 x 2048 weights of bfloat16 or int4, to torch's product in bfloat16; CPU seconds
resident decode      a token of SmolLM2 in bfloat16, all resident, to its bytes at the rate at which the memory is read

A record has all ratios, of each the median of its runs, and as spread the distance between the worst and the best, 2 % of the
median at least; a spread of more than 25 % is warned of. A ratio that was recorded and cannot be measured fails, too. A
ratio that is worse by more is measured once more, and the better one counts. The newest record of this machine is taken. Where
there is none, the newest of another machine is, and only ratios that a link bounds can fail: what kernels, disk and memory reach
beside each other differs from machine to machine. All is measured on the CPU; tools/gpu_suite.py is for GPUs.
Exit status: 0 nothing is worse, 1 something is, or was not measured, 2 there is no record, or none that can be read or made, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import asdict, dataclass
from fractions import Fraction
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import hotset
import products
import stream
import torch
from asked import exit_status, require
from passes import NUM_PROMPT, NUM_WARMUPS, SinglePasses, loaded, rounds
from report import RESULTS, finish, machine_facts

import offload_sirius
from offload_sirius.bench.decode import answer_to
from offload_sirius.bench.stream import PROMPT, pass_seconds
from offload_sirius.bench.variants import DecodeBench, forced_tokens
from offload_sirius.config import DecodingConfig, GenerationConfig
from offload_sirius.engine import Engine
from offload_sirius.engine.planning import Planned
from offload_sirius.errors import USER_ERRORS, ConfigError
from offload_sirius.kernels.native import native
from offload_sirius.machine import physical_cores

SHAPE = "synthetic:tiny?layers=8&width=512&ffn=1408&heads=16&kv_heads=4&vocab=2048"
"""45 MB of bfloat16: a pass over the link takes 0.18 s, of which computing is a few hundredths."""

LINK_GBPS = 0.25
RATE = LINK_GBPS * 1e9
NUM_PASSES = 9
FULL = DecodingConfig(mode="full")

NUM_NODES, BRANCHES, WINDOW = 64, 2, 16
DRAFTING = DecodingConfig(draft="streamed", window=NUM_NODES, lookup=False, prior=False)
AAL, NUM_WINDOWS = Fraction("15.2"), 3
"""As the paper's, of drafts that keep half of the neurons; whole windows that are timed."""

DISK_SHAPE = "synthetic:tinyllama-1.1b?layers=8&vocab=2048"
DISK_PASSES, READERS_MEMORY = 5, "200MiB"

SMOLLM2 = "smollm2-135m"
HOT_LINK_GBPS, HOT_TOKENS, HOT_FULL_TOKENS = 0.14, 32, 6
NUM_ANSWERS, ANSWER_TOKENS = 5, 48
PRODUCT_SHAPE, PRODUCT_ROUNDS = (5632, 2048), 9
PRODUCT_TOKENS = (1, 16)
PRODUCTS = {"linear bfloat16": "bfloat16", "linear int4/32": "int4"}

LEAST_SPREAD, WIDE_SPREAD = 0.02, 0.25
"""Shares of a median. With a spread above the second, a ratio can become much worse unnoticed."""

RECORD = "quick-????-??-??.json"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One ratio, once."""

    name: str
    ratio: float
    ceiling: float
    """What it could be at best."""
    portable: bool = True
    """Whether another machine should have the same: where the emulated link bounds both times."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The same ratio in several runs."""

    median: float
    spread: float
    runs: list[float]
    ceiling: float

    @property
    def limit(self) -> float:
        """A ratio above is worse."""
        return self.median + self.spread


def link() -> Iterator[Measured]:
    """Mode full over the link, by itself, in 4 bits, and for eight."""
    plain = token_seconds()
    yield Measured(name="full pass", ratio=plain[0] * RATE / plain[1], ceiling=1.0)
    packed = token_seconds(quantize="int4")
    yield Measured(name="int4 link", ratio=packed[0] / plain[0], ceiling=packed[1] / plain[1])
    one, eight = round_seconds(1), round_seconds(8)
    yield Measured(name="eight together", ratio=eight / one, ceiling=1.0)


def token_seconds(**settings: Any) -> tuple[float, int]:
    """Of mode full over the link, and the bytes of a pass."""
    context = len(PROMPT) + NUM_WARMUPS + NUM_PASSES
    with over_link(context, FULL, **settings) as (engine, planned):
        return median(pass_seconds(engine, NUM_PASSES)), planned.plan.pass_nbytes


def round_seconds(num_answers: int) -> float:
    """A token for each of them."""
    with over_link(2 * num_answers + NUM_WARMUPS + NUM_PASSES, FULL, parallel=num_answers) as (engine, _):
        return median(rounds(engine, NUM_PASSES).seconds)


def drafts() -> Iterator[Measured]:
    """Trees, draft steps, and windows of given acceptance."""
    with over_link(512, DRAFTING) as (engine, _):
        passes = SinglePasses(engine)
        for _ in range(NUM_WARMUPS):
            passes.step("full")
        full, trees = list[float](), list[float]()
        for _ in range(NUM_PASSES):
            trees += passes.timed_once("correction", NUM_NODES, BRANCHES).seconds
            full += passes.timed_once("full").seconds
        yield Measured(name="tree of 64", ratio=median(trees) / median(full), ceiling=1.0)
        draft = passes.timed("draft", NUM_PASSES)
        yield Measured(name="draft step", ratio=median(draft.seconds) * RATE / draft.nbytes, ceiling=1.0)
        full_nbytes = engine.plan.pass_nbytes
        least = ((WINDOW - 1) * draft.nbytes + full_nbytes) / float(AAL) / full_nbytes
        yield Measured(name="forced drafts", ratio=forced_seconds(engine) / median(full), ceiling=least)


def forced_seconds(engine: Engine) -> float:
    """Of a token, all windows being whole ones."""
    decoding = DecodingConfig(draft="streamed", window=WINDOW, lookup=False, prior=False)
    num_tokens = 1 + forced_tokens(AAL, NUM_WINDOWS)
    generation = GenerationConfig(max_new_tokens=num_tokens, chat=False, reuse=False)
    bench = DecodeBench(prompts=("a prompt",), variants=(decoding,), generation=generation, forced_aal=AAL)
    seconds = answer_to(engine, bench.prompts[0], decoding, bench).seconds_per_token
    assert seconds is not None
    return seconds


def disk() -> Iterator[Measured]:
    """As benchmarks/stream.py has it."""
    options = Namespace(model=DISK_SHAPE, passes=DISK_PASSES, device_memory=None, disk_host_memory=READERS_MEMORY)
    yield Measured(name="disk pass", ratio=stream.disk_row(options)["ratio"], ceiling=1.0, portable=False)


def hot() -> Iterator[Measured]:
    """As benchmarks/hotset.py has it, with one prompt."""
    options, budget = Namespace(model=SMOLLM2, link_gbps=HOT_LINK_GBPS), hotset.device_budget(SMOLLM2)
    prompt = hotset.first_prompts()[:1]
    exact = next(row for row in hotset.rows(HOT_TOKENS) if row.name == "exact")
    full = hotset.Row(name="full", decoding=FULL, num_tokens=HOT_FULL_TOKENS)
    ours, theirs = (hotset.measure(row, hotset.config_of(row, options, budget), prompt)[0] for row in (exact, full))
    seconds, nbytes = (
        [of(answer) / (answer.new_tokens - 1) for answer in (ours, theirs)]
        for of in (lambda answer: answer.decode_seconds, hotset.moved_nbytes)
    )
    yield Measured(name="hot set", ratio=seconds[0] / seconds[1], ceiling=nbytes[0] / nbytes[1], portable=False)


def kernels() -> Iterator[Measured]:
    """As benchmarks/products.py has it, one thread."""
    if native("products").library is None:
        raise ConfigError(str(native("products").problem))
    torch.set_num_threads(1)
    try:
        for num_tokens in PRODUCT_TOKENS:
            with redirect_stdout(StringIO()):
                rows = products.shape_rows(*PRODUCT_SHAPE, num_tokens, time.thread_time, PRODUCT_ROUNDS)
            found = {row["what"]: row for row in rows}
            reference = found[products.REFERENCE]
            for name, shown in PRODUCTS.items():
                row = found[name]
                least = row["bytes_per_second"] * row["seconds"] / (reference["bytes_per_second"] * reference["seconds"])
                yield Measured(name=f"products {shown} {num_tokens}", ratio=row["ratio"], ceiling=least, portable=False)
    finally:
        torch.set_num_threads(physical_cores())


def resident() -> Iterator[Measured]:
    """Answers in turn with reading memory."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "keep_blocks": False, "device": "cpu", "max_context": 256}
    ratios = []
    with offload_sirius.load(SMOLLM2, mode="full", **settings) as engine:
        nbytes = engine.plan.device_bill["resident_layers"] + engine.plan.device_bill["head"]
        for _ in range(1 + NUM_ANSWERS):
            answer = engine.generate("The sky is", max_new_tokens=ANSWER_TOKENS, ignore_eos=True, reuse=False)
            seconds = answer.decode_seconds / (answer.new_tokens - 1)
            ratios.append(seconds * products.ceiling(time.perf_counter) / nbytes)
    yield Measured(name="resident decode", ratio=median(ratios[1:]), ceiling=1.0, portable=False)


def over_link(context: int, decoding: DecodingConfig, **settings: Any) -> AbstractContextManager[tuple[Engine, Planned]]:
    """An engine whose layers all cross the emulated link. See passes.loaded."""
    given: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "link_gbps": LINK_GBPS}
    return loaded(SHAPE, streamed=True, context=max(context, NUM_PROMPT + NUM_NODES), decoding=decoding, **given, **settings)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is measured together."""

    measure: Callable[[], Iterator[Measured]]
    names: tuple[str, ...]
    """Of its ratios."""


PARTS = {
    "link": Part(measure=link, names=("full pass", "int4 link", "eight together")),
    "drafts": Part(measure=drafts, names=("tree of 64", "draft step", "forced drafts")),
    "disk": Part(measure=disk, names=("disk pass",)),
    "hot": Part(measure=hot, names=("hot set",)),
    "products": Part(
        measure=kernels, names=tuple(f"products {shown} {num}" for num in PRODUCT_TOKENS for shown in PRODUCTS.values())
    ),
    "resident": Part(measure=resident, names=("resident decode",)),
}


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    return exit_status(lambda: record(options) if options.record else guard(options))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="measure several times and keep what came of it")
    parser.add_argument("--runs", type=int, default=5, help="with --record, default %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--records", type=Path, default=RESULTS, help="folder of records, default benchmarks/results")
    parser.add_argument("--out", type=Path, help="result file; default of a record: quick-DATE.json in that folder, else none")
    return parser.parse_args()


def record(options: argparse.Namespace) -> int:
    """Run after run, each of all parts. Raises ConfigError, and keeps nothing, where one lacks a ratio."""
    require(options, runs=1)
    if left_out := [part for part in PARTS if part not in options.only]:
        raise ConfigError(f"a record has all parts, and --only leaves out {', '.join(left_out)}; leave out --record or --only")
    facts = machine_facts()
    out = options.out or options.records / f"quick-{facts['date']}.json"
    unfinished = out.with_suffix(".partial.json")
    runs = list[dict[str, Measured]]()
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}", flush=True)
        runs.append({each.name: each for part in PARTS for each in measured(part, show=True)})
        if missing := missing_of(PARTS, runs[-1]):
            raise ConfigError(f"not measured, so nothing is recorded: {', '.join(missing)}")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"runs": [[asdict(each) for each in run.values()] for run in runs]}) + "\n")
    ratios = recorded(runs)
    for name, each in ratios.items():
        if each.spread > WIDE_SPREAD * each.median:
            print(f"warning: {name}: its runs are {each.spread / each.median:.0%} apart; record it again on a quiet machine")
    kept = {name: asdict(each) for name, each in ratios.items()}
    finish("quick", {"benchmark": "quick", "num_runs": options.runs, "ratios": kept, **facts}, out)
    unfinished.unlink()
    return 0


def guard(options: argparse.Namespace) -> int:
    """Measure once and compare; what is worse once more."""
    facts = machine_facts()
    path, ratios, same = newest_record(options.records, facts["machine"])
    print(f"recorded in {path.name}" + ("" if same else ": another machine; only ratios that a link bounds can fail"), flush=True)
    rows = list[dict[str, Any]]()
    for part in options.only:
        found = measured(part)
        if any(is_worse(each, ratios, same_machine=same) for each in found):
            found = better(found, measured(part))
        for each in found:
            rows.append(row_of(each, ratios, same_machine=same))
            print(line_of(rows[-1]), flush=True)
    missing = [name for name in missing_of(options.only, [row["name"] for row in rows]) if name in ratios]
    for name in missing:
        print(f"{name}: recorded, and NOT MEASURED")
    num_worse = sum(row["verdict"] == "WORSE" for row in rows)
    print(f"{num_worse} of {len(rows)} ratios are worse than recorded")
    result = {"benchmark": "quick", "record": path.name, "same_machine": same, "rows": rows, "missing": missing, **facts}
    print(json.dumps(result)) if options.out is None else finish("quick", result, options.out)
    return int(num_worse > 0 or bool(missing))


def missing_of(parts: Iterable[str], names: Collection[str]) -> list[str]:
    """Ratios of these parts that are not among the names."""
    return [name for part in parts for name in PARTS[part].names if name not in names]


def measured(part: str, *, show: bool = False) -> list[Measured]:
    """Its ratios; none, and a line that says why, where it cannot be measured here."""
    found = list[Measured]()
    try:
        for each in PARTS[part].measure():
            found.append(each)
            if show:
                print(f"{each.name:22} {each.ratio:7.3f}, at best {each.ceiling:.3f}", flush=True)
    except (*USER_ERRORS, AssertionError) as error:
        print(f"{part}: not measured: {error}", flush=True)
    return found


def recorded(runs: Sequence[Mapping[str, Measured]]) -> dict[str, Recorded]:
    """Of every ratio."""
    found: dict[str, Recorded] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        ratios, ceilings = ([getattr(run[name], of) for run in runs if name in run] for of in ("ratio", "ceiling"))
        spread = max(max(ratios) - min(ratios), LEAST_SPREAD * median(ratios))
        found[name] = Recorded(median=median(ratios), spread=spread, runs=ratios, ceiling=median(ceilings))
    return found


def newest_record(folder: Path, machine: Mapping[str, Any]) -> tuple[Path, dict[str, Recorded], bool]:
    """The newest of this machine, else the newest -> its file, its ratios, and whether it is of this machine.

    Raises ConfigError where there is none, or one cannot be read.
    """
    found = [(path, *read_record(path)) for path in sorted(folder.glob(RECORD), reverse=True)]
    if not found:
        raise ConfigError(f"{folder}: no {RECORD} to compare with; make one with --record")
    here = [each for each in found if all(each[2].get(name) == machine[name] for name in ("cpu", "cores"))]
    path, ratios, _ = (here or found)[0]
    return path, ratios, bool(here)


def read_record(path: Path) -> tuple[dict[str, Recorded], dict[str, Any]]:
    """Ratios and machine. Raises ConfigError."""
    try:
        result = json.loads(path.read_bytes())
        return {name: Recorded(**each) for name, each in result["ratios"].items()}, dict(result["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is no record of ratios ({type(error).__name__}); remove it, or make one with --record"
        ) from error


def is_worse(measured: Measured, ratios: Mapping[str, Recorded], *, same_machine: bool) -> bool:
    """By more than the recorded spread."""
    known = ratios.get(measured.name)
    return known is not None and (same_machine or measured.portable) and measured.ratio > known.limit


def better(first: Sequence[Measured], second: Sequence[Measured]) -> list[Measured]:
    """Of two measurements of the same ratios."""
    again = {each.name: each for each in second}
    return [min(each, again.get(each.name, each), key=lambda measured: measured.ratio) for each in first]


def row_of(measured: Measured, ratios: Mapping[str, Recorded], *, same_machine: bool) -> dict[str, Any]:
    """For table and result."""
    known = ratios.get(measured.name)
    if known is None:
        verdict = "not recorded"
    elif not (same_machine or measured.portable):
        verdict = "another machine"
    else:
        verdict = "WORSE" if is_worse(measured, ratios, same_machine=same_machine) else "holds"
    return asdict(measured) | {
        "recorded": None if known is None else known.median,
        "spread": None if known is None else known.spread,
        "verdict": verdict,
    }


def line_of(row: Mapping[str, Any]) -> str:
    beside = "" if row["recorded"] is None else f", recorded {row['recorded']:.3f} +- {row['spread']:.3f}"
    return f"{row['name']:22} {row['ratio']:7.3f}{beside}, at best {row['ceiling']:.3f}: {row['verdict']}"


if __name__ == "__main__":
    sys.exit(main())
