"""How fast is a resident model on a CPU beside llama.cpp, at the same bits, with the same threads? Both in one run, in turn.

    python benchmarks/llama_cpp.py                          # installs llama-cpp-python first, which compiles for minutes
    python benchmarks/llama_cpp.py --llama-python /opt/llama/bin/python
    python benchmarks/llama_cpp.py --model smollm2-135m --format int4 --threads 1 --clock cpu_seconds

The same weights for both, written as GGUF: SmolLM2-135M, and random ones of the shape of TinyLlama-1.1B. Layers are bfloat16,
int8 with groups of 32 (Q8_0) or int4 with groups of 32 (Q4_0, which has 4.5 bits a weight, where ours has 4.75 with zeros);
embedding and head are bfloat16 in all. llama.cpp rounds activations to 8 bits where weights are quantised, ours does not. A
round is one answer of each to a prompt of 16 tokens; seconds are those of the tokens behind the first. Medians over rounds, and
of the rounds' ratios.

llama.cpp turns quantised weights into an order that its kernels for this CPU like. Where it crashes with that, it computes with
weights as they are stored, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import finish, machine_facts

import offload_sirius
from offload_sirius.engine import Engine
from offload_sirius.machine import physical_cores

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SOURCES = {"smollm2-135m": None, "tinyllama-1.1b": "synthetic:tinyllama-1.1b"}
"""What gguf_copy.py makes files of; None: its default."""

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("BF16", {}),
    "int8": ("Q8_0", {"quantize": "int8", "quantize_group": 32}),
    "int4": ("Q4_0", {"quantize": "int4", "quantize_group": 32}),
}
PROMPT_IDS = list(range(300, 316))


@dataclass(frozen=True)
class LlamaCpp:
    """A process that answers."""

    process: subprocess.Popen[str]
    version: str
    as_stored: bool

    def tokens_per_second(self, num_new: int, clock: str) -> float:
        """Of one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"ids": PROMPT_IDS, "new": num_new}) + "\n")
        self.process.stdin.flush()
        return (num_new - 1) / float(json.loads(self.process.stdout.readline())[clock])


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        python = options.llama_python or installed(folder / "llama")
        rows = [compare(model, form, options, folder, python) for model in options.model for form in options.format]
    finish(
        "llama-cpp",
        {"threads": options.threads, "clock": options.clock, "new_tokens": options.new_tokens, "rows": rows, **machine_facts()},
        options.out,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, help="an interpreter that has llama-cpp-python; default: one is made")
    parser.add_argument("--model", nargs="+", choices=SOURCES, default=list(SOURCES), help="default both")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="default all")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="for both, default %(default)s")
    parser.add_argument(
        "--clock",
        choices=("seconds", "cpu_seconds"),
        default="seconds",
        help="CPU seconds, with one thread: right beside other work",
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="length of an answer, default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="answers of each that count, default %(default)s")
    parser.add_argument("--folder", type=Path, help="keep GGUF files and environment here, and use those that are there")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/llama-cpp-DATE.json")
    return parser.parse_args()


def installed(folder: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python, made where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "llama-cpp-python"], check=True)
    return python


def compare(model: str, form: str, options: argparse.Namespace, folder: Path, python: Path) -> dict[str, Any]:
    """One model in one format: rounds of one answer each."""
    kind, settings = FORMATS[form]
    weights = gguf_file(model, "BF16", folder)
    ours, theirs = [], []
    with (
        offload_sirius.load(
            str(weights), mode="full", dtype="bfloat16", max_context=512, threads=options.threads, **settings
        ) as engine,
        llama_cpp(python, gguf_file(model, kind, folder), options.threads) as other,
    ):
        for round_ in range(options.rounds + 1):
            pair = (
                our_tokens_per_second(engine, options.new_tokens, options.clock),
                other.tokens_per_second(options.new_tokens, options.clock),
            )
            if round_ > 0:  # the first is warm-up
                ours.append(pair[0])
                theirs.append(pair[1])
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    row = {
        "model": model,
        "format": form,
        "tokens_per_second": statistics.median(ours),
        "llama_cpp_tokens_per_second": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "llama_cpp_python": other.version,
        "llama_cpp_weights_as_stored": other.as_stored,
    }
    print(
        f"{model:15} {form:9} ours {row['tokens_per_second']:7.1f} tokens/s, "
        f"llama.cpp {row['llama_cpp_tokens_per_second']:7.1f}, "
        f"ratio {row['ratio']:.2f} ({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f})"
        f"{', as stored' if other.as_stored else ''}",
        flush=True,
    )
    return row


def our_tokens_per_second(engine: Engine, num_new: int, clock: str) -> float:
    """Of one answer. CPU seconds are those of all of it, less those of an answer of one token."""
    began = time.process_time()
    result = engine.generate(PROMPT_IDS, max_new_tokens=num_new, ignore_eos=True)
    if clock == "cpu_seconds":
        whole = time.process_time() - began
        engine.generate(PROMPT_IDS, max_new_tokens=1, ignore_eos=True)
        return (num_new - 1) / (2 * whole + began - time.process_time())
    assert result.tokens_per_second is not None
    return result.tokens_per_second


def gguf_file(model: str, kind: str, folder: Path) -> Path:
    """The model in that format, written where it is not there."""
    file = folder / f"{model}-{kind}.gguf"
    if not file.exists():
        partial, source = file.with_suffix(".partial"), SOURCES[model]
        command = [sys.executable, TOOLS / "gguf_copy.py", partial, kind, *(["--source", source] if source else [])]
        subprocess.run(command, check=True)
        partial.rename(file)
    return file


@contextmanager
def llama_cpp(python: Path, file: Path, threads: int) -> Iterator[LlamaCpp]:
    """A process with the model loaded, ended behind the block."""
    for as_stored in (False, True):
        command = [python, TOOLS / "llama_cpp_runner.py", file, "--threads", str(threads), "--context", "512"]
        process = subprocess.Popen(
            [*command, *(["--as-stored"] if as_stored else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process:
            if first := process.stdout.readline():
                yield LlamaCpp(process, json.loads(first)["version"], as_stored)
                process.stdin.close()  # type: ignore[union-attr]
                return
    raise SystemExit(f"error: llama.cpp ended with status {process.returncode}")


if __name__ == "__main__":
    main()
