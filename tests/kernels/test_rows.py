"""Rows put in place by C: the same bytes as by torch, whatever their number, width, place and type."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius.kernels import native, rows


def both_ways(num_rows: int, width: int, first_row: int, shift: int, dtype: torch.dtype, turned: bool) -> None:
    """Put random rows into a larger place; what torch puts there, and nothing beside it, must be there."""
    source = torch.randn(num_rows, width + 3).to(dtype)[:, :width]
    shape = (width, 2, num_rows + first_row + 5) if turned else (num_rows + first_row + 5, 2, width)
    numel = shape[0] * shape[1] * shape[2]
    by_c, by_torch = (torch.full((numel + shift,), 7.0, dtype=dtype)[shift:].view(shape)[:, 1] for _ in range(2))
    for whole, put in ((by_c, rows.put_rows), (by_torch, lambda place, what: place.copy_(what) is not None)):
        place = (whole.t() if turned else whole)[first_row : first_row + num_rows]
        assert put(place, source)
    assert torch.equal(by_c, by_torch)


@pytest.fixture(params=["as this CPU does it", "without AVX-512"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "without AVX-512":
        if platform.machine() != "x86_64":
            pytest.skip("there is no other way on this CPU")
        monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512bw"))
        native.native.cache_clear()
        rows.library.cache_clear()
    if rows.library() is None:
        pytest.skip(native.native("rows").problem)
    yield
    native.native.cache_clear()
    rows.library.cache_clear()


@pytest.mark.usefixtures("ways")
def test_rows_land_as_torch_puts_them() -> None:
    @settings(max_examples=150, deadline=None)
    @given(
        num_rows=st.integers(1, 80),
        width=st.integers(1, 100),
        first_row=st.sampled_from([0, 1, 32]),
        shift=st.integers(0, 3),
        dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]),
        turned=st.booleans(),
    )
    def compared(num_rows: int, width: int, first_row: int, shift: int, dtype: torch.dtype, turned: bool) -> None:
        both_ways(num_rows, width, first_row, shift, dtype, turned and dtype != torch.uint8)

    compared()


def test_another_type_and_a_place_with_gaps_are_left_to_torch() -> None:
    source = torch.randn(4, 6)
    assert not rows.put_rows(torch.zeros(4, 6, dtype=torch.bfloat16), source)
    assert not rows.put_rows(torch.zeros(4, 12)[:, ::2], source)
    assert not rows.put_rows(torch.zeros(6, 4).t().byte(), source)
