"""What is a hot set worth? Drafts from resident neurons beside the best plain streaming with the same device memory.

    python benchmarks/hotset.py                        # 12 prompts, one of each category; half an hour on two cores
    python benchmarks/hotset.py --num-prompts 2 --out sample.json

SmolLM2-135M in float32. The device has room for what every plan has (head, KV cache, activations), all attention blocks, 75 % of
all neurons, and two slots of a layer's neurons. The emulated link is as slow beside computing as PCIe 4 is for a 70B model in 4
bits on a card of 24 GB. Mode full with that budget keeps as many whole layers resident as fit. The ceiling of a row is the link:
the bytes that it moved for a token over the link's rate. A full answer is timed over its first tokens only, as each takes as long
as the next. Rows are loads of their own, prompts the same in all; medians over the prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from report import finish, machine_facts

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import open_model
from offload_sirius.engine.placement import place

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
CONTEXT = 1024
NUM_FULL_TOKENS = 8
HOT_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to decode."""

    name: str
    decoding: DecodingConfig
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What came of a row. Medians over the prompts."""

    name: str
    seconds_per_token: float
    ratio_to_full: float
    """Tokens a second beside mode full's."""
    link_share: float
    """Bytes of a token over the link's rate, as a share of the seconds it took."""
    busy_share: float
    aal: float | None
    acceptance: float | None
    draft_seconds: float | None
    correction_seconds: float | None
    nbytes_per_token: float
    num_equal: int
    """Answers that begin as mode full's do, as far as that went."""
    device_plan_nbytes: int
    all_seconds_per_token: list[float]


def rows(num_tokens: int) -> list[Row]:
    """The table."""
    # A row shall not depend on those before it.
    hot = {"mode": "sirius", "draft": "resident", "keep": HOT_SHARE, "window": 8, "prior": False}

    def row(name: str, **settings: Any) -> Row:
        return Row(name=name, decoding=DecodingConfig(**hot | settings), num_tokens=num_tokens)

    return [
        Row(name="full", decoding=DecodingConfig(mode="full"), num_tokens=NUM_FULL_TOKENS),
        row("hot set, exact"),
        row("hot set, exact, window auto", window="auto"),
        row("hot set, threshold 0.1", accept="threshold"),
        row("hot set, exact, no refresh", refresh=False),
        row("hot set, exact, keep 0.5", keep=0.5),
    ]


def main() -> None:
    options, facts = arguments(), machine_facts()
    prompts = first_prompts()[: options.num_prompts]
    budget = device_budget(options.model)
    results: list[RowResult] = []
    reference: list[Generation] = []
    for row in rows(options.max_new_tokens):
        answers = measure(row, options, budget, prompts)
        reference = reference or answers
        results.append(result_of(row, answers, reference, options.link_gbps))
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
    """See above: of the plan that has all its neurons, what is not slots, and two of those."""
    checkpoint = open_model(model).checkpoint
    decoding = DecodingConfig(mode="sirius", draft="resident", keep=HOT_SHARE, prior=False)
    config = EngineConfig(model=model, dtype="float32", device="cpu", max_context=CONTEXT, decoding=decoding)
    plan, layout = place(checkpoint, config).plan, place(checkpoint, config).layout
    return plan.device_nbytes - plan.device_bill["slots"] + 2 * layout.records_nbytes


def measure(row: Row, options: argparse.Namespace, budget: int, prompts: Sequence[str]) -> list[Generation]:
    """Load once, answer every prompt; a first answer warms up."""
    settings = {name: getattr(row.decoding, name) for name in vars(row.decoding)}
    with offload_sirius.load(
        options.model,
        dtype="float32",
        device="cpu",
        max_context=CONTEXT,
        device_memory=str(budget),
        link_gbps=options.link_gbps,
        **settings,
    ) as engine:
        engine.generate(prompts[0], max_new_tokens=2)
        return [engine.generate(prompt, max_new_tokens=row.num_tokens, ignore_eos=True) for prompt in prompts]


def result_of(row: Row, answers: Sequence[Generation], full: Sequence[Generation], link_gbps: float) -> RowResult:
    seconds = [answer.decode_seconds / (answer.new_tokens - 1) for answer in answers]
    full_seconds = [answer.decode_seconds / (answer.new_tokens - 1) for answer in full]
    nbytes = [moved_nbytes(answer) / (answer.new_tokens - 1) for answer in answers]
    shares = [each / (link_gbps * 1e9) / spent for each, spent in zip(nbytes, seconds, strict=True)]
    begins = zip(answers, full, strict=True)
    return RowResult(
        name=row.name,
        seconds_per_token=median(seconds),
        ratio_to_full=median(theirs / ours for ours, theirs in zip(seconds, full_seconds, strict=True)),
        link_share=median(shares),
        busy_share=median(answer.link.busy_share or 0.0 for answer in answers),
        aal=mean([answer.aal for answer in answers]),
        acceptance=mean([answer.acceptance for answer in answers]),
        draft_seconds=middle([answer.draft_seconds for answer in answers]),
        correction_seconds=middle([answer.correction_seconds for answer in answers]),
        nbytes_per_token=median(nbytes),
        num_equal=sum(ours.token_ids[:NUM_FULL_TOKENS] == theirs.token_ids[:NUM_FULL_TOKENS] for ours, theirs in begins),
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
    draft, correction = (f"{each:.3f}" if each else "  -  " for each in (result.draft_seconds, result.correction_seconds))
    return (
        f"{result.name:30} {result.seconds_per_token:6.3f} s/token  x{result.ratio_to_full:5.2f}  AAL {aal}  draft {draft} s  "
        f"correction {correction} s  {result.nbytes_per_token / 1e6:6.1f} MB/token  link {result.link_share:.0%} used, "
        f"{result.busy_share:.0%} busy, {result.num_equal} equal"
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
