"""Are greedy ids of SmolLM2 those of llama.cpp? The 48 prompts of data/prompts.jsonl, 32 tokens, ours in float32.

    python tools/llama_cpp_ids.py --llama-python /opt/llama/bin/python
    python tools/llama_cpp_ids.py --llama-python /opt/llama/bin/python --limit 8 --only F32

Two comparisons. With the model's own file, whose layers are Q4_1, llama.cpp rounds activations to 8 bits before it multiplies,
which ours does not: what is nearly a tie may fall to the other side. With the same numbers as an F32 file it does not round; what
differs there is the order of sums only. Keys and values are float32 in both.

Each first difference is shown with the two likeliest ids of both programs and their logits, at that place. Exit status: 0 at
least 90 % of the prompts are equal in every comparison, 1 not so, 2 wrong input. benchmarks/llama_cpp.py makes an environment
with llama-cpp-python where it is told --folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from exactness import PROMPTS, logits_behind
from gguf_copy import copy, find_demo

import offload_sirius
from offload_sirius.engine import Engine
from offload_sirius.machine import physical_cores
from offload_sirius_loaders.errors import CheckpointError

RUNNER = Path(__file__).with_name("llama_cpp_runner.py")
ASKED_SHARE = 0.9

Likeliest = list[tuple[int, float]]
"""The two likeliest ids and their logits."""


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()][: options.limit]
    try:
        with tempfile.TemporaryDirectory() as folder:
            shares = [share_of(form, prompts, options, Path(folder)) for form in options.only]
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if min(shares) >= ASKED_SHARE else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--limit", type=int, default=48, help="prompts, default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer, default %(default)s")
    parser.add_argument("--only", nargs="+", choices=("own", "F32"), default=["own", "F32"], help="default both")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of both programs, default %(default)s")
    return parser.parse_args()


def share_of(form: str, prompts: list[str], options: argparse.Namespace, folder: Path) -> float:
    """Of prompts whose answers are equal; prints each first difference."""
    file = find_demo()
    if form == "F32":
        file = folder / "f32.gguf"
        copy(str(find_demo()), file, "F32")
    command = [options.llama_python, RUNNER, file, "--threads", str(options.threads), "--kv-float32", "--as-stored"]
    num_equal = 0
    with (
        offload_sirius.load("smollm2-135m", mode="full", dtype="float32", max_context=2048, threads=options.threads) as engine,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        version = json.loads(process.stdout.readline())["version"]
        for number, prompt in enumerate(prompts):
            prompt_ids = engine.model.encode(prompt)
            ours = list(engine.generate(prompt_ids, max_new_tokens=options.new_tokens, ignore_eos=True).token_ids)
            # Its answer is forced to be ours: up to the first difference that is its own, and there are its logits.
            request = {"ids": prompt_ids, "new": len(ours), "forced": ours}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            theirs = json.loads(process.stdout.readline())
            place = next((i for i, (our, their) in enumerate(zip(ours, theirs["ids"], strict=True)) if our != their), None)
            num_equal += place is None
            if place is not None:
                print(difference(engine, number, prompt_ids, ours[:place], theirs["largest"][place]), flush=True)
        process.stdin.close()
    share = num_equal / len(prompts)
    what = "the model's own file (Q4_1)" if form == "own" else "the same numbers as an F32 file"
    print(f"{what}: {num_equal} of {len(prompts)} answers equal, {share:.1%} (llama-cpp-python {version})", flush=True)
    return share


def difference(engine: Engine, number: int, prompt_ids: list[int], answer: list[int], theirs: Likeliest) -> str:
    """One line: what both programs think likeliest behind the answer so far."""
    values, found = logits_behind(engine, prompt_ids, answer).topk(2)
    ours = list(zip(found.tolist(), values.tolist(), strict=True))
    return f"    prompt {number}, token {len(answer)}: ours {said(ours)}; llama.cpp {said(theirs)}"


def said(likeliest: Likeliest) -> str:
    """The ids and their logits."""
    return ", ".join(f"{token_id} at {logit:.4f}" for token_id, logit in likeliest)


if __name__ == "__main__":
    raise SystemExit(main())
