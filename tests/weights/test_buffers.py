"""Views into a layer's bytes, and writing a checkpoint's rows through them."""

from __future__ import annotations

import pytest
import torch

from offload_sirius.weights.buffers import TRANSPOSE_ROWS, LayerBuffer, write_rows
from offload_sirius.weights.layout import layer_layout
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:tiny?width=40&heads=4&kv_heads=2&ffn=700").spec


def buffer(dtype: torch.dtype = torch.float32) -> LayerBuffer:
    layout = layer_layout(SPEC, dtype.itemsize)
    return LayerBuffer(torch.zeros(layout.nbytes, dtype=torch.uint8), SPEC, layout, dtype)


def scratch(num_rows: int = 1000) -> torch.Tensor:
    """Room for that many rows of 700 float32."""
    return torch.empty(num_rows * 700 * 4, dtype=torch.uint8)


def test_every_role_has_a_place_of_its_checkpoint_shape() -> None:
    layer = buffer()
    assert {role: tuple(layer.role(role).shape) for role in SPEC.layer_roles()} == SPEC.layer_roles()


def test_what_is_written_by_role_is_read_by_neuron_and_nothing_overlaps() -> None:
    layer = buffer()
    written = {role: torch.randn(shape) for role, shape in SPEC.layer_roles().items()}
    for role, rows in written.items():
        write_rows(layer.role(role), 0, rows, scratch())
    assert torch.equal(layer.gate, written["gate"])
    assert torch.equal(layer.up, written["up"])
    assert torch.equal(layer.down, written["down"].t())
    assert torch.equal(layer.qkv, torch.cat([written["q"], written["k"], written["v"]]))
    assert torch.equal(layer.output, written["o"])
    assert torch.equal(layer.input_norm, written["input_norm"])
    assert torch.equal(layer.post_norm, written["post_norm"])


@pytest.mark.parametrize("first_row", [0, 7])
@pytest.mark.parametrize("num_rows", [1, TRANSPOSE_ROWS, TRANSPOSE_ROWS + 3])
@pytest.mark.parametrize("scratch_rows", [1, 1000])
def test_rows_land_at_their_row_in_a_transposed_place(first_row: int, num_rows: int, scratch_rows: int) -> None:
    place = torch.zeros(5, 2, TRANSPOSE_ROWS + 20)[:, 1].t()
    rows = torch.randn(num_rows, 5)
    write_rows(place, first_row, rows, scratch(scratch_rows))
    assert torch.equal(place[first_row : first_row + num_rows], rows)
    assert place.count_nonzero() == rows.numel()


def test_writing_converts_the_type() -> None:
    layer = buffer(torch.bfloat16)
    rows = torch.randn(SPEC.layer_roles()["down"])
    write_rows(layer.role("down"), 0, rows, scratch())
    assert torch.equal(layer.down, rows.t().bfloat16())


def test_the_parts_are_the_bytes_of_the_views() -> None:
    layer = buffer()
    layer.parts["records"].fill_(1)
    assert layer.gate.view(torch.uint8).min() == 1
    assert layer.up.contiguous().view(torch.uint8).min() == 1
    assert layer.output.count_nonzero() == 0
