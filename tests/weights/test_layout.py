"""Where things lie in the bytes of a layer."""

from __future__ import annotations

import pytest

from offload_sirius.weights.layout import ALIGNMENT, layer_layout, part_of, qkv_rows
from offload_sirius_loaders import open_checkpoint

LLAMA_70B = open_checkpoint("synthetic:llama-3-70b").spec


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
    layout = layer_layout(open_checkpoint(f"synthetic:{shape}").spec, element_nbytes)
    end = 0
    for field in layout.fields.values():
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
