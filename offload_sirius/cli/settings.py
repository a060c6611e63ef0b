"""The flags of settings, one list for all commands. Texts and defaults are those of config.py; names and order are documented.

A new setting is a field there and a line here: every command that takes its group has it, unless it says that it goes without.
"""

from __future__ import annotations

from typing import Annotated

from offload_sirius.cli import flags
from offload_sirius.cli.flag_group import FlagGroup, Form
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, PlanConfig, SamplingConfig

DECODING = FlagGroup.of(
    DecodingConfig,
    flags.DECODING,
    mode=Form(str, "MODE"),
    sparsity=Form(str, "KIND"),
    keep=Form(float, "SHARE"),
    cats_threshold=Form(str | None, "X|auto"),
    window=Form(str, "N|auto"),
    accept=Form(str, "RULE"),
    threshold=Form(float, "P"),
    draft=Form(str, "PLACE"),
    draft_quantize=Form(str, "KIND"),
    resident_first=Form(str, "WHAT"),
    refresh=Form(bool),
    refresh_decay=Form(float, "SHARE"),
    overlap=Form(bool),
    prior=Form(bool | None),
    draft_keep=Form(float | None, "SHARE"),
    tree_width=Form(int, "N"),
    lookup=Form(bool | None),
)
ENGINE = (
    FlagGroup.of(EngineConfig, flags.MODEL, model=Form(str, "MODEL"))
    + DECODING
    + FlagGroup.of(
        EngineConfig,
        flags.PLACE,
        device=Form(str, "DEVICE"),
        device_memory=Form(str, "SIZE"),
        host_memory=Form(str, "SIZE"),
        link_gbps=Form(float | None, "GB/S"),
        dtype=Form(str, "DTYPE"),
        quantize=Form(str, "KIND"),
        quantize_group=Form(int | None, "N"),
        quantize_head=Form(str, "KIND"),
        keep_blocks=Form(bool),
        max_context=Form(int | None, "N"),
        kv_dtype=Form(str, "DTYPE"),
        parallel=Form(int, "N"),
        auto=Form(bool),
        threads=Form(int | None, "N"),
        cuda_graphs=Form(bool),
        shared_host_buffers=Form(int | None, "N"),
    )
)
PLAN = FlagGroup.of(
    PlanConfig,
    flags.DESCRIBED,
    device_tflops=Form(float | None, "TFLOPS"),
    device_gbps=Form(float | None, "GB/S"),
    disk_gbps=Form(float | None, "GB/S"),
) + FlagGroup.of(PlanConfig, flags.DECODING, prompt_tokens=Form(int, "N"))
SAMPLING = FlagGroup.of(
    SamplingConfig,
    flags.SAMPLING,
    temperature=Form(float, "T"),
    top_k=Form(int, "K"),
    top_p=Form(float, "P"),
    min_p=Form(float, "P"),
    repetition_penalty=Form(float, "R"),
    seed=Form(int, "N"),
)
PROMPT = FlagGroup.of(GenerationConfig, flags.PROMPT, chat=Form(bool))
GENERATION = (
    FlagGroup.of(
        GenerationConfig,
        flags.DECODING,
        max_new_tokens=Form(int, "N"),
        stop=Form(list[str] | None, "TEXT"),
        ignore_eos=Form(bool),
    )
    + SAMPLING
)

Model = Annotated[str, ENGINE.option("model")]
Device = Annotated[str, ENGINE.option("device")]
Chat = Annotated[bool, PROMPT.option("chat")]
