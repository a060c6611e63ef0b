"""What is a hot set worth? Drafts from resident neurons beside the best plain streaming with the same device memory.

    python benchmarks/hotset.py                        # 12 prompts over the categories; half an hour on two cores
    python benchmarks/hotset.py --num-prompts 2 --out sample.json

SmolLM2-135M in float32. The device has room for what every plan has (head, KV cache, activations), all attention blocks, 75 % of
all neurons, and two slots of a layer's neurons. The emulated link is as slow beside computing as PCIe 4 is for a 70B model in 4
bits on a card of 24 GB. Mode full with that budget keeps as many whole layers resident as fit. The ceiling of a row is the link:
the bytes that it moved for a token over the link's rate. A full answer is timed over its first tokens only, as each takes as long
as the next. Rows are loads of their own; medians over the prompts, of which the rows behind the first four have every second. The
first row with a hot set has everything on; others leave one thing out each, but for the prior, which is on in its own row only:
it learns from prompt to prompt. Answers are compared with mode full's, all of it resident and without a link.

Beside each row stands what the planner says of it, with rates measured in the same run before anything else: the seconds of a
window, beside those of as many draft steps and a correction as they were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from budgets import fewest_slots_nbytes
from rates_now import measured_rates
from report import finish, machine_facts

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import open_model
from offload_sirius.engine.planning import host_hardware, plan_model
from offload_sirius.rates import Rates

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
CONTEXT = 1024
NUM_FULL_TOKENS = 8
HOT_SHARE = 0.75
FULL = DecodingConfig(mode="full")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to decode."""

    name: str
    decoding: DecodingConfig
    num_tokens: int
    every: int = 1
    """Of the prompts."""


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What came of a row. Medians over the prompts."""

    name: str
    num_prompts: int
    seconds_per_token: float
    ratio_to_full: float
    """Tokens a second beside mode full's."""
    link_share: float
    """Bytes of a token over the link's rate, as a share of the seconds it took."""
    busy_share: float
    window_seconds: float | None
    """Of W - 1 draft steps and a correction, by their medians; in mode full of a token. None where the window was not fixed."""
    predicted_window_seconds: float | None
    """The same as the planner has it."""
    aal: float | None
    acceptance: float | None
    draft_seconds: float | None
    correction_seconds: float | None
    nbytes_per_token: float
    num_equal: int
    """Answers that are mode full's, as long as they are."""
    churn: float | None
    num_looked_up: int
    """Tokens that came from the text before."""
    device_plan_nbytes: int
    all_seconds_per_token: list[float]


def rows(num_tokens: int) -> list[Row]:
    """The table."""
    hot: dict[str, Any] = {"mode": "sirius", "draft": "resident", "keep": HOT_SHARE, "window": 8, "prior": False}

    def row(name: str, every: int = 1, **settings: Any) -> Row:
        return Row(name=name, decoding=DecodingConfig(**hot | settings), num_tokens=num_tokens, every=every)

    return [
        Row(name="full", decoding=FULL, num_tokens=NUM_FULL_TOKENS),
        row("exact"),
        row("threshold 0.1", accept="threshold"),
        row("exact, no refresh", refresh=False),
        row("exact, no lookup", 2, lookup=False),
        row("exact, no overlap", 2, overlap=False),
        row("exact, prior", 2, prior=True),
        row("exact, window auto", 2, window="auto"),
        row("threshold 0.1, window 16", 2, accept="threshold", window=16),
        row("exact, keep 0.5", 2, keep=0.5),
    ]


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:  # a prior of earlier runs would be a better one
        os.environ["OFFLOAD_SIRIUS_CACHE"] = folder
        compare(options)


def compare(options: argparse.Namespace) -> None:
    facts = machine_facts()
    prompts = first_prompts()[: options.num_prompts]
    budget, rates = device_budget(options.model), measured_rates("float32")
    resident = EngineConfig(
        model=options.model, dtype="float32", keep_blocks=False, device="cpu", max_context=CONTEXT, decoding=FULL
    )
    reference = measure(Row(name="reference", decoding=FULL, num_tokens=options.max_new_tokens), resident, prompts)
    results: list[RowResult] = []
    full: list[Generation] = []
    for row in rows(options.max_new_tokens):
        config = config_of(row, options, budget)
        answers = measure(row, config, prompts[:: row.every])
        full = full or answers
        predicted = predicted_seconds(row, config, rates, answers)
        results.append(result_of(row, answers, full[:: row.every], reference[:: row.every], predicted, options.link_gbps))
        print(line_of(results[-1]), flush=True)
    finish("hotset", report(results, options, budget, len(prompts)) | facts, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default %(default)s")
    parser.add_argument("--link-gbps", type=float, default=0.07, help="rate of the emulated link, default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=12, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/hotset-DATE.json")
    return parser.parse_args()


def first_prompts() -> list[str]:
    """The first prompt of each category."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    firsts = {line["category"]: line["prompt"] for line in reversed(lines)}
    return [firsts[category] for category in dict.fromkeys(line["category"] for line in lines)]


def device_budget(model: str) -> int:
    """See above."""
    decoding = DecodingConfig(mode="sirius", draft="resident", keep=HOT_SHARE, prior=False)
    return fewest_slots_nbytes(
        EngineConfig(model=model, dtype="float32", keep_blocks=False, device="cpu", max_context=CONTEXT, decoding=decoding)
    )


def config_of(row: Row, options: argparse.Namespace, budget: int) -> EngineConfig:
    return EngineConfig(
        model=options.model,
        dtype="float32",
        keep_blocks=False,
        device="cpu",
        max_context=CONTEXT,
        device_memory=str(budget),
        link_gbps=options.link_gbps,
        decoding=row.decoding,
    )


def measure(row: Row, config: EngineConfig, prompts: Sequence[str]) -> list[Generation]:
    """Load once, answer every prompt; a first answer warms up."""
    with offload_sirius.load(**vars(config)) as engine:
        engine.generate(prompts[0], max_new_tokens=2)
        asked = {"max_new_tokens": row.num_tokens, "ignore_eos": True, "reuse": False}
        return [engine.generate(prompt, **asked) for prompt in prompts]


def predicted_seconds(row: Row, config: EngineConfig, rates: Rates, answers: Sequence[Generation]) -> float | None:
    """Seconds of a window, or in mode full of a token, by the planner; None where windows differ."""
    prompt_tokens = int(median(answer.prompt_tokens for answer in answers))
    predicted = plan_model(open_model(config.model).checkpoint, config, host_hardware()).predict(rates, prompt_tokens)
    if not row.decoding.drafts:
        return predicted.seconds_per_token
    if not isinstance(row.decoding.window, int):
        return None
    assert predicted.draft is not None
    return (row.decoding.window - 1) * predicted.draft.seconds + predicted.windows[0].correction.seconds


def window_seconds(row: Row, answers: Sequence[Generation], seconds_per_token: float) -> float | None:
    """See RowResult."""
    if not row.decoding.drafts:
        return seconds_per_token
    draft, correction = (middle([getattr(each, name) for each in answers]) for name in ("draft_seconds", "correction_seconds"))
    if not isinstance(row.decoding.window, int) or draft is None or correction is None:
        return None
    return (row.decoding.window - 1) * draft + correction


def result_of(
    row: Row,
    answers: Sequence[Generation],
    full: Sequence[Generation],
    reference: Sequence[Generation],
    predicted: float | None,
    link_gbps: float,
) -> RowResult:
    seconds = [answer.decode_seconds / (answer.new_tokens - 1) for answer in answers]
    full_seconds = [answer.decode_seconds / (answer.new_tokens - 1) for answer in full]
    nbytes = [moved_nbytes(answer) / (answer.new_tokens - 1) for answer in answers]
    shares = [each / (link_gbps * 1e9) / spent for each, spent in zip(nbytes, seconds, strict=True)]
    both = zip(answers, reference, strict=True)
    return RowResult(
        name=row.name,
        num_prompts=len(answers),
        seconds_per_token=median(seconds),
        ratio_to_full=median(theirs / ours for ours, theirs in zip(seconds, full_seconds, strict=True)),
        link_share=median(shares),
        busy_share=median(answer.link.busy_share or 0.0 for answer in answers),
        window_seconds=window_seconds(row, answers, median(seconds)),
        predicted_window_seconds=predicted,
        aal=mean([answer.aal for answer in answers]),
        acceptance=mean([answer.acceptance for answer in answers]),
        draft_seconds=middle([answer.draft_seconds for answer in answers]),
        correction_seconds=middle([answer.correction_seconds for answer in answers]),
        nbytes_per_token=median(nbytes),
        num_equal=sum(ours.token_ids == theirs.token_ids[: ours.new_tokens] for ours, theirs in both),
        churn=mean([answer.churn for answer in answers]),
        num_looked_up=sum(answer.tokens_by_origin.lookup for answer in answers),
        device_plan_nbytes=answers[0].memory.device_plan_bytes,
        all_seconds_per_token=seconds,
    )


def moved_nbytes(answer: Generation) -> int:
    """Over the link, for the tokens behind the first."""
    moved = answer.link.bytes
    return moved.draft + moved.correction + moved.full


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def line_of(result: RowResult) -> str:
    aal = f"{result.aal:5.2f}" if result.aal else "    -"
    passes = (result.draft_seconds, result.correction_seconds, result.window_seconds, result.predicted_window_seconds)
    draft, correction, window, predicted = (f"{each:.3f}" if each else "  -  " for each in passes)
    return (
        f"{result.name:26} {result.seconds_per_token:6.3f} s/token  x{result.ratio_to_full:5.2f}  AAL {aal}  draft {draft} s  "
        f"correction {correction} s  window {window} s (predicted {predicted})  "
        f"{result.nbytes_per_token / 1e6:6.1f} MB/token  link {result.link_share:.0%} used, "
        f"{result.busy_share:.0%} busy, {result.num_equal} of {result.num_prompts} equal"
    )


def report(results: Sequence[RowResult], options: argparse.Namespace, budget: int, num_prompts: int) -> dict[str, Any]:
    return {
        "model": options.model,
        "dtype": "float32",
        "link_gbps": options.link_gbps,
        "device_budget_nbytes": budget,
        "num_prompts": num_prompts,
        "max_new_tokens": options.max_new_tokens,
        "rows": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    main()
