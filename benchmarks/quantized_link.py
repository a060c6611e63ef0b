"""Are passes over the link as much faster as their bytes are fewer? Layers in 4 bits beside bfloat16, over an emulated link.

    python benchmarks/quantized_link.py                  # SmolLM2-135M, all layers streamed, 0.2 GB/s
    python benchmarks/quantized_link.py --passes 31

Mode full, all layers in host memory, none resident. The rate is one at which a pass takes several times as long to arrive as to
compute, in any format. The bytes of a pass are those that the copiers counted, and must be what the format says of its rows; the
ceiling of a ratio is that of the bytes. A pass is one token of the real decode loop: head, sampling and detokenisation are in its
time. Medians; the spread is printed.

Must hold: every pass has the format's bytes, and where bfloat16 has at least 3.4 times as many, tokens come 3.4 times as fast.
Exit status: 0 it holds, 1 it does not.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from report import finish, machine_facts

from offload_sirius.bench.stream import run_passes, streaming_config
from offload_sirius.config import EngineConfig
from offload_sirius.engine import NoProgress, build, open_model
from offload_sirius.quantization import WeightFormat
from offload_sirius_loaders.spec import ModelSpec

FORMATS = (None, WeightFormat(kind="int8", group=64), WeightFormat(kind="int4", group=128), WeightFormat(kind="int4", group=32))
LEAST_RATIO = 3.4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One format."""

    name: str
    pass_nbytes: int
    """Counted."""
    format_nbytes: int
    """By arithmetic."""
    link_seconds: float
    """Bytes over the rate."""
    seconds: float
    all_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    rows = [row_of(form, options) for form in FORMATS]
    plain = rows[0]
    print(f"{options.model}, {options.link_gbps:g} GB/s")
    for row in rows:
        print(
            f"{row.name:22} {row.pass_nbytes / 1e6:7.2f} MB a pass, by the format {row.format_nbytes / 1e6:7.2f}; "
            f"{row.tokens_per_second:6.2f} tokens/s, {row.seconds / row.link_seconds:.3f} of the link's time "
            f"({min(row.all_seconds):.3f} to {max(row.all_seconds):.3f} s); {plain.seconds / row.seconds:.2f} times bfloat16's, "
            f"bytes {plain.pass_nbytes / row.pass_nbytes:.2f} times fewer"
        )
    held = holds(rows)
    result = {
        "model": options.model,
        "link_gbps": options.link_gbps,
        "rows": [asdict(row) | {"ratio": plain.seconds / row.seconds} for row in rows],
        "held": held,
    }
    finish("quantized-link", result | machine_facts(), options.out)
    return int(not held)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default %(default)s")
    parser.add_argument("--link-gbps", type=float, default=0.2, help="rate of the emulated link, default %(default)s")
    parser.add_argument("--passes", type=int, default=15, help="passes that count, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/quantized-link-DATE.json")
    return parser.parse_args()


def row_of(form: WeightFormat | None, options: argparse.Namespace) -> Row:
    """Load once, time passes."""
    model = open_model(options.model)
    config = EngineConfig(
        model=options.model,
        device="cpu",
        dtype="bfloat16",
        keep_blocks=False,
        link_gbps=options.link_gbps,
        quantize="none" if form is None else form.kind,
        quantize_group=None if form is None else form.group,
    )
    config = streaming_config(model, config, num_passes=options.passes, all_streamed=True)
    with build(model, config, NoProgress()) as engine:
        passes = run_passes(engine, options.passes, NoProgress())
        assert len(engine.plan.host_layers) == engine.spec.num_layers
    pass_nbytes = passes.result.link.bytes.full // passes.result.passes.full
    return Row(
        name="bfloat16" if form is None else f"{form.kind}, groups of {form.group}",
        pass_nbytes=pass_nbytes,
        format_nbytes=model.spec.num_layers * layer_nbytes(model.spec, form),
        link_seconds=pass_nbytes / (options.link_gbps * 1e9),
        seconds=median(passes.seconds),
        all_seconds=passes.seconds,
    )


def layer_nbytes(spec: ModelSpec, form: WeightFormat | None) -> int:
    """A layer of a llama whose every field fills whole cache lines, as those of SmolLM2 do."""

    def rows_nbytes(num_rows: int, width: int) -> int:
        return num_rows * (2 * width if form is None else form.row_nbytes(width))

    mixed = spec.num_heads * spec.head_dim
    projections = mixed + 2 * spec.num_kv_heads * spec.head_dim
    norms = 2 * 2 * spec.width
    return (
        norms
        + rows_nbytes(projections, spec.width)
        + rows_nbytes(spec.width, mixed)
        + rows_nbytes(3 * spec.ffn_width, spec.width)
    )


def holds(rows: list[Row]) -> bool:
    """See above."""
    plain, *quantised = rows
    return all(row.pass_nbytes == row.format_nbytes for row in rows) and all(
        plain.seconds / row.seconds >= LEAST_RATIO for row in quantised if plain.format_nbytes / row.format_nbytes >= LEAST_RATIO
    )


if __name__ == "__main__":
    sys.exit(main())
