"""What do drafts without correction cost in quality, and what does correction bring back? The full model beside both.

    python benchmarks/quality.py                                      # 48 prompts of 64 tokens; about an hour on two cores
    python benchmarks/quality.py --num-prompts 4 --max-new-tokens 16  # a sample
    python benchmarks/quality.py --gsm8k data/gsm8k.jsonl             # problems with a number as their answer
    python benchmarks/quality.py --model llama-3-8b --gsm8k data/gsm8k.jsonl --shots 5 --max-new-tokens 256

Greedy answers to every prompt: by the full model; by the sparse model alone (mode sparse, of which only the first token is the
full model's); and by drafts that the full model corrects (mode sirius), exactly or by a threshold, lines and trees. Trees are
drafted with the first of --sparsity only. Neurons are chosen as for a single answer, by its prompt (griffin, never refreshed) or
its tokens (cats): answers share passes here and nothing else, so nothing is said of speed. Nothing is looked up. Answers to
prompts go past end tokens, so that all have the same length; those to problems end where the model ends them.

Each figure is a share or mean over all prompts. Its interval would hold it in 95 of 100 draws of other prompts of the kind, as
far as these tell (1000 resamples of the prompts, the same for every row).

    identical   answers that are the full model's from the first token to the last
    likeliest   tokens of an answer that the full model, reading the answer so far, finds likeliest; perplexity is by the same
                pass. A lossy answer is judged by itself then: one difference from the full model's makes all that follows differ.
    forced      agreement: tokens that draft and full model both find likeliest, where both read the full model's answer; KL:
                mean divergence of the draft's distribution from the full model's there, in nats. Without correction (sparse)
                keys and values of the answer are the draft's own from its first token on, as when it really decodes. With it
                (sirius) they are the full model's, but for those of the window, which begins anew after every W - 1 drafted
                tokens and one of the full model. It is the draft that is judged, before acceptance, so all ways to accept have
                the same, and trees that of a line. Tokens that the full model gives itself do not count.
    density     parameters computed with for a token, as a share of the model's: of a draft step in mode sparse; in mode sirius
                ((W - 1) draft steps + 1) / AAL, with the windows as they were
    right       answers to problems whose last number is the right one

Must hold: in float32 all exact answers are identical. In bfloat16 a pass over several tokens rounds otherwise than one over a
single token; what differs is told, with the number of near ties. Exit status: 0 it holds, 1 it does not, 2 wrong use. A run
that was broken off goes on behind the rows that it has: they are kept beside the result file, as .tmp, until that is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from asked import exit_status
from bootstrap import CONFIDENCE, NUM_RESAMPLES, SEED, Figure, figure_of
from forced_text import Nearness, Text, nearness
from gsm8k import STOP, ask, is_right, read_problems
from own_neurons import give_own_neurons, num_together
from report import RESULTS, finish, machine_facts

from offload_sirius.bench.prompts import read_prompts
from offload_sirius.bench.variants import FULL, name_of, roomiest
from offload_sirius.config import ACCEPTS, DEFAULT_MODEL, DTYPES, SPARSITIES, DecodingConfig, EngineConfig, GenerationConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.scoring import TokenScore
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.engine import Engine, NoProgress, build, open_model
from offload_sirius.engine.placement import place
from offload_sirius.errors import PromptError
from offload_sirius.files import write_whole
from offload_sirius.sparsity.costs import draft_density
from offload_sirius_loaders.spec import ModelSpec

HELD, NOT_HELD = 0, 1
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt."""

    prompt_ids: tuple[int, ...]
    result: Decimal | None
    """The number that is asked for."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a row is made of, of one prompt."""

    result: Generation
    stats: DecodeStats
    scores: Sequence[TokenScore]
    """What the full model says of each of its tokens."""


Forced = dict[tuple[str, float, int], list[Nearness]]
"""Sparsity, share of neurons and window -> of each question's draft."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of decoding. What it does not have is None."""

    name: str
    mode: str
    sparsity: str | None
    keep: float | None
    window: int | str | None
    accept: str | None
    threshold: float | None
    tree_width: int | None
    draft_density: float | None
    density: Figure | None
    identical: Figure | None
    likeliest: Figure | None
    perplexity: Figure | None
    forced_agreement: Figure | None
    forced_kl: Figure | None
    aal: Figure | None
    acceptance: Figure | None
    """Share of the drafted tokens looked at that stood."""
    score: Figure | None
    near_ties: int | None
    """Tokens that another order of sums might have changed; counted of exact answers in bfloat16."""
    num_tokens: list[int]
    """Of each answer."""
    num_same: list[int]
    """Of each answer, tokens before the first that is not the full model's."""
    num_likeliest: list[int]
    """Of each answer, tokens that count as such."""
    seconds: float
    """That the answers took, with all else that is asked of them."""


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    return exit_status(lambda: compare(options))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default %(default)s")
    parser.add_argument("--device", default="auto", help="default %(default)s")
    parser.add_argument("--device-memory", default="0.9", help="default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    parser.add_argument("--threads", type=int, help="threads to compute with")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompts", type=Path, default=ROOT / "data" / "prompts.jsonl", help="JSONL, a prompt a line")
    asked.add_argument("--gsm8k", type=Path, help="JSONL, a question and an answer a line, in place of prompts")
    parser.add_argument(
        "--shots", type=at_least(0), default=0, help="problems of that file that are shown as examples, default none"
    )
    parser.add_argument("--num-prompts", type=at_least(1), help="so many, spread over the file; default all")
    parser.add_argument("--max-new-tokens", type=at_least(1), help="longest answer, default 64, of problems 256")
    parser.add_argument("--sparsity", nargs="+", choices=SPARSITIES, default=list(SPARSITIES), help="default both")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.75], help="shares of neurons, default 0.5 0.75")
    parser.add_argument("--accept", nargs="*", choices=ACCEPTS, default=list(ACCEPTS), help="default both")
    parser.add_argument("--threshold", type=float, default=0.1, help="default %(default)s")
    parser.add_argument("--window", type=int, default=16, help="default %(default)s")
    parser.add_argument("--tree-width", nargs="+", type=int, default=[1, 4], help="default 1 4")
    parser.add_argument("--parallel", type=at_least(1), default=16, help="answers that share passes at most, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/quality[-gsm8k]-DATE.json")
    return parser.parse_args()


def at_least(least: int) -> Callable[[str], int]:
    """Reads a number of the command line."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text}: it must be {least} or more")
        return number

    return whole_number


def compare(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    facts, name = machine_facts(), "quality" if options.gsm8k is None else "quality-gsm8k"
    out: Path = options.out or RESULTS / f"{name}-{facts['date']}.json"
    loads, questions = loads_of(options), questions_of(options)
    placement = place(open_model(options.model).checkpoint, engine_config(options, (FULL,), questions))
    settings = {
        "model": placement.planned.spec.name,
        "device": str(placement.device),
        "dtype": placement.planned.dtype,
        "prompts": (options.gsm8k or options.prompts).name,
        "prompts_sha256": sha256(repr([question.prompt_ids for question in questions]).encode()).hexdigest(),
        "shots": options.shots if options.gsm8k else None,
        "num_prompts": len(questions),
        "prompt_tokens": [len(question.prompt_ids) for question in questions],
        "max_new_tokens": max_new_tokens(options),
        "window": options.window,
        "intervals": {"confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES, "seed": SEED},
    }
    rows = KeptRows(out.with_suffix(".tmp"), settings)
    measure(options, loads, questions, rows)
    found = [rows.rows[label_of(variant)] for variants in loads for variant in variants]
    held = holds(found, placement.planned.dtype)
    finish(name, settings | {"rows": [asdict(row) for row in found], "held": held} | facts, out)
    rows.path.unlink()
    return HELD if held else NOT_HELD


class KeptRows:
    """Rows on disk, each as soon as it has been measured."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """settings: what all rows depend on; a file that was made with others begins anew."""
        self.path = path
        self.rows: dict[str, Row] = {}
        """By name."""
        self._settings = settings
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("settings") == settings:
            self.rows = {each["name"]: row_from(each) for each in kept["rows"]}

    def add(self, row: Row) -> None:
        self.rows[row.name] = row
        content = {"settings": self._settings, "rows": [asdict(each) for each in self.rows.values()]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(content).encode())


def row_from(kept: dict[str, Any]) -> Row:
    """As it is in JSON."""
    values: dict[str, Any] = {name: Figure(**value) if isinstance(value, dict) else value for name, value in kept.items()}
    return Row(**values)


def measure(
    options: argparse.Namespace, loads: Sequence[Sequence[DecodingConfig]], questions: Sequence[Question], rows: KeptRows
) -> None:
    """Those rows that are not there yet. The full model's answers are what all others are compared with."""
    missing = [[variant for variant in variants if label_of(variant) not in rows.rows] for variants in loads]
    if not any(missing):
        return
    missing[0] = [FULL]
    full: list[Answer] = []
    forced: Forced = {}
    for variants in filter(None, missing):
        for row, answers in measured(options, variants, questions, full, forced):
            full = full or answers
            rows.add(row)
            print(line_of(row), flush=True)


def holds(rows: Sequence[Row], dtype: str) -> bool:
    """See above."""
    exact = [row.identical for row in rows if row.accept == "exact"]
    return dtype != "float32" or all(identical is not None and identical.value == 1 for identical in exact)


def max_new_tokens(options: argparse.Namespace) -> int:
    """Of an answer."""
    given: int | None = options.max_new_tokens
    return given if given is not None else 64 if options.gsm8k is None else 256


def questions_of(options: argparse.Namespace) -> list[Question]:
    """What the model is asked. Raises PromptError, CheckpointError."""
    model = open_model(options.model)
    if options.gsm8k is None:
        asked: list[tuple[str, Decimal | None]] = [(prompt, None) for prompt in read_prompts(options.prompts)]
    else:
        problems = read_problems(options.gsm8k)
        examples, others = problems[: options.shots], problems[options.shots :]
        if not others:
            raise PromptError(
                f"problems {options.gsm8k}: there are {len(problems)}, and --shots takes {options.shots}; give more"
            )
        asked = [(ask(problem, examples), problem.result) for problem in others]
    num_asked = min(options.num_prompts or len(asked), len(asked))
    spread = [asked[index * len(asked) // num_asked] for index in range(num_asked)]
    return [Question(prompt_ids=tuple(model.encode(prompt)), result=result) for prompt, result in spread]


def loads_of(options: argparse.Namespace) -> list[tuple[DecodingConfig, ...]]:
    """Ways of decoding that one load answers: the full model, lines, then trees. Raises ConfigError."""
    lines, trees = [], []
    for sparsity, keep in product(options.sparsity, options.keep):
        sparse = DecodingConfig(
            mode="sparse",
            sparsity=sparsity,
            keep=keep,
            window=options.window,
            threshold=options.threshold,
            draft="streamed",
            lookup=False,
        )
        corrected = [
            replace(sparse, mode="sirius", accept=accept, tree_width=width)
            for width in options.tree_width
            for accept in options.accept
        ]
        lines.append((sparse, *(each for each in corrected if each.tree_width == 1)))
        if sparsity == options.sparsity[0]:
            trees.append(tuple(each for each in corrected if each.tree_width > 1))
    return [(FULL,), *lines, *filter(None, trees)]


def measured(
    options: argparse.Namespace,
    variants: Sequence[DecodingConfig],
    questions: Sequence[Question],
    full: Sequence[Answer],
    forced: Forced,
) -> Iterator[tuple[Row, list[Answer]]]:
    """Rows of one load, with their answers. full: the full model's; none where these are. forced: what is known; is added to."""
    with build(open_model(options.model), engine_config(options, variants, questions), NoProgress()) as engine:
        give_own_neurons(engine)
        known = {
            (question.prompt_ids, each.result.token_ids): each.scores for question, each in zip(questions, full, strict=False)
        }
        for variant in variants:
            began = time.perf_counter()
            answers = answers_of(engine, variant, questions, options, known)
            near = None
            if variant.drafts:
                # What nobody corrects is one window.
                window = options.window if variant.mode == "sirius" else max_new_tokens(options)
                key = (variant.sparsity, variant.keep, window)
                near = forced[key] = forced.get(key) or forced_to(engine, questions, full, window, options.window)
            seconds = time.perf_counter() - began
            yield row_of(engine.spec, variant, questions, answers, full or answers, near, seconds), answers


def engine_config(options: argparse.Namespace, variants: Sequence[DecodingConfig], questions: Sequence[Question]) -> EngineConfig:
    """For answers of all these."""
    decoding = roomiest(variants)
    longest = max(len(question.prompt_ids) for question in questions)
    return EngineConfig(
        model=options.model,
        device=options.device,
        device_memory=options.device_memory,
        dtype=options.dtype,
        keep_blocks=False,
        max_context=longest + max_new_tokens(options) + decoding.num_side_nodes,
        parallel=num_together(decoding, options.parallel),
        threads=options.threads,
        decoding=decoding,
    )


def answers_of(
    engine: Engine,
    variant: DecodingConfig,
    questions: Sequence[Question],
    options: argparse.Namespace,
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Sequence[TokenScore]],
) -> list[Answer]:
    """To every question. known: scores of answers that were given before; is added to."""
    asked = GenerationConfig(
        decoding=variant,
        max_new_tokens=max_new_tokens(options),
        ignore_eos=options.gsm8k is None,
        stop=(STOP,) if options.shots and options.gsm8k else (),
        reuse=False,
    )
    batch = engine.batch()
    writing = [batch.submit(question.prompt_ids, asked) for question in questions]
    while batch.step():
        num_done = sum(each.state == "done" for each in writing)
        print(f"\r{label_of(variant)}: {num_done} of {len(writing)} answers ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    answers = []
    for question, each in zip(questions, writing, strict=True):
        key = (question.prompt_ids, each.result.token_ids)
        if key not in known:
            [known[key]] = engine.score(question.prompt_ids, [each.result.token_ids])
        answers.append(Answer(result=each.result, stats=each.stats, scores=known[key]))
    return answers


def forced_to(
    engine: Engine, questions: Sequence[Question], full: Sequence[Answer], window: int, num_rows: int
) -> list[Nearness]:
    """Of each question's draft, along the full model's answer."""
    texts = [
        Text(prompt_ids=question.prompt_ids, token_ids=answer.result.token_ids)
        for question, answer in zip(questions, full, strict=True)
    ]
    found: list[Nearness] = []
    engine.use_threads(prompt=True)
    with engine.answering(texts) as model:
        num_slots = len(model.slots)
        for first in range(0, len(texts), num_slots):
            found += nearness(model, model.slots, texts[first : first + num_slots], window, num_rows)
    return found


def row_of(
    spec: ModelSpec,
    variant: DecodingConfig,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    full: Sequence[Answer],
    forced: Sequence[Nearness] | None,
    seconds: float,
) -> Row:
    """The figures. forced: along the full model's answers; None for that itself."""
    drafts, corrects = variant.drafts, variant.mode == "sirius"
    step_density = draft_density(spec, variant) if drafts else 1.0
    stats = [answer.stats for answer in answers]
    ids, full_ids = ([answer.result.token_ids for answer in each] for each in (answers, full))
    num_tokens = [len(each) for each in ids]
    num_likeliest = [sum(score.is_likeliest for score in answer.scores) for answer in answers]
    nats = [-sum(score.log_probability for score in answer.scores) for answer in answers]
    flips = [each.flips for each in stats if each.flips is not None]
    costs = [(each.num_passes["draft"] * step_density + each.num_passes["correction"], each.num_advanced) for each in stats]
    return Row(
        name=label_of(variant),
        mode=variant.mode,
        sparsity=variant.sparsity if drafts else None,
        keep=variant.keep if drafts else None,
        window=variant.window if corrects else None,
        accept=variant.accept if corrects else None,
        threshold=variant.threshold if corrects and variant.accept == "threshold" else None,
        tree_width=variant.tree_width if corrects else None,
        draft_density=step_density if drafts else None,
        density=figure_of(costs if corrects else [(step_density, 1)] * len(answers)),
        identical=figure_of([(here == there, 1) for here, there in zip(ids, full_ids, strict=True)]),
        likeliest=figure_of(list(zip(num_likeliest, num_tokens, strict=True))),
        perplexity=figure_of(list(zip(nats, num_tokens, strict=True)), np.exp),
        forced_agreement=figure_of([(each.num_same, each.num_tokens) for each in forced]) if forced else None,
        forced_kl=figure_of([(each.kl, each.num_tokens) for each in forced]) if forced else None,
        aal=figure_of([(each.num_advanced, len(each.windows)) for each in stats]),
        acceptance=figure_of([(each.num_accepted, each.num_tried) for each in stats]),
        score=score_of(questions, answers),
        near_ties=sum(flips) if flips else None,
        num_tokens=num_tokens,
        num_same=[num_alike(here, there) for here, there in zip(ids, full_ids, strict=True)],
        num_likeliest=num_likeliest,
        seconds=seconds,
    )


def score_of(questions: Sequence[Question], answers: Sequence[Answer]) -> Figure | None:
    """Share of right answers; None where no number was asked for."""
    both = [(question.result, answer.result.text) for question, answer in zip(questions, answers, strict=True)]
    marked = [(float(is_right(text, result)), 1.0) for result, text in both if result is not None]
    return figure_of(marked) if marked else None


def num_alike(here: Sequence[int], there: Sequence[int]) -> int:
    """Tokens before the first difference."""
    shorter = min(len(here), len(there))
    return next((index for index in range(shorter) if here[index] != there[index]), shorter)


def label_of(variant: DecodingConfig) -> str:
    """Its name, without what all have in common."""
    return name_of(replace(variant, draft="auto", lookup=None))


def line_of(row: Row) -> str:
    parts = [
        f"{row.name:40}",
        f"density {in_words(row.density, '.2f')}",
        f"identical {in_words(row.identical, '.0%')}",
        f"likeliest {in_words(row.likeliest, '.1%')}",
        f"perplexity {in_words(row.perplexity, '.2f')}",
    ]
    if row.forced_agreement is not None:
        parts.append(f"forced: agreement {in_words(row.forced_agreement, '.1%')}, KL {in_words(row.forced_kl, '.3f')}")
    if row.aal is not None:
        parts.append(f"AAL {in_words(row.aal, '.2f')}  acceptance {in_words(row.acceptance, '.1%')}")
    if row.score is not None:
        parts.append(f"right {in_words(row.score, '.0%')}")
    return "  ".join([*parts, f"{row.seconds:.0f} s"])


def in_words(figure: Figure | None, form: str) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:{form}} ({figure.low:{form}} to {figure.high:{form}})"


if __name__ == "__main__":
    sys.exit(main())
