"""What do keys and values in 8 bits cost in quality? The same texts scored with a plain cache and with one in 8 bits.

python benchmarks/kv_cache.py [--model smollm2-135m] [--limit 12] [--max-new-tokens 128]

The model answers prompts in mode full with a plain cache; what it says of each token of prompt and answer is then compared: how
often the likeliest token is the same, the perplexity, and how far log-probabilities are apart. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import offload_sirius
from offload_sirius.bench.prompts import read_prompts
from offload_sirius.decode.scoring import TokenScore
from offload_sirius.engine import Engine

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


def main() -> None:
    arguments = parsed()
    texts = answered(arguments)
    plain, plain_nbytes = scored(arguments, texts, "auto")
    near, near_nbytes = scored(arguments, texts, "int8")
    pairs = list(zip(plain, near, strict=True))
    figures = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "tokens": len(pairs),
        "cache_bytes": {"auto": plain_nbytes, "int8": near_nbytes},
        "same_likeliest": sum(a.is_likeliest == b.is_likeliest for a, b in pairs) / len(pairs),
        "perplexity": {"auto": perplexity(plain), "int8": perplexity(near)},
        "median_difference": statistics.median(abs(a.log_probability - b.log_probability) for a, b in pairs),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(
        f"{len(pairs)} tokens: likeliest or not alike at {figures['same_likeliest']:.2%}, perplexity {perplexity(plain):.4f} and "
        f"{perplexity(near):.4f}, log-probabilities {figures['median_difference']:.4f} apart (median), "
        f"cache {near_nbytes / plain_nbytes:.1%} of the plain one"
    )
    print(json.dumps(figures))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-context", type=int, default=1024)
    return parser.parse_args()


def loaded(arguments: argparse.Namespace, **settings: Any) -> Engine:
    return offload_sirius.load(arguments.model, mode="full", dtype=arguments.dtype, max_context=arguments.max_context, **settings)


def answered(arguments: argparse.Namespace) -> list[list[int]]:
    """Prompt and answer of each as one text."""
    with loaded(arguments) as engine:
        prompts = [engine.model.encode(prompt) for prompt in read_prompts(PROMPTS)[: arguments.limit]]
        return [[*ids, *engine.generate(ids, max_new_tokens=arguments.max_new_tokens).token_ids] for ids in prompts]


def scored(arguments: argparse.Namespace, texts: list[list[int]], kv_dtype: str) -> tuple[list[TokenScore], int]:
    """Of all tokens but the first of each text, one by one; bytes of the cache."""
    with loaded(arguments, kv_dtype=kv_dtype) as engine:
        scores = [score for text in texts for score in engine.score(text[:1], [text[1:]])[0]]
        return scores, engine.plan.device_bill["kv_cache"]


def perplexity(scores: list[TokenScore]) -> float:
    return math.exp(-statistics.fmean(score.log_probability for score in scores))


if __name__ == "__main__":
    main()
