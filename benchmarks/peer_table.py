"""One process of each system after the other, all in the same memory: the table `memory` of peers.py."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cgroup import new_cgroup
from children import Child, drop_page_cache, run_child
from peer_models import Preparation, as_text, prepared, write_folder
from peer_ways import FULL, OURS, PACKED, Answer, Way, environment_of, ways_to_answer

from offload_sirius.bench.stream import checkpoint_files
from offload_sirius.cache import safe_name
from offload_sirius.engine import open_model
from offload_sirius.units import parse_size
from offload_sirius.weights.disk_rate import QUEUES, read_seconds
from offload_sirius_loaders import open_checkpoint

FLOOR = "raw reads"
MOST_OF_FLOOR = 1.15
"""What a token of mode full may take."""

STEADY, MOST_ATTEMPTS = 1.1, 4
"""Mode full is measured again where its floor before and behind differ by more: the disk did something else then."""

CHOOSING_TURNS = 3
"""Reads in each way, in turn, of which the one with the lowest median is the floor's."""

PROMPT_IDS = list(range(300, 316))
SENTENCE = "The capital of France is Paris, and that of Spain is"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process, and what it answered; None where it failed."""

    child: Child
    answer: Answer | None


@dataclass(kw_only=True)
class Measured:
    """All that is known of a system."""

    name: str
    is_capped: bool = True
    preparation: Preparation | None = None
    note: str = ""
    error: str | None = None
    warm_up: Run | None = None
    runs: list[Run] = field(default_factory=list)
    """One of each round that counts, until one fails."""

    @property
    def answers(self) -> list[Answer]:
        """Of the rounds that count."""
        return [run.answer for run in self.runs if run.answer is not None]


@dataclass(kw_only=True)
class Floors:
    """Plain reads of what mode full reads: as many bytes in one go, as disks that others share allow so many a while."""

    nbytes: int = 0
    """For a token."""
    num_tokens: int = 1
    """In one go."""
    queue: tuple[int, int] = QUEUES[0]
    """Reads at a time, bytes of each."""
    around: list[tuple[float, float]] = field(default_factory=list)
    """For a token, before and behind mode full's run of each round."""
    num_disturbed: int = 0
    """Measurements that were given up."""

    @property
    def seconds(self) -> list[float]:
        """For a token, of each round."""
        return [statistics.mean(each) for each in self.around]

    def choose(self, files: list[Path], answer: Answer) -> None:
        """Find the fastest way of reading, in the round that does not count."""
        self.nbytes, self.num_tokens = int(answer.read_nbytes_per_token), len(answer.ids) - 1
        if self.nbytes:
            turns = [[read_seconds(files, self.nbytes, *queue) for queue in QUEUES] for _ in range(CHOOSING_TURNS)]
            seconds = [statistics.median(each) for each in zip(*turns, strict=True)]
            self.queue = QUEUES[seconds.index(min(seconds))]

    def measured(self, files: list[Path], run: Callable[[], Run]) -> Run:
        """A run, and reads before and behind it, of a few the first during which the disk stayed as it was, or the last."""
        if not self.nbytes:
            return run()
        behind = self._read(files)
        for left in reversed(range(MOST_ATTEMPTS)):
            found = run()
            if found.answer is None:
                return found
            before, behind = behind, self._read(files)
            if max(before, behind) <= STEADY * min(before, behind) or not left:
                break
            self.num_disturbed += 1
        self.around.append((before, behind))
        return found

    def _read(self, files: list[Path]) -> float:
        """Seconds for a token."""
        return sum(read_seconds(files, self.nbytes, *self.queue) for _ in range(self.num_tokens)) / self.num_tokens


def memory_table(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """One process after the other, all in the same memory."""
    limit_nbytes = None if options.limit == "none" else parse_size(options.limit).resolve(0)
    if limit_nbytes is not None and (why := no_cgroup()) is not None:
        return {"skipped": why}
    folder, cost = model_folder(options)
    prompt, ids = prompt_of(options, folder, has_digits=cost is not None)
    checkpoint = open_checkpoint(str(folder))
    head = {
        "model": options.model,
        "weights_bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "limit_bytes": limit_nbytes,
        "prompt_tokens": len(ids),
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "page_cache_dropped": drop_page_cache(),
    }
    if not head["page_cache_dropped"]:
        print("the page cache cannot be dropped here: files may be read from memory", file=sys.stderr)
    ways, errors = ways_to_answer(options, folder, prompt, ids, limit_nbytes)
    failed = [Measured(name=name, error=error) for name, error in errors.items()]
    measured = [Measured(name=way.name, is_capped=way.is_capped, preparation=way.preparation) for way in ways]
    files, floors = checkpoint_files(checkpoint), Floors()
    for round_ in range(options.rounds + 1):
        for index, one in enumerate(measured):
            if one.error is not None:
                continue
            if round_ == 0:
                ways[index] = choose(ways[index], one, options, limit_nbytes)
                if one is measured[0] and one.warm_up is not None and one.warm_up.answer is not None:
                    floors.choose(files, one.warm_up.answer)
            else:
                run = partial(run_way, ways[index], 0, options, limit_nbytes)
                one.runs.append(floors.measured(files, run) if one is measured[0] else run())
                one.error = one.runs[-1].child.error
            print(run_text(one, round_), flush=True)
        rows = rows_of([*measured, *failed], floors)
        keep(head | {"rows": rows})
    print(table_text(rows), flush=True)
    return head | {"rows": rows, "promises": promises(rows)}


def no_cgroup() -> str | None:
    """Why no memory cgroup can be made here."""
    try:
        with new_cgroup():
            return None
    except OSError as error:
        return f"no memory cgroup can be made here: {error}; run as root on a machine with cgroups, or with --limit none"


def model_folder(options: argparse.Namespace) -> tuple[Path, Preparation | None]:
    """The model as a folder, written from a synthetic one; a folder is what it is."""
    if Path(options.model).is_dir():
        return Path(options.model), None
    if not options.model.startswith("synthetic:"):
        raise ValueError(f"--model is {options.model!r}; give synthetic:SHAPE, or a folder with safetensors and config.json")
    folder = options.folder / safe_name(options.model)
    return folder, prepared(folder, partial(write_folder, options.model))


def prompt_of(options: argparse.Namespace, folder: Path, *, has_digits: bool) -> tuple[str, list[int]]:
    """Text and ids."""
    model = open_model(str(folder))
    text = options.prompt or (as_text(PROMPT_IDS) if has_digits else SENTENCE)
    return text, model.encode(text, chat=False)


def choose(way: Way, one: Measured, options: argparse.Namespace, limit_nbytes: int | None) -> Way:
    """The way with the attempt that works alone, whose run is what warms up; notes the last error where none does."""
    for index, attempt in enumerate(way.attempts):
        run = run_way(way, index, options, limit_nbytes)
        if run.answer is not None:
            one.note, one.warm_up, one.error = attempt.note, run, None
            return Way(**vars(way) | {"attempts": (attempt,)})
        print(f"{way.name}{': ' if attempt.note else ''}{attempt.note}: {run.child.error}", flush=True)
        one.error = run.child.error
    return way


def run_way(way: Way, index: int, options: argparse.Namespace, limit_nbytes: int | None) -> Run:
    drop_page_cache()
    child = run_child(
        way.attempts[index].command,
        environment=environment_of(options, is_ours=way.is_ours),
        limit_seconds=options.seconds,
        in_cgroup=limit_nbytes is not None,
        limit_nbytes=limit_nbytes if way.is_capped else None,
    )
    return Run(child=child, answer=None if child.figures is None else way.read(child.figures))


# Rows, and what they must show


def rows_of(measured: Sequence[Measured], floors: Floors) -> list[dict[str, Any]]:
    """The floor's, then one of each system; the first of them is mode full."""
    return [floor_row(floors), *(row_of(each, measured[0], floors) for each in measured)]


def floor_row(floors: Floors) -> dict[str, Any]:
    if not floors.seconds:
        return {"name": FLOOR, "error": "nothing is read from the disk"}
    return {
        "name": FLOOR,
        "error": None,
        "seconds_per_token": statistics.median(floors.seconds),
        "all_seconds_per_token": floors.seconds,
        "read_bytes_per_token": floors.nbytes,
        "all_before_and_behind": floors.around,
        "num_disturbed": floors.num_disturbed,
        "tokens_at_once": floors.num_tokens,
        "queue": list(floors.queue),
    }


def row_of(one: Measured, full: Measured, floors: Floors) -> dict[str, Any]:
    """Medians over the rounds, and of the ratios of each round, where mode full ever answered. Peaks are the highest."""
    row: dict[str, Any] = {
        "name": one.name,
        "error": one.error,
        "capped": one.is_capped,
        "note": one.note,
        "written_bytes": one.preparation.nbytes if one.preparation else 0,
        "preparation_seconds": one.preparation.seconds if one.preparation else 0.0,
    }
    answers, children = one.answers, [run.child for run in one.runs if run.answer is not None]
    if not answers:
        return row
    seconds = [answer.seconds_per_token for answer in answers]
    to_full = [theirs / ours.seconds_per_token for theirs, ours in zip(seconds, full.answers, strict=False)]
    row |= {
        "seconds_per_token": statistics.median(seconds),
        "all_seconds_per_token": seconds,
        "first_token_seconds": statistics.median(answer.first_token_seconds for answer in answers),
        "read_bytes_per_token": statistics.median(answer.read_nbytes_per_token for answer in answers),
        "read_bytes": statistics.median(child.read_nbytes for child in children),
        "process_seconds": statistics.median(child.seconds for child in children),
        "cpu_seconds": statistics.median(child.cpu_seconds for child in children),
        "resident_peak_bytes": max(child.resident_peak_nbytes for child in children),
        "cgroup_peak_bytes": max(child.cgroup_peak_nbytes or 0 for child in children) or None,
        "versions": answers[0].versions,
    }
    if full.answers:
        row |= {
            "ratio_to_full": statistics.median(to_full),
            "all_ratios_to_full": to_full,
            "first_equal_ids": equal_ids(answers[0].ids, full.answers[0].ids),
        }
    if one.name in (FULL, PACKED) and floors.seconds and answers[0].read_nbytes_per_token:
        # In proportion, as a packed copy may leave room for more or fewer resident layers.
        rounds = zip(answers, floors.seconds, strict=False)
        to_floor = [each.seconds_per_token / (floor * each.read_nbytes_per_token / floors.nbytes) for each, floor in rounds]
        row |= {"ratio_to_floor": statistics.median(to_floor), "all_ratios_to_floor": to_floor}
    return row


def equal_ids(some: Sequence[int], others: Sequence[int]) -> int:
    """How many are the same before the first that is not."""
    pairs = zip(some, others, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))


def promises(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """What is to be shown: mode full near the floor, and faster than all that ran within the same limit."""
    full = next(row for row in rows if row["name"] == FULL)
    kept = {"ours, full answered every time": full["error"] is None}
    if "ratio_to_floor" in full:
        kept[f"ours, full within {MOST_OF_FLOOR} of the raw reads"] = full["ratio_to_floor"] <= MOST_OF_FLOOR
    others = [row for row in rows if row["name"] not in (*OURS, FLOOR) and row["capped"] and "ratio_to_full" in row]
    return kept | {f"ours, full faster than {row['name']}": row["ratio_to_full"] > 1 for row in others}


def run_text(one: Measured, round_: int) -> str:
    """A line as a run has ended."""
    head = f"round {round_} {one.name:28}"
    run = one.runs[-1] if one.runs else one.warm_up
    if one.error is not None or run is None or run.answer is None:
        return f"{head} {one.error}"
    return f"{head} {run.answer.seconds_per_token:7.3f} s/token, {run.child.seconds:5.1f} s{' (does not count)' * (round_ == 0)}"


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        f"{'':28} {'s/token':>8} {'lowest':>8} {'highest':>8} {'to full':>8} {'first token':>11} {'peak MB':>8} "
        f"{'cgroup MB':>9} {'MB/token':>8} {'written MB':>10}"
    )
    return "\n".join([head, *(line_of(row) for row in rows)])


def line_of(row: dict[str, Any]) -> str:
    """One line; what there is no figure for stays empty."""
    if "seconds_per_token" not in row:
        return f"{row['name']:28} {row['error']}"
    all_seconds = row["all_seconds_per_token"]
    cells = [
        (row["seconds_per_token"], "8.3f", 1),
        (min(all_seconds), "8.3f", 1),
        (max(all_seconds), "8.3f", 1),
        (row.get("ratio_to_full"), "8.2f", 1),
        (row.get("first_token_seconds"), "11.2f", 1),
        (row.get("resident_peak_bytes"), "8.0f", 1e6),
        (row.get("cgroup_peak_bytes"), "9.0f", 1e6),
        (row["read_bytes_per_token"], "8.0f", 1e6),
        (row.get("written_bytes"), "10.0f", 1e6),
    ]
    figures = [f"{value / unit:{form}}" if value is not None else " " * int(form.split(".")[0]) for value, form, unit in cells]
    return " ".join([f"{row['name']:28}", *figures, *([row["error"]] if row["error"] else [])])
