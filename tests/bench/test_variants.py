"""Rows from lists: the cross product, each once, and what cannot be forced."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from offload_sirius.bench.variants import FULL, DecodeBench, name_of, roomiest, variants_of
from offload_sirius.config import MAX_LOOKUP_NODES, DecodingConfig, GenerationConfig, SamplingConfig
from offload_sirius.errors import ConfigError

PLAIN: dict[str, Any] = {
    "modes": ["full", "sparse", "sirius"],
    "sparsities": ["griffin"],
    "keeps": [0.5],
    "windows": ["4"],
    "accepts": ["exact"],
    "tree_widths": [1],
    "drafts": ["auto"],
}


SHARED = DecodingConfig()


def names(shared: DecodingConfig = SHARED, **lists: Any) -> list[str]:
    return [name_of(variant) for variant in variants_of(shared, **PLAIN | lists)]


def bench(variants: tuple[DecodingConfig, ...], **others: Any) -> DecodeBench:
    generation = GenerationConfig(
        max_new_tokens=others.pop("max_new_tokens", 9), sampling=others.pop("sampling", SamplingConfig())
    )
    return DecodeBench(prompts=("hi",), variants=variants, generation=generation, **others)


def test_the_small_table_has_one_sparse_and_one_corrected_row() -> None:
    assert names() == ["griffin 0.5 sparse", "griffin 0.5 sirius exact w4"]
    assert names(modes=["full"]) == []


def test_rows_say_how_many_of_the_resident_neurons_drafts_compute() -> None:
    asked = {"keeps": [0.75], "drafts": ["resident", "streamed"], "modes": ["sparse"]}
    found = [name_of(variant) for variant in variants_of(SHARED, **PLAIN | asked, draft_keep=0.6)]
    assert found == ["griffin 0.6 of 0.75 resident sparse", "griffin 0.75 streamed sparse"]


def test_rows_are_a_cross_product_in_the_order_of_the_lists() -> None:
    assert names(sparsities=["griffin", "cats"], keeps=[0.5, 0.75], modes=["sirius"], tree_widths=[1, 2]) == [
        "griffin 0.5 sirius exact w4",
        "griffin 0.5 sirius exact w4 t2",
        "griffin 0.75 sirius exact w4",
        "griffin 0.75 sirius exact w4 t2",
        "cats 0.5 sirius exact w4",
        "cats 0.5 sirius exact w4 t2",
        "cats 0.75 sirius exact w4",
        "cats 0.75 sirius exact w4 t2",
    ]
    assert names(DecodingConfig(sparsity="cats", cats_threshold="auto"), sparsities=["griffin", "cats"], modes=["sparse"]) == [
        "griffin 0.5 sparse",
        "cats 0.5 gates auto sparse",
    ]
    assert names(modes=["sirius"], windows=["auto", "8"], accepts=["exact", "threshold"]) == [
        "griffin 0.5 sirius exact wauto",
        "griffin 0.5 sirius threshold 0.1 wauto",
        "griffin 0.5 sirius exact w8",
        "griffin 0.5 sirius threshold 0.1 w8",
    ]


def test_places_of_drafts_are_rows_and_loads_of_their_own() -> None:
    variants = variants_of(DecodingConfig(refresh=False, refresh_decay=0.5), **PLAIN | {"drafts": ["streamed", "resident"]})
    assert [name_of(each) for each in variants] == [
        "griffin 0.5 streamed sparse",
        "griffin 0.5 streamed sirius exact w4",
        "griffin 0.5 resident sparse",
        "griffin 0.5 resident sirius exact w4",
    ]
    assert {(each.refresh, each.refresh_decay) for each in variants} == {(False, 0.5)}
    assert bench(variants).loads == [(FULL,), variants[:2], variants[2:]]


def test_what_is_given_twice_is_measured_once() -> None:
    assert names(modes=["sparse", "sparse"], keeps=[0.5, 0.5]) == ["griffin 0.5 sparse"]


def test_each_kind_of_neurons_is_a_load_of_its_own_with_room_for_the_largest_tree() -> None:
    variants = variants_of(SHARED, **PLAIN | {"sparsities": ["griffin", "cats"], "tree_widths": [4, 1], "windows": ["4", "9"]})
    first, *others = bench(variants).loads
    assert first == (FULL,)
    assert [(load[0].sparsity, len(load)) for load in others] == [("griffin", 5), ("cats", 5)]
    assert [(roomiest(load).window, roomiest(load).tree_width) for load in others] == [(9, 4), (9, 4)]
    assert bench(variants).num_ahead == 8 * 4 + 1 + MAX_LOOKUP_NODES - 9


def test_rows_say_whether_tokens_are_looked_up_where_that_was_asked_for() -> None:
    assert names(DecodingConfig(lookup=False), modes=["sirius"], tree_widths=[1, 2]) == [
        "griffin 0.5 sirius exact w4 no lookup",
        "griffin 0.5 sirius exact w4 t2 no lookup",
    ]
    assert names(DecodingConfig(lookup=True), accepts=["threshold"]) == [
        "griffin 0.5 sparse",
        "griffin 0.5 sirius threshold 0.1 w4 lookup",
    ]


def test_rows_say_of_which_copy_drafts_are_made_where_they_can_be() -> None:
    assert names(
        SHARED, modes=["sirius"], sparsities=["griffin", "cats"], drafts=["auto", "streamed"], draft_quantize="int4"
    ) == [
        "griffin 0.5 int4 copy sirius exact w4",
        "griffin 0.5 streamed sirius exact w4",
        "cats 0.5 sirius exact w4",
        "cats 0.5 streamed sirius exact w4",
    ]


def test_forced_answers_are_whole_windows_behind_a_first_token() -> None:
    forced = bench(variants_of(SHARED, **PLAIN), forced_aal=Fraction("3.5"), max_new_tokens=14)
    assert (forced.num_tokens, forced.num_ahead) == (1 + 10, 4)
    assert name_of(forced.variants[1], forced.forced_aal) == "griffin 0.5 sirius forced 3.5 w4"


@pytest.mark.parametrize(
    ("lists", "aal", "message"),
    [
        ({"modes": ["sparse"]}, "2", "--force-aal is for mode sirius; add it to --modes"),
        ({"tree_widths": [1, 2]}, "2", "--force-aal is for lines, and --tree-width is 2; give --tree-width 1"),
        (
            {"windows": ["auto"]},
            "2",
            "--force-aal is for fixed windows, and --window is auto; give a number, such as --window 16",
        ),
        ({"windows": ["8", "4"]}, "4.5", "--force-aal is 4.5; it must be between 1 and --window 4"),
        ({}, "0.5", "--force-aal is 0.5; it must be between 1 and --window 4"),
        (
            {"accepts": ["threshold"]},
            "2",
            "--force-aal decides what is accepted, and --accept is threshold; leave --accept out",
        ),
        ({"windows": ["16"]}, "9.5", "--max-new-tokens is 9; a first token and one window of --force-aal 9.5 take 10"),
    ],
)
def test_what_cannot_be_forced_is_said(lists: dict[str, Any], aal: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bench(variants_of(SHARED, **PLAIN | lists), forced_aal=Fraction(aal))
    assert str(caught.value) == message


def test_what_is_looked_up_cannot_be_forced() -> None:
    with pytest.raises(ConfigError) as caught:
        bench(variants_of(DecodingConfig(lookup=True), **PLAIN), forced_aal=Fraction(2))
    assert str(caught.value) == "--force-aal decides what is accepted, of drafted tokens alone; leave --lookup out"


def test_the_rule_of_the_paper_is_greedy_in_every_row() -> None:
    with pytest.raises(ConfigError, match="--accept threshold is greedy, and --temperature is 1"):
        bench(variants_of(SHARED, **PLAIN | {"accepts": ["exact", "threshold"]}), sampling=SamplingConfig(temperature=1.0))
