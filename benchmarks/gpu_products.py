"""How fast do a few tokens meet many quantised rows on a GPU? Triton's kernels beside the memory's rate and torch's own products.

    python benchmarks/gpu_products.py                                              # the feed-forward of the 70B shape
    python benchmarks/gpu_products.py --device cpu --rows 512 --width 256          # that it runs, nothing else

linear is what gates take, down what the down projection takes. One token is bound by memory: its share is the packed bytes a
second over the rate at which the device reads plain weights, the better one of a sum and a product with one row. 64 tokens are
held against torch's product in bfloat16 with as many weights: their share is its seconds over ours. A product goes in turn over
copies that no cache holds together, and on a GPU all of them are one recorded graph, as draft steps are: launching them one by
one would take longer than the smallest does. Medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import finish, machine_facts
from torch import Tensor
from torch.nn import functional

from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.kernels.quantized import quantized_down, quantized_linear
from offload_sirius.quantization import WeightFormat
from offload_sirius.weights.quant import quantise_rows

FORMATS = (WeightFormat(kind="int8", group=64), WeightFormat(kind="int4", group=128))
NUM_COPIES = 3
NUM_ROUNDS = 10
MANY_TOKENS = 64
QUANTISED_ROWS = 512
"""So many are quantised, and repeated: what is measured does not depend on the numbers."""

Product = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One product."""

    what: str
    format: str
    num_tokens: int
    seconds: float
    bytes_per_second: float
    """Of weights as they lie in memory."""
    share: float
    """Of what it is held against."""


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; this question is about kernels of a GPU", file=sys.stderr)
        return 2
    with torch.inference_mode():
        plain = [torch.full((options.rows, options.width), 0.01, dtype=torch.bfloat16, device=device) for _ in range(NUM_COPIES)]
        ceiling = bytes_per_second(plain)
        print(f"{options.rows} x {options.width}, the device reads {ceiling / 1e9:.1f} GB/s")
        torch_seconds = many_tokens_by_torch(plain)
        del plain
        rows = [row for form in FORMATS for row in rows_of(form, options, device, ceiling, torch_seconds)]
    result = {
        "num_rows": options.rows,
        "width": options.width,
        "ceiling_bytes_per_second": ceiling,
        "torch_seconds": torch_seconds,
        "rows": [asdict(row) for row in rows],
    }
    finish("gpu-products", result | machine_facts(), options.out)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default %(default)s")
    parser.add_argument("--rows", type=int, default=28672, help="of the matrix, in steps of 512, default %(default)s")
    parser.add_argument("--width", type=int, default=8192, help="weights of a row, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/gpu-products-DATE.json")
    return parser.parse_args()


def bytes_per_second(plain: Sequence[Tensor]) -> float:
    """At which the device reads weights."""
    row = torch.ones(1, plain[0].shape[1], dtype=torch.bfloat16, device=plain[0].device)
    ways: tuple[list[Product], ...] = (
        [lambda weights=weights: functional.linear(row, weights) for weights in plain],
        [lambda weights=weights: weights.sum(dtype=torch.float32) for weights in plain],
    )
    return plain[0].nbytes / min(seconds_of(way, plain[0].device) for way in ways)


def many_tokens_by_torch(plain: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of torch's products in bfloat16."""
    x, z = tokens_for(plain[0].shape, MANY_TOKENS, plain[0].device)
    return {
        "linear": seconds_of([lambda weights=weights: functional.linear(x, weights) for weights in plain], x.device),
        "down": seconds_of([lambda weights=weights: z @ weights for weights in plain], z.device),
    }


def tokens_for(shape: Sequence[int], num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[S, D] for linear and [S, N] for down."""
    num_rows, width = shape
    x, z = (torch.ones(num_tokens, size, dtype=torch.bfloat16, device=device) for size in (width, num_rows))
    return x, z


def rows_of(
    form: WeightFormat, options: argparse.Namespace, device: torch.device, ceiling: float, torch_seconds: dict[str, float]
) -> list[Row]:
    """Both products of a format, with one token and with many."""
    chance = torch.Generator().manual_seed(0)
    some = quantise_rows(torch.randn(QUANTISED_ROWS, options.width, generator=chance) * 0.02, form)
    packed = some.repeat(options.rows // QUANTISED_ROWS, 1)
    matrices = [QuantizedRows(packed.to(device, copy=True), options.width, form) for _ in range(NUM_COPIES)]
    found = []
    for num_tokens in (1, MANY_TOKENS):
        x, z = tokens_for((len(packed), options.width), num_tokens, device)
        products: dict[str, list[Product]] = {
            "linear": [lambda matrix=matrix, x=x: quantized_linear(x, matrix) for matrix in matrices],
            "down": [lambda matrix=matrix, z=z: quantized_down(z, matrix) for matrix in matrices],
        }
        for what, all_copies in products.items():
            seconds = seconds_of(all_copies, device)
            rate = packed.nbytes / seconds
            share = rate / ceiling if num_tokens == 1 else torch_seconds[what] / seconds
            found.append(
                Row(
                    what=what,
                    format=f"{form.kind}/{form.group}",
                    num_tokens=num_tokens,
                    seconds=seconds,
                    bytes_per_second=rate,
                    share=share,
                )
            )
            print(line_of(found[-1]), flush=True)
    return found


def seconds_of(products: Sequence[Product], device: torch.device) -> float:
    """Of one, on average over all copies; the median of several rounds."""
    for product in products:
        product()  # the first one of its kind is tuned
    act = recorded(products) if device.type == "cuda" else lambda: [product() for product in products]
    seconds = []
    for _ in range(NUM_ROUNDS + 1):
        synchronise(device)
        began = time.perf_counter()
        act()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:]) / len(products)


def recorded(products: Sequence[Product]) -> Callable[[], Any]:
    """All of them as one launch."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    return graph.replay


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line_of(row: Row) -> str:
    against = "of the memory's rate" if row.num_tokens == 1 else "of torch's speed in bfloat16"
    return (
        f"{row.what:6} {row.format:8} {row.num_tokens:2} tokens {row.seconds * 1e6:9.1f} us  "
        f"{row.bytes_per_second / 1e9:7.1f} GB/s  {row.share:.1%} {against}"
    )


if __name__ == "__main__":
    sys.exit(main())
