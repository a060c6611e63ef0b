"""Does a model run in less memory than its weights have bytes? The real command line in a memory cgroup, weights from disk.

    python benchmarks/memory_cap.py          # 1.1 billion parameters, 2.2 GB in bfloat16, under 1.5 GB and less

Each row starts `offload-sirius generate` inside a cgroup of its own (version 1 or 2, which takes root) and reads the answer's
figures and the cgroup's own: its peak counts everything, Python, libraries, threads and the file cache included. The ceiling is
the limit. A run that does not count comes first: within the first row's limit it writes the weights to the cache folder, where
they are not there yet.
Exit status: 0 all rows kept to plan, budget and limit, 1 some did not, 2 no cgroup can be made here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cgroup import Cgroup, new_cgroup
from report import finish, machine_facts

from offload_sirius.cache import cache_folder
from offload_sirius.units import parse_size
from offload_sirius_loaders import open_checkpoint

KEPT, BROKEN, NO_CGROUP = 0, 1, 2

MODEL = "synthetic:tinyllama-1.1b"
NUM_NEW = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A limit, and the budgets given on the command line; None leaves them to the program."""

    limit: str
    device_memory: str | None = None
    host_memory: str | None = None

    @property
    def limit_nbytes(self) -> int:
        return nbytes_of(self.limit)

    @property
    def device_budget_nbytes(self) -> int:
        """What the device's plan may take: as given, else the whole limit."""
        return nbytes_of(self.device_memory or self.limit)

    @property
    def flags(self) -> list[str]:
        """As `generate` takes them."""
        given = {"--device-memory": self.device_memory, "--host-memory": self.host_memory}
        return [word for flag, size in given.items() if size is not None for word in (flag, size)]


CASES = (
    Case(limit="1.5GB"),
    Case(limit="1.5GB", device_memory="700MB", host_memory="250MB"),
    Case(limit="1.2GB"),
    Case(limit="1.2GB", device_memory="450MB", host_memory="150MB"),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case. `figures` is the JSON of `generate`, None where it failed."""

    case: Case
    peak_nbytes: int
    num_kills: int
    exit_status: int
    figures: dict[str, Any] | None

    @property
    def promises(self) -> dict[str, bool]:
        """What was to be shown."""
        kept = {"not killed": self.num_kills == 0, "answered": self.figures is not None}
        if self.figures is None:
            return kept
        memory = self.figures["memory"]
        return kept | {
            "device peak within plan": memory["device_peak_bytes"] <= memory["device_plan_bytes"],
            "device plan within budget": memory["device_plan_bytes"] <= self.case.device_budget_nbytes,
            "plans within limit": memory["device_plan_bytes"] + memory["host_plan_bytes"] <= self.case.limit_nbytes,
            "layers from disk": bool(self.figures["plan"]["disk_layers"]),
        }


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    weights_nbytes = sum(info.nbytes for info in open_checkpoint(MODEL).tensors.values())
    print(f"{MODEL}: {weights_nbytes / 1e6:.0f} MB of weights\n{TABLE_HEAD}")
    outcomes = []
    try:
        run(CASES[0], options.cache)  # the file cache of what it may have to write would be part of the peak
        for case in CASES:
            outcomes.append(run(case, options.cache))
            print(table_lines(outcomes[-1]), flush=True)
    except OSError as error:
        print(f"error: no memory cgroup can be made here: {error}; run as root on a machine with cgroups", file=sys.stderr)
        return NO_CGROUP
    rows = [as_row(outcome) for outcome in outcomes]
    finish("memory-cap", {"model": MODEL, "weights_bytes": weights_nbytes, "rows": rows, **machine_facts()}, options.out)
    return KEPT if all(all(outcome.promises.values()) for outcome in outcomes) else BROKEN


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder for the weights, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/memory-cap-DATE.json")
    return parser.parse_args()


def nbytes_of(size: str) -> int:
    """`1.5GB` in bytes."""
    return parse_size(size).resolve(0)


def run(case: Case, cache: Path) -> Outcome:
    """One answer within the limit. Raises OSError where no cgroup can be made, or none that knows its peak."""
    with new_cgroup() as group:
        group.limit_to(case.limit_nbytes)
        done = generate_within(group, case, cache)
        if group.peak_nbytes is None:
            raise FileNotFoundError("the kernel keeps no peak of a group; memory.peak needs Linux 5.19")
        return Outcome(
            case=case,
            peak_nbytes=group.peak_nbytes,
            num_kills=group.num_kills,
            exit_status=done.returncode,
            figures=json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None,
        )


def generate_within(group: Cgroup, case: Case, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in the group."""
    generate = [
        sys.executable,
        "-m",
        "offload_sirius",
        "generate",
        "--model",
        MODEL,
        "--mode",
        "full",
        "--prompt",
        "hi",
        "--json",
    ]
    command = group.entered_by([*generate, "--max-new-tokens", str(NUM_NEW), "--ignore-eos", *case.flags])
    environment = os.environ | {"OFFLOAD_SIRIUS_CACHE": str(cache)}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)


TABLE_HEAD = (
    f"{'limit':>6} {'budgets':>12} {'cgroup peak':>11} {'device plan':>11} {'device peak':>11} {'host plan':>9} "
    f"{'layers':>9} {'s/token':>7}  (MB; layers resident + host + disk)"
)


def table_lines(outcome: Outcome) -> str:
    """A row as text, and what it did not keep."""
    broken = [f"    not kept: {promise}" for promise, kept in outcome.promises.items() if not kept]
    return "\n".join([table_line(outcome), *broken])


def table_line(outcome: Outcome) -> str:
    case, figures = outcome.case, outcome.figures
    budgets = " + ".join(size for size in (case.device_memory, case.host_memory) if size) or "auto"
    head = f"{case.limit:>6} {budgets:>12} {outcome.peak_nbytes / 1e6:11.0f}"
    if figures is None:
        return f"{head} exit status {outcome.exit_status}, {outcome.num_kills} killed"
    memory, plan = figures["memory"], figures["plan"]
    layers = "+".join(str(len(plan[f"{tier}_layers"])) for tier in ("resident", "host", "disk"))
    return (
        f"{head} {memory['device_plan_bytes'] / 1e6:11.0f} {memory['device_peak_bytes'] / 1e6:11.0f} "
        f"{memory['host_plan_bytes'] / 1e6:9.0f} {layers:>9} {seconds_per_token(figures):7.2f}"
    )


def seconds_per_token(figures: dict[str, Any]) -> float:
    """Behind the first token."""
    return float(figures["decode_seconds"] / (figures["new_tokens"] - 1))


def as_row(outcome: Outcome) -> dict[str, Any]:
    """For the result file."""
    figures = outcome.figures
    row = {
        **asdict(outcome.case),
        "cgroup_peak_bytes": outcome.peak_nbytes,
        "kills": outcome.num_kills,
        "exit_status": outcome.exit_status,
        "promises": outcome.promises,
    }
    if figures is None:
        return row
    return row | {
        **figures["memory"],
        **{key: figures["plan"][key] for key in ("resident_layers", "host_layers", "disk_layers", "device_bill", "host_bill")},
        "seconds_per_token": seconds_per_token(figures),
        "ttft_seconds": figures["ttft_seconds"],
        "load_seconds": figures["load_seconds"],
        "link_gbytes_per_second": figures["link"]["gbytes_per_second"],
    }


if __name__ == "__main__":
    sys.exit(main())
