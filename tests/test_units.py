"""Sizes, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.errors import ConfigError
from offload_sirius.units import GIB, KIB, MIB, Size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        ("500MB", 500_000_000),
        ("1.5 GB", 1_500_000_000),
        (" 300 MB ", 300_000_000),
        (".5KiB", 512),
        ("2.TiB", 2 << 40),
        ("3TB", 3 * 10**12),
        ("64KiB", 64 * KIB),
        ("7kb", 7000),
        ("1073741824", GIB),
        ("4096B", 4096),
        ("1B", 1),
        ("0.5GiB", 512 * MIB),
    ],
)
def test_a_size_in_units_is_bytes(text: str, nbytes: int) -> None:
    assert parse_size(text) == Size(nbytes=nbytes)


@pytest.mark.parametrize(("text", "share"), [("0.8", 0.8), ("1", 1.0), (".25", 0.25), ("1.0", 1.0)])
def test_a_plain_number_up_to_1_is_a_share(text: str, share: float) -> None:
    assert parse_size(text) == Size(share=share)


@pytest.mark.parametrize("text", ["", "GiB", "24 gigs", "-1GiB", "1e9", "12,5GB", "0x10", "24GiB extra", "nan", "50%"])
def test_a_size_that_cannot_be_read_is_one_clear_line(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_size(text)
    assert str(error.value) == f"size {text!r} is not understood; write 24GiB, 500MB, or a share of what is free such as 0.8"


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0"])
def test_a_size_of_zero_is_one_clear_line(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_size(text)
    assert str(error.value) == f"size {text!r} is zero; write 24GiB, 500MB, or a share of what is free such as 0.8"


def test_bytes_resolve_to_themselves_and_shares_to_a_part_of_what_is_free() -> None:
    assert Size(nbytes=123).resolve(free_nbytes=10) == 123
    assert Size(share=0.8).resolve(free_nbytes=1001) == 800


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1025, "1.01 KiB"),
        (1536 * MIB, "1.50 GiB"),
        (GIB, "1.00 GiB"),
        (GIB + 1, "1.01 GiB"),
        (300 * 10**6, "286.11 MiB"),
        (5000 * GIB, "5000.00 GiB"),
    ],
)
def test_sizes_are_written_in_binary_units_rounded_up(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(1, 2**44))
def test_a_written_size_given_back_is_enough(nbytes: int) -> None:
    given_back = parse_size(format_size(nbytes)).nbytes
    assert given_back is not None
    assert nbytes <= given_back <= nbytes + max(1, nbytes // 100)
