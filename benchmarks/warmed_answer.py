"""An answer of this program behind another one that is not counted, as the line of `generate --json`. a_third.py runs it.

    python benchmarks/warmed_answer.py --settings '{"model": "synthetic:small", "mode": "full"}' --prompt Hi --new 8 --warm-up 4

What warms up is in mode full, whatever the mode of the answer.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import offload_sirius


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=json.loads, required=True, help="of offload_sirius.load, as JSON")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--new", type=int, required=True, help="tokens")
    parser.add_argument("--warm-up", type=int, default=0, help="tokens that are not counted, default %(default)s")
    options = parser.parse_args()
    asked: dict[str, Any] = {"ignore_eos": True, "chat": False, "reuse": False}
    with offload_sirius.load(**options.settings) as engine:
        if options.warm_up:
            engine.generate(options.prompt, mode="full", max_new_tokens=options.warm_up, **asked)
        answer = engine.generate(options.prompt, max_new_tokens=options.new, **asked)
    print(json.dumps(answer.as_json()), flush=True)


if __name__ == "__main__":
    main()
