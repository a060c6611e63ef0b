"""How much faster than accelerate's CPU offload is streaming? The same shape, prompt, dtype and number of tokens, in turn.

    python benchmarks/accelerate_offload.py --model 'synthetic:llama-3-70b?layers=10'
    python benchmarks/accelerate_offload.py --model synthetic:tiny --device cpu     # that it runs, nothing else

Both hold every layer in host memory and none on the device, and continue a short prompt greedily. accelerate's model is
transformers' own, with hooks that bring each module's weights to the device when it is called. Seconds a token are medians behind
the first token; the ratio is accelerate's over ours. On CUDA the ceiling is the bytes of a pass at the best rate from
pinned memory. peers.py runs this several times.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from report import finish, machine_facts

from offload_sirius.bench.link import pinned_upload_bytes_per_second
from offload_sirius.bench.stream import pass_seconds, streaming_config
from offload_sirius.config import EngineConfig
from offload_sirius.engine import NoProgress, build, open_model
from offload_sirius_loaders.spec import ModelSpec

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
FILL = 0.01
"""Written to every weight: pages that nothing was written to are all the same page, and copied faster than any real one."""


def main() -> None:
    options = arguments()
    ours, ceiling = our_seconds(options)
    gc.collect()
    theirs = their_seconds(options)
    ratio = statistics.median(theirs) / statistics.median(ours)
    medians = f"ours {statistics.median(ours):.3f} s a token, accelerate {statistics.median(theirs):.3f}"
    print(f"{options.model}: {medians}, ratio {ratio:.1f}")
    import accelerate
    import transformers

    facts = machine_facts()
    facts["versions"] |= {"accelerate": accelerate.__version__, "transformers": transformers.__version__}
    result = {
        "model": options.model,
        "device": options.device,
        "seconds": ours,
        "accelerate_seconds": theirs,
        "ceiling_seconds": ceiling,
        "ratio": ratio,
    }
    finish("accelerate-offload", {**result, **facts}, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3-70b?layers=10", help="a synthetic llama, default %(default)s")
    parser.add_argument("--device", default="cuda", help="default %(default)s")
    parser.add_argument("--passes", type=int, default=5, help="tokens that count, default %(default)s")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/accelerate-offload-DATE.json")
    return parser.parse_args()


def our_seconds(options: argparse.Namespace) -> tuple[list[float], float | None]:
    """A token each, everything streamed; and the same bytes at the best rate from pinned memory, None without a GPU."""
    model = open_model(options.model)
    config = EngineConfig(model=options.model, device=options.device, dtype="bfloat16")
    config = streaming_config(model, config, num_passes=options.passes, all_streamed=True)
    with build(model, config, NoProgress()) as engine:
        seconds, nbytes = pass_seconds(engine, options.passes), engine.plan.pass_nbytes
    device = torch.device(options.device)
    return seconds, nbytes / pinned_upload_bytes_per_second(device) if device.type == "cuda" else None


def their_seconds(options: argparse.Namespace) -> list[float]:
    """A token each, every module offloaded to the CPU."""
    from accelerate import cpu_offload

    model = cpu_offload(reference_model(open_model(options.model).spec), execution_device=torch.device(options.device))
    moments: list[float] = []

    class Moments:
        """Told of each token as it is chosen."""

        def put(self, value: Any) -> None:
            moments.append(time.perf_counter())

        def end(self) -> None:
            pass

    prompt = torch.tensor([PROMPT], device=options.device)
    num_new = options.passes + 2
    with torch.inference_mode():
        model.generate(prompt, do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new, streamer=Moments())
    # The prompt is put first; the first token and the first step are warm-up.
    return [after - before for before, after in pairwise(moments[2:])]


def reference_model(spec: ModelSpec) -> Any:
    """transformers' llama of that shape in bfloat16 in host memory, every page written to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=spec.num_layers,
        hidden_size=spec.width,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        intermediate_size=spec.ffn_width,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied_head,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    rotary = LlamaForCausalLM(LlamaConfig(**(config.to_dict() | {"num_hidden_layers": 0, "vocab_size": 8}))).model.rotary_emb
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = rotary  # its table is computed and not a weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(FILL)
    return model


if __name__ == "__main__":
    main()
