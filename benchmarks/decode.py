"""What does decoding with sparse drafts cost and give? SmolLM2 in several ways beside the full model, over an emulated link.

    python benchmarks/decode.py                    # the table
    python benchmarks/decode.py --num-prompts 1 --max-new-tokens 8 --out sample.json
    offload-sirius bench decode --help             # the same for other models and settings

Full, then coarse and fine sparsity at two densities, exact and by threshold, lines and trees; windows of 16. The ceiling of a row
is its effective density: bytes over the link for a token, as a share of the full model's. Every layer is streamed in every row,
with the same budgets. Prompts are spread over the categories of data/prompts.jsonl. A run that was broken off goes on where it
was: answers are kept beside the result file until that is written. Medians over the prompts; the spread is in the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import RESULTS, finish, machine_facts

from offload_sirius.bench.answers import Answer
from offload_sirius.bench.decode import NoWatch, decode_config, measure_decode
from offload_sirius.bench.variants import DecodeBench, name_of, variants_of
from offload_sirius.cli.bench_decode import table
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig
from offload_sirius.engine import open_model

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


def main() -> None:
    options, facts = arguments(), machine_facts()
    out = options.out or RESULTS / f"decode-{facts['date']}.json"
    bench = DecodeBench(
        prompts=prompts(options.num_prompts),
        variants=variants_of(
            DecodingConfig(threshold=0.1, lookup=False),
            modes=["sirius"],
            sparsities=["griffin", "cats"],
            keeps=[0.5, 0.75],
            windows=[16],
            accepts=["exact", "threshold"],
            drafts=["streamed"],
            tree_widths=[1, 4],
        ),
        generation=GenerationConfig(max_new_tokens=options.max_new_tokens, reuse=False),
    )
    asked = EngineConfig(model=options.model, device="cpu", link_gbps=options.link_gbps, keep_blocks=False)
    config = decode_config(open_model(asked.model), asked, bench, all_streamed=True)
    kept = KeptAnswers(
        out.with_suffix(".partial.jsonl"), asdict(bench.generation) | {"asked": asdict(asked), "prompts": bench.prompts}
    )
    report = measure_decode(config, bench, watch=kept, known=kept.answers)
    print("\n".join(table(report)))
    finish("decode", {**report.as_json(), **facts}, out)
    kept.path.unlink()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default %(default)s")
    parser.add_argument("--link-gbps", type=float, default=2.0, help="rate of the emulated link, default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=8, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/decode-DATE.json")
    return parser.parse_args()


def prompts(num_prompts: int) -> tuple[str, ...]:
    """Of as many categories as there are prompts, evenly spread; the first of each, then the second, where there are more."""
    by_category: dict[str, list[str]] = {}
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        by_category.setdefault(found["category"], []).append(found["prompt"])
    turns = [prompt for turn in zip(*by_category.values(), strict=False) for prompt in turn]
    if num_prompts > len(by_category):
        return tuple(turns[:num_prompts])
    return tuple(turns[index * len(by_category) // num_prompts] for index in range(num_prompts))


class KeptAnswers(NoWatch):
    """Answers on disk, a line for each way of decoding, as soon as it has been measured."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """settings: what answers depend on beside their way; a file that was made with others begins anew."""
        self.path = path
        self.answers: dict[DecodingConfig, list[Answer]] = {}
        first = json.dumps(settings)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines[:1] != [first]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(first + "\n")
        for found in map(json.loads, lines[1:] if lines[:1] == [first] else []):
            answers = [Answer(**each | {"token_ids": tuple(each["token_ids"])}) for each in found["answers"]]
            self.answers[DecodingConfig(**found["variant"])] = answers

    def answered(self, name: str, num_answers: int, num_all: int) -> None:
        print(f"{name}: {num_answers} of {num_all}", flush=True)

    def measured(self, variant: DecodingConfig, answers: Sequence[Answer]) -> None:
        with self.path.open("a") as file:
            file.write(
                json.dumps({"name": name_of(variant), "variant": asdict(variant), "answers": [asdict(each) for each in answers]})
                + "\n"
            )


if __name__ == "__main__":
    main()
