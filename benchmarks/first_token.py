"""What does the first token of a long prompt cost? Seconds to it, against one streamed pass of the same model in the same run.

    python benchmarks/first_token.py --model 'synthetic:llama-3-70b?layers=40' --prompt-tokens 1000
    python benchmarks/first_token.py --model synthetic:tinyllama-1.1b --link-gbps 0.5 --prompt-tokens 100

A prompt is one pass whatever its length, so on a device that computes faster than weights arrive the ratio is near 1.
Medians of a few prompts and passes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from report import finish, machine_facts

from offload_sirius.bench.stream import pass_seconds, streaming_config
from offload_sirius.config import EngineConfig
from offload_sirius.engine import NoProgress, build, open_model
from offload_sirius.errors import USER_ERRORS, PromptError

NUM_PASSES = 5


def main() -> int:
    """Returns the exit status: 0, or 2 for what cannot be measured."""
    options = arguments()
    try:
        measure(options)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    """Load once; passes, then prompts."""
    model = open_model(options.model)
    config = EngineConfig(
        model=options.model,
        device=options.device,
        link_gbps=options.link_gbps,
        shared_host_buffers=options.shared_host_buffers,
    )
    most = model.spec.max_positions // 2
    if options.prompt_tokens > most:
        raise PromptError(f"--prompt-tokens is {options.prompt_tokens}; give at most {most}, half of the model's positions")
    config = streaming_config(model, config, num_passes=options.prompt_tokens + NUM_PASSES, all_streamed=True)
    with build(model, config, NoProgress()) as engine:
        one_pass = statistics.median(pass_seconds(engine, NUM_PASSES))
        prompt = [1 + index % 200 for index in range(options.prompt_tokens)]
        answers = [
            engine.generate(prompt, mode="full", max_new_tokens=1, ignore_eos=True, reuse=False) for _ in range(options.prompts)
        ]
    seconds = [answer.ttft_seconds for answer in answers]
    ratio = statistics.median(seconds) / one_pass
    print(
        f"{options.model}: first token of {options.prompt_tokens} after {statistics.median(seconds):.3f} s "
        f"({min(seconds):.3f} to {max(seconds):.3f}), a pass {one_pass:.3f} s, ratio {ratio:.2f}"
    )
    result = {
        "model": options.model,
        "shared_host_buffers": options.shared_host_buffers,
        "prompt_tokens": options.prompt_tokens,
        "first_token_seconds": seconds,
        "pass_seconds": one_pass,
        "ratio": ratio,
    }
    finish("first-token", {**result, **machine_facts()}, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3-70b?layers=40", help="default %(default)s")
    parser.add_argument("--device", default="auto", help="default %(default)s")
    parser.add_argument("--link-gbps", type=float, help="emulate a link of that rate")
    parser.add_argument("--shared-host-buffers", type=int, help="for shapes that exceed host memory")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--prompts", type=int, default=3, help="how many, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/first-token-DATE.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
