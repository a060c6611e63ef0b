"""The flags: what help says of them, and that what they say comes to the configs."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from offload_sirius.cli.app import app
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, SamplingConfig, default_of, names_of

from .conftest import Run

TOP: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS: dict[str, Any] = {name: each for name, each in TOP.items() if name != "bench"} | {
    f"bench {name}": each for name, each in TOP["bench"].commands.items()
}
DECODING = (
    "--mode --sparsity --keep --cats-threshold --window --accept --threshold --draft --draft-quantize --resident-first "
    "--refresh --refresh-decay --overlap --prior --draft-keep --tree-width --lookup "
)
PLACE = (
    "--device --device-memory --host-memory --link-gbps --dtype --quantize --quantize-group --quantize-head --keep-blocks "
    "--max-context --kv-dtype --auto --threads --cuda-graphs --shared-host-buffers "
)
ANSWER = "--max-new-tokens --stop --ignore-eos --temperature --top-k --top-p --min-p --repetition-penalty --seed "
RUN = "--model " + DECODING + PLACE


def flags(documented: str, without: str = "") -> set[str]:
    assert set(without.split()) <= set(documented.split())
    return set(documented.split()) - set(without.split())


DOCUMENTED = {
    "generate": flags(RUN + ANSWER + "--prompt --prompt-file --chat --trace --json --verbose"),
    "chat": flags(RUN + ANSWER + "--system --history --verbose", without="--shared-host-buffers --ignore-eos"),
    "serve": flags(
        RUN + "--host --port --api-key --served-name --max-queue --max-request-size --grace --parallel --verbose",
    ),
    "batch": flags(RUN + ANSWER + "--in --out --parallel --figures --chat --verbose"),
    "plan": flags(
        RUN + "--device-tflops --device-gbps --disk-gbps --prompt-tokens --parallel --json --verbose",
        without="--cats-threshold --accept --threshold --refresh --refresh-decay --overlap --threads --shared-host-buffers",
    ),
    "pack": flags(
        "--model --out --quantize --quantize-group --quantize-head --keep-blocks --dtype --report --verify --json --verbose"
    ),
    "bench link": flags("--device --sizes --path --repeats --plot --json"),
    "bench stream": flags(
        "--model " + PLACE + "--passes --plot --trace --json --verbose", without="--max-context --kv-dtype --auto --cuda-graphs"
    ),
    "bench decode": flags(
        RUN + ANSWER + "--prompts --limit --chat --modes --force-aal --plot --trace --json --verbose",
        without="--mode --max-context --auto --stop",
    ),
    "doctor": flags("--path --measure --json"),
    "models": flags("--json"),
}
COMPANIONS = {
    "cats_threshold": ["--sparsity", "cats"],
    "quantize_group": ["--quantize", "int8"],
    "shared_host_buffers": ["--model", "synthetic:tiny"],
}
"""What else must be given with some settings."""
GIVEN: list[tuple[type, dict[str, Any]]] = [
    (
        EngineConfig,
        {"model": "synthetic:tiny", "device": "cpu", "device_memory": "1GiB", "host_memory": "2GiB", "link_gbps": 0.5}
        | {"dtype": "float32", "quantize": "int8", "quantize_group": 32, "quantize_head": "int8", "keep_blocks": False}
        | {"max_context": 99, "kv_dtype": "int8", "auto": True, "threads": 2, "cuda_graphs": False, "shared_host_buffers": 3},
    ),
    (
        DecodingConfig,
        {"mode": "sparse", "sparsity": "cats", "keep": 0.25, "cats_threshold": 0.5, "window": 7, "accept": "threshold"}
        | {"threshold": 0.2, "draft": "resident", "draft_quantize": "int4", "resident_first": "layers", "refresh": False}
        | {"refresh_decay": 0.6, "overlap": False, "prior": False, "draft_keep": 0.3, "tree_width": 4, "lookup": False},
    ),
    (GenerationConfig, {"max_new_tokens": 9, "stop": ("a", "b"), "ignore_eos": True, "chat": False}),
    (
        SamplingConfig,
        {"temperature": 0.5, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 7},
    ),
]
"""A value for each setting, which is not its default."""


def typed(name: str, value: Any) -> list[str]:
    """As one would type it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return ["--" + flag if value else "--no-" + flag]
    return [part for each in (value if isinstance(value, tuple) else [value]) for part in ("--" + flag, str(each))]


def without_spaces(text: str) -> str:
    """Help is wrapped, within words too."""
    return "".join(text.split())


def test_every_command_is_documented() -> None:
    assert set(COMMANDS) == set(DOCUMENTED)


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_command_has_the_documented_flags_and_no_others(command: str) -> None:
    assert {parameter.opts[0] for parameter in COMMANDS[command].params} == DOCUMENTED[command]


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


@pytest.mark.parametrize(("config", "name"), [(config, name) for config, values in GIVEN for name in values])
def test_what_is_given_for_a_setting_is_in_its_config(config: type, name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    monkeypatch.setattr("offload_sirius.cli.generate._run", lambda _, *configs, **__: got.extend(configs))
    value = dict(GIVEN)[config][name]
    assert value != default_of(config, name)
    assert run("generate", "--prompt", "hi", *typed(name, value), *COMPANIONS.get(name, [])).code == 0
    engine_config, generation, _ = got
    owner = next(each for each in (engine_config, generation.decoding, generation, generation.sampling) if type(each) is config)
    assert getattr(owner, name) == value
    assert engine_config.decoding == generation.decoding


def test_every_setting_can_be_given_on_the_command_line() -> None:
    of_several_answers = {"parallel", "reuse", "logprobs"}
    for config, values in GIVEN:
        assert names_of(config) - {"decoding", "sampling"} - of_several_answers == set(values)
