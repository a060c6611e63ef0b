"""How fast a machine is: link, disk, device memory, arithmetic; measured once and kept, given by the user, or assumed.

Every rate says where it comes from. Knows neither how they are measured (bench/rates.py) nor what they are used for
(weights/predict.py); no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from offload_sirius.errors import ConfigError
from offload_sirius.files import write_whole
from offload_sirius.quantization import KINDS, Kind

DtypeName = Literal["bfloat16", "float32"]
"""A type that weights are held and computed in: a machine has rates for each."""

GIVEN, ASSUMED = "given", "assumed"


@dataclass(frozen=True, kw_only=True)
class QuantizedRates:
    """Rates of products with quantised weights of one kind, for one type of activations. Groups count by their bytes."""

    bytes_per_second: float
    """Rate at which a product of one token reads them, scales included."""
    flops_per_second: float
    """Additions and multiplications of each further token, of few that read them as they are."""
    unpacking_bytes_per_second: float
    """Rate at which they are dequantised for products of many tokens, which are those of plain weights."""
    source: str
    """assumed, or `measured DATE`."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one machine, one device of it and one type of weights."""

    link_bytes_per_second: float
    """Host memory to device: pinned uploads to a GPU; memory to memory by one thread on a CPU."""
    disk_bytes_per_second: float
    """Plain reads of a file past the page cache."""
    device_bytes_per_second: float
    """Rate at which a layer's forward pass of one token reads its weights."""
    device_flops_per_second: float
    """Additions and multiplications of a layer's forward pass of many tokens."""
    layer_overhead_seconds: float
    """What a layer takes beyond that, however small it is: calls, kernels, norms, a cache entry."""
    step_overhead_seconds: float
    """What a pass takes beyond its layers and its head: an embedding row, the choice of a token, a turn of the loop."""
    compute_share_beside_copies: float
    """Speed of computing while the link copies without pause, over its speed alone. 1 where a copy takes neither the memory nor
    the cores that compute."""
    copy_share_beside_computing: float
    """The same of the copy."""
    compute_share_beside_readers: float
    """Speed of computing on the cores that are left to it while layers come from disk, over its speed on all."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> given, assumed, or `measured DATE`."""
    quantized: Mapping[Kind, QuantizedRates] = field(default_factory=dict)
    """Of quantised weights, as far as they were measured."""

    def of_quantized(self, kind: Kind) -> QuantizedRates:
        """Those that were measured, or shares of the rates of plain weights that are assumed."""
        return self.quantized.get(kind) or self._assumed_of(kind)

    def _assumed_of(self, kind: Kind) -> QuantizedRates:
        reading, unpacking = ASSUMED_SHARES[kind]
        return QuantizedRates(
            bytes_per_second=reading * self.device_bytes_per_second,
            flops_per_second=ASSUMED_FLOPS_SHARE * self.device_flops_per_second,
            unpacking_bytes_per_second=unpacking * self.device_bytes_per_second,
            source=ASSUMED,
        )

    def given(self, **values: float | None) -> Rates:
        """With these in place of what was measured or assumed; None leaves a rate as it is."""
        changed = {name: value for name, value in values.items() if value is not None}
        return replace(self, **changed, sources={**self.sources, **dict.fromkeys(changed, GIVEN)})  # type: ignore[arg-type]


NAMES = tuple(each.name for each in fields(Rates) if each.name not in ("sources", "quantized"))
QUANTIZED_NAMES = tuple(each.name for each in fields(QuantizedRates) if each.name != "source")

ASSUMED_SHARES: dict[Kind, tuple[float, float]] = {"int8": (0.9, 0.08), "int4": (0.75, 0.03)}
"""Of the rate at which plain weights are read: quantised ones read for a token, and dequantised. As a core of a Xeon does it; of
a GPU the first is what its kernels are to reach."""

ASSUMED_FLOPS_SHARE = 0.6
"""Of the arithmetic of plain weights: what the kernels for a GPU are to reach."""


def rates_from(source: str, **values: float) -> Rates:
    """Rates that all have the same source."""
    return Rates(**values, sources=dict.fromkeys(values, source))  # type: ignore[arg-type]


LINK_BYTES_PER_SECOND = 25e9
"""Pinned uploads over PCIe 4 x16, as others have measured them: of 31.5 GB/s, about 25 arrive."""

DISK_BYTES_PER_SECOND = 3e9
"""An NVMe disk on four lanes of PCIe 3, which most of those sold in the last years reach."""

GPU_BYTES_PER_SECOND, GPU_FLOPS_PER_SECOND = 900e9, 100e12
"""Consumers' cards with 24 GB read their memory at 900 to 1000 GB/s and compute 70 to 165 TFLOPS in bfloat16."""

GPU_LAYER_SECONDS, GPU_STEP_SECONDS = 100e-6, 1e-3
"""About twenty kernels a layer, at the 5 us that launching one takes; one round trip of a token, and Python around it."""

CPU_COPY_BYTES_PER_SECOND = 5e9
"""One thread that copies: each byte is read and written, by a core that moves about 10 GB/s."""

CPU_BYTES_PER_SECOND_OF_CORE, CPU_BYTES_PER_SECOND = 8e9, 40e9
"""A core alone, and two channels of DDR4 that many of them share."""

CPU_FLOPS_PER_SECOND_OF_CORE = 40e9
"""Eight multiply-add lanes of float32 at 2.5 GHz; bfloat16 is no faster where a CPU has no instructions for it."""

CPU_LAYER_SECONDS, CPU_STEP_SECONDS = 300e-6, 1e-3
"""About twenty calls of torch at some 10 us each, and threads that start together for the matmuls among them."""


def assumed_gpu_rates() -> Rates:
    """Of a GPU nobody has measured. An upload takes nothing from computing: it writes at a fraction of the memory's rate."""
    return rates_from(
        ASSUMED,
        link_bytes_per_second=LINK_BYTES_PER_SECOND,
        disk_bytes_per_second=DISK_BYTES_PER_SECOND,
        device_bytes_per_second=GPU_BYTES_PER_SECOND,
        device_flops_per_second=GPU_FLOPS_PER_SECOND,
        layer_overhead_seconds=GPU_LAYER_SECONDS,
        step_overhead_seconds=GPU_STEP_SECONDS,
        compute_share_beside_copies=1.0,
        copy_share_beside_computing=1.0,
        compute_share_beside_readers=1.0,
    )


def assumed_cpu_rates(num_cores: int) -> Rates:
    """Of a CPU nobody has measured. A thread that copies, or the readers, take a core; the copy shares memory with the others."""
    left = (num_cores - 1) / num_cores if num_cores > 1 else 0.5
    return rates_from(
        ASSUMED,
        link_bytes_per_second=CPU_COPY_BYTES_PER_SECOND,
        disk_bytes_per_second=DISK_BYTES_PER_SECOND,
        device_bytes_per_second=min(num_cores * CPU_BYTES_PER_SECOND_OF_CORE, CPU_BYTES_PER_SECOND),
        device_flops_per_second=num_cores * CPU_FLOPS_PER_SECOND_OF_CORE,
        layer_overhead_seconds=CPU_LAYER_SECONDS,
        step_overhead_seconds=CPU_STEP_SECONDS,
        compute_share_beside_copies=left,
        copy_share_beside_computing=left,
        compute_share_beside_readers=left if num_cores > 1 else 1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a rates file holds."""

    rates: Mapping[str, Rates] = field(default_factory=dict)
    """Key of a machine, device and type -> rates."""
    problem: str = ""
    """One line where the file cannot be used; it then counts as empty."""


def rates_file(cache_folder: Path) -> Path:
    """Where rates are kept between runs."""
    return cache_folder / "rates.json"


def read_rates(path: Path) -> Stored:
    """Read a rates file. One that is absent holds nothing; one that is broken holds nothing and says why."""
    try:
        entries = json.loads(path.read_bytes())
        return Stored(rates={key: _from_json(entry) for key, entry in entries.items()})
    except FileNotFoundError:
        return Stored()
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        reason = "it does not hold rates"
    return Stored(problem=f"{path}: is ignored, {reason}; measure again with `offload-sirius doctor --measure`")


def write_rates(path: Path, key: str, rates: Rates) -> None:
    """Keep rates beside those of other keys. The file is replaced whole, so that no reader ever sees half of it.

    Raises ConfigError where it cannot be written.
    """
    entries = {each: _as_json(kept) for each, kept in read_rates(path).rates.items()} | {key: _as_json(rates)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: cannot be made: {error.strerror}; set OFFLOAD_SIRIUS_CACHE to a folder that can be written to"
        ) from error
    write_whole(path, (json.dumps(entries, indent=1) + "\n").encode())


def _as_json(rates: Rates) -> dict[str, Any]:
    plain = {name: {"value": getattr(rates, name), "source": rates.sources[name]} for name in NAMES}
    return plain | {"quantized": {kind: asdict(each) for kind, each in rates.quantized.items()}}


def _from_json(entry: Mapping[str, Any]) -> Rates:
    """Raises KeyError, TypeError or ValueError for what is no entry; names that are not known belong to another version."""
    values = _positive({name: entry[name]["value"] for name in NAMES})
    # A file that is older than quantised weights has no rates of them.
    quantized = {kind: _quantized_from_json(entry["quantized"][kind]) for kind in KINDS if kind in entry.get("quantized", {})}
    return Rates(**values, sources={name: str(entry[name]["source"]) for name in NAMES}, quantized=quantized)


def _quantized_from_json(entry: Mapping[str, Any]) -> QuantizedRates:
    return QuantizedRates(**_positive({name: entry[name] for name in QUANTIZED_NAMES}), source=str(entry["source"]))


def _positive(found: Mapping[str, Any]) -> dict[str, float]:
    values = {name: float(value) for name, value in found.items()}
    if bad := [name for name, value in values.items() if not (math.isfinite(value) and value > 0)]:
        raise ValueError(bad)
    return values
