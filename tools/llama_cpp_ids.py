"""Are greedy ids of SmolLM2 those of llama.cpp? The 48 prompts of data/prompts.jsonl, 32 tokens, ours in float32.

    python tools/llama_cpp_ids.py --llama-python /opt/llama/bin/python
    python tools/llama_cpp_ids.py --llama-python /opt/llama/bin/python --limit 8 --only F32

With the model's own file, whose layers are Q4_1, llama.cpp rounds activations to 8 bits before it multiplies, which ours does
not: what is nearly a tie may fall to the other side. The other comparisons tell how much of a difference rounding makes:

    own       the model's own file
    F32       the same numbers as an F32 file, with which llama.cpp does not round: what differs is the order of sums
    itself    the own file, llama.cpp beside llama.cpp with its other attention (flash attention off): what differs is the order
              of sums, and with it to which side of a step some activations are rounded. From layer to layer these become more
    rounded   the own file, our activations rounded as llama.cpp rounds them (llama_cpp_rounding.py): the same

Where `itself` and `rounded` are no nearer than `own`, no program can be that does not add in llama.cpp's very order.

Keys and values are float32 in all. Each first difference is shown with the two likeliest ids of both sides and their logits, at
that place; and of each comparison, how far apart the largest logits are: the median over all places, both sides behind the same
ids. Exit status: 0 at least 90 % of the prompts are equal with the own file and as F32, 1 not so, 2 wrong input.
benchmarks/llama_cpp.py makes an environment with llama-cpp-python where it is told --folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from exactness import PROMPTS
from gguf_copy import copy, find_demo
from llama_cpp_rounding import rounded_activations

import offload_sirius
from benchmarks.report import finish, machine_facts
from offload_sirius.engine import Engine
from offload_sirius.machine import physical_cores
from offload_sirius_loaders.errors import CheckpointError

RUNNER = Path(__file__).with_name("llama_cpp_runner.py")
ASKED_SHARE = 0.9

Likeliest = list[tuple[int, float]]
"""The two likeliest ids and their logits."""
Answer = Callable[[list[int], list[int] | None], list[Likeliest]]
"""Ids of a prompt, and of the answer to it, which is taken whatever the model says; None: its own -> for each place."""

FORMS = {
    "own": "the model's own file (Q4_1)",
    "F32": "the same numbers as an F32 file",
    "itself": "the own file, llama.cpp beside itself with its other attention",
    "rounded": "the own file, our activations rounded like llama.cpp's",
}
ASKED = ("own", "F32")
"""Those that the exit status is about."""


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()][: options.limit]
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = [compare(form, prompts, options, Path(folder)) for form in options.only]
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish("llama-cpp-ids", {"new_tokens": options.new_tokens, "rows": rows, **machine_facts()}, options.out)
    return 0 if all(row["num_equal"] >= ASKED_SHARE * len(prompts) for row in rows if row["form"] in ASKED) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--limit", type=int, default=48, help="prompts, default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer, default %(default)s")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS), help="default all")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of both programs, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/llama-cpp-ids-DATE.json")
    return parser.parse_args()


def compare(form: str, prompts: list[str], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All prompts in one form; prints each first difference."""
    file = find_demo()
    if form == "F32":
        file = folder / "f32.gguf"
        copy(str(find_demo()), file, "F32")
    differences, distances = [], []
    with (
        offload_sirius.load("smollm2-135m", mode="full", dtype="float32", max_context=2048, threads=options.threads) as engine,
        llama_cpp(options, file) as (version, answer_of_llama),
        another(form, engine, options, file) as answer_of_other,
    ):
        for number, prompt in enumerate(prompts):
            prompt_ids = engine.model.encode(prompt)
            others = answer_of_other(prompt_ids, None)
            ids = [likeliest[0][0] for likeliest in others]
            # Up to the first place where it would say something else, what llama.cpp is made to say is its own.
            theirs = answer_of_llama(prompt_ids, ids)
            distances += [abs(other[0][1] - their[0][1]) for other, their in zip(others, theirs, strict=True)]
            place = next((i for i, their in enumerate(theirs) if their[0][0] != ids[i]), None)
            if place is not None:
                differences.append({"prompt": number, "token": place, "other": others[place], "llama_cpp": theirs[place]})
                print(f"    prompt {number}, token {place}: {said(others[place])}; llama.cpp {said(theirs[place])}", flush=True)
    num_equal, apart = len(prompts) - len(differences), statistics.median(distances)
    print(
        f"{FORMS[form]}: {num_equal} of {len(prompts)} answers equal, {num_equal / len(prompts):.1%}; largest logits are "
        f"{apart:.2g} apart (llama-cpp-python {version})",
        flush=True,
    )
    return {
        "form": form,
        "what": FORMS[form],
        "num_prompts": len(prompts),
        "num_equal": num_equal,
        "median_distance_of_largest_logits": apart,
        "differences": differences,
        "llama_cpp_python": version,
    }


@contextmanager
def another(form: str, engine: Engine, options: argparse.Namespace, file: Path) -> Iterator[Answer]:
    """What llama.cpp is compared with."""

    def answer(prompt_ids: list[int], _: list[int] | None) -> list[Likeliest]:
        return greedy(engine, prompt_ids, options.new_tokens)

    if form == "itself":
        with llama_cpp(options, file, "--no-flash-attention") as (_, answer_of_llama):
            yield answer_of_llama
    elif form == "rounded":
        with rounded_activations():
            yield answer
    else:
        yield answer


@contextmanager
def llama_cpp(options: argparse.Namespace, file: Path, *flags: str) -> Iterator[tuple[str, Answer]]:
    """Its version, and its answers."""
    command = [options.llama_python, RUNNER, file, "--threads", str(options.threads), "--kv-float32", "--as-stored", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def asked(request: dict[str, Any]) -> dict[str, Any]:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            reply: dict[str, Any] = json.loads(stdout.readline())
            return reply

        def answer(prompt_ids: list[int], ids: list[int] | None) -> list[Likeliest]:
            if ids is None:
                ids = asked({"ids": prompt_ids, "new": options.new_tokens})["ids"]
            largest: list[Likeliest] = asked({"ids": prompt_ids, "new": len(ids), "forced": ids})["largest"]
            return largest

        yield json.loads(stdout.readline())["version"], answer
        stdin.close()


def greedy(engine: Engine, prompt_ids: list[int], num_new: int) -> list[Likeliest]:
    """Our answer, in the passes that generating takes: one of the prompt, one a token."""
    transformer = engine._transformer  # logits are no part of an engine's surface
    transformer.cache.truncate(0)
    logits, largest = transformer.prefill(torch.tensor(prompt_ids)), []
    while True:
        values, ids = logits.topk(2)
        largest.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
        if len(largest) == num_new:
            return largest
        logits = transformer.step(ids[:1])[0]


def said(likeliest: Likeliest) -> str:
    """The ids and their logits."""
    return ", ".join(f"{token_id} at {logit:.4f}" for token_id, logit in likeliest)


if __name__ == "__main__":
    raise SystemExit(main())
