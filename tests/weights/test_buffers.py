"""Views into a layer's bytes, and writing a checkpoint's rows through them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from offload_sirius.blocks import BLOCK_FORMATS
from offload_sirius.kernels.blocks import NeuronRows
from offload_sirius.weights import buffers
from offload_sirius.weights.buffers import TRANSPOSE_ROWS, LayerBuffer, kept_neurons, write_rows
from offload_sirius.weights.layout import layer_layout, model_layout
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.spec import Role

SPEC = open_checkpoint("synthetic:tiny?width=40&heads=4&kv_heads=2&ffn=700").spec


def buffer(dtype: torch.dtype = torch.float32, num_kept: int = 0) -> LayerBuffer:
    layout = layer_layout(SPEC, dtype.itemsize, num_kept)
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
@pytest.mark.parametrize("by_torch", [True, False])
def test_rows_land_at_their_row_in_a_transposed_place(
    first_row: int, num_rows: int, scratch_rows: int, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_torch:
        monkeypatch.setattr(buffers, "put_rows", lambda place, rows: False)
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


def test_gate_is_the_part_of_all_gates_and_of_nothing_else() -> None:
    layer = buffer()
    layer.parts["gate"].fill_(1)
    assert layer.gate.view(torch.uint8).min() == 1
    assert layer.up_down.count_nonzero() == 0
    assert layer.output.count_nonzero() == 0
    assert layer.post_norm.count_nonzero() == 0


def test_kept_neurons_are_views_into_the_same_place_as_the_records() -> None:
    layer = buffer(num_kept=30)
    kept = layer.kept
    assert kept is not None
    assert [tuple(each.shape) for each in (kept.gate, kept.up_down, kept.up, kept.down)] == [
        (30, 40),
        (30, 2, 40),
        (30, 40),
        (30, 40),
    ]
    layer.parts["kept"].fill_(1)
    assert kept.gate.view(torch.uint8).min() == kept.up_down.view(torch.uint8).min() == 1
    assert kept.gate.data_ptr() == layer.gate.data_ptr() == layer.parts["kept"].data_ptr() == layer.parts["records"].data_ptr()
    # 90 rows of 160 bytes lie where 700 rows of gates began; what is behind them is as it was.
    assert layer.gate.view(torch.uint8)[:90].min() == 1
    assert layer.gate[90:].count_nonzero() == 0
    assert layer.up_down.count_nonzero() == layer.output.count_nonzero() == 0


def test_a_layer_of_which_none_are_kept_has_no_view_of_them() -> None:
    assert buffer().kept is None
    assert buffer().parts["kept"].numel() == 0


def test_kept_neurons_may_lie_in_bytes_of_their_own_in_the_same_order() -> None:
    layer = buffer(num_kept=30)
    layout = layer_layout(SPEC, 4, 30)
    storage = torch.zeros(layout.kept_nbytes, dtype=torch.uint8)
    alone = kept_neurons(storage, layout, torch.float32)
    alone.gate.copy_(torch.randn(30, 40))
    alone.up_down.copy_(torch.randn(30, 2, 40))
    layer.parts["kept"].copy_(storage)
    assert layer.kept is not None
    assert torch.equal(layer.kept.gate, alone.gate)
    assert torch.equal(layer.kept.up, alone.up)
    assert torch.equal(layer.kept.down, alone.down)


@pytest.mark.parametrize("packed", [True, False])
def test_one_layer_s_attention_block_and_any_other_s_records_have_room_in_a_staging_buffer(packed: bool) -> None:
    spec = replace(SPEC, width=256, head_dim=64, ffn_width=512, num_layers=4)
    names: list[dict[Role, str]] = [{"q": "Q8_0", "down": "Q4_1"}, {"down": "Q6_K"}, {"q": "Q4_K", "o": "Q4_K", "up": "Q4_K"}, {}]
    blocks = [{role: BLOCK_FORMATS[name] for role, name in each.items()} for each in names]
    layout = model_layout(spec, 4, 0, None, blocks).staging
    staging = LayerBuffer(torch.zeros(layout.nbytes, dtype=torch.uint8), spec, layout, torch.float32)
    for attention in range(4):
        for records in range(4):
            staging.storage.zero_()
            head = staging.staged(attention, packed=packed).file_part("attention", packed=packed)
            rest = staging.staged(records, packed=packed).file_part("records", packed=packed)
            head.fill_(1)
            rest.fill_(2)
            assert (head == 1).all(), (attention, records)
        own = staging.staged(attention, packed=packed)
        own.storage.zero_()
        down = own.down
        if isinstance(down, NeuronRows) and not packed:
            down.table.fill_(3)
            assert (own.file_part("attention", packed=False) == 0).all(), "it is read with the records"
        assert own.storage.numel() == layout.layer(attention).nbytes
