"""Settings: their defaults, their ranges, and what is said about a value outside."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from offload_sirius.config import (
    AUTO,
    MAX_AUTO_WINDOW,
    MAX_TREE_NODES,
    DecodingConfig,
    EngineConfig,
    GenerationConfig,
    PlanConfig,
    SamplingConfig,
    default_of,
    help_of,
    tree_nodes,
)
from offload_sirius.errors import ConfigError
from offload_sirius.units import GIB, Size

CONFIGS = (EngineConfig, DecodingConfig, SamplingConfig, GenerationConfig, PlanConfig)


def test_defaults_are_within_their_ranges() -> None:
    for config in CONFIGS:
        config()


def test_defaults_are_greedy_and_chat_with_the_small_model() -> None:
    assert default_of(EngineConfig, "model") == "smollm2-135m"
    assert default_of(SamplingConfig, "temperature") == 0
    assert default_of(GenerationConfig, "max_new_tokens") == 256
    assert GenerationConfig().sampling == SamplingConfig()


def test_by_default_the_full_model_corrects_coarse_drafts_exactly() -> None:
    decoding = EngineConfig().decoding
    assert (decoding.mode, decoding.sparsity, decoding.keep, decoding.accept) == ("sirius", "griffin", 0.5, "exact")
    assert (decoding.window, decoding.tree_width, decoding.threshold, decoding.cats_threshold) == (AUTO, 1, 0.1, None)
    assert GenerationConfig().decoding is None, "a request is decoded as the model was loaded for"


def test_every_setting_has_a_help_text_of_one_line() -> None:
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            if field.name not in ("sampling", "decoding"):
                assert help_of(config, field.name).endswith(".")
                assert "\n" not in help_of(config, field.name)


@pytest.mark.parametrize("ask", [help_of, default_of])
def test_a_setting_that_does_not_exist_is_a_bug(ask: Any) -> None:
    with pytest.raises(AssertionError, match="SamplingConfig has no field top_q"):
        ask(SamplingConfig, "top_q")


def test_an_unknown_setting_is_refused() -> None:
    unknown: dict[str, Any] = {"top_q": 1}
    with pytest.raises(TypeError, match="top_q"):
        SamplingConfig(**unknown)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().seed = 1  # type: ignore[misc]


def test_sizes_are_read_from_text() -> None:
    config = EngineConfig(device_memory="20GiB", host_memory="0.5")
    assert config.device_size == Size(nbytes=20 * GIB)
    assert config.host_size == Size(share=0.5)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices_that_are_accepted(device: str) -> None:
    assert EngineConfig(device=device).device == device


@pytest.mark.parametrize("device", ["", "gpu", "cpu:0", "auto:1", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1"])
def test_a_device_of_another_name_is_one_clear_line(device: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(device=device)
    assert str(error.value) == f"--device is {device}; it must be auto, cuda, cuda:N or cpu"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": "  "}, "--model is '  '; it must be an alias, hub id, path or synthetic:SHAPE"),
        ({"dtype": "int8"}, "--dtype is int8; it must be one of auto, bfloat16, float32"),
        ({"link_gbps": 0.0}, "--link-gbps is 0.0; it must be between 0.000001 and 1,000,000 GB/s"),
        ({"link_gbps": math.inf}, "--link-gbps is inf; it must be between 0.000001 and 1,000,000 GB/s"),
        ({"link_gbps": math.nan}, "--link-gbps is nan; it must be between 0.000001 and 1,000,000 GB/s"),
        ({"max_context": 0}, "--max-context is 0; it must be at least 1"),
        ({"threads": 0}, "--threads is 0; it must be between 1 and 1024"),
        ({"threads": 1025}, "--threads is 1025; it must be between 1 and 1024"),
        ({"model": "synthetic:tiny", "shared_host_buffers": 0}, "--shared-host-buffers is 0; it must be at least 1"),
        ({"shared_host_buffers": 2}, "--model is smollm2-135m; it must be synthetic:SHAPE with --shared-host-buffers"),
        ({"device_memory": "big"}, "size 'big' is not understood; write 24GiB, 500MB, or a share of what is free such as 0.8"),
        ({"host_memory": "0"}, "size '0' is zero; write 24GiB, 500MB, or a share of what is free such as 0.8"),
    ],
    ids=str,
)
def test_an_engine_setting_outside_its_range_is_one_clear_line(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(**setting)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "--temperature is -0.1; it must be 0 or a positive number"),
        ({"temperature": math.inf}, "--temperature is inf; it must be 0 or a positive number"),
        ({"temperature": math.nan}, "--temperature is nan; it must be 0 or a positive number"),
        ({"top_k": -1}, "--top-k is -1; it must be 0 or a positive number of tokens"),
        ({"top_p": 0.0}, "--top-p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "--top-p is 1.1; it must be above 0 and at most 1"),
        ({"top_p": math.nan}, "--top-p is nan; it must be above 0 and at most 1"),
        ({"min_p": -0.5}, "--min-p is -0.5; it must be between 0 and 1"),
        ({"min_p": 1.5}, "--min-p is 1.5; it must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty is 0.0; it must be between 0.001 and 1000"),
        ({"repetition_penalty": math.inf}, "--repetition-penalty is inf; it must be between 0.001 and 1000"),
        ({"seed": -1}, "--seed is -1; it must be between 0 and 2^64 - 1"),
        ({"seed": 2**64}, "--seed is 18446744073709551616; it must be between 0 and 2^64 - 1"),
    ],
    ids=str,
)
def test_a_sampling_setting_outside_its_range_is_one_clear_line(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**setting)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.0}, {"top_p": 1.0}, {"min_p": 1.0}, {"top_k": 10**9}, {"seed": 2**64 - 1}], ids=str
)
def test_the_ends_of_a_range_belong_to_it(setting: dict[str, Any]) -> None:
    SamplingConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0; it must be between 1 and 10,000,000"),
        ({"stop": ("END", "")}, "--stop is ''; it must be a text that is not empty"),
    ],
    ids=str,
)
def test_a_generation_setting_outside_its_range_is_one_clear_line(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        GenerationConfig(**setting)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "fast"}, "--mode is fast; it must be one of full, sparse, sirius"),
        ({"sparsity": "nonsense"}, "--sparsity is nonsense; it must be one of griffin, cats"),
        ({"keep": 0}, "--keep is 0; it must be above 0 and at most 1"),
        ({"keep": 1.5}, "--keep is 1.5; it must be above 0 and at most 1"),
        ({"keep": math.nan}, "--keep is nan; it must be above 0 and at most 1"),
        ({"window": 1}, "--window is 1; it must be auto, or 2 or more tokens"),
        ({"window": "x"}, "--window is x; it must be auto, or 2 or more tokens"),
        ({"window": "-3"}, "--window is -3; it must be auto, or 2 or more tokens"),
        ({"window": 2.5}, "--window is 2.5; it must be auto, or 2 or more tokens"),
        ({"window": 513}, "--window is 513; it must be such that (window - 1) * width + 1 is at most 512"),
        (
            {"window": 66, "tree_width": 8},
            "--window is 66 with --tree-width 8; it must be such that (window - 1) * width + 1 is at most 512",
        ),
        ({"accept": "nonsense"}, "--accept is nonsense; it must be one of exact, threshold"),
        ({"threshold": 0.0}, "--threshold is 0.0; it must be above 0 and at most 1"),
        ({"threshold": 2.0}, "--threshold is 2.0; it must be above 0 and at most 1"),
        ({"threshold": math.nan}, "--threshold is nan; it must be above 0 and at most 1"),
        ({"tree_width": 0}, "--tree-width is 0; it must be at least 1"),
        ({"tree_width": 512}, "--tree-width is 512; it must be at most 511"),
        ({"cats_threshold": "0"}, "--cats-threshold is 0; it must be auto or a positive number"),
        ({"cats_threshold": "x"}, "--cats-threshold is x; it must be auto or a positive number"),
        ({"cats_threshold": "nan"}, "--cats-threshold is nan; it must be auto or a positive number"),
        ({"cats_threshold": "inf"}, "--cats-threshold is inf; it must be auto or a positive number"),
        (
            {"cats_threshold": "auto"},
            "--cats-threshold is auto with --sparsity griffin; it must be left out, or given with --sparsity cats",
        ),
        ({"draft_keep": 0.0}, "--draft-keep is 0.0; it must be above 0 and at most --keep 0.5"),
        ({"draft_keep": 0.6}, "--draft-keep is 0.6; it must be above 0 and at most --keep 0.5"),
        ({"draft_keep": math.nan}, "--draft-keep is nan; it must be above 0 and at most --keep 0.5"),
        ({"draft_keep": 0.5, "keep": 1}, "--keep is 1; it must be below 1 with --draft-keep"),
        (
            {"draft_keep": 0.25, "draft": "streamed"},
            "--draft-keep is 0.25 with --draft streamed and --sparsity griffin; it must be left out, or with --draft resident",
        ),
        (
            {"draft_keep": 0.25, "sparsity": "cats"},
            "--draft-keep is 0.25 with --draft auto and --sparsity cats; it must be left out, or with --draft resident",
        ),
    ],
    ids=str,
)
def test_a_decoding_setting_outside_its_range_is_one_clear_line(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        DecodingConfig(**setting)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "setting",
    [
        {"keep": 1.0},
        {"keep": 1e-9},
        {"window": 2},
        {"window": 512},
        {"window": 2, "tree_width": 511},
        {"threshold": 1.0},
        {"tree_width": 511},
    ],
    ids=str,
)
def test_the_ends_of_a_decoding_range_belong_to_it(setting: dict[str, Any]) -> None:
    assert DecodingConfig(**setting).max_nodes <= MAX_TREE_NODES


def test_numbers_may_be_given_as_text() -> None:
    assert DecodingConfig(window="16").window == 16
    assert DecodingConfig(sparsity="cats", cats_threshold="0.25").cats_threshold == 0.25
    assert DecodingConfig(sparsity="cats", cats_threshold="auto").cats_threshold == AUTO


@pytest.mark.parametrize(
    ("setting", "max_window", "max_nodes", "num_side_nodes"),
    [
        ({"mode": "full"}, MAX_AUTO_WINDOW, 1, 0),
        ({"mode": "sparse", "window": 9, "tree_width": 4}, 9, 1, 0),
        ({}, 64, 64 + 16, 16),
        ({"window": 16}, 16, 16 + 16, 16),
        ({"window": 16, "lookup": False}, 16, 16, 0),
        ({"window": 16, "accept": "threshold"}, 16, 16, 0),
        ({"window": 16, "accept": "threshold", "lookup": True}, 16, 16 + 16, 16),
        ({"window": 505}, 505, 512, 7),
        ({"window": 16, "tree_width": 8}, 16, 121 + 16, 105 + 16),
        ({"tree_width": 2}, 64, 127 + 16, 63 + 16),
        ({"tree_width": 8}, 32, 249 + 16, 217 + 16),
        ({"tree_width": 255}, 2, 256 + 16, 254 + 16),
        ({"tree_width": 511}, 2, 512, 510),
    ],
    ids=str,
)
def test_a_window_has_a_most_of_tokens_by_hand(
    setting: dict[str, Any], max_window: int, max_nodes: int, num_side_nodes: int
) -> None:
    decoding = DecodingConfig(**setting)
    assert (decoding.max_window, decoding.max_nodes, decoding.num_side_nodes) == (max_window, max_nodes, num_side_nodes)


def test_a_tree_has_a_root_and_as_many_nodes_on_each_further_level_as_it_is_wide() -> None:
    assert [tree_nodes(window, width) for window, width in ((2, 1), (16, 1), (16, 8), (3, 4))] == [2, 16, 121, 9]


def test_at_least_one_neuron_is_kept() -> None:
    assert DecodingConfig(keep=0.5).num_kept(11) == 5
    assert DecodingConfig(keep=0.01).num_kept(11) == 1
    assert DecodingConfig(keep=1).num_kept(11) == 11


def test_a_threshold_takes_no_temperature() -> None:
    sampling = SamplingConfig(temperature=0.7)
    with pytest.raises(ConfigError) as error:
        GenerationConfig(decoding=DecodingConfig(accept="threshold"), sampling=sampling)
    assert str(error.value) == (
        "--accept threshold is greedy, and --temperature is 0.7; use --temperature 0, or --accept exact, which samples"
    )
    GenerationConfig(decoding=DecodingConfig(mode="sparse", accept="threshold"), sampling=sampling)


@pytest.mark.parametrize(
    ("settings", "with_prior"),
    [
        ({}, True),
        ({"accept": "threshold"}, False),
        ({"mode": "sparse"}, False),
        ({"mode": "full"}, False),
        ({"prior": False}, False),
        ({"accept": "threshold", "prior": True}, True),
        ({"mode": "sparse", "prior": True}, True),
        ({"mode": "full", "prior": True}, False),
    ],
    ids=str,
)
def test_earlier_runs_have_a_say_where_the_text_does_not_depend_on_it_or_where_it_is_asked_for(
    settings: dict[str, Any], with_prior: bool
) -> None:
    assert DecodingConfig(**settings).with_prior == with_prior


@pytest.mark.parametrize(
    ("draft_keep", "num_hot", "num_drafted"), [(None, 88, 88), (0.5, 88, 88), (0.25, 88, 44), (0.25, 20, 20), (0.001, 88, 1)]
)
def test_drafts_compute_all_that_is_resident_or_a_share_of_the_layer(
    draft_keep: float | None, num_hot: int, num_drafted: int
) -> None:
    assert DecodingConfig(draft_keep=draft_keep).num_drafted(176, num_hot) == num_drafted


def test_drafts_that_are_brought_know_nothing_of_what_is_resident() -> None:
    decoding = DecodingConfig(draft_keep=0.25, keep=0.75)
    assert decoding.drafting_from("streamed") == DecodingConfig(draft="streamed", keep=0.75)
    assert decoding.drafting_from("resident") == DecodingConfig(draft="resident", keep=0.75, draft_keep=0.25)
