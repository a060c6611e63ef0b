"""Is resident decoding at least as fast as transformers' generate? The same weights, prompt, type and threads, in turn.

    python benchmarks/resident.py
    python benchmarks/resident.py --dtype bfloat16 --new-tokens 128

Both hold all of SmolLM2-135M-Instruct in memory and continue one prompt greedily past end tokens. A round is one answer of each;
the table has the medians, the ratio is the median over rounds of transformers' seconds over ours. Prefill is in both times.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import finish, machine_facts

import offload_sirius
from offload_sirius.engine import Engine
from offload_sirius.machine import physical_cores

PROMPT = "Explain step by step why the sky is blue at noon and red in the evening."


def main() -> None:
    options = arguments()
    rows = [compare(options, dtype) for dtype in options.dtype]
    for row in rows:
        print(
            f"{row['dtype']:9} ours {row['tokens_per_second']:.1f} tokens/s, "
            f"transformers {row['transformers_tokens_per_second']:.1f}, "
            f"ratio {row['ratio']:.2f} ({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f})"
        )
    facts = machine_facts()
    import transformers

    facts["versions"]["transformers"] = transformers.__version__
    finish("resident", {"new_tokens": options.new_tokens, "rows": rows, **facts}, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default both")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of an answer, default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="answers of each that count, default %(default)s")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="for both, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/resident-DATE.json")
    return parser.parse_args()


def compare(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """One type: rounds of one answer each."""
    torch.set_num_threads(options.threads)
    shared = {"mode": "full", "dtype": dtype, "keep_blocks": False, "max_context": 512, "threads": options.threads}
    with offload_sirius.load("smollm2-135m", **shared) as engine:
        prompt_ids = engine.model.encode(PROMPT)
        reference = reference_model(engine, getattr(torch, dtype))
        ours, theirs = [], []
        for round_ in range(options.rounds + 1):
            pair = our_seconds(engine, prompt_ids, options.new_tokens), their_seconds(reference, prompt_ids, options.new_tokens)
            if round_ > 0:  # the first is warm-up
                ours.append(pair[0])
                theirs.append(pair[1])
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {
        "dtype": dtype,
        "threads": options.threads,
        "tokens_per_second": options.new_tokens / statistics.median(ours),
        "transformers_tokens_per_second": options.new_tokens / statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


def our_seconds(engine: Engine, prompt_ids: list[int], num_new: int) -> float:
    """One answer of the engine."""
    began = time.perf_counter()
    engine.generate(prompt_ids, max_new_tokens=num_new, ignore_eos=True, reuse=False)
    return time.perf_counter() - began


@torch.inference_mode()
def their_seconds(reference: Any, prompt_ids: list[int], num_new: int) -> float:
    """One answer of transformers."""
    began = time.perf_counter()
    reference.generate(torch.tensor([prompt_ids]), do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new)
    return time.perf_counter() - began


def reference_model(engine: Engine, dtype: torch.dtype) -> Any:
    """The same weights in transformers, resident."""
    from transformers import AutoModelForCausalLM

    from offload_sirius_loaders.writer import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_checkpoint(engine.checkpoint, directory)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


if __name__ == "__main__":
    main()
