"""The flags: what help says of them, and that their defaults are those of config.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import typer

from offload_sirius.cli.app import app
from offload_sirius.cli.generate import generate
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, SamplingConfig, default_of, help_of

from .conftest import Run

TOP: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS: dict[str, Any] = {name: each for name, each in TOP.items() if name != "bench"} | {
    f"bench {name}": each for name, each in TOP["bench"].commands.items()
}
DOCUMENTED = {
    "generate": (
        "--model --mode --sparsity --keep --cats-threshold --window --accept --threshold --draft --draft-quantize "
        "--resident-first --refresh "
        "--refresh-decay --overlap --prior --draft-keep --tree-width --lookup --device --device-memory --host-memory "
        "--link-gbps --dtype --quantize --quantize-group --quantize-head --keep-blocks "
        "--max-context --kv-dtype --auto --threads --temperature --top-k --top-p --min-p --repetition-penalty --seed "
        "--stop --max-new-tokens --prompt --prompt-file --chat --ignore-eos "
        "--cuda-graphs --shared-host-buffers --trace --json --verbose"
    ),
    "batch": (
        "--in --out --parallel --figures --chat --model --mode --sparsity --keep --cats-threshold --window --accept --threshold "
        "--draft --draft-quantize --resident-first --refresh --refresh-decay --overlap --prior --draft-keep --tree-width "
        "--lookup --device --device-memory --host-memory --link-gbps --dtype --quantize --quantize-group --quantize-head "
        "--keep-blocks --max-context --kv-dtype --auto --threads --cuda-graphs --shared-host-buffers --max-new-tokens --stop "
        "--ignore-eos --temperature --top-k --top-p --min-p --repetition-penalty --seed --verbose"
    ),
    "plan": (
        "--model --mode --sparsity --keep --window --draft --draft-quantize "
        "--resident-first --prior --draft-keep --tree-width --lookup "
        "--device --device-memory --host-memory --link-gbps --dtype --quantize --quantize-group --quantize-head --keep-blocks "
        "--max-context --kv-dtype --auto --cuda-graphs --device-tflops "
        "--device-gbps --disk-gbps --prompt-tokens --parallel --json --verbose"
    ),
    "serve": (
        "--host --port --api-key --served-name --max-queue --max-request-size --grace "
        "--model --mode --sparsity --keep --cats-threshold --window --accept --threshold --draft --draft-quantize "
        "--resident-first --refresh --refresh-decay --overlap --prior --draft-keep --tree-width --lookup --device "
        "--device-memory --host-memory --link-gbps --dtype --quantize --quantize-group --quantize-head --keep-blocks "
        "--max-context --kv-dtype --parallel --auto --threads --cuda-graphs --shared-host-buffers --verbose"
    ),
    "pack": "--model --out --quantize --quantize-group --quantize-head --keep-blocks --dtype --report --verify --json --verbose",
    "chat": (
        "--system --history --model --mode --sparsity --keep --cats-threshold --window --accept --threshold --draft "
        "--draft-quantize --resident-first --refresh --refresh-decay --overlap --prior --draft-keep --tree-width --lookup "
        "--device --device-memory --host-memory --link-gbps --dtype --quantize --quantize-group --quantize-head --keep-blocks "
        "--max-context --kv-dtype --auto --threads --cuda-graphs --max-new-tokens --stop --temperature --top-k --top-p --min-p "
        "--repetition-penalty --seed --verbose"
    ),
    "doctor": "--path --measure --json",
    "models": "--json",
    "bench link": "--device --sizes --path --repeats --plot --json",
    "bench decode": (
        "--model --prompts --limit --chat --modes --sparsity --keep --cats-threshold --window --accept --threshold "
        "--draft --draft-quantize --resident-first --refresh "
        "--refresh-decay --overlap --prior --draft-keep --tree-width --lookup --force-aal "
        "--max-new-tokens --ignore-eos --temperature --top-k --top-p --min-p --repetition-penalty --seed "
        "--device --device-memory --host-memory --link-gbps --dtype --quantize --quantize-group --quantize-head --keep-blocks "
        "--kv-dtype --threads --cuda-graphs --shared-host-buffers "
        "--plot --trace --json --verbose"
    ),
    "bench stream": (
        "--model --device --device-memory --host-memory --link-gbps --dtype --quantize --quantize-group --quantize-head "
        "--keep-blocks --threads --passes "
        "--shared-host-buffers --plot --trace --json --verbose"
    ),
}
SETTINGS = [
    (config, name)
    for config, names in (
        (
            EngineConfig,
            "model device device_memory host_memory link_gbps dtype quantize quantize_group quantize_head keep_blocks "
            "max_context kv_dtype auto threads shared_host_buffers cuda_graphs",
        ),
        (DecodingConfig, "mode sparsity keep cats_threshold window accept threshold draft refresh refresh_decay tree_width"),
        (DecodingConfig, "resident_first overlap prior draft_keep draft_quantize lookup"),
        (GenerationConfig, "max_new_tokens ignore_eos chat"),
        (SamplingConfig, "temperature top_k top_p min_p repetition_penalty seed"),
    )
    for name in names.split()
]


def without_spaces(text: str) -> str:
    """Help is wrapped, within words too."""
    return "".join(text.split())


def test_every_command_is_documented() -> None:
    assert set(COMMANDS) == set(DOCUMENTED)


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_command_has_the_documented_flags_and_no_others(command: str) -> None:
    assert {parameter.opts[0] for parameter in COMMANDS[command].params} == set(DOCUMENTED[command].split())


@pytest.mark.parametrize("command", DOCUMENTED)
def test_help_says_what_each_flag_means(command: str, run: Run) -> None:
    shown = run(*command.split(), "--help")
    assert shown.code == 0
    for parameter in COMMANDS[command].params:
        assert parameter.help
        assert without_spaces(parameter.help) in without_spaces(shown.out), parameter.opts[0]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_help_shows_the_default_of_each_flag_that_takes_a_value(command: str, run: Run) -> None:
    shown = without_spaces(run(*command.split(), "--help").out)
    for parameter in COMMANDS[command].params:
        if parameter.default is not None and not parameter.is_flag:
            assert f"[default:{parameter.default}]" in shown, parameter.opts[0]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_help_ends_with_two_examples(command: str, run: Run) -> None:
    *_, first, second = run(*command.split(), "--help").out.rstrip().splitlines()
    assert first.startswith(f"    offload-sirius {command}")
    assert second.startswith(f"    offload-sirius {command} ")


@pytest.mark.parametrize(("config", "name"), SETTINGS)
def test_a_flag_has_the_default_and_the_text_of_its_setting(config: type, name: str) -> None:
    flag = next(each for each in COMMANDS["generate"].params if each.name == name)
    assert parameters(generate)[name] == default_of(config, name)
    assert flag.help == help_of(config, name)


def parameters(command: Callable[..., Any]) -> dict[str, Any]:
    """Name -> default."""
    return {name: each.default for name, each in inspect.signature(command).parameters.items()}


def test_every_setting_can_be_given_on_the_command_line() -> None:
    configs = (EngineConfig, DecodingConfig, GenerationConfig, SamplingConfig)
    settings = {name for config in configs for name in config.__dataclass_fields__}
    of_several_answers = {"parallel", "reuse", "logprobs"}
    assert settings - {"decoding", "sampling"} - of_several_answers <= set(parameters(generate))
