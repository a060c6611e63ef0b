"""One question, one command, one answer: what README says of each benchmark that has no table of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evidence.results import Result, listed, newest, percent


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row of the table."""

    text: str
    command: str
    """What measures it."""
    result: str
    """Name of its result file."""
    answer: Callable[[Result], str]


def stream_link(result: Result) -> str:
    row = result.row(what="link at 1 GB/s")
    return (
        f"a pass takes {row['seconds']:.3f} s, its bytes over the rate {row['ceiling_seconds']:.3f} s: ratio {row['ratio']:.2f}"
    )


def stream_disk(result: Result) -> str:
    row = result.row(what="disk")
    return (
        f"a pass takes {row['seconds']:.3f} s, the best plain O_DIRECT read of as many bytes {row['ceiling_seconds']:.3f} s: "
        f"ratio {row['ratio']:.2f}"
    )


def memory_cap(result: Result) -> str:
    row = result.row(limit="1.5GB", device_memory=None)
    return f"{row['seconds_per_token']:.2f} s a token, {row['cgroup_peak_bytes'] / 1e9:.2f} GB at peak"


def resident(result: Result) -> str:
    found = [
        f"{row['dtype']} {row['tokens_per_second']:.1f} against {row['transformers_tokens_per_second']:.1f} tokens/s, "
        f"ratio {row['ratio']:.2f}"
        for row in result.rows
    ]
    return "; ".join(found)


def predict(result: Result) -> str:
    at_one = max(abs(row["error"]) for row in result.rows if row["link_gbps"] == 1.0)
    nbytes = "equal" if result["bytes_equal"] else "differ"
    return (
        f"bound by the link: within {percent(at_one, 1)} at 1 GB/s; all {len(result.rows)} rows within "
        f"{percent(result['worst_error'], 1)}; bytes {nbytes}"
    )


def exactness(result: Result) -> str:
    disk = newest("exactness-gguf-disk")
    rows = result.rows + disk.rows
    equal, asked = (sum(row[key] for row in rows) for key in ("num_equal", "num_prompts"))
    streamed = max(row["num_host_layers"] for row in rows), max(row["num_disk_layers"] for row in rows)
    return (
        f"{equal} of {asked} answers in {len(rows)} rows: GGUF and safetensors, each resident, over an emulated link "
        f"({streamed[0]} of 30 layers streamed) and from disk ({streamed[1]} of 30)"
    )


def llama_cpp_ids(result: Result) -> str:
    row = result.row(form="F32")
    return (
        f"{row['num_equal']} of {row['num_prompts']} answers equal; the others leave at near-ties, which are in the result file"
    )


def llama_cpp(result: Result) -> str:
    ratios = {
        model: ", ".join(f"{row['ratio']:.2f}" for row in result.rows if row["model"] == model)
        for model in ("smollm2-135m", "tinyllama-1.1b")
    }
    as_stored = any(row["llama_cpp_weights_as_stored"] for row in result.rows)
    return f"SmolLM2-135M {ratios['smollm2-135m']} of its tokens/s; TinyLlama-1.1B shape {ratios['tinyllama-1.1b']}" + (
        "; its order of quantised weights for this CPU crashed, so it took them as stored" if as_stored else ""
    )


def sirius_exactness(result: Result) -> str:
    resident, copies = newest("sirius-exactness-resident"), newest("sirius-exactness-copies")
    left = f", {copies['num_pairs_left']} of whose pairs were not tried" if copies["num_pairs_left"] else ""
    return (
        f"{result['num_equal']} of {result['num_rows']} answers equal, greedy and sampled, resident, over a link and from disk; "
        f"with a hot set (`--draft resident`) {resident['num_equal']} of {resident['num_rows']}; with quantised copies among "
        f"the settings {copies['num_equal']} of {copies['num_rows']}{left}"
    )


def hotset(result: Result) -> str:
    exact, threshold = result.row(name="exact"), result.row(name="threshold 0.1")
    return (
        f"{exact['ratio_to_full']:.1f} times mode full's tokens/s with the same device memory, exact, "
        f"{exact['num_equal']} of {exact['num_prompts']} answers mode full's; {threshold['ratio_to_full']:.1f} times with "
        f"threshold 0.1; link busy {percent(exact['busy_share'])} of the time; {exact['aal']:.2f} tokens a correction"
    )


def quantization(result: Result) -> str:
    plain, int8, *fours = result.rows
    peers = {row["name"]: row["agreement"] for row in result["peers"]}
    return (
        f"the unquantised model's likeliest token is found again for {percent(int8['agreement'], 1)} by int8 (perplexity of a "
        f"text {int8['perplexity']:.1f}, unquantised {plain['perplexity']:.1f}), "
        f"{listed([percent(row['agreement'], 1) for row in fours])} by int4 in groups of 32, 64 and 128 "
        f"({', '.join(format(row['perplexity'], '.1f') for row in fours)}); hqq {percent(peers['hqq'], 1)}, "
        f"torchao {percent(peers['torchao'], 1)} in groups of {result['peer_group']}"
    )


def quantized_link(result: Result) -> str:
    plain = result.rows[0]
    found = [
        f"{row['name']}: {row['ratio']:.2f} times bfloat16's tokens/s, {plain['pass_nbytes'] / row['pass_nbytes']:.2f} times "
        "fewer bytes"
        for row in result.rows[1:]
    ]
    worst = max(row["seconds"] / row["link_seconds"] for row in result.rows)
    return "; ".join(found) + f"; none takes more than {worst:.2f} of its bytes over the rate"


def together(result: Result) -> str:
    full, sirius = result.row(way="full"), result.row(way="sirius")
    equal, asked = (sum(row[key] for row in result.rows) for key in ("num_equal", "num_answers"))
    return (
        f"mode full: {full['ratio']:.2f} times what one takes, with the same bytes; sirius with half of the neurons on the "
        f"device {sirius['ratio']:.2f} times; {equal} of {asked} answers are those of mode full alone"
    )


def fuzz(result: Result) -> str:
    found = "nothing" if not result["found"] else f"{sum(result['found'].values())} findings"
    return (
        f"of {result['cases']:,} cases {found}: no crash, no hang, no read outside its files, no memory out of proportion; what "
        "earlier runs had found, which is in the result file, is mended"
    )


QUESTIONS = [
    Question(
        text="Does an emulated link idle? TinyLlama-1.1B shape, bfloat16, 1 GB/s",
        command="python benchmarks/stream.py --only link --passes 15",
        result="stream",
        answer=stream_link,
    ),
    Question(
        text="Does the disk idle? The same from its checkpoint's files",
        command="python benchmarks/stream.py --only disk --passes 15",
        result="stream",
        answer=stream_disk,
    ),
    Question(
        text="Larger than memory: the same, 2.2 GB of weights under a cgroup limit of 1.5 GB",
        command="python benchmarks/memory_cap.py",
        result="memory-cap",
        answer=memory_cap,
    ),
    Question(
        text="Resident decoding of SmolLM2-135M beside transformers' `generate`",
        command="python benchmarks/resident.py",
        result="resident",
        answer=resident,
    ),
    Question(
        text="Resident decoding beside llama.cpp's, bfloat16, int8 and int4 in groups of 32, one thread each, CPU seconds",
        command="python benchmarks/llama_cpp.py --threads 1 --clock cpu_seconds",
        result="llama-cpp",
        answer=llama_cpp,
    ),
    Question(
        text="Does the planner know how long a token takes? Three shapes, three budgets, two emulated links",
        command="python benchmarks/predict.py",
        result="predict",
        answer=predict,
    ),
    Question(
        text="Token for token what transformers gives? SmolLM2-135M, float32, greedy, 48 prompts of 64 tokens a row",
        command="python tools/exactness.py",
        result="exactness",
        answer=exactness,
    ),
    Question(
        text="The ids that llama.cpp gives? SmolLM2-135M's file, its numbers written as F32, 48 prompts of 32 tokens",
        command="python tools/llama_cpp_ids.py --only F32 --threads 1 --llama-python PYTHON",
        result="llama-cpp-ids",
        answer=llama_cpp_ids,
    ),
    Question(
        text="Is exact acceptance exact? SmolLM2-135M, float32, mode sirius against mode full, 96 tokens: rows in which every "
        "two of prompt, sparsity, keep, window, tree width, lookup, seed, place and `--quantize` meet",
        command="python tools/sirius_exactness.py [--draft resident]",
        result="sirius-exactness",
        answer=sirius_exactness,
    ),
    Question(
        text="What are drafts on the device worth? SmolLM2-135M, float32, all attention blocks and 75 % of the neurons resident, "
        "link of 0.07 GB/s, windows of 8, 12 prompts of 64 tokens",
        command="python benchmarks/hotset.py",
        result="hotset",
        answer=hotset,
    ),
    Question(
        text="What do 8 and 4 bits cost in quality? SmolLM2-135M in another order of its weights, 48 prompts, each token given "
        "those before it",
        command="python benchmarks/quantization.py",
        result="quantization",
        answer=quantization,
    ),
    Question(
        text="What do 8 and 4 bits save on a link? SmolLM2-135M, mode full, everything streamed at 0.2 GB/s",
        command="python benchmarks/quantized_link.py",
        result="quantized-link",
        answer=quantized_link,
    ),
    Question(
        text="What do eight answers together take? SmolLM2-135M, float32, 24 tokens each, link of 0.1 GB/s",
        command="python benchmarks/together.py --max-new-tokens 24",
        result="together",
        answer=together,
    ),
    Question(
        text="Can a broken file crash it? Headers, metadata, tables, configs, tokenizers, templates and sealed packs, broken",
        command="python tools/fuzz.py --cases 210000 --seed 4",
        result="fuzz",
        answer=fuzz,
    ),
]


def answers() -> list[str]:
    """The table, as lines of Markdown."""
    lines = ["| Question | Command | Answer | Measured |", "|---|---|---|---|"]
    for question in QUESTIONS:
        result = newest(question.result)
        lines.append(f"| {question.text} | `{question.command}` | {question.answer(result)} | {result.measured} |")
    return lines
