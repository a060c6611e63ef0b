"""The arithmetic of a pass, by hand. What the model keeps and allocates is compared with its tensors beside the tensors."""

from __future__ import annotations

import pytest

from offload_sirius.model.costs import activation_nbytes, attended_pairs, extents, mixing_flops, recorded_steps_nbytes
from offload_sirius_loaders import open_checkpoint

LLAMA_70B = open_checkpoint("synthetic:llama-3-70b").spec


@pytest.mark.parametrize(
    ("num_tokens", "num_cached", "pairs"),
    [(1, 0, 1), (1, 99, 100), (512, 0, 512 * 512), (513, 0, 512 * 512 + 513), (1024, 8, 512 * 520 + 512 * 1032)],
)
def test_a_chunk_sees_all_up_to_its_last_position(num_tokens: int, num_cached: int, pairs: int) -> None:
    assert attended_pairs(num_tokens, num_cached) == pairs


def test_attention_of_a_pair_is_a_product_for_the_score_and_one_for_the_value() -> None:
    assert mixing_flops(LLAMA_70B, 1) == 4 * 64 * 128


def test_steps_of_more_tokens_than_the_prompt_add_their_hidden_states_while_their_logits_are_smaller_than_a_chunk() -> None:
    few, many = (activation_nbytes(LLAMA_70B, 256, 2, 256, step_rows=step_rows) for step_rows in (1, 257))
    assert many > few
    assert activation_nbytes(LLAMA_70B, 512, 2, step_rows=512) == activation_nbytes(LLAMA_70B, 512, 2, step_rows=1) or many


def test_extents_double_up_to_the_whole_cache() -> None:
    assert extents(4096) == (256, 512, 1024, 2048, 4096)
    assert extents(1000) == (256, 512, 1000)
    assert extents(256) == (256,)
    assert extents(40) == (40,)


def test_steps_recorded_for_every_extent_share_what_they_compute_in() -> None:
    one, five = (recorded_steps_nbytes(LLAMA_70B, capacity, 2) for capacity in (256, 4096))
    assert five - one == (4096 - 256) * (3 + 2) + 4 * 80 * 48 * 2048
