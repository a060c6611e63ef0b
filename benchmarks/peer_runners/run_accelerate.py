"""transformers with accelerate: greedy tokens behind a prompt of ids, one line of JSON. For an environment that has both.

    python benchmarks/peer_runners/run_accelerate.py --model FOLDER --ids 1,2,3 --new 8 --threads 2            # all in memory
    python benchmarks/peer_runners/run_accelerate.py --model FOLDER --ids 1,2,3 --new 8 --threads 2 --memory 600000000 --offload D

--memory is what accelerate may keep of the weights in memory; it puts the other modules to the disk and reads them when they are
called. Knows nothing of this project.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import accelerate
import torch
import transformers
from greedy import greedy_answer
from moments import Moments, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True, help="of the prompt, with commas")
    parser.add_argument("--new", type=int, required=True, help="tokens")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory", type=int, help="bytes of weights; with it, the others go to the disk")
    parser.add_argument("--offload", type=Path, help="folder for what has to be written to the disk")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    moments = Moments()
    placed = {}
    if options.memory is not None:
        placed = {"device_map": "auto", "max_memory": {"cpu": options.memory}, "offload_folder": str(options.offload)}
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, **placed)
    ids = greedy_answer(model, options.ids, options.new, moments)
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    facts = {
        "versions": {"accelerate": accelerate.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "modules_in_memory": sum(str(place) != "disk" for place in places),
        "modules_on_disk": sum(str(place) == "disk" for place in places),
    }
    report(moments, ids, facts)


if __name__ == "__main__":
    main()
