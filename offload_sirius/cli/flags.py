"""Flags that several commands share. Names and order are the documented surface; texts and defaults are those of config.py."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, PlanConfig, SamplingConfig, help_of
from offload_sirius.errors import ConfigError

MODEL, PLACE, DECODING, SAMPLING, PROMPT, OUTPUT = "Model", "Memory and device", "Decoding", "Sampling", "Prompt", "Output"
DESCRIBED = "A machine you do not have"


def _option(config: type, name: str, panel: str, **more: Any) -> Any:
    return typer.Option("--" + name.replace("_", "-"), help=help_of(config, name), rich_help_panel=panel, **more)


Model = Annotated[str, _option(EngineConfig, "model", MODEL, metavar="MODEL")]
Device = Annotated[str, _option(EngineConfig, "device", PLACE, metavar="DEVICE")]
DeviceMemory = Annotated[str, _option(EngineConfig, "device_memory", PLACE, metavar="SIZE")]
StreamingDeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        help=help_of(EngineConfig, "device_memory") + " Default: what slots take, so that every layer is streamed.",
        metavar="SIZE",
        rich_help_panel=PLACE,
    ),
]
HostMemory = Annotated[str, _option(EngineConfig, "host_memory", PLACE, metavar="SIZE")]
LinkGbps = Annotated[float | None, _option(EngineConfig, "link_gbps", PLACE, metavar="GB/S")]
Dtype = Annotated[str, _option(EngineConfig, "dtype", PLACE, metavar="DTYPE")]
Quantize = Annotated[str, _option(EngineConfig, "quantize", PLACE, metavar="KIND")]
QuantizeGroup = Annotated[int | None, _option(EngineConfig, "quantize_group", PLACE, metavar="N")]
QuantizeHead = Annotated[str, _option(EngineConfig, "quantize_head", PLACE, metavar="KIND")]
KeepBlocks = Annotated[
    bool, typer.Option("--keep-blocks/--no-keep-blocks", help=help_of(EngineConfig, "keep_blocks"), rich_help_panel=PLACE)
]
MaxContext = Annotated[int | None, _option(EngineConfig, "max_context", PLACE, metavar="N")]
KvDtype = Annotated[str, _option(EngineConfig, "kv_dtype", PLACE, metavar="DTYPE")]
Auto = Annotated[bool, typer.Option("--auto", help=help_of(EngineConfig, "auto"), rich_help_panel=PLACE)]
Threads = Annotated[int | None, _option(EngineConfig, "threads", PLACE, metavar="N")]
Parallel = Annotated[int, _option(EngineConfig, "parallel", DECODING, metavar="N")]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help=help_of(EngineConfig, "cuda_graphs"), rich_help_panel=PLACE)
]
SharedHostBuffers = Annotated[int | None, _option(EngineConfig, "shared_host_buffers", PLACE, metavar="N")]

Mode = Annotated[str, _option(DecodingConfig, "mode", DECODING, metavar="MODE")]
Sparsity = Annotated[str, _option(DecodingConfig, "sparsity", DECODING, metavar="KIND")]
Keep = Annotated[float, _option(DecodingConfig, "keep", DECODING, metavar="SHARE")]
CatsThreshold = Annotated[str | None, _option(DecodingConfig, "cats_threshold", DECODING, metavar="X|auto")]
Window = Annotated[str, _option(DecodingConfig, "window", DECODING, metavar="N|auto")]
Accept = Annotated[str, _option(DecodingConfig, "accept", DECODING, metavar="RULE")]
Threshold = Annotated[float, _option(DecodingConfig, "threshold", DECODING, metavar="P")]
Draft = Annotated[str, _option(DecodingConfig, "draft", DECODING, metavar="PLACE")]
DraftQuantize = Annotated[str, _option(DecodingConfig, "draft_quantize", DECODING, metavar="KIND")]
ResidentFirst = Annotated[str, _option(DecodingConfig, "resident_first", DECODING, metavar="WHAT")]
Refresh = Annotated[
    bool, typer.Option("--refresh/--no-refresh", help=help_of(DecodingConfig, "refresh"), rich_help_panel=DECODING)
]
Overlap = Annotated[
    bool, typer.Option("--overlap/--no-overlap", help=help_of(DecodingConfig, "overlap"), rich_help_panel=DECODING)
]
RefreshDecay = Annotated[float, _option(DecodingConfig, "refresh_decay", DECODING, metavar="SHARE")]
Prior = Annotated[
    bool | None, typer.Option("--prior/--no-prior", help=help_of(DecodingConfig, "prior"), rich_help_panel=DECODING)
]
DraftKeep = Annotated[float | None, _option(DecodingConfig, "draft_keep", DECODING, metavar="SHARE")]
TreeWidth = Annotated[int, _option(DecodingConfig, "tree_width", DECODING, metavar="N")]
Lookup = Annotated[
    bool | None, typer.Option("--lookup/--no-lookup", help=help_of(DecodingConfig, "lookup"), rich_help_panel=DECODING)
]
MaxNewTokens = Annotated[int, _option(GenerationConfig, "max_new_tokens", DECODING, metavar="N")]
MaxChatTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        help=help_of(GenerationConfig, "max_new_tokens") + " Default: what the context has room for.",
        metavar="N",
        rich_help_panel=DECODING,
    ),
]
Stop = Annotated[list[str] | None, _option(GenerationConfig, "stop", DECODING, metavar="TEXT")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help=help_of(GenerationConfig, "ignore_eos"), rich_help_panel=DECODING)]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help=help_of(GenerationConfig, "chat"), rich_help_panel=PROMPT)]

DeviceTflops = Annotated[float | None, _option(PlanConfig, "device_tflops", DESCRIBED, metavar="TFLOPS")]
DeviceGbps = Annotated[float | None, _option(PlanConfig, "device_gbps", DESCRIBED, metavar="GB/S")]
DiskGbps = Annotated[float | None, _option(PlanConfig, "disk_gbps", DESCRIBED, metavar="GB/S")]
PromptTokens = Annotated[int, _option(PlanConfig, "prompt_tokens", DECODING, metavar="N")]

Temperature = Annotated[float, _option(SamplingConfig, "temperature", SAMPLING, metavar="T")]
TopK = Annotated[int, _option(SamplingConfig, "top_k", SAMPLING, metavar="K")]
TopP = Annotated[float, _option(SamplingConfig, "top_p", SAMPLING, metavar="P")]
MinP = Annotated[float, _option(SamplingConfig, "min_p", SAMPLING, metavar="P")]
RepetitionPenalty = Annotated[float, _option(SamplingConfig, "repetition_penalty", SAMPLING, metavar="R")]
Seed = Annotated[int, _option(SamplingConfig, "seed", SAMPLING, metavar="N")]

Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        help="Write what was copied, computed, waited for and sampled when, for ui.perfetto.dev.",
        metavar="FILE",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with text and figures instead of the text.", rich_help_panel=OUTPUT)
]
Report = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.", rich_help_panel=OUTPUT)]
Plot = Annotated[
    str | None, typer.Option("--plot", help="Draw the figures as a PNG picture.", metavar="FILE", rich_help_panel=OUTPUT)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print the plan, and the traceback of an error.", rich_help_panel=OUTPUT)
]


def at_least_one(flag: str, number: int) -> int:
    """The number. Raises ConfigError where it is less than 1."""
    if number < 1:
        raise ConfigError(f"{flag} is {number}; it must be at least 1")
    return number
