"""Everything that needs a GPU, in one command of less than ten minutes: tests, rates, passes, and what they are compared with.

    PYTHONPATH=.:loaders python3 tools/gpu_suite.py --out FOLDER
    PYTHONPATH=.:loaders python3 tools/gpu_suite.py --only "link" "stream 70B int8-sized"

Each part is a command of its own, so that one that fails or takes too long does not take the others along, and the memory of one
is free for the next. What needs CUDA is left out on a machine without, and said so. The table has what each part must show; the
result file has everything the parts have printed as JSON, with the commit that each was run on: with --only the other parts of
the day's file stay. Exit status: 0 all held, 1 something failed, took too long or fell short.

bfloat16 70B has 137 GB: its layers share 8 host buffers, so that its bytes and arithmetic are real and its weights repeat; so do
those in 4 bits, of which only as many have to be quantised. int8-sized means as many bytes as the 70B shape would have in int8:
half of its layers in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from report import machine_facts  # noqa: E402  beside the scripts, as they import it

TOTAL_SECONDS = 9.5 * 60
GPU_TESTS = (
    "tests/weights/test_cuda.py",
    "tests/kernels/test_blocks.py",
    "tests/kernels/test_gather.py",
    "tests/kernels/test_quantized.py",
)
"""Files with tests that need a GPU, by name: others import packages that a machine for them need not have."""

MOST_DRAFT_RATIO, MOST_CORRECTION_RATIO = 1.35, 1.05
"""Seconds of resident passes beside those of their bytes, at most."""

PAPERS_DRAFT_SHARE, MOST_OF_PAPERS_FLOOR, MOST_OF_FULL_HOT = 0.5884, 1.03, 0.30
"""What a draft step of a 70B model brings of a pass with half of the neurons kept; seconds a token of the paper's method, to the
least that its windows allow, and with a hot set to mode full's with every layer streamed."""

LEAST_MEMORY_SHARE, LEAST_TORCH_SHARE = 0.7, 0.6
"""Of products with quantised rows: of the memory's rate with one token, of the speed of torch's in bfloat16 with many."""

Figures = dict[str, Any]
Verdict = tuple[bool, str]
"""Whether a part holds, and what it found in a few words."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question, answered by a command that ends with a line of JSON."""

    name: str
    command: tuple[str, ...]
    judge: Callable[[Figures], Verdict]
    needs_cuda: bool = True
    limit_seconds: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a part."""

    name: str
    held: bool | None
    """None where it was left out."""
    found: str
    seconds: float
    figures: Figures | None
    commit: str | None = None
    """Of the repository, where that is known."""


def offload_sirius(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "offload_sirius", *arguments, "--json")


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments, "--out", "{scratch}")


def stream(model: str, *arguments: str) -> tuple[str, ...]:
    return offload_sirius("bench", "stream", "--model", model, *arguments)


def judge_link(figures: Figures) -> Verdict:
    return True, "see the result file"


def judge_stream(least: float, *, most_pinned: float | None = None) -> Callable[[Figures], Verdict]:
    """Full passes must use that share of the link's rate, and take at most that many times their bytes of host memory."""

    def judge(figures: Figures) -> Verdict:
        share, seconds = figures["link_share"], figures["seconds"]["median"]
        pinned, pageable = figures["pinned_nbytes"] / figures["pass_nbytes"], figures["pageable_nbytes"]
        found = f"{seconds:.3f} s a pass, {share:.1%} of the link (at least {least:.0%}), pinned {pinned:.3f} of its bytes"
        return share >= least and (most_pinned is None or (pinned <= most_pinned and pageable == 0)), found

    return judge


def judge_ratio(most: float | None = None, least: float | None = None) -> Callable[[Figures], Verdict]:
    """The ratio that a benchmark ends with must be within bounds."""

    def judge(figures: Figures) -> Verdict:
        ratio = figures["ratio"]
        held = (most is None or ratio <= most) and (least is None or ratio >= least)
        return held, f"ratio {ratio:.2f} (" + (f"at most {most}" if most is not None else f"at least {least}") + ")"

    return judge


def judge_exact(figures: Figures) -> Verdict:
    """Exact answers must be those of mode full."""
    exact = [row for row in figures["rows"] if row["accept"] == "exact"]
    wrong = [row["name"] for row in exact if row["num_identical"] < figures["num_prompts"]]
    return bool(exact) and not wrong, f"{len(exact) - len(wrong)} of {len(exact)} ways to draft give mode full's tokens"


def judge_hot_passes(figures: Figures) -> Verdict:
    """A draft step must be recorded, and take little more than its bytes in device memory; a correction its own over the link."""
    draft, correction = figures["draft_ratio"], figures["correction_ratio"]
    found = (
        f"a draft takes {draft:.2f} of its bytes (at most {MOST_DRAFT_RATIO}), launched {figures['launched_ratio']:.2f}; "
        f"a correction {correction:.3f} of its own (at most {MOST_CORRECTION_RATIO})"
    )
    return figures["is_recorded"] and draft <= MOST_DRAFT_RATIO and correction <= MOST_CORRECTION_RATIO, found


def judge_products(figures: Figures) -> Verdict:
    """Every product must come near enough to what bounds it."""
    one = min((row["share"] for row in figures["rows"] if row["num_tokens"] == 1), default=0.0)
    many = min((row["share"] for row in figures["rows"] if row["num_tokens"] > 1), default=0.0)
    found = (
        f"one token {one:.0%} of the memory's rate (at least {LEAST_MEMORY_SHARE:.0%}), "
        f"many {many:.0%} of torch's speed in bfloat16 (at least {LEAST_TORCH_SHARE:.0%})"
    )
    return one >= LEAST_MEMORY_SHARE and many >= LEAST_TORCH_SHARE, found


def judge_scripted(figures: Figures) -> Verdict:
    """Drafts must bring nothing over the link; how fast the rest is depends on the GPU."""
    rows = figures["rows"]
    speeds = ", ".join(f"{row['tokens_per_second']:.1f} at {row['acceptance']:.0%}" for row in rows)
    draft, correction = (max(row[f"{what}_seconds"] for row in rows) for what in ("draft", "correction"))
    found = f"a draft step {draft * 1e3:.1f} ms, a correction {correction:.3f} s; tokens/s: {speeds} of drafted tokens standing"
    return all(row["draft_nbytes"] == 0 for row in rows), found


def judge_scale(figures: Figures) -> Verdict:
    """What must hold of growth does, as the script itself says."""
    return all(each["holds"] for each in figures["held"]), "; ".join(
        f"{each['what']}: {each['found']}" for each in figures["held"]
    )


def judge_paper(figures: Figures) -> Verdict:
    """In the paper's own setting beside its floor, by the tokens its windows gave, and with the device memory of the card."""
    rows = {(row["group"], row["name"]): row for row in figures["table"]["rows"]}
    sirius = rows["paper", "sirius, the paper's AAL"]
    own, floor = sirius["ratio_to_full"], ((sirius["window"] - 1) * PAPERS_DRAFT_SHARE + 1) / sirius["aal"]
    hot = rows["int4 on the card", "hot set, the paper's AAL"]["ratio_to_full"]
    found = (
        f"{own:.3f} of mode full, {own / floor:.3f} of the floor (at most {MOST_OF_PAPERS_FLOOR}), with a hot set {hot:.3f} "
        f"(at most {MOST_OF_FULL_HOT})"
    )
    return own <= MOST_OF_PAPERS_FLOOR * floor and hot <= MOST_OF_FULL_HOT, found


def judge_quality(figures: Figures) -> Verdict:
    """Exact answers must be identical."""
    exact = [row["identical"]["value"] for row in figures["rows"] if row["accept"] == "exact"]
    return bool(exact) and min(exact) == 1, f"{len(exact)} exact rows, {min(exact, default=0):.0%} of answers identical"


def judge_graphs(figures: Figures) -> Verdict:
    saved = (figures["launched_seconds"] - figures["graph_seconds"]) / figures["num_layers"]
    return True, f"a graph saves {saved * 1e6:.0f} us a layer"


SEVENTY = "synthetic:llama-3-70b"
SHARED = ("--shared-host-buffers", "8")
TRACES = "{folder}/gpu-suite"
"""Begins the names of traces, which stay beside the result file."""

PARTS = (
    Part(name="link", command=offload_sirius("bench", "link"), judge=judge_link, needs_cuda=False),
    Part(
        name="stream tiny over an emulated link",
        command=stream("synthetic:small?layers=6", "--link-gbps", "0.02"),
        judge=judge_stream(0.9),
        needs_cuda=False,
    ),
    Part(name="stream 1.1B", command=stream("synthetic:tinyllama-1.1b"), judge=judge_stream(0.9)),
    Part(
        name="stream 8B",
        command=stream("synthetic:llama-3-8b", "--trace", f"{TRACES}-stream-8b.trace.json"),
        judge=judge_stream(0.95),
    ),
    Part(
        name="stream 70B int8-sized",
        command=stream(f"{SEVENTY}?layers=40"),
        judge=judge_stream(0.97, most_pinned=1.02),
        limit_seconds=180,
    ),
    Part(name="stream 70B bf16, shared buffers", command=stream(SEVENTY, *SHARED), judge=judge_stream(0.97), limit_seconds=150),
    Part(
        name="resident drafts, 70B int8-sized, 24 GiB",
        command=script(
            "hot_passes",
            "--model",
            f"{SEVENTY}?layers=40",
            *SHARED,
            "--device-memory",
            "24GiB",
            "--trace",
            f"{TRACES}-resident-drafts.trace.json",
        ),
        judge=judge_hot_passes,
        limit_seconds=150,
    ),
    Part(name="products with quantised rows", command=script("gpu_products"), judge=judge_products),
    Part(
        name="scripted acceptance, 70B int4, 24 GiB",
        command=script("scripted", "--model", SEVENTY, "--quantize", "int4", *SHARED, "--device-memory", "24GiB"),
        judge=judge_scripted,
        limit_seconds=150,
    ),
    Part(
        name="first token of 1000, 70B, shared buffers",
        command=script("first_token", "--model", SEVENTY, *SHARED, "--prompt-tokens", "1000"),
        judge=judge_ratio(most=1.15),
        limit_seconds=150,
    ),
    Part(
        name="accelerate's CPU offload, 10 layers of 70B",
        command=script("accelerate_offload", "--model", f"{SEVENTY}?layers=10"),
        judge=judge_ratio(least=10),
        limit_seconds=180,
    ),
    Part(
        name="exact drafts, float32",
        command=offload_sirius(
            *("bench", "decode", "--model", "synthetic:small?layers=6&dtype=F32", "--sparsity", "griffin,cats"),
            *("--tree-width", "1,3", "--window", "5", "--max-new-tokens", "24", "--limit", "1", "--host-memory", "2GiB"),
        ),
        judge=judge_exact,
        needs_cuda=False,
    ),
    Part(
        name="quality, random weights",
        command=script(
            *("quality", "--model", "synthetic:small?layers=6&dtype=F32", "--dtype", "float32"),
            *("--num-prompts", "2", "--max-new-tokens", "16", "--sparsity", "griffin", "--keep", "0.5"),
        ),
        judge=judge_quality,
        needs_cuda=False,
    ),
    Part(name="graphs", command=script("graphs"), judge=judge_graphs),
    Part(name="growth", command=script("scale", "--quick", "--passes", "3"), judge=judge_scale),
    Part(
        name="the paper's table, 20 layers of 70B",
        command=script("paper", "--only", "table", "--quick", "--model", f"{SEVENTY}?layers=20", *SHARED),
        judge=judge_paper,
        limit_seconds=180,
    ),
)

TESTS = "tests"
NAMES = [TESTS, *(part.name for part in PARTS)]


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    began, has_cuda = time.perf_counter(), torch.cuda.is_available()
    facts = machine_facts()
    path = options.out / f"gpu-suite-{facts['date']}.json"
    wanted, num_short = options.only or NAMES, 0
    outcomes = kept_in(path, facts["machine"]["gpu"])
    for name in wanted:
        seconds_left = TOTAL_SECONDS - (time.perf_counter() - began)
        outcome = run_tests(has_cuda) if name == TESTS else run_part(part_named(name), has_cuda, seconds_left, options.out)
        num_short += outcome.held is False
        if outcome.held is not None or name not in outcomes:
            outcomes[name] = replace(outcome, commit=facts["versions"]["commit"])
        print(line(outcome), flush=True)
        write(path, outcomes, facts)
    print(f"{path}: {num_short} of {len(wanted)} parts did not hold")
    return int(num_short > 0)


def kept_in(path: Path, gpu: str | None) -> dict[str, Outcome]:
    """What a result file has of parts that there are, where it is of the same GPU."""
    result = json.loads(path.read_text()) if path.exists() else None
    if result is None or result["machine"]["gpu"] != gpu:
        return {}
    found = (Outcome(**part) for part in result["parts"])
    return {outcome.name: outcome for outcome in found if outcome.name in NAMES}


def write(path: Path, outcomes: dict[str, Outcome], facts: dict[str, Any]) -> None:
    """Keep what there is so far, so that nothing is lost when the time is over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [asdict(outcomes[name]) for name in NAMES if name in outcomes]
    path.write_text(json.dumps({"parts": parts, "seconds": sum(part["seconds"] for part in parts), **facts}, indent=1) + "\n")


def part_named(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder, default %(default)s")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="PART", help="of " + ", ".join(map(repr, NAMES)))
    return parser.parse_args()


def run_tests(has_cuda: bool) -> Outcome:
    """The tests that need a GPU."""
    if not has_cuda:
        return Outcome(name=TESTS, held=None, found="left out: no CUDA device", seconds=0.0, figures=None)
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *GPU_TESTS]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
        last, held = (ran.stdout.strip().splitlines() or ["nothing printed"])[-1], ran.returncode == 0
        tail = ran.stdout[-4000:]
    except subprocess.TimeoutExpired:
        last, held, tail = "did not end within 180 s", False, ""
    return Outcome(name=TESTS, held=held, found=last, seconds=time.perf_counter() - began, figures={"output": tail})


def run_part(part: Part, has_cuda: bool, seconds_left: float, folder: Path) -> Outcome:
    """One command, held to its limit and to what is left of the suite's. folder: where what it writes beside figures stays."""
    if part.needs_cuda and not has_cuda:
        return Outcome(name=part.name, held=None, found="left out: no CUDA device", seconds=0.0, figures=None)
    limit = min(part.limit_seconds, seconds_left)
    if limit <= 0:
        return Outcome(name=part.name, held=False, found="not begun: the suite's time was over", seconds=0.0, figures=None)
    began = time.perf_counter()
    held, found, figures = False, "", None
    try:
        figures = figures_of(part.command, limit, folder)
        held, found = part.judge(figures)
    except subprocess.TimeoutExpired:
        found = f"did not end within {limit:.0f} s"
    except (PartError, KeyError, TypeError, ZeroDivisionError) as error:  # the last three: figures that lack what is judged
        found = f"{type(error).__name__}: {error}"
    return Outcome(name=part.name, held=held, found=found, seconds=time.perf_counter() - began, figures=figures)


class PartError(Exception):
    """A command that failed, or did not end with JSON."""


def figures_of(command: tuple[str, ...], limit_seconds: float, folder: Path) -> Figures:
    """Run a command; the JSON of its last line. Raises PartError, subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory() as scratch:
        places = {"{scratch}": f"{scratch}/result.json", "{folder}": str(folder.resolve())}
        words = [reduce(lambda text, place: text.replace(*place), places.items(), word) for word in command]
        ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit_seconds)
    lines = ran.stdout.strip().splitlines()
    # With exit status 1 a script may have measured all, and say of its figures that they do not hold.
    if ran.returncode not in (0, 1) or not lines:
        raise PartError(f"exit status {ran.returncode}: " + " | ".join(ran.stderr.strip().splitlines()[-3:]))
    try:
        figures: Figures = json.loads(lines[-1])
    except ValueError as error:
        said = ran.stderr.strip().splitlines()[-1:] if ran.returncode else []
        raise PartError(" | ".join([f"its last line is no JSON: {lines[-1][:200]}", *said])) from error
    return figures


def line(outcome: Outcome) -> str:
    """A row of the table."""
    verdict = {True: "holds", False: "FAILS", None: "-"}[outcome.held]
    return f"{outcome.name:44} {verdict:6} {outcome.seconds:6.1f} s  {outcome.found}"


if __name__ == "__main__":
    sys.exit(main())
