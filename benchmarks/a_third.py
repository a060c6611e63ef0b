"""What is mode sirius worth on a model that agrees with itself, with a third of the model's bytes? A table of peers.py.

SmolLM2-135M in float32, head in 8 bits, 538 MB as it is stored; a third of that is what all weights, buffers and the KV cache
may take. Once as device and host memory together, in a cgroup of that third, what the program itself takes and the reserve that
it plans without, layers read from the disk: drafts must read, too, as resident ones need all layers in host memory. Once as
device memory behind an emulated link that is as slow beside computing as PCIe 4 is for a 70B model in 4 bits (see hotset.py), all
layers in host memory, drafts on an int4 copy on the device.

Prompts are the first of each category; of each one answer of mode full and one of mode sirius, exact, in turn. Each process is
one answer; where layers are on the disk, behind some tokens of mode full that do not count, as readers try queue depths over
the first 2 GB that they read. Seconds a token are those behind the first; an answer of mode full is cut short, as each of its
tokens takes as long as the next. Answers are compared with those of mode full with everything resident.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cgroup import new_cgroup
from children import Child, drop_page_cache, run_child
from hotset import first_prompts
from peer_models import as_text, prepared, write_folder

from offload_sirius.cache import safe_name
from offload_sirius.engine import open_model
from offload_sirius.engine.planning import HOST_RESERVE_NBYTES
from offload_sirius.units import MIB

ANSWER = Path(__file__).resolve().parent / "warmed_answer.py"
MODEL = "smollm2-135m"
CONTEXT = 256
NUM_FULL_TOKENS = 8
NUM_WARM_UPS = 8
"""Tokens of mode full before an answer with layers on the disk, in which some 2.5 GB are read."""

READERS_NBYTES = 57 * MIB
"""Of the third, in the row whose layers are on the disk: what its readers and the embedding's rows take."""

ON_DISK, BEHIND_LINK = "on disk, in a cgroup", "behind a link"
NO_CGROUP = "on disk, no cgroup can be made"
"""There the budgets alone hold."""

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the layers are, by settings of the engine."""

    name: str
    memory: Figures
    drafts: Figures
    from_disk: bool = False
    limit_nbytes: int | None = None
    """Of a cgroup; None without one."""


def third_table(options: argparse.Namespace, keep: Callable[[Figures], None]) -> Figures:
    """Rows of both places. Raises CheckpointError, OSError."""
    folder = options.folder / f"{safe_name(MODEL)}-float32"
    prepared(folder, partial(write_folder, MODEL))
    source, weights_nbytes = open_model(MODEL), sum(info.nbytes for info in open_model(str(folder)).checkpoint.tensors.values())
    prompts = [as_text(source.encode(prompt)) for prompt in first_prompts()[: options.third_prompts]]
    ask = partial(ask_child, options, str(folder))
    unlimited = places_of(weights_nbytes // 3, None, options.third_link_gbps)[0]
    own = program_nbytes(answered(ask(unlimited, "full", prompts[0], 2)))
    places = places_of(weights_nbytes // 3, own if can_group() else None, options.third_link_gbps)
    head = {
        "model": MODEL,
        "weights_bytes": weights_nbytes,
        "budget_bytes": weights_nbytes // 3,
        "program_bytes": own,
        "link_gbps": options.third_link_gbps,
        "num_prompts": len(prompts),
        "new_tokens": options.third_tokens,
        "full_tokens": min(NUM_FULL_TOKENS, options.third_tokens),
    }
    resident = Place(name="resident", memory={"device_memory": "0.9"}, drafts={})
    references = [answered(ask(resident, "full", prompt, options.third_tokens)) for prompt in prompts]
    rows: list[Figures] = []
    for place in places:
        pairs: list[tuple[Child, Child]] = []
        for prompt in prompts:
            full = ask(place, "full", prompt, head["full_tokens"])
            pairs.append((full, ask(place, "sirius", prompt, options.third_tokens)))
            print(pair_text(place, pairs[-1]), flush=True)
            if error_of(pairs) is not None:
                break
            keep(head | {"rows": [*rows, row_of(place, pairs, references)]})
        rows.append(row_of(place, pairs, references))
        print(line_of(rows[-1]), flush=True)
    return head | {"rows": rows, "promises": promises(rows)}


def places_of(budget_nbytes: int, own_nbytes: int | None, link_gbps: float) -> list[Place]:
    """Both have the same bytes for weights, buffers and KV cache together. own_nbytes: of the program; None: without a limit."""
    device_nbytes = budget_nbytes - READERS_NBYTES
    return [
        Place(
            name=NO_CGROUP if own_nbytes is None else ON_DISK,
            memory={"device_memory": str(device_nbytes), "host_memory": str(READERS_NBYTES)},
            drafts={"draft": "streamed"},
            from_disk=True,
            limit_nbytes=None if own_nbytes is None else budget_nbytes + own_nbytes,
        ),
        Place(
            name=BEHIND_LINK,
            memory={"device_memory": str(budget_nbytes), "link_gbps": link_gbps},
            drafts={"draft": "resident", "draft_quantize": "int4"},
        ),
    ]


def program_nbytes(alone: Child) -> int:
    """Of an answer without a limit, memory that is in no plan: Python, torch, threads; and what the program never plans with."""
    memory = (alone.figures or {})["memory"]
    return int(alone.resident_peak_nbytes - memory["device_plan_bytes"] - memory["host_plan_bytes"] + HOST_RESERVE_NBYTES)


def answered(child: Child) -> Child:
    """Raises OSError for one that failed: without a limit and without drafts none may."""
    if child.error is not None:
        raise OSError(f"mode full does not run here: {child.error}")
    return child


def ask_child(options: argparse.Namespace, folder: str, place: Place, mode: str, prompt: str, num_tokens: int) -> Child:
    """One answer; the page cache is dropped where layers are read from the disk."""
    settings = {
        "model": folder,
        "dtype": "float32",
        "device": "cpu",
        "quantize_head": "int8",
        "mode": mode,
        "max_context": CONTEXT,
        "threads": options.threads,
        **place.memory,
        **({"prior": False, **place.drafts} if mode == "sirius" else {}),
    }
    warm_up = ("--warm-up", str(NUM_WARM_UPS)) if place.from_disk else ()
    if place.from_disk:
        drop_page_cache()
    return run_child(
        (sys.executable, str(ANSWER), "--settings", json.dumps(settings), "--prompt", prompt, "--new", str(num_tokens), *warm_up),
        environment=os.environ | {"OMP_WAIT_POLICY": "passive"},
        limit_seconds=4 * options.seconds,
        in_cgroup=place.limit_nbytes is not None,
        limit_nbytes=place.limit_nbytes,
    )


def can_group() -> bool:
    """Whether a cgroup can be made here."""
    try:
        with new_cgroup():
            return True
    except OSError:
        return False


def error_of(pairs: Sequence[tuple[Child, Child]]) -> str | None:
    """The first."""
    return next((child.error for pair in pairs for child in pair if child.error is not None), None)


def seconds_per_token(child: Child) -> float:
    """Behind the first."""
    assert child.figures is not None
    return float(child.figures["decode_seconds"] / (child.figures["new_tokens"] - 1))


def row_of(place: Place, pairs: Sequence[tuple[Child, Child]], references: Sequence[Child]) -> Figures:
    """Medians over the prompts, and of the ratios of each pair."""
    flags = [word for name, value in place.memory.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    row: Figures = {"name": place.name, "error": error_of(pairs), "memory": flags, "limit_bytes": place.limit_nbytes}
    if row["error"] is not None:
        return row
    full, sirius = ([seconds_per_token(pair[which]) for pair in pairs] for which in (0, 1))
    ratios = [plain / drafted for plain, drafted in zip(full, sirius, strict=True)]
    figures = [pair[1].figures or {} for pair in pairs]
    children = [child for pair in pairs for child in pair]
    return row | {
        "full_seconds_per_token": statistics.median(full),
        "all_full_seconds_per_token": full,
        "sirius_seconds_per_token": statistics.median(sirius),
        "all_sirius_seconds_per_token": sirius,
        "ratio": statistics.median(ratios),
        "all_ratios": ratios,
        "num_prompts": len(pairs),
        "num_equal": num_equal([child for pair in pairs for child in pair], [each for each in references for _ in range(2)]),
        "num_sirius_equal": num_equal([sirius for _, sirius in pairs], references),
        "aal": mean_of(figures, "aal"),
        "acceptance": mean_of(figures, "acceptance"),
        "window": figures[-1]["window"],
        "device_plan_bytes": max((child.figures or {})["memory"]["device_plan_bytes"] for child in children),
        "cgroup_peak_bytes": max(child.cgroup_peak_nbytes or 0 for child in children) or None,
        "resident_peak_bytes": max(child.resident_peak_nbytes for child in children),
    }


def mean_of(figures: Sequence[Figures], name: str) -> float | None:
    known = [each[name] for each in figures if each[name] is not None]
    return statistics.mean(known) if known else None


def num_equal(children: Sequence[Child], references: Sequence[Child]) -> int:
    """Answers that are the beginning of their reference's."""
    equal = 0
    for child, reference in zip(children, references, strict=False):
        ids, whole = ((each.figures or {})["token_ids"] for each in (child, reference))
        equal += ids == whole[: len(ids)]
    return equal


def promises(rows: Sequence[Figures]) -> dict[str, bool]:
    """Which is faster is what is asked; that there are answers, and right ones, must hold, and that one of the two is faster."""
    kept = {f"{row['name']}: every process answered": row["error"] is None for row in rows}
    ran = [row for row in rows if row["error"] is None]
    kept |= {f"{row['name']}: answers are mode full's": row["num_equal"] == 2 * row["num_prompts"] for row in ran}
    behind_link = [row for row in ran if row["name"] == BEHIND_LINK]
    return kept | {"ours, sirius faster than ours, full behind a link": any(row["ratio"] > 1 for row in behind_link)}


def pair_text(place: Place, pair: tuple[Child, Child]) -> str:
    """A line as both have ended."""
    if (error := error_of([pair])) is not None:
        return f"{place.name:22} {error}"
    full, sirius = (seconds_per_token(child) for child in pair)
    return f"{place.name:22} full {full:.3f} s/token, sirius {sirius:.3f}, {full / sirius:.2f} times"


def line_of(row: Figures) -> str:
    if row["error"] is not None:
        return f"{row['name']:22} {row['error']}"
    return (
        f"{row['name']:22} full {row['full_seconds_per_token']:.3f} s/token, sirius {row['sirius_seconds_per_token']:.3f}, "
        f"{row['ratio']:.2f} times ({min(row['all_ratios']):.2f} to {max(row['all_ratios']):.2f}), AAL {row['aal'] or 0:.2f}, "
        f"{row['num_equal']} of {2 * row['num_prompts']} answers are mode full's"
    )
