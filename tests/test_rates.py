"""Rates and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offload_sirius.errors import ConfigError
from offload_sirius.rates import (
    NAMES,
    QUANTIZED_NAMES,
    QuantizedRates,
    Rates,
    Stored,
    assumed_cpu_rates,
    assumed_gpu_rates,
    rates_from,
    read_rates,
    write_rates,
)


def measured(value: float) -> Rates:
    return rates_from("measured 2026-11-25", **dict.fromkeys(NAMES, value))


def test_what_is_written_is_read_again_beside_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rates.json"
    write_rates(path, "a GPU, bfloat16", measured(2.0))
    write_rates(path, "a GPU, float32", measured(3.0))
    write_rates(path, "a GPU, bfloat16", measured(4.0))
    assert read_rates(path) == Stored(rates={"a GPU, bfloat16": measured(4.0), "a GPU, float32": measured(3.0)})
    assert [each.name for each in path.parent.iterdir()] == ["rates.json"]


def test_a_file_that_is_not_there_holds_nothing_and_is_no_problem(tmp_path: Path) -> None:
    assert read_rates(tmp_path / "rates.json") == Stored()


def test_rates_of_quantised_weights_are_kept_with_those_of_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    quantized = QuantizedRates(bytes_per_second=1.0, flops_per_second=2.0, unpacking_bytes_per_second=3.0, source="measured then")
    write_rates(path, "key", replace(measured(4.0), quantized={"int8": quantized}))
    found = read_rates(path).rates["key"]
    assert found.of_quantized("int8") == quantized
    assert found.of_quantized("int4").source == "assumed"
    assert found == replace(measured(4.0), quantized={"int8": quantized})


def test_what_is_assumed_of_quantised_weights_follows_the_rates_of_plain_ones() -> None:
    given = assumed_gpu_rates().given(device_bytes_per_second=1000.0, device_flops_per_second=10.0)
    assert given.of_quantized("int4") == QuantizedRates(
        bytes_per_second=750.0, flops_per_second=6.0, unpacking_bytes_per_second=30.0, source="assumed"
    )


ENTRY = {name: {"value": 1.0, "source": "given"} for name in NAMES}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'"rates"',
        b'{"a": 1}',
        b'{"a": {}}',
        json.dumps({"a": ENTRY | {"link_bytes_per_second": 5.0}}).encode(),
        json.dumps({"a": ENTRY | {"link_bytes_per_second": {"value": -1.0, "source": "given"}}}).encode(),
        json.dumps({"a": ENTRY | {"link_bytes_per_second": {"value": float("nan"), "source": "given"}}}).encode(),
        json.dumps({"a": ENTRY | {"quantized": {"int8": {}}}}).encode(),
        json.dumps({"a": ENTRY | {"quantized": {"int8": {**dict.fromkeys(QUANTIZED_NAMES, -1.0), "source": "x"}}}}).encode(),
        b"[" * 100_000,
    ],
)
def test_a_broken_file_is_ignored_with_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_bytes(content)
    stored = read_rates(path)
    assert stored.rates == {}
    assert stored.problem == f"{path}: is ignored, it does not hold rates; measure again with `offload-sirius doctor --measure`"


def test_a_file_that_cannot_be_read_is_ignored_with_its_reason(tmp_path: Path) -> None:
    assert read_rates(tmp_path).problem.startswith(f"{tmp_path}: is ignored, Is a directory; ")


def test_a_broken_file_is_replaced_when_rates_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text("{")
    write_rates(path, "key", measured(1.0))
    assert read_rates(path) == Stored(rates={"key": measured(1.0)})


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"file: cannot be made: File exists; set OFFLOAD_SIRIUS_CACHE"):
        write_rates(file / "rates.json", "key", measured(1.0))


def test_a_given_rate_takes_the_place_of_another_and_says_so() -> None:
    rates = assumed_gpu_rates().given(link_bytes_per_second=1e9, disk_bytes_per_second=None)
    assert (rates.link_bytes_per_second, rates.sources["link_bytes_per_second"]) == (1e9, "given")
    assert rates.disk_bytes_per_second == assumed_gpu_rates().disk_bytes_per_second
    assert rates.sources["disk_bytes_per_second"] == "assumed"


@pytest.mark.parametrize("rates", [assumed_gpu_rates(), assumed_cpu_rates(1), assumed_cpu_rates(64)])
def test_every_assumed_rate_says_that_it_is(rates: Rates) -> None:
    assert dict(rates.sources) == dict.fromkeys(NAMES, "assumed")
    assert all(getattr(rates, name) > 0 for name in NAMES)
