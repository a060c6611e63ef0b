"""How fast are the systems people use beside this one? Same model, prompt, tokens and memory, greedy, one run of each in turn.

    python benchmarks/peers.py                              # memory and third; installs the others first
    python benchmarks/peers.py --environment llama_cpp=/opt/llama/bin/python --rounds 7
    python benchmarks/peers.py --tables link --model 'synthetic:llama-3-70b?layers=10'          # a machine with CUDA

memory: 1.1 billion random weights of the shape of TinyLlama, 2.2 GB in bfloat16, in a memory cgroup of 1.5 GB (root makes one),
the page cache dropped before each run. What a system keeps of its files in the cache of its group is its own to use. The floor
is a plain O_DIRECT read of as many bytes as mode full reads behind the first token, before and after each of its runs. A round is
one run of each; the first does not count, and finds out which way of reading is the fastest here, and how much of the weights
accelerate may keep in memory without being killed. A packed copy is what `offload-sirius pack` writes. Seconds a token are
those behind the first token; those of the first are counted from where loading begins, without imports. Random weights agree with
no draft: what mode sirius costs at worst is seen here, not what it gains. All compute in bfloat16.

Every process gets OMP_WAIT_POLICY=passive, so that threads that wait leave the cores to those that read, and OMP_NUM_THREADS.
This script has torch's shared libraries loaded, from the same environment as ours: pages of files belong to the group that read
them first, so some 100 MB of ours are counted outside its group, and as much of others' inside theirs.

third: SmolLM2-135M in float32 with a third of its bytes: what mode sirius gains on a real model. See a_third.py.

link: on CUDA, full passes over the GPU's link beside accelerate's CPU offload and the best copy. See accelerate_offload.py.

Each system has an environment of its own below the cache folder. One that does not install, or is killed, is a row that says so.
A table that is not asked for stays as it is in the result file.
Exit status: 0 all held, 1 mode full took more than 1.15 of the floor or was not the fastest in the cgroup, or an answer that has
to be mode full's was not, 2 wrong use, or no cgroup can be made here, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from a_third import third_table
from asked import exit_status, require
from children import run_child
from peer_environments import REQUIREMENTS
from peer_models import NotPreparedError
from peer_table import memory_table
from peer_ways import environment_of
from report import RESULTS, command_line, finish, machine_facts, parts_of

from offload_sirius.cache import cache_folder
from offload_sirius.machine import physical_cores

HERE = Path(__file__).resolve().parent

KEPT, BROKEN, NO_CGROUP = 0, 1, 2
TABLES = ("memory", "third", "link")


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    return exit_status(lambda: measure(options), (NotPreparedError, OSError, ValueError))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:tinyllama-1.1b", help="synthetic, or a folder; default %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default %(default)s")
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="default: link on CUDA, else memory and third")
    parser.add_argument("--limit", default="1.5GB", help="memory of each process, or none; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each that count, default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=8, help="length of an answer, default %(default)s")
    parser.add_argument("--prompt", help="default: ids 300 to 315 of a model without a tokenizer, else a sentence")
    parser.add_argument("--peers", nargs="*", choices=(*REQUIREMENTS, "memory"), help="default all; memory: all of it in memory")
    parser.add_argument(
        "--environment", nargs="+", default=[], metavar="NAME=PYTHON", help="interpreters that have what is needed"
    )
    parser.add_argument("--gguf", help="the model for llama.cpp; a synthetic one is written")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of each but ours in a cgroup, default %(default)s")
    parser.add_argument("--seconds", type=float, default=180.0, help="that a run may take, default %(default)s")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "peers", help="models, environments; default %(default)s")
    parser.add_argument("--third-prompts", type=int, default=5, help="of the table third, default %(default)s")
    parser.add_argument("--third-tokens", type=int, default=48, help="of an answer there, default %(default)s")
    parser.add_argument("--third-link-gbps", type=float, default=0.07, help="its emulated link, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/peers-DATE.json")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> int:
    """All tables that are asked for, beside the others of the result file. What is known stands in OUT.partial.

    Raises USER_ERRORS, OSError, ValueError.
    """
    require(options, new_tokens=2, rounds=1, threads=1, third_prompts=1, third_tokens=2)
    facts = machine_facts()
    has_cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    tables = options.tables or (["link"] if has_cuda else ["memory", "third"])
    out = options.out or RESULTS / f"peers-{facts['date']}.json"
    partial_out = out.with_name(f"{out.name}.partial")
    before = parts_of(out, [name for name in TABLES if name not in tables])
    result: dict[str, Any] = {"tables": [name for name in TABLES if name in (*before, *tables)], **before}
    status = KEPT
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in tables:
        keep = partial(keep_partial, partial_out, result | facts, name)
        result[name] = {"memory": memory_table, "third": third_table, "link": link_table}[name](options, keep) | {
            "command": command_line()
        }
        status = max(status, table_status(result[name]))
    finish("peers", result | facts, out)
    partial_out.unlink(missing_ok=True)
    return status


def keep_partial(path: Path, result: dict[str, Any], name: str, table: dict[str, Any]) -> None:
    """What is known so far."""
    path.write_text(json.dumps(result | {name: table}) + "\n")


def table_status(table: dict[str, Any]) -> int:
    """Says what was not kept."""
    if "skipped" in table:
        print(f"error: {table['skipped']}", file=sys.stderr)
        return NO_CGROUP
    broken = [promise for promise, kept in table["promises"].items() if not kept]
    for promise in broken:
        print(f"not kept: {promise}")
    return BROKEN if broken else KEPT


def link_table(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """accelerate_offload.py, a process a round, beside the best copy from pinned memory."""
    device = "cuda" if options.device == "auto" else options.device
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        command = (
            *(sys.executable, str(HERE / "accelerate_offload.py"), "--model", options.model, "--device", device),
            *("--passes", str(options.new_tokens), "--out", f"{scratch}/result.json"),
        )
        for round_ in range(options.rounds):
            child = run_child(command, environment=environment_of(options, is_ours=True), limit_seconds=options.seconds)
            if child.figures is None:
                return {"model": options.model, "rounds": rounds, "error": child.error, "promises": {"every round ended": False}}
            rounds.append({key: child.figures[key] for key in ("seconds", "accelerate_seconds", "ceiling_seconds", "ratio")})
            print(f"round {round_ + 1}: accelerate's CPU offload takes {rounds[-1]['ratio']:.1f} times ours", flush=True)
            keep({"model": options.model, "device": device, "rounds": rounds})
    return {"model": options.model, "device": device, "rounds": rounds} | link_figures(rounds)


def link_figures(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds' medians, and of their ratios."""
    ours, theirs = ([statistics.median(each[key]) for each in rounds] for key in ("seconds", "accelerate_seconds"))
    ceilings = [each["ceiling_seconds"] for each in rounds]
    figures = {
        "seconds_per_token": statistics.median(ours),
        "accelerate_seconds_per_token": statistics.median(theirs),
        "ceiling_seconds": None if None in ceilings else statistics.median(ceilings),
        "ratio": statistics.median(each["ratio"] for each in rounds),
        "ratio_to_ceiling": None if None in ceilings else statistics.median(a / b for a, b in zip(ours, ceilings, strict=True)),
    }
    return figures | {"promises": {"ours faster than accelerate's CPU offload": figures["ratio"] > 1}}


if __name__ == "__main__":
    sys.exit(main())
