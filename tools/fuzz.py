"""Can a file of a model make this program crash, hang, read elsewhere or take memory out of proportion? Broken models by the
thousand.

    PYTHONPATH=.:loaders python tools/fuzz.py --cases 200000            # two processes, about a quarter of an hour on two cores
    PYTHONPATH=.:loaders python tools/fuzz.py --seed 7 --minutes 60 --out findings
    PYTHONPATH=.:loaders python tools/fuzz.py --seed 7 --only 4711      # one case once more, with its traceback

Each case is a small good model of some kind (safetensors, GGUF, quantised, packed; fuzzing/corpus.py) of which some things are
broken (fuzzing/mutate.py): headers, metadata, tensor tables, config.json, indices, tokenizers, templates, and of packed models
what their seals are of, sealed again. It must open properly or be refused in one line; fuzzing/check.py says what that means
and how time and memory are counted. Every 40th one that opens is loaded and answers two tokens.

A case is its number and the seed, nothing else, so that any can be had again. What is found is made as small as it gets and
written to a folder by its kind. A process that dies or does not come back is a finding of the case it was at, and another takes
its place. Exit status: 0 nothing was found, 1 something was, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing.check import Verdict, judge, write_files
from fuzzing.corpus import Corpus, make_corpus, read_corpus
from fuzzing.mutate import mutated

NOTHING, FOUND, WRONG_USE = 0, 1, 2
DEEP_EVERY = 40
"""Loading takes five times as long as opening."""
CHAT_EVERY = 12
"""A template takes a process of its own, and with it as long as fifty cases."""
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "tokenizer.gguf.json", "model.gguf")
"""Where a template may stand."""
STUCK_SECONDS = 600.0
"""A process that has not begun another case by then does not come back."""
TOLD_EVERY = 500
"""Cases after which a process says how far it is."""
MOST_SMALLER = 400
"""Attempts to make a finding smaller."""


@dataclass(kw_only=True)
class Tally:
    """What came of many cases."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of all."""
    by_model: dict[str, Counter[str]] = field(default_factory=dict)
    """Of each model that was broken."""
    slowest_seconds: float = 0.0
    slowest_case: int = -1
    most_grown_nbytes: int = 0
    most_grown_case: int = -1

    def add(self, number: int, model: str, verdict: Verdict) -> None:
        """Count a case. Those that answer are not compared by time and memory: loading takes more than opening."""
        self.cases += 1
        self.outcomes[verdict.outcome] += 1
        self.by_model.setdefault(model, Counter())[verdict.outcome] += 1
        if verdict.outcome != "answered" and verdict.seconds > self.slowest_seconds:
            self.slowest_seconds, self.slowest_case = verdict.seconds, number
        if verdict.outcome != "answered" and verdict.grown_nbytes > self.most_grown_nbytes:
            self.most_grown_nbytes, self.most_grown_case = verdict.grown_nbytes, number

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return vars(self) | {
            "by_model": {model: dict(sorted(outcomes.items())) for model, outcomes in sorted(self.by_model.items())}
        }

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another process has counted, as it was told."""
        self.cases += other["cases"]
        self.outcomes.update(other["outcomes"])
        for model, outcomes in other["by_model"].items():
            self.by_model.setdefault(model, Counter()).update(outcomes)
        if other["slowest_seconds"] > self.slowest_seconds:
            self.slowest_seconds, self.slowest_case = other["slowest_seconds"], other["slowest_case"]
        if other["most_grown_nbytes"] > self.most_grown_nbytes:
            self.most_grown_nbytes, self.most_grown_case = other["most_grown_nbytes"], other["most_grown_case"]


@dataclass(frozen=True)
class Case:
    """One broken model."""

    model: str
    files: dict[str, bytes]
    deep: bool
    """Let it answer."""
    chat: bool
    """Render a conversation, where what may hold a template is not the good model's."""


def case_of(corpus: Corpus, seed: int, number: int) -> Case:
    """The case of that number."""
    random = Random(f"{seed}:{number}")
    model = sorted(corpus)[number % len(corpus)]
    return Case(model, mutated(corpus[model], random), random.randrange(DEEP_EVERY) == 0, random.randrange(CHAT_EVERY) == 0)


class Judge:
    """Judges cases in a folder of its own."""

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        self.corpus = corpus
        self._folder = folder
        for model, files in corpus.items():  # also brings in what is imported at the first use
            verdict = self.judge(Case(model, files, True, False))
            assert verdict.outcome == "answered", (model, verdict)

    def judge(self, case: Case) -> Verdict:
        """Write it and open it."""
        path = write_files(case.files, self._folder)
        good = self.corpus[case.model]
        chat = case.chat and any(case.files.get(name) != good.get(name) for name in TEMPLATE_FILES)
        return judge(path, sum(map(len, case.files.values())), deep=case.deep, chat=chat)

    def smaller(self, case: Case, signature: str) -> Case:
        """As much as possible as it is in the good model, with the same finding."""
        good, attempts = self.corpus[case.model], MOST_SMALLER if "longer" not in signature else 20

        def holds(files: dict[str, bytes]) -> bool:
            nonlocal attempts
            attempts -= 1
            return attempts > 0 and self.judge(Case(case.model, files, case.deep, case.chat)).signature == signature

        files = dict(case.files)
        for name in good:
            whole = files | {name: good[name]}
            if whole != files and holds(whole):
                files = whole
        for name in [name for name in files if files[name] != good.get(name)]:
            step = max(len(files[name]) // 2, 1)
            while step >= 1 and attempts > 0:
                at = 0
                while at < len(files[name]) and attempts > 0:
                    without = files[name][:at] + files[name][at + step :]
                    if holds(files | {name: without}):
                        files[name] = without
                    else:
                        at += step
                step //= 2
        return Case(case.model, files, case.deep, case.chat)


def main() -> int:
    """Run it."""
    arguments = _parser().parse_args()
    if arguments.worker is not None:
        return _work(arguments)
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as scratch:
        folder = Path(scratch)
        corpus = make_corpus(folder / "corpus")
        if arguments.only is not None:
            return _show(corpus, folder, arguments)
        return _run(folder, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="end then, however many cases are left")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder for what is found")
    parser.add_argument("--only", type=int, help="number of the one case to run")
    parser.add_argument("--result", type=Path, help="file for the figures; default: benchmarks/results")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser


def _fast_folder() -> str | None:
    """In memory where there is a place: hundreds of thousands of files are written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _show(corpus: Corpus, folder: Path, arguments: argparse.Namespace) -> int:
    work = folder / "work"
    work.mkdir()
    case = case_of(corpus, arguments.seed, arguments.only)
    verdict = Judge(corpus, work).judge(case)
    for name in sorted({*case.files, *corpus[case.model]}):
        if case.files.get(name) != corpus[case.model].get(name):
            print(f"{case.model}: {name} is changed: {case.files.get(name, b'(gone)')[:2000]!r}")
    print(verdict.outcome, verdict.signature, verdict.detail)
    return FOUND if verdict.outcome == "found" else NOTHING


# One process among others: says what it does as JSON, a line each, and marks where it is in memory that outlives it.


def _work(arguments: argparse.Namespace) -> int:
    folder = arguments.scratch / f"work-{arguments.worker}"
    folder.mkdir(exist_ok=True)
    judge_ = Judge(read_corpus(arguments.scratch / "corpus"), folder)
    tally, known = Tally(), set[str]()
    until = time.monotonic() + 60 * arguments.minutes
    with _marks(arguments.scratch, arguments.worker) as mark:
        for number in range(arguments.first, arguments.cases, arguments.processes):
            mark[:8] = number.to_bytes(8, "little")
            case = case_of(judge_.corpus, arguments.seed, number)
            verdict = judge_.judge(case)
            tally.add(number, case.model, verdict)
            if verdict.outcome == "found" and verdict.signature not in known:
                known.add(verdict.signature)
                _keep(arguments.out, judge_.smaller(case, verdict.signature), verdict, number)
                _tell(found=verdict.signature, number=number)
            if tally.cases == TOLD_EVERY:
                _tell(tally=tally.as_json())
                tally = Tally()
            if time.monotonic() > until:
                break
    _tell(tally=tally.as_json())
    return NOTHING


def _tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _marks(scratch: Path, worker: int) -> mmap.mmap:
    path = scratch / f"mark-{worker}"
    if not path.exists():
        path.write_bytes(bytes(8))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 8)


def _keep(out: Path, case: Case, verdict: Verdict, number: int) -> None:
    name = "".join(each if each.isalnum() else "-" for each in verdict.signature)[:100]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in case.files.items():
        (folder / file).write_bytes(content)
    (folder / "finding.txt").write_text(f"case {number}, of {case.model}: {verdict.signature}\n\n{verdict.detail}\n")


# The one that starts them.


class Worker:
    """A process, started again behind each case in which it ends."""

    def __init__(self, index: int, scratch: Path, arguments: argparse.Namespace) -> None:
        self.tally = Tally()
        self.found: dict[str, int] = {}
        """Signature -> number of the first case."""
        self._index, self._scratch, self._arguments = index, scratch, arguments
        self._until = time.monotonic() + 60 * arguments.minutes
        self._mark = _marks(scratch, index)
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        """Wait until all cases are done."""
        self._thread.join()

    def _run(self) -> None:
        first = self._index
        while first < self._arguments.cases:
            code, lines = self._run_from(first)
            if code == 0:
                return
            number = self._case
            signature = "does not come back" if code == -9 else f"ends the process with {code}"
            self.found[signature] = number
            case = case_of(read_corpus(self._scratch / "corpus"), self._arguments.seed, number)
            _keep(self._arguments.out, case, Verdict(outcome="found", signature=signature, detail="".join(lines[-60:])), number)
            self.tally.cases += 1
            self.tally.outcomes["found"] += 1
            first = number + self._arguments.processes

    @property
    def _case(self) -> int:
        return int.from_bytes(self._mark[:8], "little")

    def _run_from(self, first: int) -> tuple[int, list[str]]:
        given, minutes = self._arguments, (self._until - time.monotonic()) / 60
        command = [sys.executable, "-X", "faulthandler", __file__, "--worker", str(self._index), "--first", str(first)]
        command += [
            "--cases",
            str(given.cases),
            "--seed",
            str(given.seed),
            "--minutes",
            str(minutes),
            "--out",
            str(given.out),
        ]
        command += ["--processes", str(given.processes), "--scratch", str(self._scratch)]
        environment = os.environ | {"OFFLOAD_SIRIUS_CACHE": str(self._scratch / "cache"), "OMP_NUM_THREADS": "1"}
        errors = (self._scratch / f"errors-{self._index}").open("w+")
        with errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            watch = threading.Thread(target=self._watch, args=(process,))
            watch.start()
            assert process.stdout is not None
            for line in process.stdout:
                self._hear(json.loads(line))
            code = process.wait()
            watch.join()
            errors.seek(0)
            return code, errors.readlines()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        """Kill it where it stays at one case for too long."""
        case, since = -1, time.monotonic()
        while process.poll() is None:
            if self._case != case:
                case, since = self._case, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                process.kill()
            time.sleep(0.2)

    def _hear(self, told: dict[str, Any]) -> None:
        if "tally" in told:
            self.tally.merge(told["tally"])
        else:
            self.found.setdefault(told["found"], told["number"])
            print(f"found: {told['found']} (case {told['number']})", file=sys.stderr, flush=True)


def _run(scratch: Path, arguments: argparse.Namespace) -> int:
    from benchmarks.report import finish, machine_facts

    began = time.monotonic()
    workers = [Worker(index, scratch, arguments) for index in range(arguments.processes)]
    for _ in _progress(workers):
        pass
    total = Tally()
    for worker in workers:
        worker.join()
        total.merge(worker.tally.as_json())
    found = {signature: number for worker in workers for signature, number in worker.found.items()}
    figures = {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began, 1),
        "found": found,
        **total.as_json(),
    }
    finish("fuzz", machine_facts() | figures, arguments.result)
    return FOUND if found else NOTHING


def _progress(workers: Sequence[Worker]) -> Iterator[None]:
    """Say how far they are, every ten seconds."""
    began = said = time.monotonic()
    while any(worker._thread.is_alive() for worker in workers):
        yield time.sleep(0.1)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            cases = sum(worker.tally.cases for worker in workers)
            print(f"{cases} cases, {cases / (said - began):.0f}/s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
