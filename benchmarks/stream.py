"""Does the link ever idle? Full passes of a model through the streamer, against the ceiling of the same bytes in the same run.

    python benchmarks/stream.py                       # emulated link of 1 GB/s, then the disk
    python benchmarks/stream.py --link-gbps 2 --only link

link: the streamed layers are in host memory; the ceiling is their bytes over the set rate.
disk: the streamed layers are read from the checkpoint's files in every pass; the ceiling is the best plain O_DIRECT read of the
same number of bytes over several queue depths, measured before each pass that counts, since disks vary from minute to minute.
A pass is one token of the real decode loop: head, sampling and detokenisation are in its time. Medians; the spread is printed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from report import finish, machine_facts

import offload_sirius
from offload_sirius.bench.stream import checkpoint_files, pass_seconds
from offload_sirius.engine import Engine
from offload_sirius.units import MIB
from offload_sirius.weights.disk_rate import QUEUES, read_seconds


def main() -> None:
    options = arguments()
    rows: list[dict[str, Any]] = []
    if options.only in (None, "link"):
        rows.append(link_row(options))
    if options.only in (None, "disk"):
        rows.append(disk_row(options))
    for row in rows:
        print(
            f"{row['what']:28} {row['bytes'] / 1e9:.3f} GB a pass: ceiling {row['ceiling_seconds']:.3f} s, "
            f"pass {row['seconds']:.3f} s ({min(row['all_seconds']):.3f} to {max(row['all_seconds']):.3f}), "
            f"ratio {row['ratio']:.3f}"
        )
    finish("stream", {"model": options.model, "passes": options.passes, "rows": rows, **machine_facts()}, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:tinyllama-1.1b", help="default %(default)s")
    parser.add_argument("--link-gbps", type=float, default=1.0, help="rate of the emulated link, default %(default)s")
    parser.add_argument("--passes", type=int, default=5, help="passes that count, default %(default)s")
    parser.add_argument("--only", choices=("link", "disk"), help="one of the two")
    parser.add_argument("--device-memory", help="default: head, cache and the slots, no resident layers")
    parser.add_argument("--disk-host-memory", default="200MiB", help="what the readers may take, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/stream-DATE.json")
    return parser.parse_args()


def link_row(options: argparse.Namespace) -> dict[str, Any]:
    """Passes over the emulated link."""
    with load(options, link_gbps=options.link_gbps) as engine:
        seconds = pass_seconds(engine, options.passes)
        ceiling = engine.plan.pass_nbytes / (options.link_gbps * 1e9)
        return row(f"link at {options.link_gbps:g} GB/s", engine, seconds, [ceiling])


def disk_row(options: argparse.Namespace) -> dict[str, Any]:
    """Passes from disk, each beside plain reads of as many bytes of the same files."""
    with load(options, host_memory=options.disk_host_memory) as engine:
        assert engine.plan.disk_layers, "everything fits into host memory; give a smaller --disk-host-memory"
        files = checkpoint_files(engine.checkpoint)
        pass_seconds(engine, 6)  # the reader tunes its depth over these
        ceilings, seconds = [], []
        for _ in range(options.passes):
            ceilings.append(min(read_seconds(files, engine.plan.pass_nbytes, *queue) for queue in QUEUES))
            seconds += pass_seconds(engine, 2)[-1:]
        return row("disk", engine, seconds, ceilings)


def load(options: argparse.Namespace, **settings: Any) -> Engine:
    """The model with no more device memory than streaming takes."""
    device_memory = options.device_memory or smallest_device_memory(options.model)
    return offload_sirius.load(options.model, device_memory=device_memory, max_context=64, mode="full", **settings)


def smallest_device_memory(model: str) -> str:
    """Fixed parts and four slots of a bfloat16 model, without its weights being read."""
    from offload_sirius.weights.layout import layer_layout
    from offload_sirius_loaders import open_checkpoint

    spec = open_checkpoint(model).spec
    return str(2 * spec.vocab_size * spec.width + 4 * layer_layout(spec, 2).nbytes + 16 * MIB)


def row(what: str, engine: Engine, seconds: list[float], ceilings: list[float]) -> dict[str, Any]:
    """One line of the table: medians, and the median of the ratio of each pair."""
    ceiling = statistics.median(ceilings)
    pairs = zip(seconds, ceilings if len(ceilings) == len(seconds) else [ceiling] * len(seconds), strict=True)
    return {
        "what": what,
        "bytes": engine.plan.pass_nbytes,
        "slots": engine.plan.num_slots,
        "ceiling_seconds": ceiling,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "all_ceiling_seconds": ceilings,
        "ratio": statistics.median(second / best for second, best in pairs),
    }


if __name__ == "__main__":
    main()
