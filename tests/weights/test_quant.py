"""Quantising: torch and C against a written-out reference, to the bit, and how far the result is from what it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.errors import CheckpointError
from offload_sirius.kernels import cpu
from offload_sirius.kernels.native import Native
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import GROUPS, KINDS, WeightFormat
from offload_sirius.weights import quant
from offload_sirius.weights.quant import dequantise_rows, quantise_rows, quantization_error

FORMATS = [WeightFormat(kind=kind, group=group) for kind in KINDS for group in GROUPS]
one = np.float32


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02


KINDS_OF_WEIGHTS = {
    "normal": lambda shape: normal(*shape),
    "with outliers": lambda shape: normal(*shape) ** 5 * 1e6,
    "tiny": lambda shape: normal(*shape) * 1e-6,
    "positive": lambda shape: normal(*shape).abs() + 0.01,
    "zero": lambda shape: torch.zeros(*shape),
    "on a grid": lambda shape: (normal(*shape) * 100).round() / 4,
}


def half(value: np.float32) -> np.float32:
    return one(np.float16(value))


def stored_scale(value: np.float32) -> np.float32:
    return half(max(value, one(2.0**-24)))


def reaching_scale(largest: np.float32) -> np.float32:
    scale = np.float16(largest / one(127))
    return one(np.nextafter(scale, np.float16(np.inf))) if one(scale) * one(127) < largest else one(scale)


def stored_zero(value: np.float32) -> np.float32:
    return one(min(max(np.rint(value * one(16)), one(0)), one(255))) / one(16)


def sum_of(values: list[np.float32]) -> np.float32:
    """Added in halves; of an odd number the last goes to the first."""
    while len(values) > 1:
        middle = len(values) // 2
        added = [values[i] + values[middle + i] for i in range(middle)]
        if len(values) % 2:
            added[0] += values[-1]
        values = added
    return values[0]


def integers_of(steps: list[np.float32], zero: np.float32) -> list[np.float32]:
    return [one(min(max(np.rint(step + zero), one(0)), one(15))) for step in steps]


def solve(weights: list[np.float32]) -> tuple[np.float32, np.float32, list[int]]:
    """Scale, zero and integers of one group of int4, as the docstring of quant.py says."""
    lowest, highest = min(*weights, one(0)), max(*weights, one(0))
    scale = stored_scale((highest - lowest) / one(15))
    zero = stored_zero(-lowest * (one(1) / scale))
    best, least = (scale, zero), one(np.inf)
    for _ in range(quant.NUM_ITERATIONS + 1):
        steps = [weight * (one(1) / scale) for weight in weights]
        integers = integers_of(steps, zero)
        residuals = [step - (integer - zero) for step, integer in zip(steps, integers, strict=True)]
        error = sum_of([residual * residual for residual in residuals]) * (scale * scale)
        if error < least:
            best, least = (scale, zero), error
        targets = []
        for step, residual in zip(steps, residuals, strict=True):
            size = abs(residual)
            left = one(0) if size == 0 else size - one(1) / np.sqrt(size) * one(1 / quant.BETA)
            targets.append(step - np.copysign(max(left, one(0)), residual))
        zero = stored_zero(sum_of([i - t for i, t in zip(integers, targets, strict=True)]) / one(len(weights)))
        shifted = [integer - zero for integer in integers]
        factor = sum_of([t * s for t, s in zip(targets, shifted, strict=True)])
        scale = stored_scale(scale * (factor / max(sum_of([s * s for s in shifted]), one(1e-6))))
    scale, zero = best
    return scale, zero, [int(i) for i in integers_of([weight * (one(1) / scale) for weight in weights], zero)]


def written_out(weights: list[np.float32], form: WeightFormat) -> bytes:
    """The bytes of a row, by the text of quantization.py."""
    width, sizes = len(weights), list(map(abs, weights))
    place = sizes.index(max(sizes))
    outlier, weights = weights[place], [*weights[:place], one(0), *weights[place + 1 :]]
    groups = [weights[start : start + form.group] for start in range(0, width, form.group)]
    blocks = -(-width // 32)
    if form.kind == "int8":
        scales = [reaching_scale(max(map(abs, group))) for group in groups]
        integers = []
        for group, scale in zip(groups, scales, strict=True):
            inverse = one(1) / scale if scale else one(0)
            integers += [int(min(max(np.rint(weight * inverse), -127), 127)) for weight in group]
        row = bytes(i % 256 for i in integers).ljust(32 * blocks, b"\0")
        row += np.array(scales, dtype="<f2").tobytes()
        row += np.array([place], dtype="<u2").tobytes() + np.array([outlier], dtype="<f2").tobytes()
    else:
        solved = [solve(group) for group in groups]
        integers = [i for *_, group in solved for i in group]
        integers += [0] * (32 * blocks - width)
        row = bytes(
            integers[32 * block + low] | integers[32 * block + 16 + low] << 4 for block in range(blocks) for low in range(16)
        )
        row += np.array([scale for scale, *_ in solved], dtype="<f2").tobytes()
        scale, zero, _ = solved[place // form.group]
        rest = outlier - (one(integers[place]) - zero) * scale
        row += np.array([place], dtype="<u2").tobytes() + np.array([rest], dtype="<f2").tobytes()
        row += bytes(int(zero * 16) for _, zero, _ in solved)
    return row.ljust(form.row_nbytes(width), b"\0")


def by_torch(weights: Tensor, form: WeightFormat) -> Tensor:
    """quantise_rows where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "native", lambda name: Native(library=None, problem="no compiler"))
        return quantise_rows(weights, form)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_WEIGHTS)
def test_bytes_are_those_of_the_written_out_reference(form: WeightFormat, kind: str) -> None:
    weights = KINDS_OF_WEIGHTS[kind]((3, 200))
    with np.errstate(over="ignore"):
        expected = [list(written_out(list(row), form)) for row in weights.numpy()]
    rows = quantise_rows(weights, form)
    assert rows.tolist() == expected
    assert torch.equal(by_torch(weights, form), rows)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([1, 5]))
def test_c_and_torch_give_the_same_bits(form: WeightFormat, width: int, num_rows: int, seed: int, power: int) -> None:
    weights = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) ** power
    assert torch.equal(by_torch(weights, form), quantise_rows(weights, form))


@pytest.mark.parametrize("with_library", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_is_the_same_bytes_whatever_rows_and_threads_are_beside_it(
    form: WeightFormat, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(cpu, "native", lambda name: Native(library=None, problem="no compiler"))
    weights = normal(300, 333)  # more than are worked on at once
    rows = quantise_rows(weights, form)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(quantise_rows(weights, form), rows)
    finally:
        torch.set_num_threads(before)
    for part in (slice(0, 1), slice(7, 20), slice(299, 300)):
        assert torch.equal(quantise_rows(weights[part], form), rows[part])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rows_are_written_where_they_are_wanted_and_nowhere_else(form: WeightFormat) -> None:
    weights, nbytes = normal(5, 200), form.row_nbytes(200)
    storage = torch.full((5, 2, nbytes), 7, dtype=torch.uint8)
    out = quantise_rows(weights, form, storage[:, 1])
    assert out.data_ptr() == storage[:, 1].data_ptr()
    assert torch.equal(storage[:, 1], quantise_rows(weights, form))
    assert (storage[:, 0] == 7).all()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(GROUPS), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_no_int8_weight_is_further_off_than_half_a_step(group: int, width: int, seed: int, size: float) -> None:
    form = WeightFormat(kind="int8", group=group)
    weights = torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) * size
    rows = QuantizedRows(quantise_rows(weights, form), width, form)
    steps = rows.scales.float().repeat_interleave(group, dim=1)[:, :width]
    sizes = weights.abs()
    places = sizes.argmax(dim=1, keepdim=True)
    assert torch.equal(rows.outlier_places.long(), places)
    # The outlier has 11 bits of its own, or what float16 has at all.
    allowed = (steps * 0.50001).scatter(1, places, sizes.gather(1, places) * 2**-11 + 2**-25)
    assert ((rows.dequantised() - weights).abs() <= allowed).all()
    # A step is a 127th of the largest weight of the others, rounded up to 11 bits, or to what float16 has at all.
    others = sizes.scatter(1, places, 0.0)
    assert (steps <= others.amax() / 127 * (1 + 2**-10) + 2**-24).all()


def test_a_row_with_one_huge_weight_keeps_the_others() -> None:
    weights = normal(4, 128)
    plain = {form: quantization_error(weights, quantise_rows(weights, form), form).relative_rms for form in FORMATS}
    huge = weights.clone()
    huge[:, 70] = 3.0
    for form in FORMATS:
        rows = QuantizedRows(quantise_rows(huge, form), 128, form)
        assert (rows.dequantised()[:, 70] - 3.0).abs().max() < 0.002
        errors = (rows.dequantised() - huge).index_fill(1, torch.tensor([70]), 0.0)
        assert errors.square().mean().sqrt() / weights.square().mean().sqrt() < 1.2 * plain[form]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(GROUPS), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_int4_is_at_most_as_far_off_as_covering_each_group_would_be(group: int, width: int, seed: int, size: float) -> None:
    form = WeightFormat(kind="int4", group=group)
    weights = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * size
    errors = dequantise_rows(quantise_rows(weights, form), width, form) - weights
    for start in range(0, width, group):
        part = weights[0, start : start + group]
        step = (max(part.max().item(), 0) - min(part.min().item(), 0)) / 15
        # Half a step each, and a sixteenth and a bit for what rounding does to zero and scale.
        assert errors[0, start : start + group].square().sum() <= len(part) * (0.6 * step) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_float_type_are_quantised_as_the_float32_they_are(dtype: torch.dtype) -> None:
    weights = normal(3, 64).to(dtype)
    form = WeightFormat(kind="int4", group=32)
    assert torch.equal(quantise_rows(weights, form), quantise_rows(weights.float(), form))


def test_the_error_falls_with_bits_and_smaller_groups() -> None:
    weights = normal(64, 1024)
    errors = {form: quantization_error(weights, quantise_rows(weights, form), form).relative_rms for form in FORMATS}
    for kind in KINDS:
        by_group = [errors[WeightFormat(kind=kind, group=group)] for group in GROUPS]
        assert by_group == sorted(by_group)
    assert errors[WeightFormat(kind="int8", group=128)] < 0.008
    assert errors[WeightFormat(kind="int4", group=128)] < 0.1


def test_the_solver_is_better_than_covering_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, form = normal(64, 1024), WeightFormat(kind="int4", group=128)
    rows = quantise_rows(weights, form)
    monkeypatch.setattr(quant, "NUM_ITERATIONS", 0)
    covering = by_torch(weights, form)
    solved, covered = (quantization_error(weights, each, form).relative_rms for each in (rows, covering))
    assert solved < 0.96 * covered


def test_errors_by_hand() -> None:
    form = WeightFormat(kind="int8", group=32)
    weights = torch.tensor([[1000.0, 127.0, 1.25, 0.0, -3.0]])
    rows = quantise_rows(weights, form)
    assert dequantise_rows(rows, 5, form).tolist() == [[1000.0, 127.0, 1.0, 0.0, -3.0]]
    error = quantization_error(weights, rows, form)
    assert error.largest == 0.25
    assert error.relative_rms == pytest.approx(0.25 / (1000.0**2 + 127.0**2 + 1.25**2 + 3.0**2) ** 0.5)
    nothing = torch.zeros(1, 3)
    assert quantization_error(nothing, quantise_rows(nothing, form), form).relative_rms == 0


@pytest.mark.parametrize("with_library", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_weights_that_cannot_be_written_are_refused(
    form: WeightFormat, with_library: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(cpu, "native", lambda name: Native(library=None, problem="no compiler"))
    weights = normal(3, 200)
    weights[1, 150] = value
    with pytest.raises(CheckpointError, match=f"weights cannot be written as {form.kind}: some are not finite, or too large"):
        quantise_rows(weights, form)
