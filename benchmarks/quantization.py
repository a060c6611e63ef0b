"""What do 8 and 4 bits cost in quality? Quantised weights beside the unquantised model, and beside other quantisers of 4 bits.

    python benchmarks/quantization.py                                          # twenty minutes on two cores
    python benchmarks/quantization.py --limit 4 --max-new-tokens 16 --peers    # a sample, without other quantisers

SmolLM2-135M-Instruct, computed in float32. Its file has all matrices of its layers in GGUF's Q4_1, in blocks of 32 inputs, which
any 4 bits in the same blocks would find again without having to be good. So width, neurons and the numbers of a head are put in
another order first, at random and everywhere alike: the same model, of whose weights no two in a group need to have been in one
block. That is what "unquantised" stands for here. It answers every prompt greedily, and each format is then asked for the next
token behind the prompt and behind every beginning of that answer: agreement is the share of places at which it finds the same
token likeliest, and KL the mean divergence of its distribution from the unquantised model's, in nats. Perplexity is that of
the first 4096 tokens of docs/architecture.md, a small text, in pieces of 512: it compares the formats with each other, and says
nothing of how good the model is.

peers: hqq and torchao, installed into a folder of this run's own, quantise the linear layers of the same model in transformers
to 4 bits in groups of 32, with no data either, and are asked the same. Their groups run along the inputs of every matrix; ours
run along the width of the model, in the down projection along its outputs. torchao's zero points are whole numbers.

Must hold: int8 agrees at 98 % of the places, and int4 in groups of 32 at no less than each of the others does, less one in 100.
Exit status: 0 it holds, 1 it does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp, prod
from pathlib import Path
from typing import Any

import torch
from report import finish, machine_facts
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import offload_sirius
from offload_sirius.engine import Engine, open_model
from offload_sirius.quantization import WeightFormat
from offload_sirius_loaders.spec import ModelSpec
from tools.gguf_to_safetensors import convert, find_demo

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "data" / "prompts.jsonl"
TEXT = ROOT / "docs" / "architecture.md"

FORMATS = (
    None,
    WeightFormat(kind="int8", group=64),
    WeightFormat(kind="int4", group=32),
    WeightFormat(kind="int4", group=64),
    WeightFormat(kind="int4", group=128),
)
PEER_GROUP = 32
PIECE_TOKENS, TEXT_TOKENS = 512, 4096
LEAST_INT8_AGREEMENT = 0.98
MOST_LESS_THAN_PEERS = 0.01


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the unquantised model says to a prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    """n of them, an end token included."""


LogitsOf = Callable[[Answer], Tensor]
"""float32 [n, V]: what a model says before each token of an answer, having read prompt and answer so far."""


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How near a model is to the unquantised one."""

    agreement: float
    """Share of tokens."""
    kl: float
    """Mean over the tokens, in nats."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One format."""

    name: str
    agreement: float
    kl: float
    perplexity: float
    bytes_per_weight: float
    """Of a layer, norms included."""
    load_seconds: float


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another quantiser."""

    name: str
    packages: tuple[str, ...]
    """That pip has to bring; torch is there."""
    quantised: Callable[[Tensor], Tensor]
    """float32 [out, in] -> the weights that its 4 bits stand for."""
    bits_per_weight: float


def by_hqq(weights: Tensor) -> Tensor:
    """Scale and zero in float16, as hqq's linear layers hold them."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(weights, nbits=4, group_size=PEER_GROUP, axis=1, device="cpu")
    meta |= {"compute_dtype": torch.float32, "scale": meta["scale"].half().float(), "zero": meta["zero"].half().float()}
    found: Tensor = Quantizer.dequantize(packed, meta)
    return found


def by_torchao(weights: Tensor) -> Tensor:
    """Scale in float16, zero a whole number."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    linear = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    linear.weight = nn.Parameter(weights)
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(PEER_GROUP),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )
    quantize_(linear, config)
    found: Tensor = linear.weight.dequantize()
    return found.float()


PEERS = (
    Peer(name="hqq", packages=("hqq", "einops", "termcolor"), quantised=by_hqq, bits_per_weight=4 + 32 / PEER_GROUP),
    Peer(name="torchao", packages=("torchao",), quantised=by_torchao, bits_per_weight=4 + (16 + 8) / PEER_GROUP),
)


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="quantization-") as scratch:
        return compare(options, Path(scratch))


def compare(options: argparse.Namespace, scratch: Path) -> int:
    """Returns the exit status."""
    directory = scratch / "smollm2"
    convert(find_demo(), directory)
    model = open_model(str(directory))
    put_in_another_order(directory, model.spec)
    prompts = [str(json.loads(line)["prompt"]) for line in PROMPTS.read_text(encoding="utf-8").splitlines()][: options.limit]
    context = max(PIECE_TOKENS, *(len(model.encode(prompt)) + options.max_new_tokens for prompt in prompts))
    text_ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:TEXT_TOKENS]

    rows: list[Row] = []
    answers: list[Answer] = []
    plain: list[Tensor] = []
    for form in FORMATS:
        with load(directory, form, context, options.threads) as engine:
            if form is None:
                answers = [answer_to(engine, prompt, options.max_new_tokens) for prompt in prompts]
                plain = [our_logits(engine, answer) for answer in answers]
            rows.append(row_of(engine, form, answers, plain, text_ids))
            print(line_of(rows[-1]), flush=True)
    peers = peer_rows([peer for peer in PEERS if peer.name in options.peers], directory, answers, plain)

    held = holds(rows, peers)
    result = {
        "model": "smollm2-135m, in another order",
        "dtype": "float32",
        "num_prompts": len(prompts),
        "num_tokens": sum(len(answer.token_ids) for answer in answers),
        "text": {"file": TEXT.name, "sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(), "num_tokens": len(text_ids)},
        "rows": [asdict(row) for row in rows],
        "peer_group": PEER_GROUP,
        "peers": peers,
        "held": held,
    }
    finish("quantization", result | machine_facts(), options.out)
    return int(not held)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="no more prompts of data/prompts.jsonl than these")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, default %(default)s")
    parser.add_argument("--threads", type=int, help="threads to compute with")
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="other quantisers, default all")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/quantization-DATE.json")
    return parser.parse_args()


def put_in_another_order(directory: Path, spec: ModelSpec) -> None:
    """Rewrite the folder's weights: another order of the width, of each layer's neurons, and of the numbers of a head's values.

    A product does not ask in which order its terms come. Queries and keys keep theirs, which their rotation knows.
    """
    chance = torch.Generator().manual_seed(0)
    width, neurons = (torch.randperm(size, generator=chance) for size in (spec.width, spec.ffn_width))
    head = torch.randperm(spec.head_dim, generator=chance)
    values, outputs = (
        (torch.arange(num_heads)[:, None] * spec.head_dim + head).flatten() for num_heads in (spec.num_kv_heads, spec.num_heads)
    )
    rows = {"v_proj": values, "o_proj": width, "gate_proj": neurons, "up_proj": neurons, "down_proj": width}
    columns = {"o_proj": outputs, "down_proj": neurons}
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            kind = name.split(".")[-2]
            if kind in rows:
                tensor = tensor[rows[kind]]
            tensors[name] = tensor[..., columns.get(kind, width)].contiguous()  # embedding, head and norms have the width, too
        save_file(tensors, file, metadata={"format": "pt"})


def load(directory: Path, form: WeightFormat | None, context: int, threads: int | None) -> Engine:
    """All of it resident on the CPU."""
    quantised = {} if form is None else {"quantize": form.kind, "quantize_group": form.group}
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_context": context, "threads": threads}
    return offload_sirius.load(str(directory), mode="full", **settings, **quantised)


def answer_to(engine: Engine, prompt: str, max_new_tokens: int) -> Answer:
    prompt_ids = engine.model.encode(prompt)
    return Answer(prompt_ids=prompt_ids, token_ids=list(engine.generate(prompt_ids, max_new_tokens=max_new_tokens).token_ids))


def our_logits(engine: Engine, answer: Answer) -> Tensor:
    """See LogitsOf. The answer is one pass, as a correction of a window is."""
    transformer = engine._transformer  # logits are no part of an engine's surface
    transformer.cache.truncate(0)
    first = transformer.prefill(torch.tensor(answer.prompt_ids))[None]
    if len(answer.token_ids) == 1:
        return first
    return torch.cat((first, transformer.step(torch.tensor(answer.token_ids[:-1]))))


def row_of(
    engine: Engine, form: WeightFormat | None, answers: Sequence[Answer], plain: Sequence[Tensor], text_ids: list[int]
) -> Row:
    found = closeness(lambda answer: our_logits(engine, answer), answers, plain)
    num_weights = sum(prod(info.shape) for (layer, _), info in engine.checkpoint.tensors.items() if layer == 0)
    return Row(
        name="none" if form is None else f"{form.kind}, groups of {form.group}",
        agreement=found.agreement,
        kl=found.kl,
        perplexity=perplexity(engine, text_ids),
        bytes_per_weight=engine.plan.layer_nbytes / num_weights,
        load_seconds=engine.load_seconds,
    )


def closeness(logits_of: LogitsOf, answers: Sequence[Answer], plain: Sequence[Tensor]) -> Closeness:
    """plain: the unquantised model's logits, of each answer."""
    num_same, divergence, num_tokens = 0, 0.0, 0
    for answer, expected in zip(answers, plain, strict=True):
        logits = logits_of(answer)
        num_same += int((logits.argmax(dim=1) == torch.tensor(answer.token_ids)).sum())
        ours, theirs = logits.log_softmax(dim=1), expected.log_softmax(dim=1)
        divergence += functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        num_tokens += len(answer.token_ids)
    return Closeness(agreement=num_same / num_tokens, kl=divergence / num_tokens)


def perplexity(engine: Engine, token_ids: list[int]) -> float:
    """Of all tokens but the first of each piece."""
    transformer, nats, num_tokens = engine._transformer, 0.0, 0
    for piece in torch.tensor(token_ids).split(PIECE_TOKENS):
        transformer.cache.truncate(0)
        logits = transformer.step(piece)
        nats += functional.cross_entropy(logits[:-1], piece[1:], reduction="sum").item()
        num_tokens += len(piece) - 1
    return exp(nats / num_tokens)


def peer_rows(peers: Sequence[Peer], directory: Path, answers: Sequence[Answer], plain: Sequence[Tensor]) -> list[dict[str, Any]]:
    """What came of each, and before them of transformers itself; of one that cannot be had, why."""
    if not peers:
        return []
    with tempfile.TemporaryDirectory(prefix="quantisers-") as scratch:
        found = [{"name": "transformers, unquantised", **asdict(closeness(reference(directory), answers, plain))}]
        print(peer_line(found[-1]), flush=True)
        for peer in peers:
            try:
                install(peer, Path(scratch) / peer.name)
                found.append(
                    {
                        "name": peer.name,
                        "bits_per_weight": peer.bits_per_weight,
                        **asdict(closeness(reference(directory, peer.quantised), answers, plain)),
                    }
                )
            except (subprocess.CalledProcessError, ImportError) as error:
                found.append({"name": peer.name, "problem": problem_of(error)})
            print(peer_line(found[-1]), flush=True)
    return found


def install(peer: Peer, folder: Path) -> None:
    """Into a folder of its own, behind all that is installed. Raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *peer.packages]
    # hqq would build kernels for GPUs.
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"DISABLE_CUDA": "1"})
    sys.path.append(str(folder))


def problem_of(error: subprocess.CalledProcessError | ImportError) -> str:
    """One line."""
    said = (error.stderr.strip().splitlines() or [""])[-1] if isinstance(error, subprocess.CalledProcessError) else str(error)
    return f"not installed: {said}"


def reference(directory: Path, quantised: Callable[[Tensor], Tensor] | None = None) -> LogitsOf:
    """transformers' model. quantised: what its linear layers become; the head stays as it is, as ours does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if quantised is not None:
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    module.weight.copy_(quantised(module.weight.detach().clone()))

    @torch.inference_mode()
    def logits_of(answer: Answer) -> Tensor:
        token_ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids[:-1]]])
        logits: Tensor = model(token_ids, logits_to_keep=len(answer.token_ids)).logits[0]
        return logits

    return logits_of


def holds(rows: Sequence[Row], peers: Sequence[dict[str, Any]]) -> bool:
    """See above; a quantiser that could not be had is none to compare with."""
    agreements = {row.name: row.agreement for row in rows}
    theirs = [peer["agreement"] for peer in peers if "bits_per_weight" in peer]
    ours = agreements[f"int4, groups of {PEER_GROUP}"]
    is_near = all(ours >= agreement - MOST_LESS_THAN_PEERS for agreement in theirs)
    return agreements["int8, groups of 64"] >= LEAST_INT8_AGREEMENT and is_near


def line_of(row: Row) -> str:
    return (
        f"{row.name:26} agreement {row.agreement:.4f}  KL {row.kl:.5f}  perplexity {row.perplexity:7.3f}  "
        f"{row.bytes_per_weight:.3f} bytes a weight  loaded in {row.load_seconds:.1f} s"
    )


def peer_line(peer: dict[str, Any]) -> str:
    if "problem" in peer:
        return f"{peer['name']:26} {peer['problem']}"
    bits = f"  {peer['bits_per_weight'] / 8:.3f} bytes a weight" if "bits_per_weight" in peer else ""
    return f"{peer['name']:26} agreement {peer['agreement']:.4f}  KL {peer['kl']:.5f}{bits}"


if __name__ == "__main__":
    sys.exit(main())
