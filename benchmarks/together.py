"""How long do eight answers together take beside one? One pass of the weights serves all, so over a link about as long.

    python benchmarks/together.py                         # SmolLM2-135M; a quarter of an hour on two cores
    python benchmarks/together.py --num-answers 4 --max-new-tokens 16 --out sample.json

SmolLM2-135M in float32, over an emulated link that bounds every pass of a single answer. A row is one way to decode: mode full
with all layers streamed, and mode sirius with half of the neurons on the device, windows of 8. Each engine has places for all
answers; one alone has the same plan. Prompts are the shortest of the file, as a CPU takes long for those of several, and answers
are all as long, so that any is the longest. First some by themselves, one after the other; then all, submitted at once. Times are
from submission to the last token, the prompts' passes included. Beside the ratio stands what crossed the link, and how many
answers are those of mode full, resident and without a link, to one prompt at a time, token for token.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from report import finish, machine_facts

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import Engine, open_model
from offload_sirius.engine.placement import place

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
CONTEXT = 512
WAYS = {
    "full": DecodingConfig(mode="full"),
    "sirius": DecodingConfig(mode="sirius", draft="resident", keep=0.5, window=8, prior=False),
}


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What came of a way to decode."""

    way: str
    num_answers: int
    num_tokens: int
    """Of each answer."""
    alone_seconds: list[float]
    together_seconds: float
    ratio: float
    """Of all together to the median alone."""
    alone_nbytes: list[int]
    together_nbytes: int
    """Over the link, copied."""
    num_equal: int
    """Answers together that are those of the resident model to one prompt at a time."""
    together_tokens_per_second: float


def main() -> None:
    options = arguments()
    facts = machine_facts()
    prompts = shortest_prompts(options.num_answers)
    expected = references(prompts, options)
    results = [measure(way, prompts, expected, options) for way in options.ways]
    for result in results:
        print(
            f"{result.way:8} {result.num_answers} answers of {result.num_tokens} tokens: "
            f"{result.together_seconds:6.1f} s together, {median(result.alone_seconds):6.1f} s alone, ratio {result.ratio:.2f}; "
            f"{result.together_nbytes / 1e9:.2f} GB, {median(result.alone_nbytes) / 1e9:.2f} GB alone; {result.num_equal} equal"
        )
    asked = {"model": options.model, "link_gbps": options.link_gbps, "context": CONTEXT}
    finish("together", {"benchmark": "together", **asked, "rows": [asdict(each) for each in results], **facts}, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default %(default)s")
    parser.add_argument("--link-gbps", type=float, default=0.1, help="rate of the emulated link, default %(default)s")
    parser.add_argument("--num-answers", type=int, default=8, help="default %(default)s")
    parser.add_argument("--num-alone", type=int, default=2, help="answers by themselves, default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="default %(default)s")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/together-DATE.json")
    return parser.parse_args()


def shortest_prompts(count: int) -> list[str]:
    """Of all categories."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line)["prompt"] for line in lines), key=len)[:count]


def references(prompts: list[str], options: argparse.Namespace) -> list[tuple[int, ...]]:
    """What the full model answers to each prompt by itself."""
    given: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_context": CONTEXT}
    with offload_sirius.load(options.model, mode="full", **given) as engine:
        return [answer(engine, [prompt], options.max_new_tokens)[2][0] for prompt in prompts]


def measure(way: str, prompts: list[str], expected: list[tuple[int, ...]], options: argparse.Namespace) -> RowResult:
    """Load, and answer some prompts one by one, then all together."""
    config = config_of(WAYS[way], options)
    with offload_sirius.load(**vars(config)) as engine:
        answer(engine, prompts[:1], 2)  # warms up
        alone = [answer(engine, [prompt], options.max_new_tokens) for prompt in prompts[: options.num_alone]]
        seconds, nbytes, together = answer(engine, prompts, options.max_new_tokens)
    alone_seconds = [each[0] for each in alone]
    return RowResult(
        way=way,
        num_answers=len(prompts),
        num_tokens=options.max_new_tokens,
        alone_seconds=alone_seconds,
        together_seconds=seconds,
        ratio=seconds / median(alone_seconds),
        alone_nbytes=[each[1] for each in alone],
        together_nbytes=nbytes,
        num_equal=sum(found == answered for found, answered in zip(together, expected, strict=True)),
        together_tokens_per_second=len(prompts) * options.max_new_tokens / seconds,
    )


def config_of(decoding: DecodingConfig, options: argparse.Namespace) -> EngineConfig:
    """Device memory for what every plan has, and of the layers two slots; in mode sirius for the hot set beside them."""
    given: dict[str, Any] = {"model": options.model, "dtype": "float32", "device": "cpu", "max_context": CONTEXT}
    config = EngineConfig(**given, parallel=options.num_answers, decoding=decoding)
    placement = place(open_model(options.model).checkpoint, config)
    bill, layout = placement.plan.device_bill, placement.layout
    slot_nbytes = layout.nbytes if placement.plan.hot is None else layout.records_nbytes
    budget = placement.plan.device_nbytes - bill.get("resident_layers", 0) - bill["slots"] + 2 * slot_nbytes
    return EngineConfig(
        **given, parallel=options.num_answers, device_memory=str(budget), link_gbps=options.link_gbps, decoding=decoding
    )


def answer(engine: Engine, prompts: list[str], num_tokens: int) -> tuple[float, int, list[tuple[int, ...]]]:
    """Seconds, bytes over the link, and token ids of answers that are written together."""
    began, copied = time.perf_counter(), engine._streamer.copied_nbytes
    batch = engine.batch()
    answers = [batch.submit(prompt, max_new_tokens=num_tokens, ignore_eos=True, reuse=False) for prompt in prompts]
    while batch.step():
        pass
    seconds = time.perf_counter() - began
    return seconds, engine._streamer.copied_nbytes - copied, [each.result.token_ids for each in answers]


if __name__ == "__main__":
    main()
