"""Would CUDA graphs make the resident parts of a step faster? The layers of one step as they are, and as a captured graph.

    python benchmarks/graphs.py --model 'synthetic:llama-3-8b?layers=16'

All layers are resident. A step through them is timed with the host launching every kernel, and as the replay of a graph captured
at the same position (which a real step could not use as it is: its cache grows). What a graph saves is the difference; where
layers are streamed it is hidden behind the link as long as a layer's launches take less than its bytes. Resident draft steps are
recorded in a way that they can use; what that brings hot_passes.py measures. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import finish, machine_facts

from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import NoProgress, build, open_model

PROMPT_TOKENS = 128
NUM_ROUNDS = 20


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print("error: no CUDA device; this question is about graphs of CUDA kernels", file=sys.stderr)
        return 2
    model = open_model(options.model)
    full = DecodingConfig(mode="full")
    config = EngineConfig(model=options.model, device="cuda", max_context=PROMPT_TOKENS + 1, decoding=full)
    with build(model, config, NoProgress()) as engine:
        if engine.plan.streamed_layers:
            print(f"error: {options.model} does not fit the device; give one with fewer layers", file=sys.stderr)
            return 2
        transformer = engine._transformer  # graphs are no part of an engine's surface
        transformer.prefill(torch.arange(1, PROMPT_TOKENS + 1))
        with torch.inference_mode():
            hidden = engine._streamer.embed(torch.tensor([1]))
            chunk = transformer._line(transformer.cache, hidden, transformer.cache.length)
            launched = median_seconds(lambda: transformer._pass([chunk], transformer._dense))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                transformer._pass([chunk], transformer._dense)
            replayed = median_seconds(graph.replay)
    num_layers = model.spec.num_layers
    print(
        f"{options.model}: {num_layers} layers launched {launched * 1e3:.3f} ms, as a graph {replayed * 1e3:.3f} ms, "
        f"saved {(launched - replayed) / num_layers * 1e6:.0f} us a layer"
    )
    result = {"model": options.model, "launched_seconds": launched, "graph_seconds": replayed, "num_layers": num_layers}
    finish("graphs", {**result, **machine_facts()}, options.out)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3-8b?layers=16", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/graphs-DATE.json")
    return parser.parse_args()


def median_seconds(act: Callable[[], None]) -> float:
    """Of one, the device waited for at both ends; the first few are warm-up."""
    seconds = []
    for _ in range(NUM_ROUNDS + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        act()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


if __name__ == "__main__":
    sys.exit(main())
