"""Products in C: right, and of each token the same bits whatever tokens, rows and threads there are beside it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload_sirius.kernels import cpu
from offload_sirius.kernels import native as room
from offload_sirius.kernels.cpu import Rows
from offload_sirius.kernels.native import Native, compiled, find_compiler
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.kernels.quantized import ACTIVATIONS, activated
from offload_sirius.quantization import GROUPS, KINDS, WeightFormat
from offload_sirius.weights.quant import quantise_rows

pytestmark = pytest.mark.skipif(not any(map(room.shutil.which, room.COMPILERS)), reason="there is no C compiler")

SHAPES = [(1, 32), (5, 40), (3, 17), (13, 1000), (37, 576), (101, 2080)]
"""Rows, weights: less than a tile, rests of units, blocks, groups and strips."""

MAX_TOKENS = 70
"""More than meet a row at once."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def strided(rows: Tensor, gap: int) -> Tensor:
    """The same rows with a gap behind each."""
    storage = rows.new_zeros(rows.shape[0], rows.shape[1] + gap)
    storage[:, : rows.shape[1]] = rows
    return storage[:, : rows.shape[1]]


def quantised(form: WeightFormat, weights: Tensor) -> QuantizedRows:
    return QuantizedRows(strided(quantise_rows(weights, form), 32), weights.shape[1], form)


FORMATS = [WeightFormat(kind=kind, group=group) for kind in KINDS for group in GROUPS]

WAYS: dict[str, Callable[[Tensor], Rows]] = {
    "float32": lambda weights: strided(weights, 3),
    "bfloat16": lambda weights: strided(weights.bfloat16(), 5),
    **{f"{form.kind}/{form.group}": partial(quantised, form) for form in FORMATS},
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(params=["tiles", "vectors"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes: tiles.c where the CPU has such a unit, and products.c, which is everywhere."""
    if request.param == "vectors":
        monkeypatch.setattr(cpu, "tiles", lambda: None)
    elif cpu.tiles() is None:
        pytest.skip("this CPU does not multiply matrices")
    return str(request.param)


both_units = pytest.mark.usefixtures("unit")


def exact(rows: Rows) -> Tensor:
    """What they stand for, in float64."""
    return (rows.dequantised() if isinstance(rows, QuantizedRows) else rows).double()


def assert_near(ours: Tensor, exactly: Tensor) -> None:
    """Within the rounding of a sum in float32, which is of the size of what is summed."""
    assert ours.dtype == torch.float32
    assert (ours - exactly).abs().max() <= 2e-6 * exactly.abs().max(), (ours - exactly).abs().max()


@both_units
@ways
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_products_are_those_of_the_weights_that_rows_stand_for(way: str, num_rows: int, width: int) -> None:
    rows = WAYS[way](normal(num_rows, width))
    x, z = normal(4, width), normal(4, num_rows)
    assert_near(cpu.linear(x, rows), x.double() @ exact(rows).t())
    assert_near(cpu.down(z, rows), z.double() @ exact(rows))


@both_units
@ways
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_a_token_gives_the_same_bits_whatever_is_beside_it(way: str, num_rows: int, width: int) -> None:
    gate, up = (WAYS[way](normal(num_rows, width) + shift) for shift in (0, 0.1))
    x, z = normal(MAX_TOKENS, width), normal(MAX_TOKENS, num_rows)
    linear, gate_up, down = cpu.linear(x, gate), cpu.gate_up(x, gate, up, "silu"), cpu.down(z, gate)
    for count in (1, 2, 3, 4, 16, 64):
        assert torch.equal(cpu.linear(x[:count], gate), linear[:count]), count
        assert torch.equal(cpu.gate_up(x[:count], gate, up, "silu"), gate_up[:count]), count
        assert torch.equal(cpu.down(z[:count], gate), down[:count]), count
    assert torch.equal(cpu.linear(x[-1:], gate), linear[-1:])
    one = cpu.linear(x, gate[num_rows - 1 :])
    assert torch.equal(one, linear[:, -1:]), "a row's product does not depend on the rows beside it either"


@both_units
@ways
def test_threads_change_no_bit(way: str) -> None:
    rows = WAYS[way](normal(101, 576))
    x, z = normal(5, 576), normal(5, 101)
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append((cpu.linear(x, rows), cpu.gate_up(x, rows, rows, "gelu"), cpu.down(z, rows)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(other, results[0], strict=True))


@both_units
@pytest.mark.parametrize("way", ["float32", "bfloat16", "int8/64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_up_is_the_activation_of_one_product_times_the_other(way: str, activation: cpu.Activation) -> None:
    gate, up, x = WAYS[way](normal(37, 200)), WAYS[way](normal(37, 200) + 1), normal(21, 200) * 3
    expected = activated(x.double() @ exact(gate).t(), activation) * (x.double() @ exact(up).t())
    assert_near(cpu.gate_up(x, gate, up, activation), expected)
    rounded = cpu.gate_up(x, gate, up, activation, dtype=torch.bfloat16)
    assert torch.equal(rounded, cpu.gate_up(x, gate, up, activation).bfloat16())
    # Large on both sides: nothing overflows to what is no number.
    assert torch.isfinite(cpu.gate_up(x * 1000, gate, up, activation)).all()


@both_units
def test_tokens_may_be_of_any_float_type_and_strided() -> None:
    rows, x = normal(20, 64), normal(6, 128).bfloat16()
    view = x[::2, :64]
    assert torch.equal(cpu.linear(view, rows), cpu.linear(view.float().contiguous(), rows))
    turned = normal(64, 6).t()
    assert torch.equal(cpu.linear(turned, rows), cpu.linear(turned.contiguous(), rows))


@both_units
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ways
def test_tokens_of_sixteen_bits_meet_weights_that_are_not_rounded(way: str, dtype: torch.dtype) -> None:
    rows, x, z = WAYS[way](normal(37, 300)), normal(20, 300).to(dtype), normal(20, 37).to(dtype)
    assert_near(cpu.linear(x, rows), x.double() @ exact(rows).t())
    assert_near(cpu.linear(x, rows), cpu.linear(x.float(), rows))
    # Numbers times scales keep sixteen bits, where they had eight.
    down, exactly = cpu.down(z, rows), z.double() @ exact(rows)
    assert (down - exactly).abs().max() <= 2e-5 * exactly.abs().max()
    assert torch.equal(cpu.down(z[:1], rows), down[:1])


@both_units
def test_tokens_of_any_size_keep_their_bits() -> None:
    rows = quantised(FORMATS[0], normal(5, 64))
    for size in (1e-30, 1e-10, 1e10, 1e30):
        x, z = normal(3, 64) * size, normal(3, 5) * size
        assert_near(cpu.linear(x, rows), x.double() @ exact(rows).t())
        assert_near(cpu.down(z, rows), z.double() @ exact(rows))


def test_torch_may_use_the_same_unit_in_between() -> None:
    weights, x = normal(64, 256).bfloat16(), normal(40, 256).bfloat16()
    theirs, ours = torch.nn.functional.linear(x, weights), cpu.linear(x, weights)
    for count in (40, 1, 17, 40):
        assert torch.equal(cpu.linear(x[:count], weights), ours[:count])
        assert torch.equal(torch.nn.functional.linear(x, weights), theirs)
        assert torch.equal(cpu.down(x[:count, :64], weights), cpu.down(x[:, :64], weights)[:count])


@both_units
def test_no_rows_give_nothing() -> None:
    rows = normal(4, 64)[:0]
    assert cpu.linear(normal(2, 64), rows).shape == (2, 0)
    assert torch.equal(cpu.down(torch.zeros(2, 0), rows), torch.zeros(2, 64))


@both_units
def test_no_tokens_give_nothing() -> None:
    rows = normal(4, 64)
    assert cpu.linear(normal(2, 64)[:0], rows).shape == (0, 4)
    assert cpu.down(torch.zeros(0, 4), rows).shape == (0, 64)


@pytest.mark.skipif(room.os.uname().machine != "x86_64", reason="names instructions of x86")
@pytest.mark.parametrize("instructions", ["x86-64", "haswell"])
def test_the_ways_for_lesser_cpus_give_the_same_products(
    instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instructions == "haswell" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU cannot run it")
    flags = tuple(f"-march={instructions}" if flag == "-march=native" else flag for flag in room.FLAGS)
    monkeypatch.setattr(room, "FLAGS", flags)
    library = ctypes.CDLL(str(compiled("products", tmp_path, find_compiler())))
    matrices = {way: make(normal(13, 1000)) for way, make in WAYS.items()}
    monkeypatch.setattr(cpu, "native", lambda name: Native(library=library))
    monkeypatch.setattr(cpu, "tiles", lambda: None)
    for way, rows in matrices.items():
        x, z = normal(7, 1000), normal(7, 13)
        assert_near(cpu.linear(x, rows), x.double() @ exact(rows).t())
        assert_near(cpu.down(z, rows), z.double() @ exact(rows))
        assert torch.equal(cpu.linear(x, rows)[:1], cpu.linear(x[:1], rows)), way
