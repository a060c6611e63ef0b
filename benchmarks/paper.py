"""The paper's offloading table, measured, and what each part of its method is worth.

    python benchmarks/paper.py                        # both: some 25 minutes on two cores
    python benchmarks/paper.py --only table           # or: --only ablations
    python benchmarks/paper.py --quick --out sample.json
    python benchmarks/paper.py --only table --model 'synthetic:llama-3-70b'     # the shape itself, on a CUDA device

Table. Full, sparse and Sirius in seconds a token, as in arXiv 2409.03856. Without a GPU: the shape of Llama-3-70B in bfloat16,
all 80 layers at a sixteenth of the width, over an emulated link at a hundredth of the paper's rate, so that bytes of attention,
of neurons and of slots stand to each other as in the 70B model. On CUDA: that shape itself. First the paper's own setting: all
is streamed, drafts too, half of the neurons kept, windows of 16, and 15.2 tokens a window, the paper's AAL, by a script, as
random weights accept nothing. Every window counts with its correction. Then drafts on the device, with as much of it for layers
as a card of 24 GB leaves the 70B model in 4 bits, and in bfloat16; there also with the AAL that a real model (SmolLM2-135M) has
with as many neurons kept as that card's hot set has. Without a GPU the rows "int4 on the card" are of bfloat16 weights, too,
with the share of the layers on the device that weights in 4 bits would have: products with quantised rows are in none of them.
Where --model has weights of its own, its own acceptance is measured, too. Scores are not: random weights have none.

The ceiling of a row is the link: its bytes over the link's rate, as a share of its seconds. The floor of the paper's setting is
arithmetic, ((W - 1) * d + 1) / AAL of mode full, d = 0.588 being a draft step's share of a pass.

Ablations. SmolLM2-135M in float32, one prompt of each of some categories: threshold, window, tree width, keys and values
rewritten by corrections or left as drafts wrote them, rejected tokens taken back or left, and the refresh of resident drafts.
Bytes are what counts for a larger model: they are the ratio of seconds where the link is all that takes time.

Rows go into OUT.partial as they come; with --only the other half of the result file stays.
Exit status: 0 all held, 1 with the paper's AAL its own setting took more than 0.66 of mode full, or the hot set of the card in 4
bits more than 0.30 of either mode full (not judged with --quick), or a row of the paper's setting is missing, 2 wrong use, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from asked import exit_status, require
from decode import prompts
from paper_ablations import LINK_GBPS, paper_ablations
from paper_table import paper_table
from report import RESULTS, command_line, finish, machine_facts, parts_of

PARTS = {"table": paper_table, "ablations": paper_ablations}


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    return exit_status(lambda: measure(options))


def measure(options: argparse.Namespace) -> int:
    """What is asked for, beside the other half. What is known stands in OUT.partial. Raises USER_ERRORS."""
    require(options, tokens=1, windows=1, num_prompts=1, max_new_tokens=2)
    facts = machine_facts()
    out = options.out or RESULTS / f"paper-{facts['date']}.json"
    partial_out = out.with_name(f"{out.name}.partial")
    names = list(PARTS) if options.only is None else [options.only]
    result = {**parts_of(out, [name for name in PARTS if name not in names]), **facts}
    with tempfile.TemporaryDirectory() as folder:  # a prior of earlier runs would change drafts
        os.environ["OFFLOAD_SIRIUS_CACHE"] = folder
        for name in names:
            result[name] = PARTS[name](options, partial(write_half, partial_out, result, name)) | {"command": command_line()}
    held = result["table"]["held"] if "table" in names else []
    for each in held:
        print(f"{each['what']}: {each['found']}: {'holds' if each['holds'] else 'DOES NOT HOLD'}")
    finish("paper", result, out)
    partial_out.unlink(missing_ok=True)
    return int(not all(each["holds"] for each in held))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="one half")
    parser.add_argument("--model", help="of the table; default: the 70B shape, shrunk where there is no GPU")
    parser.add_argument("--device", default="auto", help="default %(default)s")
    parser.add_argument("--link-gbps", type=float, help="of the table: emulate a link of that rate; default: see above")
    parser.add_argument("--threads", type=int, help="of the table, that compute; default: the program's")
    parser.add_argument("--shared-host-buffers", type=int, help="of the table: let all layers share so many; 8 for 70B on CUDA")
    parser.add_argument("--tokens", type=int, default=8, help="that are timed of full and sparse, default %(default)s")
    parser.add_argument("--windows", type=int, default=5, help="that are timed, default %(default)s: 76 tokens")
    parser.add_argument("--real-model", default="smollm2-135m", help="of acceptance and ablations, default %(default)s")
    parser.add_argument("--ablations-link-gbps", type=float, default=LINK_GBPS, help="without a GPU, default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=6, help="of the real model, default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of its answers, default %(default)s")
    parser.add_argument("--quick", action="store_true", help="one window, three tokens, one prompt of 16 tokens: does it run?")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/paper-DATE.json")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.windows, options.num_prompts, options.max_new_tokens = 3, 1, 1, 16
    options.prompts = prompts(options.num_prompts)
    return options


def write_half(path: Path, result: dict[str, Any], name: str, half: dict[str, Any]) -> None:
    """Keep what there is of one half, beside the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {name: half}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
