"""Measuring rates: every one is found, positive, and says where it comes from. How large they are is the machine's affair."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload_sirius.bench import rates as bench
from offload_sirius.bench.rates import measure_rates
from offload_sirius.quantization import KINDS
from offload_sirius.rates import NAMES, QUANTIZED_NAMES, assumed_cpu_rates
from offload_sirius.units import MIB
from offload_sirius.weights.disk_rate import DiskRate


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and repeats that take no time, and no disk."""
    narrow = {"width": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "ffn_width": 512}
    for name in ("LARGE", "RING"):
        monkeypatch.setattr(bench, name, replace(getattr(bench, name), **narrow))
    monkeypatch.setattr(bench, "LARGE_NBYTES", 2 * 10**6)  # a few layers
    for name in ("STEP_REPEATS", "PROMPT_REPEATS", "STEPS_AT_ONCE", "STEPS_BESIDE_COPIES"):
        monkeypatch.setattr(bench, name, 2)
    monkeypatch.setattr(
        bench, "measure_disk", lambda path: DiskRate(path=path, bytes_per_second=2e9, depth=1, read_nbytes=MIB, direct=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rate_is_measured_on_a_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        found = measure_rates(torch.device("cpu"), dtype, tmp_path, assumed_cpu_rates(2), "measured today", rounds=1)
    finally:
        torch.set_num_threads(threads)
    assert dict(found.sources) == dict.fromkeys(NAMES, "measured today")
    assert all(math.isfinite(getattr(found, name)) and getattr(found, name) > 0 for name in NAMES)
    assert all(getattr(found, name) <= 1 for name in NAMES if "share" in name)
    assert found.disk_bytes_per_second == 2e9
    assert set(found.quantized) == set(KINDS)
    for each in found.quantized.values():
        assert each.source == "measured today"
        assert all(math.isfinite(getattr(each, name)) and getattr(each, name) > 0 for name in QUANTIZED_NAMES)


def test_products_alone_give_a_device_s_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "seconds_of", lambda work, device: 2.0 * len(work()))  # each product takes two seconds
    found = bench.product_rates(torch.float32, torch.device("cpu"), rows=64)
    assert found == {"device_bytes_per_second": 64 * 256 * 4 / 2, "device_flops_per_second": 2 * 256 * 64 * 256 / 2}
