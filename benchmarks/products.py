"""How fast do a few tokens meet many rows of weights on a CPU? tiles.c or products.c beside torch's own products.

    python benchmarks/products.py                  # one thread, seconds of CPU: right beside other work, too
    python benchmarks/products.py --threads 8      # wall-clock seconds: for a machine that does nothing else

The ceiling is the memory's rate, as a sum over float32 weights reads them. Every product goes in turn over matrices that no cache
holds together. Medians; GB/s are bytes of weights as they lie in memory, and a ratio below 1 is less time than torch's product in
bfloat16 takes for as many weights. Tokens are bfloat16, but for rows of float32 and where it is said.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import finish, machine_facts
from torch.nn import functional

from offload_sirius.kernels import cpu
from offload_sirius.kernels.native import native
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import WeightFormat
from offload_sirius.units import MIB
from offload_sirius.weights.quant import quantise_rows

SHAPES = ((1536, 576), (5632, 2048), (14336, 4096))
"""Rows, weights: gates of SmolLM2-135M, of a 1.1B and of an 8B model."""

TOKENS = (1, 16, 64)
REFERENCE = "linear torch bfloat16"
FORMATS = (
    WeightFormat(kind="int8", group=128),
    WeightFormat(kind="int8", group=32),
    WeightFormat(kind="int4", group=128),
    WeightFormat(kind="int4", group=32),
)


def main() -> None:
    options = arguments()
    if native("products").library is None:
        raise SystemExit(f"error: {native('products').problem}")
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    rows: list[dict[str, Any]] = [{"what": "ceiling", "bytes_per_second": ceiling(clock)}]
    print(f"ceiling: {rows[0]['bytes_per_second'] / 1e9:.1f} GB/s")
    for num_rows, width in SHAPES:
        for num_tokens in TOKENS:
            rows += shape_rows(num_rows, width, num_tokens, clock, options.rounds)
    clock_name = "seconds of CPU" if options.threads == 1 else "wall-clock seconds"
    finish("products", {"threads": options.threads, "clock": clock_name, "rows": rows, **machine_facts()}, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each figure, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/products-DATE.json")
    return parser.parse_args()


def ceiling(clock: Callable[[], float]) -> float:
    """Bytes a second."""
    weights = torch.ones(256 * MIB // 4)
    return weights.nbytes / min(seconds(weights.sum, clock) for _ in range(7))


def shape_rows(num_rows: int, width: int, num_tokens: int, clock: Callable[[], float], num_rounds: int) -> list[dict[str, Any]]:
    """All products of a shape, measured in turn."""
    products, nbytes = products_of(num_rows, width, num_tokens)
    taken: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(num_rounds + 1):
        for name, product in products.items():
            taken[name].append(seconds(lambda product=product, turn=turn: product(turn), clock))
    medians = {name: statistics.median(each[1:]) for name, each in taken.items()}  # the first turn is warm-up
    print(f"{num_rows} x {width}, {num_tokens} tokens")
    for name, median in medians.items():
        rate, ratio = nbytes[name] / median / 1e9, median / medians[REFERENCE]
        print(f"    {name:34} {median * 1e3:8.3f} ms  {rate:6.2f} GB/s  ratio {ratio:5.2f}")
    return [
        {
            "what": name,
            "num_rows": num_rows,
            "width": width,
            "num_tokens": num_tokens,
            "seconds": median,
            "bytes_per_second": nbytes[name] / median,
            "ratio": median / medians[REFERENCE],
        }
        for name, median in medians.items()
    ]


def products_of(num_rows: int, width: int, num_tokens: int) -> tuple[dict[str, Callable[[int], object]], dict[str, int]]:
    """Name -> a product with the matrix of that turn; name -> bytes of its weights."""
    torch.manual_seed(0)
    weights = torch.randn(num_rows, width) * 0.02
    num_copies = max(2, 128 * MIB // weights.nbytes)
    x, z = torch.randn(num_tokens, width), torch.randn(num_tokens, num_rows)
    products: dict[str, Callable[[int], object]] = {}
    nbytes: dict[str, int] = {}
    for dtype in (torch.float32, torch.bfloat16):
        copies = [weights.to(dtype, copy=True) for _ in range(num_copies)]
        name, x_typed, z_typed = str(dtype).removeprefix("torch."), x.to(dtype), z.to(dtype)
        products |= {
            f"linear torch {name}": lambda turn, x=x_typed, m=copies: functional.linear(x, m[turn % len(m)]),
            f"linear {name}": lambda turn, x=x_typed, m=copies: cpu.linear(x, m[turn % len(m)]),
            f"down torch {name}": lambda turn, z=z_typed, m=copies: z @ m[turn % len(m)],
            f"down {name}": lambda turn, z=z_typed, m=copies: cpu.down(z, m[turn % len(m)]),
        }
        nbytes |= dict.fromkeys(list(products)[-4:], weights.numel() * dtype.itemsize)
    for form in FORMATS:
        packed = quantise_rows(weights, form)
        rows = [QuantizedRows(packed.clone(), width, form) for _ in range(4 * num_copies)]
        for typed in (torch.bfloat16, torch.float32):
            name = f"{form.kind}/{form.group}{', float32 tokens' if typed == torch.float32 else ''}"
            x_typed, z_typed = x.to(typed), z.to(typed)
            products |= {
                f"linear {name}": lambda turn, x=x_typed, m=rows: cpu.linear(x, m[turn % len(m)]),
                f"down {name}": lambda turn, z=z_typed, m=rows: cpu.down(z, m[turn % len(m)]),
            }
        nbytes |= dict.fromkeys(list(products)[-4:], packed.nbytes)
    return products, nbytes


def seconds(action: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    action()
    return clock() - began


if __name__ == "__main__":
    main()
