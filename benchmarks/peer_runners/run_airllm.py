"""AirLLM: greedy tokens behind a prompt of ids, one line of JSON. For an environment that has it.

    python benchmarks/peer_runners/run_airllm.py --model FOLDER --shards DIR --split           # writes its layer files, no more
    python benchmarks/peer_runners/run_airllm.py --model FOLDER --shards DIR --ids 1,2,3 --new 8 --threads 2

Knows nothing of this project.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

import torch
from airllm import AutoModel
from greedy import greedy_answer
from moments import Moments, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shards", required=True, help="folder of the layer files")
    parser.add_argument("--split", action="store_true", help="end when the layer files are there")
    parser.add_argument("--ids", default="1", help="of the prompt, with commas")
    parser.add_argument("--new", type=int, default=1, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    moments = Moments()
    model = AutoModel.from_pretrained(options.model, device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=options.shards)
    if options.split:
        print(json.dumps({}))
        return
    ids = greedy_answer(model, options.ids, options.new, moments)
    versions = {name: version(name) for name in ("airllm", "transformers", "accelerate", "torch")}
    report(moments, ids, {"versions": versions})


if __name__ == "__main__":
    main()
