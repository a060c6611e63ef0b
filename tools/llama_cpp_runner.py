"""Greedy answers of llama.cpp, asked for line by line: a program of its own, for an environment that has llama-cpp-python.

    echo '{"ids": [1, 2, 3], "new": 8}' | python tools/llama_cpp_runner.py model.gguf --threads 2

A line in is {"ids": token ids of the prompt, "new": number of tokens}, and optionally "forced": ids of the answer, which are
taken whatever the model says. A line out is {"ids": what was likeliest at each place, "seconds" and "cpu_seconds": from the
first token to the last, "largest": of a forced answer, for each place, the two likeliest ids and their logits}. The first line
out is {"version": ...}. Knows nothing of this project.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


class Runner:
    def __init__(self, path: str, threads: int, context: int, kv_float32: bool, as_stored: bool, flash: bool) -> None:
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.quiet = quiet  # it must live as long as the library
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.use_extra_bufts = not as_stored
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_parameters)
        if not self.model:
            raise SystemExit(f"error: llama.cpp cannot load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_threads = parameters.n_threads_batch = threads
        if kv_float32:
            parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
        if not flash:
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def answer(self, ids: list[int], num_new: int, forced: list[int] | None) -> dict[str, object]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        logits = self.logits_after(ids)
        found, largest = [], []
        began, cpu_began = time.perf_counter(), time.process_time()
        for place in range(num_new):
            best = int(logits.argmax())
            found.append(best)
            if forced is not None:
                second, first = (int(each) for each in np.argpartition(logits, -2)[-2:])
                largest.append([[best, float(logits[best])], [second if best == first else first, float(logits[second])]])
            if place + 1 < num_new:
                logits = self.logits_after([best if forced is None else forced[place]])
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        return {"ids": found, "seconds": seconds, "cpu_seconds": cpu_seconds, "largest": largest}

    def logits_after(self, ids: list[int]) -> np.ndarray:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch only points to them
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))) != 0:
            raise SystemExit("error: llama.cpp could not decode")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab_size,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kv-float32", action="store_true", help="keys and values in float32, not float16")
    parser.add_argument(
        "--as-stored", action="store_true", help="weights in the order of the file, not as its matrix units like it"
    )
    parser.add_argument("--no-flash-attention", action="store_true", help="scores of all positions in memory")
    options = parser.parse_args()
    runner = Runner(
        options.model,
        options.threads,
        options.context,
        options.kv_float32,
        options.as_stored,
        flash=not options.no_flash_attention,
    )
    runner.answer([1] * 16, 2, None)  # whether it works at all
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(runner.answer(request["ids"], request["new"], request.get("forced"))), flush=True)


if __name__ == "__main__":
    main()
