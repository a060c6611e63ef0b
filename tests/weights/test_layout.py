"""Where things lie in the bytes of a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_sirius.blocks import BLOCK_FORMATS, BlockFormat
from offload_sirius.weights.layout import ALIGNMENT, layer_layout, model_layout, part_of, qkv_rows
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.spec import Role

LLAMA_70B = open_checkpoint("synthetic:llama-3-70b").spec
TINY = open_checkpoint("synthetic:tiny?width=40&heads=4&kv_heads=2&ffn=13").spec


def test_a_70b_layer_has_the_bytes_of_its_parameters() -> None:
    layout = layer_layout(LLAMA_70B, 2)
    attention, feed_forward, norms = 150_994_944, 704_643_072, 16_384
    assert layout.part_nbytes("attention") == 2 * (attention + norms)
    assert layout.part_nbytes("records") == 2 * feed_forward
    assert layout.nbytes == 2 * (attention + feed_forward + norms)


def test_the_two_parts_are_neighbours_and_cover_the_layer() -> None:
    layout = layer_layout(LLAMA_70B, 2)
    assert layout.part_range("attention") == (0, layout.attention_nbytes)
    assert layout.part_range("records") == (layout.attention_nbytes, layout.nbytes)


@pytest.mark.parametrize("shape", ["tiny", "small", "tiny?width=40&heads=4&kv_heads=1&ffn=13"])
@pytest.mark.parametrize("element_nbytes", [2, 4])
def test_fields_are_aligned_and_do_not_overlap(shape: str, element_nbytes: int) -> None:
    layout = layer_layout(open_checkpoint(f"synthetic:{shape}").spec, element_nbytes, 9)
    end = 0
    for name, field in layout.fields.items():
        if name == "kept_gate":  # kept neurons overlie the records: a slot holds the ones or the others
            end = layout.attention_nbytes
        assert field.offset % ALIGNMENT == 0
        assert field.offset >= end
        nbytes = element_nbytes
        for length in field.shape:
            nbytes *= length
        end = field.offset + nbytes
    assert end <= layout.nbytes


def test_gate_alone_and_up_with_down_alone_are_contiguous() -> None:
    layout = layer_layout(LLAMA_70B, 2)
    gate, up_down = layout.fields["gate"], layout.fields["up_down"]
    assert gate.offset == layout.attention_nbytes
    assert up_down.offset == gate.offset + 2 * 28672 * 8192
    assert up_down.shape == (28672, 2, 8192)


def test_q_k_and_v_are_rows_of_one_matrix() -> None:
    assert [qkv_rows(LLAMA_70B, role) for role in ("q", "k", "v")] == [(0, 8192), (8192, 9216), (9216, 10240)]
    assert qkv_rows(LLAMA_70B, "v_bias") == (9216, 10240)


def test_feed_forward_tensors_are_records_and_all_others_attention() -> None:
    records = {role for role in LLAMA_70B.layer_roles() if part_of(role) == "records"}
    assert records == {"gate", "up", "down"}


def test_gate_and_kept_neurons_of_a_70b_layer_by_hand() -> None:
    layout = layer_layout(LLAMA_70B, 2, 14336)
    attention, matrix = 2 * (150_994_944 + 16_384), 2 * 28672 * 8192
    assert layout.part_range("gate") == (attention, attention + matrix)
    assert layout.part_range("kept") == (attention, attention + 3 * matrix // 2)
    assert layout.record_nbytes == 2 * 8192 * 2
    assert 2 * layout.kept_nbytes == layout.records_nbytes


def test_positions_of_a_small_layer_written_out() -> None:
    layout = layer_layout(TINY, 4, 6)
    # Rows of 160 bytes; every field begins at a multiple of 64.
    offsets = {name: (field.offset, field.shape) for name, field in layout.fields.items()}
    assert offsets == {
        "input_norm": (0, (40,)),
        "qkv": (192, (80, 40)),
        "output": (192 + 12800, (40, 40)),
        "post_norm": (12992 + 6400, (40,)),
        "gate": (19392 + 192, (13, 40)),  # 2080 bytes, and 32 to the next multiple
        "up_down": (19584 + 2112, (13, 2, 40)),  # 4160 bytes, a multiple
        "kept_gate": (19584, (6, 40)),  # 960 bytes, a multiple
        "kept_up_down": (19584 + 960, (6, 2, 40)),  # 1920 bytes, a multiple
    }
    assert (layout.attention_nbytes, layout.records_nbytes) == (19584, 2112 + 4160)
    assert layout.part_range("gate") == (19584, 19584 + 2112)
    assert layout.part_range("kept") == (19584, 19584 + 960 + 1920)
    assert (layout.kept_nbytes, layout.record_nbytes) == (2880, 320)
    assert (layout.host_nbytes, layout.kept_host_nbytes) == (7 * 4096, 4096)


def test_kept_neurons_change_nothing_else_and_end_within_the_layer() -> None:
    plain = layer_layout(TINY, 4)
    assert (plain.kept_nbytes, plain.kept_host_nbytes) == (0, 0)
    assert "kept_gate" not in plain.fields
    for num_kept in range(1, 14):
        layout = layer_layout(TINY, 4, num_kept)
        assert {name: layout.fields[name] for name in plain.fields} == dict(plain.fields)
        assert layout.nbytes == plain.nbytes
        assert 0 < layout.kept_nbytes <= layout.records_nbytes
    assert layer_layout(TINY, 4, 13).kept_nbytes == plain.records_nbytes


MIXES = [
    dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), BLOCK_FORMATS["Q4_K"]),
    dict.fromkeys(("q", "k", "o", "gate", "up"), BLOCK_FORMATS["Q4_K"]) | dict.fromkeys(("v", "down"), BLOCK_FORMATS["Q6_K"]),
    dict.fromkeys(("q", "k", "v", "o", "gate", "up"), BLOCK_FORMATS["Q5_K"]),
]


def test_a_70b_in_blocks_has_the_bytes_of_the_file_and_a_number_for_each_neuron() -> None:
    layout = layer_layout(LLAMA_70B, 2, blocks=MIXES[1])
    width, ffn, attention = 8192, 28672, 150_994_944
    values = 1024 * width
    stored = (attention - values + 2 * ffn * width) * 144 // 256 + (values + ffn * width) * 210 // 256
    assert layout.nbytes == stored + 2 * width * 2 + 4 * ffn
    assert layout.gate_nbytes == width * 144 // 256
    assert layout.record_nbytes == 4 + width * 6 // 8 + layout.gate_nbytes
    assert layout.fields["down_table"].shape == (ffn // 256, 18 * width)


def test_where_layers_differ_no_layer_has_more_of_anything_than_a_slot_has_room_for() -> None:
    spec = replace(TINY, width=256, head_dim=64, ffn_width=512, num_layers=4)
    layout = model_layout(spec, 4, 100, None, [MIXES[0], MIXES[1], MIXES[2], MIXES[0]])
    assert layout.layer(0) is layout.layer(3)
    assert [layout.layer(layer).blocks for layer in range(3)] == MIXES
    for layer in range(4):
        own = layout.layer(layer)
        assert own.nbytes <= layout.nbytes
        assert own.record_nbytes <= layout.record_nbytes
        assert all(own.part_nbytes(part) <= layout.part_nbytes(part) for part in ("attention", "records", "gate", "kept"))
    assert layout.total(lambda each: each.nbytes, (1, 2)) == layout.layer(1).nbytes + layout.layer(2).nbytes
    fewer = layout.of(replace(spec, ffn_width=100))
    assert fewer.layer(1).attention_nbytes == layout.layer(1).attention_nbytes, "its table is for all neurons"
    assert fewer.layer(1).records_nbytes < layout.layer(1).records_nbytes // 5 + ALIGNMENT * 2


def test_a_slot_has_room_for_a_table_that_the_larger_blocks_do_not_have() -> None:
    """Q4_1 has fewer bits than Q5_K, and a table of 4 bytes for 32 neurons in place of 16 for 256; plain numbers have none."""
    spec = replace(TINY, width=256, head_dim=64, ffn_width=512, num_layers=3)
    tables: list[dict[Role, BlockFormat]] = [{"down": BLOCK_FORMATS[name]} for name in ("Q5_K", "Q4_1", "Q4_1")]
    for mixes in (tables, [*tables[:2], {}]):
        layout = model_layout(spec, 4, 100, None, mixes)
        fewer = layout.of(replace(spec, ffn_width=100))
        for each in (layout, fewer):
            assert each.attention_nbytes == max(own.attention_nbytes for own in each.by_layer)
            assert all(own.records_nbytes <= each.records_nbytes for own in each.by_layer)
            starts = [each.fields[name].offset for name in ("gate", "up_down")]
            assert starts[0] == each.attention_nbytes < starts[1] < each.nbytes
        assert layout.fields["kept_gate"].offset == layout.attention_nbytes


def test_layers_that_are_alike_have_one_layout() -> None:
    spec = replace(TINY, width=256, head_dim=64, ffn_width=512)
    layout = model_layout(spec, 4, 0, None, [MIXES[1]] * spec.num_layers)
    assert layout.by_layer == ()
    assert layout == layer_layout(spec, 4, blocks=MIXES[1])
