"""Does a resident draft step take the time of its bytes in device memory, and a correction that of its others over the link?

    python benchmarks/hot_passes.py                                  # the 70B shape in the bytes of int8, 24 GiB of a GPU
    python benchmarks/hot_passes.py --model 'synthetic:small?dtype=F32' --device cpu --link-gbps 0.05 --device-memory 200MiB

draft: a step of one token and the choice of the next one; beside its resident bytes (attention, hot neurons, head) over the rate
at which the device reads the head, the better one of a sum and a product with one row. On a GPU both with its kernels launched
one by one and as a recorded graph; with --trace the former pays for some hundred events more.
correction: a window of 16, one behind the other, so that each brings all neurons that are not hot; beside their bytes over the
link's best rate. In a window part of them comes while drafts compute: what is left is the correction there.
Medians; weights are random, so which tokens are drafted does not matter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from report import finish, machine_facts
from torch.nn import functional

from offload_sirius.bench.link import pinned_upload_bytes_per_second
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.decode.model import Ask, Pass
from offload_sirius.engine import Engine, NoProgress, build, open_model
from offload_sirius.engine.placement import find_device
from offload_sirius.engine.streamed import StreamedModel
from offload_sirius.errors import USER_ERRORS, ConfigError
from offload_sirius.trace import Tracer

WINDOW = 16
NUM_PROMPT = 64
CONTEXT = 512
NUM_WINDOWS = 5
NUM_READS = 10


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What was measured. Seconds are medians."""

    resident_nbytes: int
    """What a draft step reads, keys and values apart."""
    device_bytes_per_second: float
    launched_seconds: float
    """Of a draft step whose kernels are launched one by one."""
    draft_seconds: float
    """Of a draft step as it is: recorded, where the device records."""
    is_recorded: bool
    recorded_nbytes: int | None
    """Device memory that was taken while it was recorded; None where it was not."""
    cold_nbytes: int
    """What a correction brings."""
    link_bytes_per_second: float
    correction_seconds: float
    window_draft_seconds: float
    """Of all drafts of a window."""
    window_correction_seconds: float
    """Of its correction, of which the drafts' time has already brought a part."""

    @property
    def launched_ratio(self) -> float:
        """Seconds beside those of the bytes."""
        return self.launched_seconds * self.device_bytes_per_second / self.resident_nbytes

    @property
    def draft_ratio(self) -> float:
        """Seconds beside those of the bytes."""
        return self.draft_seconds * self.device_bytes_per_second / self.resident_nbytes

    @property
    def correction_ratio(self) -> float:
        """Seconds beside those of the bytes."""
        return self.correction_seconds * self.link_bytes_per_second / self.cold_nbytes


def main() -> int:
    options = arguments()
    try:
        device = find_device(options.device)
        if device.type != "cuda" and options.link_gbps is None:
            raise ConfigError("no CUDA device: give --link-gbps, and a small --model, to emulate the link of one")
        link = options.link_gbps * 1e9 if options.link_gbps else pinned_upload_bytes_per_second(device)
        tracer = Tracer() if options.trace else None
        model = open_model(options.model)
        with build(model, config_of(options), NoProgress(), tracer) as engine:
            passes = measure(engine, link)
            result = {"model": options.model, "device": str(device), "num_hot": hot_share(engine), **figures_of(passes)}
            if tracer is not None:
                tracer.write(options.trace)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table_of(options.model, passes))
    finish("hot-passes", {**result, **machine_facts()}, options.out)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3-70b?layers=40", help="default %(default)s")
    parser.add_argument("--device", default="auto", help="default %(default)s")
    parser.add_argument("--device-memory", default="24GiB", help="default %(default)s")
    parser.add_argument("--keep", type=float, default=0.5, help="share of neurons that may be hot, default %(default)s")
    parser.add_argument("--link-gbps", type=float, help="emulate a link of that rate; default: the device's own")
    parser.add_argument("--shared-host-buffers", type=int, help="let all layers share so many host buffers")
    parser.add_argument("--trace", type=Path, help="write what was copied and computed when, for ui.perfetto.dev")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/hot-passes-DATE.json")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=options.model,
        device=options.device,
        device_memory=options.device_memory,
        link_gbps=options.link_gbps,
        max_context=CONTEXT,
        shared_host_buffers=options.shared_host_buffers,
        decoding=DecodingConfig(draft="resident", keep=options.keep, window=WINDOW, lookup=False, prior=False),
    )


def measure(engine: Engine, link_bytes_per_second: float) -> Passes:
    """Windows whose drafts are launched, then as they are, then corrections alone."""
    plan, streamed = engine.plan, engine._streamed  # single passes are no part of an engine's surface
    assert plan.hot is not None
    streamed.prepare(engine.config.decoding)
    streamed.slots[0].begin(0)
    run(streamed, "prefill", range(1, NUM_PROMPT + 1), following="draft")
    with plain_drafts(streamed):
        launched = [window(streamed) for _ in range(NUM_WINDOWS + 1)][1:]
    before = free_nbytes(engine)
    window(streamed)  # records
    recorded_nbytes = None if before is None else before - (free_nbytes(engine) or 0)
    recorded = [window(streamed) for _ in range(NUM_WINDOWS)]
    window_ids = range(1, WINDOW + 1)
    corrections = [seconds_of(lambda: correct(streamed, window_ids, following="correction")) for _ in range(NUM_WINDOWS + 1)]
    return Passes(
        resident_nbytes=sum(plan.device_bill[what] for what in ("attention", "hot_neurons", "head")),
        device_bytes_per_second=device_bytes_per_second(engine),
        launched_seconds=median(each for drafts, _ in launched for each in drafts),
        draft_seconds=median(each for drafts, _ in recorded for each in drafts),
        is_recorded=streamed._captured is not None and streamed._captured.num_recorded > 0,
        recorded_nbytes=recorded_nbytes,
        cold_nbytes=plan.pass_nbytes,
        link_bytes_per_second=link_bytes_per_second,
        correction_seconds=median(corrections[1:]),
        window_draft_seconds=median(sum(drafts) for drafts, _ in recorded),
        window_correction_seconds=median(correction for _, correction in recorded),
    )


@contextmanager
def plain_drafts(streamed: StreamedModel) -> Iterator[None]:
    """Draft steps are not recorded in this block."""
    captured, streamed._captured = streamed._captured, None
    yield
    streamed._captured = captured


def window(streamed: StreamedModel) -> tuple[list[float], float]:
    """Seconds of each draft step of a window, and of its correction. Nothing of it is kept."""
    token_ids, seconds = [1], list[float]()

    def draft() -> None:
        following: Pass = "draft" if len(token_ids) < WINDOW - 1 else "correction"
        token_ids.append(int(run(streamed, "draft", token_ids[-1:], following=following).argmax()))

    while len(token_ids) < WINDOW:
        seconds.append(seconds_of(draft))
    streamed.slots[0].keep(NUM_PROMPT)
    return seconds, seconds_of(lambda: correct(streamed, token_ids, following="draft"))


def correct(streamed: StreamedModel, token_ids: Sequence[int], *, following: Pass) -> None:
    run(streamed, "correction", token_ids, following=following)[-1].argmax().item()  # waits for the device
    streamed.slots[0].keep(NUM_PROMPT)


def run(streamed: StreamedModel, kind: Pass, token_ids: Sequence[int], *, following: Pass) -> torch.Tensor:
    """Logits of a pass."""
    return streamed.run([Ask(slot=streamed.slots[0], kind=kind, token_ids=list(token_ids), following=following)])[0]


def device_bytes_per_second(engine: Engine) -> float:
    """At which the device reads the head."""
    head = engine._streamer.head
    row = torch.ones(1, head.shape[1], dtype=head.dtype, device=head.device)

    def read_by(work: Callable[[], torch.Tensor]) -> float:
        return median(seconds_of(lambda: work().flatten()[0].item()) for _ in range(NUM_READS))

    ways = (lambda: functional.linear(row, head), lambda: head.sum(dtype=torch.float32))
    return head.nbytes / min(read_by(way) for way in ways)


def seconds_of(work: Callable[[], object]) -> float:
    """Of work that waits for the device."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def free_nbytes(engine: Engine) -> int | None:
    """Of the device; None where it is the host."""
    if engine.device.type != "cuda":
        return None
    torch.cuda.synchronize(engine.device)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(engine.device)[0])


def hot_share(engine: Engine) -> str:
    assert engine.plan.hot is not None
    return f"{engine.plan.hot.num_hot} of {engine.spec.ffn_width}"


def figures_of(passes: Passes) -> dict[str, object]:
    ratios = {name: getattr(passes, name) for name in ("launched_ratio", "draft_ratio", "correction_ratio")}
    return asdict(passes) | ratios


def table_of(model: str, passes: Passes) -> str:
    recorded = "as a graph" if passes.is_recorded else "not recorded"
    drafts = f"{passes.window_draft_seconds * 1e3:.3f} ms of drafts"
    return "\n".join(
        (
            f"{model}: a draft reads {passes.resident_nbytes / 1e9:.3f} GB at {passes.device_bytes_per_second / 1e9:.1f} GB/s",
            f"  launched     {passes.launched_seconds * 1e3:9.3f} ms, {passes.launched_ratio:.2f} of its bytes",
            f"  {recorded:12} {passes.draft_seconds * 1e3:9.3f} ms, {passes.draft_ratio:.2f} of its bytes",
            f"a correction brings {passes.cold_nbytes / 1e9:.3f} GB at {passes.link_bytes_per_second / 1e9:.2f} GB/s",
            f"  alone        {passes.correction_seconds * 1e3:9.3f} ms, {passes.correction_ratio:.2f} of its bytes",
            f"  in a window  {passes.window_correction_seconds * 1e3:9.3f} ms behind {drafts}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
