"""llama.cpp with a mapped file: greedy tokens behind a prompt of ids, one line of JSON. For an environment with llama-cpp-python.

    python benchmarks/peer_runners/run_llama_cpp.py --model FILE.gguf --ids 1,2,3 --new 8 --threads 2

Knows nothing of this project.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moments import Moments, report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import llama_cpp
from llama_cpp_runner import Runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True, help="of the prompt, with commas")
    parser.add_argument("--new", type=int, required=True, help="tokens")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=512, help="positions of its cache, default %(default)s")
    options = parser.parse_args()
    moments = Moments()
    runner = Runner(options.model, options.threads, options.context, kv_float32=False, as_stored=False, flash=True)
    moments.begin()
    moments.put(None)  # the prompt
    ids = [int(each) for each in options.ids.split(",")]
    found: list[int] = []
    for _ in range(options.new):
        found.append(int(runner.logits_after(ids).argmax()))
        moments.put(found[-1])
        ids = found[-1:]
    report(moments, found, {"versions": {"llama_cpp_python": llama_cpp.__version__}})


if __name__ == "__main__":
    main()
