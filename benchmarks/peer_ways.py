"""The systems that peers.py compares, each as the command that runs it and the figures it prints. Measures none of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from children import run_child
from peer_environments import REQUIREMENTS, NotInstalledError, interpreter
from peer_models import NotPreparedError, Preparation, prepared, write_gguf

from offload_sirius.cache import safe_name
from offload_sirius_loaders import open_checkpoint

RUNNERS = Path(__file__).resolve().parent / "peer_runners"

FULL, PACKED, SIRIUS = "ours, full", "ours, full, packed", "ours, sirius"
OURS = (FULL, PACKED, SIRIUS)
LLAMA_CPP, DISK_OFFLOAD, AIRLLM, IN_MEMORY = (
    "llama.cpp, mmap",
    "accelerate, disk offload",
    "AirLLM",
    "transformers, all in memory",
)
MEMORY_SHARES = (0.9, 0.8, 0.75, 0.7, 0.6, 0.45, 0.3, 0.0)
"""Of the limit, that accelerate is told to keep weights in: the first that it survives."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One run's figures, whoever made it."""

    ids: list[int]
    first_token_seconds: float
    seconds_per_token: float
    read_nbytes_per_token: float
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One setting of a system."""

    command: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A system that answers."""

    name: str
    attempts: tuple[Attempt, ...]
    """The first that works in the round that does not count is the one that is measured."""
    read: Callable[[dict[str, Any]], Answer]
    is_ours: bool = False
    is_capped: bool = True
    preparation: Preparation | None = None


def ways_to_answer(
    options: argparse.Namespace, folder: Path, prompt: str, ids: list[int], limit_nbytes: int | None
) -> tuple[list[Way], dict[str, str]]:
    """All systems that could be made ready, mode full first; names of those that could not, and why."""
    ways, failed = [our_way(options, FULL, folder, prompt, "full")], dict[str, str]()

    def add(name: str, make: Callable[[], Way]) -> None:
        try:
            ways.append(make())
        except NotInstalledError as error:
            failed[name] = f"not installed: {error}"
        except NotPreparedError as error:
            failed[name] = f"not prepared: {error}"
        if name in failed:
            print(f"{name}: {failed[name]}", flush=True)

    add(PACKED, partial(packed_way, options, folder, prompt))
    ways.append(our_way(options, SIRIUS, folder, prompt, "sirius"))
    wanted = (*REQUIREMENTS, "memory") if options.peers is None else options.peers
    pythons = environments_of(options.environment)
    makers: dict[str, tuple[str, Callable[[Path], Way]]] = {
        "llama_cpp": (LLAMA_CPP, partial(llama_cpp_way, options, ids)),
        "accelerate": (DISK_OFFLOAD, partial(disk_offload_way, options, folder, ids, limit_nbytes)),
        "airllm": (AIRLLM, partial(airllm_way, options, folder, ids)),
        "memory": (IN_MEMORY, partial(in_memory_way, options, folder, ids)),
    }
    for key, (name, make) in makers.items():
        if key in wanted:
            environment = "accelerate" if key == "memory" else key
            add(name, partial(with_interpreter, environment, pythons, options.folder, make))
    return ways, failed


def with_interpreter(environment: str, pythons: dict[str, str], folder: Path, make: Callable[[Path], Way]) -> Way:
    """A way whose environment is given, or made. Raises NotInstalledError, NotPreparedError."""
    return make(Path(pythons[environment]) if environment in pythons else interpreter(environment, folder))


def environments_of(words: Sequence[str]) -> dict[str, str]:
    """Name -> interpreter. Raises ValueError."""
    pairs = [word.partition("=") for word in words]
    for name, _, python in pairs:
        if name not in REQUIREMENTS or not Path(python).is_file():
            raise ValueError(f"--environment {name}={python}: give NAME=PYTHON, a file, NAME one of {', '.join(REQUIREMENTS)}")
    return {name: python for name, _, python in pairs}


def packed_way(options: argparse.Namespace, folder: Path, prompt: str) -> Way:
    """A packed copy, whose layers need not be rearranged as they arrive. Raises NotPreparedError."""
    packed = options.folder / f"{safe_name(options.model)}-packed"
    cost = prepared(packed, partial(pack, options, folder), source=folder)
    return our_way(options, PACKED, packed, prompt, "full", cost)


def pack(options: argparse.Namespace, folder: Path, packed: Path) -> None:
    """Raises NotPreparedError."""
    command = (sys.executable, "-m", "offload_sirius", "pack", "--model", str(folder), "--out", str(packed), "--json")
    child = run_child(command, environment=environment_of(options, is_ours=True), limit_seconds=10 * options.seconds)
    if child.error is not None:
        raise NotPreparedError(child.error)


def our_way(
    options: argparse.Namespace, name: str, folder: Path, prompt: str, mode: str, preparation: Preparation | None = None
) -> Way:
    """Memory and threads are left to the program, which obeys the cgroup and leaves a core to its readers."""
    command = (
        *(sys.executable, "-m", "offload_sirius", "generate", "--model", str(folder), "--mode", mode),
        *(
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
            "--prompt",
            prompt,
            "--no-chat",
            "--max-new-tokens",
            str(options.new_tokens),
            "--ignore-eos",
        ),
        "--json",
    )
    attempts = (Attempt(command=command),)
    return Way(name=name, attempts=attempts, read=our_answer, is_ours=True, preparation=preparation)


def our_answer(figures: dict[str, Any]) -> Answer:
    """From the JSON of `generate`. Bytes are counted where layers are used; of them, the disk's share of the layers was read.

    Drafts read no layer whose neurons are kept in host memory.
    """
    steps = figures["new_tokens"] - 1
    moved, plan = figures["link"]["bytes"], figures["plan"]
    on_disk = set(plan["disk_layers"])
    num_streamed = max(len(on_disk) + len(plan["host_layers"]), 1)
    full_share, draft_share = len(on_disk) / num_streamed, len(on_disk - set(plan["kept_layers"])) / num_streamed
    return Answer(
        ids=list(figures["token_ids"]),
        first_token_seconds=figures["load_seconds"] + figures["ttft_seconds"],
        seconds_per_token=figures["decode_seconds"] / steps,
        read_nbytes_per_token=(full_share * (moved["correction"] + moved["full"]) + draft_share * moved["draft"]) / steps,
    )


def peer_answer(figures: dict[str, Any]) -> Answer:
    """From the line of a runner."""
    return Answer(
        ids=figures["ids"],
        first_token_seconds=figures["load_seconds"] + figures["ttft_seconds"],
        seconds_per_token=figures["seconds_per_token"],
        read_nbytes_per_token=figures["read_bytes_per_token"],
        versions=figures["versions"],
    )


def runner(python: Path, name: str, model: Path | str, *arguments: str) -> tuple[str, ...]:
    return (str(python), str(RUNNERS / f"{name}.py"), "--model", str(model), *arguments)


def asked(options: argparse.Namespace, ids: Sequence[int]) -> tuple[str, ...]:
    """What every runner is given."""
    return ("--ids", ",".join(map(str, ids)), "--new", str(options.new_tokens), "--threads", str(options.threads))


def llama_cpp_way(options: argparse.Namespace, ids: list[int], python: Path) -> Way:
    """Raises NotPreparedError."""
    cost = None
    if options.gguf is None:
        if not options.model.startswith("synthetic:"):
            raise NotPreparedError("only synthetic models are written as GGUF; give the file with --gguf")
        file = options.folder / f"{safe_name(options.model)}.gguf"
        cost = prepared(file, partial(write_gguf, options.model))
    command = runner(python, "run_llama_cpp", options.gguf or file, *asked(options, ids))
    return Way(name=LLAMA_CPP, attempts=(Attempt(command=command),), read=peer_answer, preparation=cost)


def disk_offload_way(options: argparse.Namespace, folder: Path, ids: list[int], limit_nbytes: int | None, python: Path) -> Way:
    """How much it may keep of the weights is for the user to say, so the largest of a few shares that works."""
    offload = options.folder / f"{safe_name(options.model)}-offload"
    whole = limit_nbytes or folder_limit(folder)
    attempts = tuple(
        Attempt(
            command=runner(
                python,
                "run_accelerate",
                folder,
                *asked(options, ids),
                "--memory",
                str(int(share * whole)),
                "--offload",
                str(offload),
            ),
            note=f"keeps {share:.0%} of the limit in memory",
        )
        for share in MEMORY_SHARES
    )
    return Way(name=DISK_OFFLOAD, attempts=attempts, read=peer_answer)


def folder_limit(folder: Path) -> int:
    """Where nothing is limited, so many bytes as the weights have: some of them will go to the disk."""
    return sum(info.nbytes for info in open_checkpoint(str(folder)).tensors.values())


def in_memory_way(options: argparse.Namespace, folder: Path, ids: list[int], python: Path) -> Way:
    """Without a limit: what the machine gives where memory is no question."""
    command = runner(python, "run_accelerate", folder, *asked(options, ids))
    return Way(name=IN_MEMORY, attempts=(Attempt(command=command),), read=peer_answer, is_capped=False)


def airllm_way(options: argparse.Namespace, folder: Path, ids: list[int], python: Path) -> Way:
    """Its layer files are written without a limit. Raises NotPreparedError."""
    shards = options.folder / f"{safe_name(options.model)}-airllm"

    def split(path: Path) -> None:
        command = runner(python, "run_airllm", folder, "--shards", str(path), "--split")
        child = run_child(command, environment=environment_of(options, is_ours=False), limit_seconds=10 * options.seconds)
        if child.error is not None:
            raise NotPreparedError(child.error)

    cost = prepared(shards, split, source=folder)
    command = runner(python, "run_airllm", folder, "--shards", str(shards), *asked(options, ids))
    return Way(name=AIRLLM, attempts=(Attempt(command=command),), read=peer_answer, preparation=cost)


def environment_of(options: argparse.Namespace, *, is_ours: bool) -> dict[str, str]:
    """Threads as asked for, nothing from the network, and nothing of this project in another's process."""
    own = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    return {name: text for name, text in os.environ.items() if is_ours or name != "PYTHONPATH"} | own
