"""Whatever a user or a file can get wrong, through the real command line: one line on stderr, exit code 2, nothing on stdout.

A row says what is broken and what the line must tell: what it is about, what was found, what is needed or what to do. Texts are
exact where the message is this program's own; where a number depends on the machine, it is a pattern.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from offload_sirius.cli import main
from offload_sirius.cli.console import TextWriter
from offload_sirius.decode.stream import TextPiece
from offload_sirius.units import GIB

TINY = "synthetic:tiny?dtype=F32"
ON_CPU = ("--device", "cpu", "--threads", "1")
SHORT_ANSWER = ("generate", *ON_CPU, "--model", TINY, "--prompt", "hi", "--max-new-tokens", "4")
SHARD = "model-00001-of-00004.safetensors"
FIRST_TENSOR = "model.embed_tokens.weight"
Capture = pytest.CaptureFixture[str]


def line_of(capsys: Capture, *arguments: str) -> str:
    """Run `generate`, which must fail as documented. Returns the line without its `error: `."""
    code = main(["generate", *ON_CPU, "--prompt", "hi", "--max-new-tokens", "4", *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    return one_line(captured.err)


def one_line(err: str) -> str:
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").removesuffix("\n")


# Folders: a good one is copied, and one thing in it is broken.


@pytest.fixture(scope="module")
def good(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer, each of whose tokens is a word: w0, w1, ... Other words are w0."""
    directory = tmp_path_factory.mktemp("good") / "model"
    shutil.copytree(tiny_directory, directory)
    words = {f"w{token_id}": token_id for token_id in range(512)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(good, tmp_path / "model"))


Break = Callable[[Path], None]


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str | bytes) -> Break:
    return lambda folder: void((folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()))


def config(**fields: Any) -> Break:
    """Change fields of config.json; None leaves one out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        changed = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))

    return change


def header(edit: Callable[[dict[str, Any]], object]) -> Break:
    """Change the header of the first shard, and leave its data as they are."""

    def change(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        fields = json.loads(content[8:end])
        edit(fields)
        text = json.dumps(fields).encode()
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return change


def tensor(**fields: Any) -> Break:
    """Change what the first shard's header says of the embedding."""
    return header(lambda entries: entries[FIRST_TENSOR].update(fields))


def truncate(name: str, nbytes: int) -> Break:
    return lambda folder: os.truncate(folder / name, nbytes)


def only(name: str, content: bytes) -> Break:
    """Throw all weights away, and put this in their place."""

    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / name).write_bytes(content)

    return change


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def void(_: object) -> None:
    """Make a statement of an expression."""


EMBEDDING_NBYTES = 512 * 64 * 4
FOLDERS: dict[str, tuple[Break, str]] = {
    "the folder does not exist": (shutil.rmtree, r"{folder}: no such file or directory; accepted are an alias, .*"),
    "the folder is empty": (empty, r"{folder}: has no .safetensors file; download the weights into this folder, or give another"),
    "config.json is absent": (remove("config.json"), r"{folder}: has no config.json, which says what the model is; download .*"),
    "config.json is broken": (
        write("config.json", '{"model_type": "llama",'),
        r"{folder}/config.json: broken JSON at line 1 column \d+: .*; download the file again",
    ),
    "config.json is no object": (
        write("config.json", "[1]"),
        r"{folder}/config.json: holds \[1\], a JSON object is needed; download the file again",
    ),
    "config.json is not UTF-8": (
        write("config.json", b"\xff{}"),
        r"{folder}/config.json: not UTF-8 at byte 0; download the file again",
    ),
    "config.json lacks a field": (
        config(hidden_size=None),
        r"{folder}/config.json: hidden_size is missing, and nothing else says it; download the file again",
    ),
    "config.json has an absurd field": (
        config(num_hidden_layers=-4),
        r"{folder}/config.json: num_hidden_layers is -4; it must be a whole number between 1 and 65536",
    ),
    "config.json has more layers than there are tensors": (
        config(num_hidden_layers=65536),
        r"{folder}/config.json: num_hidden_layers is 65536, and the files hold \d+ tensors in all; download config.json and .*",
    ),
    "the architecture is unknown": (
        config(model_type="gpt2"),
        r"{folder}/config.json: architecture 'gpt2' is not supported; known are llama, mistral, qwen2, qwen3",
    ),
    "the activation is unknown": (config(hidden_act="swoosh"), r".*activation '?swoosh'?.*; .*"),
    "the weights are quantised in an unknown way": (
        config(quantization_config={"quant_method": "hqq"}),
        r"{folder}/config.json: the checkpoint is quantised by 'hqq', which is not supported; supported are awq, .*, use .*",
    ),
    "a shard is missing": (
        remove(SHARD),
        rf"{{folder}}/model.safetensors.index.json: names {SHARD}, which is not in the folder; download that shard",
    ),
    "a shard is truncated": (
        truncate(SHARD, 1000),
        rf"{{folder}}/{SHARD}: (tensor \S+|its header) ends at byte \d+, the file has 1000; download the file again",
    ),
    "a shard is empty": (
        truncate(SHARD, 0),
        rf"{{folder}}/{SHARD}: has 0 bytes, a safetensors file has at least 8; download it again",
    ),
    "a shard is a Git LFS pointer": (
        write(SHARD, "version https://git-lfs.github.com/spec/v1\n"),
        rf"{{folder}}/{SHARD}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder",
    ),
    "two tensors overlap": (
        header(lambda entries: entries.update(again=entries[FIRST_TENSOR])),
        rf"{{folder}}/{SHARD}: tensor \S+ overlaps the tensor before it: it starts at byte \d+, \d+ is needed; download .*",
    ),
    "a tensor lies outside its file": (
        tensor(data_offsets=[10**9, 10**9 + EMBEDDING_NBYTES]),
        rf"{{folder}}/{SHARD}: tensor \S+ leaves a gap before it: it starts at byte \d+, \d+ is needed; download the file again",
    ),
    "a tensor is missing": (
        config(attention_bias=True),
        r"{folder}: tensor model.layers.0.self_attn.q_proj.bias is missing, which config.json asks for; download .*",
    ),
    "a tensor has another shape": (
        tensor(shape=[64, 512]),
        rf"{{folder}}/{SHARD}: tensor {FIRST_TENSOR} has shape \[64, 512\], config.json asks for \[512, 64\]; download .*",
    ),
    "a tensor has a type that is no number of ours": (
        tensor(dtype="I32"),
        rf"{{folder}}/{SHARD}: tensor {FIRST_TENSOR} is stored as I32; F32, F16, BF16 are supported, use a 16-bit revision .*",
    ),
    "a tensor has a type that nobody knows": (
        tensor(dtype="F31"),
        rf"{{folder}}/{SHARD}: tensor {FIRST_TENSOR} has dtype 'F31'; known are .*",
    ),
    "the weights are pickled": (
        only("pytorch_model.bin", b"\x80\x02."),
        r"{folder}/pytorch_model.bin: pickled weights are refused, because a pickle can run code when it is loaded; use .*",
    ),
    "there is no tokenizer": (remove("tokenizer.json"), r"model: the model has no tokenizer; put its tokenizer.json beside .*"),
    "the tokenizer is broken": (
        write("tokenizer.json", "{"),
        r"{folder}/tokenizer.json: cannot be read: .*; download the file again",
    ),
    "a field of the tokenizer's settings is nested too deep": (
        write("tokenizer_config.json", "[" * 100_000),
        r"{folder}/tokenizer_config.json: not valid JSON: maximum recursion depth exceeded.*; download the file again",
    ),
    "a number in the tokenizer's settings has too many digits": (
        write("tokenizer_config.json", '{"a": ' + "9" * 5000 + "}"),
        r"{folder}/tokenizer_config.json: not valid JSON: Exceeds the limit .*; download the file again",
    ),
    "the tokenizer has no token for what it does not know": (
        write("tokenizer.json", json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}})),
        r"the tokenizer of model cannot encode the prompt: WordLevel error: Missing \[UNK\] token .*; download the tokenizer .*",
    ),
    "a message would move the cursor": (
        write("tokenizer.json", '{"version": "\\u001b[31m' + "x" * 5000 + '"}'),
        r"{folder}/tokenizer.json: cannot be read: .{{1,320}}; download the file again",
    ),
    "the chat template is broken": (
        write("chat_template.jinja", "{% if %}"),
        r"model: the chat template is not valid: .*; give the prompt as it is with --no-chat",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_used_is_one_line(break_it: Break, message: str, folder: Path, capsys: Capture) -> None:
    break_it(folder)
    line = line_of(capsys, "--model", str(folder))
    assert re.fullmatch(message.format(folder=re.escape(str(folder))), line)
    assert line.isprintable()


def test_the_folder_that_is_broken_above_works_when_it_is_not(folder: Path) -> None:
    assert main([*SHORT_ANSWER, "--model", str(folder)]) == 0


# GGUF files: written whole, and then broken.


def write_gguf(path: Path, *, architecture: str = "llama", embedding_type: str = "F32") -> Path:
    """The header of a llama of one layer, and its embedding."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    values = np.zeros((2, 8), np.float64 if embedding_type == "F64" else np.float32)
    writer.add_tensor("token_embd.weight", values, raw_dtype=GGMLQuantizationType[embedding_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def truncated(path: Path) -> None:
    os.truncate(write_gguf(path), path.stat().st_size - 32)


GGUF_FILES: dict[str, tuple[Break, str]] = {
    "it is truncated": (
        truncated,
        r"{path}: tensor token_embd.weight ends at byte \d+, the file has \d+; download the file again",
    ),
    "it is truncated in the header": (
        lambda path: os.truncate(write_gguf(path), 100),
        r"{path}: the header reaches to byte \d+, the file has 100; download the file again",
    ),
    "it is empty": (
        lambda path: path.touch(),
        r"{path}: not a GGUF file, it does not start with GGUF; give a .gguf file",
    ),
    "its architecture is unknown": (
        lambda path: void(write_gguf(path, architecture="gpt2")),
        r"{path}: architecture 'gpt2' is not supported in GGUF files; use one of llama, qwen2",
    ),
    "a tensor's type is not supported": (
        lambda path: void(write_gguf(path, embedding_type="F64")),
        r"{path}: tensor token_embd.weight has type F64; use a file with F32, .*",
    ),
    "a tensor is missing": (
        lambda path: void(write_gguf(path)),
        r"{path}: tensor \S+ is missing; download the file again",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), GGUF_FILES.values(), ids=GGUF_FILES)
def test_a_gguf_file_that_cannot_be_used_is_one_line(break_it: Break, message: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "model.gguf"
    break_it(path)
    assert re.fullmatch(message.format(path=re.escape(str(path))), line_of(capsys, "--model", str(path)))


# Names: of the hub, aliases, shapes.


def hub_error(kind: type[Exception]) -> Exception:
    """Without the HTTP response that its constructor asks for, whose class differs between versions."""
    error = kind.__new__(kind)
    error.args = ("403 Client Error\nRequest ID: x",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), r"org/m: is not in the cache \(.*\) and the hub cannot be reached; check the .*"),
        (hub_error(GatedRepoError), r"org/m: the model is gated; accept its licence on https://huggingface.co/org/m, then .*"),
        (hub_error(RepositoryNotFoundError), r"org/m: the hub has no such model, or hides it; check the name, or log in .*"),
        (TimeoutError("read timed out"), r"org/m: the download broke off: read timed out; run the command again, it goes on .*"),
        (OSError(errno.ENOSPC, "full"), r"org/m: the disk is full; free some, or set HF_HOME to a folder on another disk .*"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_line(
    error: Exception, message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*_: object, local_files_only: bool, **__: object) -> str:
        raise LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert re.fullmatch(message, line_of(capsys, "--model", "org/m"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lama-3-70b", r"'lama-3-70b' is not a known model; close are llama-3-70b, .*; accepted are an alias, .*"),
        ("xyz", r"'xyz' is not a known model; aliases are .*; accepted are an alias, .*"),
        ("synthetic:huge", r"synthetic:huge: shape 'huge' is not known; known are tiny, .*"),
        ("synthetic:tiny?size=3", r"synthetic:tiny\?size=3: parameter 'size=3' is not known; write NAME=VALUE, known are .*"),
        ("synthetic:tiny?layers=0", r"synthetic:tiny\?layers=0: .* is 0; it must be a whole number between 1 and .*"),
        ("weights.bin", r"weights.bin: no such file or directory; accepted are .*"),
        ("", r"--model is ''; it must be an alias, hub id, path or synthetic:SHAPE"),
    ],
)
def test_a_name_that_is_no_model_is_one_line(model: str, message: str, capsys: Capture) -> None:
    assert re.fullmatch(message, line_of(capsys, "--model", model))


# Flags.

NO_NUMBER = "Invalid value for '--{flag}': .*"
NO_SIZE = "size '{value}' is not understood; write 24GiB, 500MB, or a share of what is free such as 0.8"
ABSURD: dict[str, tuple[str, list[str]]] = {
    "link-gbps": ("between 0.000001 and 1,000,000 GB/s", ["0", "-1", "nan", "inf", "1e308", "1e-300"]),
    "max-context": ("at least 1", ["0", "-1"]),
    "threads": ("between 1 and 1024", ["0", "-1", "1025", "9" * 30]),
    "max-new-tokens": ("between 1 and 10,000,000", ["0", "-1", "9" * 30]),
    "temperature": ("0 or a positive number", ["-1", "nan", "inf", "-inf"]),
    "top-k": ("0 or a positive number of tokens", ["-1"]),
    "top-p": ("above 0 and at most 1", ["0", "-1", "nan", "inf", "1e308"]),
    "min-p": ("between 0 and 1", ["-1", "nan", "inf", "1e308"]),
    "repetition-penalty": ("between 0.001 and 1000", ["0", "-1", "nan", "inf", "1e-308", "1e308"]),
    "seed": (r"between 0 and 2\^64 - 1", ["-1", "9" * 30]),
}
FLAGS = [
    *((flag, value, rf"--{flag} is .*; it must be {needed}") for flag, (needed, values) in ABSURD.items() for value in values),
    *((flag, value, NO_NUMBER.format(flag=flag)) for flag in ABSURD for value in ("many", "")),
    *((flag, value, NO_NUMBER.format(flag=flag)) for flag in ("max-context", "top-k", "seed") for value in ("nan", "inf", "1.5")),
    *(
        (flag, value, re.escape(NO_SIZE.format(value=value)))
        for flag in ("device-memory", "host-memory")
        for value in ("-1", "nan", "inf", "24 parsecs", "", "9" * 400 + "GiB")
    ),
    ("device-memory", "0", "size '0' is zero; write .*"),
    ("max-context", "9" * 30, rf"--max-context is {'9' * 30}; {re.escape(TINY)} has 2048 positions"),
    ("device", "gpu", "--device is gpu; it must be auto, cuda, cuda:N or cpu"),
    ("device", "cuda:x", "--device is cuda:x; it must be auto, cuda, cuda:N or cpu"),
    ("dtype", "float16", "--dtype is float16; it must be one of auto, bfloat16, float32"),
    ("mode", "fast", "--mode is fast; it must be one of full, sparse, sirius"),
    ("stop", "", "--stop is ''; it must be a text that is not empty"),
    ("prompt", "", "the prompt is empty; give --prompt TEXT, --prompt-file FILE, or text on standard input"),
    ("prompt", "a\udcff", "the prompt is not valid Unicode: half of a surrogate pair, .*, at character 1; remove it"),
    ("prompt", "x" * 2048, ".* has 2048 tokens, .* takes 2048 positions, prompt and answer together; shorten the prompt"),
    ("prompt-file", "/nowhere", "--prompt and --prompt-file are both given; give one of them"),
]


@pytest.mark.parametrize(("flag", "value", "message"), FLAGS, ids=[f"{flag}={value[:12]!r}" for flag, value, _ in FLAGS])
def test_a_flag_that_cannot_be_used_is_one_line(flag: str, value: str, message: str, capsys: Capture) -> None:
    assert re.fullmatch(message, line_of(capsys, "--model", TINY, f"--{flag}", value))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("top-k", "9" * 30), ("temperature", "1e308"), ("device-memory", "9999999TiB")],
)
def test_a_flag_that_is_huge_but_has_a_meaning_works(flag: str, value: str) -> None:
    assert (
        main(["generate", "--model", TINY, "--prompt", "hi", "--threads", "1", "--max-new-tokens", "2", f"--{flag}", value]) == 0
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99", "cuda:300", f"cuda:{10**20}"])
def test_cuda_where_there_is_none_is_one_line(device: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = line_of(capsys, "--model", TINY, "--device", device)
    assert line == f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu"


@pytest.mark.parametrize("device", ["cuda:2", f"cuda:{10**20}"])
def test_a_gpu_too_many_is_one_line(device: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = line_of(capsys, "--model", TINY, "--device", device)
    assert line == f"--device {device}: the last CUDA device is cuda:1; use one up to it"


# Prompts in files.


def in_file(content: bytes) -> Break:
    return lambda path: void(path.write_bytes(content))


PROMPT_FILES: dict[str, tuple[Break, str]] = {
    "missing": (lambda path: None, r"prompt file {path}: No such file or directory; give a file that can be read"),
    "a directory": (lambda path: path.mkdir(), r"prompt file {path}: Is a directory; give a file that can be read"),
    "not UTF-8": (in_file(b"ab\xff"), r"prompt file {path}: byte 2 is 0xff, not UTF-8; convert it, for example with iconv .*"),
    "UTF-16": (in_file("hi".encode("utf-16")), r"prompt file {path}: byte 0 is 0xff, not UTF-8; convert it, .*"),
    "empty": (in_file(b""), r"the prompt is empty; give .*"),
    "too long": (in_file(b"x" * 3000), r"the prompt has 3000 tokens, .* takes 2048 positions, .*; shorten the prompt"),
}


@pytest.mark.parametrize(("make", "message"), PROMPT_FILES.values(), ids=PROMPT_FILES)
def test_a_prompt_file_that_cannot_be_used_is_one_line(make: Break, message: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "prompt.txt"
    make(path)
    assert main(["generate", "--model", TINY, "--prompt-file", str(path)]) == 2
    assert re.fullmatch(message.format(path=re.escape(str(path))), one_line(capsys.readouterr().err))


def test_no_prompt_at_all_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["generate", "--model", TINY]) == 2
    assert one_line(capsys.readouterr().err).startswith("the prompt is empty; give --prompt TEXT")


# Memory: too little by plan, and memory that runs out in spite of the plan.


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--device-memory",
            r"device budget 1.00 KiB is too small: .* need (.*); give at least --device-memory (\S+?)",
        ),
        ("--host-memory", r"host budget 1.00 KiB is too small: .* takes (.*); give at least --host-memory (\S+)"),
    ],
)
def test_a_budget_too_small_names_the_smallest_that_works(flag: str, message: str, capsys: Capture) -> None:
    told = re.fullmatch(message, line_of(capsys, "--model", TINY, flag, "1KiB"))
    assert told
    assert told[2] == told[1].replace(" ", "")
    assert main([*SHORT_ANSWER, flag, told[2]]) == 0


def smallest_budgets(capsys: Capture, *arguments: str) -> list[str]:
    """The flags that the messages ask for, one after the other. Every layer is then read from disk in every pass."""
    budgets = {"--device-memory": "1KiB", "--host-memory": "1KiB"}
    for flag in budgets:
        line = line_of(capsys, *arguments, *chain(*budgets.items()))
        told = re.search(rf"give at least {flag} ([\w.]+)", line)
        assert told
        budgets[flag] = told[1]
    return list(chain(*budgets.items()))


def test_the_smallest_budgets_work_together(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path))
    assert main([*SHORT_ANSWER, *smallest_budgets(capsys, "--model", TINY)]) == 0


def test_budgets_above_what_is_free_are_refused_before_anything_is_allocated(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sirius.machine.free_host_nbytes", lambda: 8 * GIB)
    line = line_of(capsys, "--model", "synthetic:llama-3-70b", "--device-memory", "10000GiB")
    assert re.fullmatch(
        r"device memory: the plan takes 1\d\d\.\d\d GiB, 7\.\d\d GiB are free; give smaller --device-memory, at most 7\.\d\dGiB",
        line,
    )


def test_two_budgets_that_exceed_one_memory_are_refused_together(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius.machine.free_host_nbytes", lambda: 8 * GIB)
    line = line_of(capsys, "--model", "synthetic:llama-3-70b", "--device-memory", "7GiB", "--host-memory", "100GiB")
    assert re.fullmatch(
        r"device and host memory: the plan takes 10\d\.\d\d GiB, 7\.82 GiB are free; "
        r"give smaller --device-memory and --host-memory, together at most 7\.7\dGiB",
        line,
    )


def refuse(kind: type[Exception], *arguments: object) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise kind(*arguments)

    return fail


RAN_OUT = (
    r"memory ran out; the plan takes [\d.]+ [KM]iB on the device and [\d.]+ MiB on the host: "
    r"give smaller --device-memory or --host-memory"
)
CANNOT_ALLOCATE = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
EXHAUSTED: dict[str, tuple[str, Callable[..., Any], str]] = {
    "torch has none": (
        "offload_sirius.weights.host.torch.empty",
        refuse(RuntimeError, CANNOT_ALLOCATE),
        rf"{RAN_OUT}|(device|host) memory ran out while allocating [\d.]+ K?i?B; give a smaller --(device|host)-memory",
    ),
    "the KV cache finds none": (
        "offload_sirius.engine.building.KVCache",
        refuse(RuntimeError, CANNOT_ALLOCATE),
        RAN_OUT,
    ),
    "the system has no pages": (
        "offload_sirius.weights.mapping.mmap.mmap",
        refuse(OSError, errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RAN_OUT,
    ),
    "Python has none": ("offload_sirius.weights.mapping.mmap.mmap", refuse(MemoryError), RAN_OUT),
    "there are no more threads": ("threading.Thread.start", refuse(RuntimeError, "can't start new thread"), RAN_OUT),
}


@pytest.mark.parametrize(("place", "fail", "message"), EXHAUSTED.values(), ids=EXHAUSTED)
def test_memory_that_runs_out_while_loading_is_one_line(
    place: str, fail: Callable[..., Any], message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, fail)
    assert re.fullmatch(message, line_of(capsys, "--model", TINY))


def test_memory_that_runs_out_in_the_middle_of_an_answer_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius.model.transformer.Transformer.prefill_all", refuse(RuntimeError, CANNOT_ALLOCATE))
    assert re.fullmatch(RAN_OUT, line_of(capsys, "--model", TINY))


LIMITED = """
import resource, sys, torch
from pathlib import Path
from offload_sirius.cli import main
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (512 << 20),) * 2)
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_may_not_have_the_memory_it_plans_with_says_so_in_one_line() -> None:
    model = ("--model", "synthetic:llama-3-8b?layers=4&vocab=4096")
    program = [sys.executable, "-c", LIMITED, "generate", *ON_CPU, *model, "--prompt", "hi"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"memory ran out(;| while allocating) .*(:|;) give (a )?smaller --", one_line(done.stderr))


# Disks that fail in the middle of a run.


def at_third_piece(monkeypatch: pytest.MonkeyPatch, break_it: Callable[[], object]) -> None:
    """Break something once three tokens have been written."""
    write_piece = TextWriter.write

    def write(self: TextWriter, piece: TextPiece) -> None:
        write_piece(self, piece)
        if piece.new_tokens == 3:
            break_it()

    monkeypatch.setattr(TextWriter, "write", write)


def answer_from_disk(folder: Path, capsys: Capture) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of an answer of 30 tokens, all layers from disk."""
    arguments = ("--model", str(folder), "--max-new-tokens", "30")
    code = main([*SHORT_ANSWER, *arguments, *smallest_budgets(capsys, *arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def whole(good: Path, capsys: Capture) -> str:
    """What the model answers when nothing fails."""
    code, text, _ = answer_from_disk(good, capsys)
    assert code == 0
    return text.removesuffix("\n")


def assert_broke_off(whole: str, told: tuple[int, str, str], message: str) -> None:
    code, out, err = told
    assert code == 2
    written = out.removesuffix("\n")
    assert 3 <= len(written.split()) < len(whole.split())
    assert whole.startswith(written)
    assert re.fullmatch(message, one_line(err))


def test_a_read_error_in_the_middle_keeps_the_text_and_is_one_line(
    whole: str, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = refuse(OSError, errno.EIO, os.strerror(errno.EIO))
    at_third_piece(monkeypatch, lambda: monkeypatch.setattr(os, "preadv", fail))
    message = rf"{re.escape(str(folder))}/\S+: cannot be read: Input/output error; check the disk and the file"
    assert_broke_off(whole, answer_from_disk(folder, capsys), message)


def test_a_file_that_shrinks_in_the_middle_keeps_the_text_and_is_one_line(
    whole: str, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink() -> None:
        for shard in folder.glob("*.safetensors"):
            os.truncate(shard, 5000)

    at_third_piece(monkeypatch, shrink)
    message = (
        rf"{re.escape(str(folder))}/\S+: ends at byte \d+, byte \d+ is needed; "
        "the file was changed while it was in use: start again"
    )
    assert_broke_off(whole, answer_from_disk(folder, capsys), message)


# Settings of drafts.

DRAFTS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing is kept": (("--keep", "0"), "--keep is 0.0; it must be above 0 and at most 1"),
    "more than all is kept": (("--keep", "1.5"), "--keep is 1.5; it must be above 0 and at most 1"),
    "a share that is none": (("--keep", "nan"), "--keep is nan; it must be above 0 and at most 1"),
    "a window of one token": (("--window", "1"), "--window is 1; it must be auto, or 2 or more tokens"),
    "a window that is no number": (("--window", "x"), "--window is x; it must be auto, or 2 or more tokens"),
    "a window too long": (
        ("--window", "1000"),
        "--window is 1000; it must be such that (window - 1) * width + 1 is at most 512",
    ),
    "a tree without a branch": (("--tree-width", "0"), "--tree-width is 0; it must be at least 1"),
    "a tree too wide": (("--tree-width", "100000"), "--tree-width is 100000; it must be at most 511"),
    "a probability above one": (("--threshold", "2"), "--threshold is 2.0; it must be above 0 and at most 1"),
    "a gate of nothing": (("--cats-threshold", "0"), "--cats-threshold is 0; it must be auto or a positive number"),
    "a gate that is no number": (("--cats-threshold", "x"), "--cats-threshold is x; it must be auto or a positive number"),
    "a gate of coarse sparsity": (
        ("--cats-threshold", "auto"),
        "--cats-threshold is auto with --sparsity griffin; it must be left out, or given with --sparsity cats",
    ),
    "a rule that does not exist": (("--accept", "nonsense"), "--accept is nonsense; it must be one of exact, threshold"),
    "a sparsity that does not exist": (("--sparsity", "nonsense"), "--sparsity is nonsense; it must be one of griffin, cats"),
    "a mode that does not exist": (("--mode", "nonsense"), "--mode is nonsense; it must be one of full, sparse, sirius"),
    "a threshold with a temperature": (
        ("--accept", "threshold", "--temperature", "0.5"),
        "--accept threshold is greedy, and --temperature is 0.5; use --temperature 0, or --accept exact, which samples",
    ),
}


@pytest.mark.parametrize(("flags", "message"), DRAFTS.values(), ids=DRAFTS)
def test_a_setting_of_drafts_out_of_range_is_one_line(flags: tuple[str, ...], message: str, capsys: Capture) -> None:
    assert line_of(capsys, "--model", TINY, *flags) == message


def test_settings_of_drafts_are_refused_before_torch_is_imported() -> None:
    program = (
        "import json, sys; from offload_sirius.cli import main; "
        "codes = [main(['generate', '--prompt', 'hi', *flags]) for flags in json.loads(sys.argv[1])]; "
        "print(json.dumps([codes, 'torch' in sys.modules]))"
    )
    rows = list(DRAFTS.values())
    flags = json.dumps([flags for flags, _ in rows])
    done = subprocess.run([sys.executable, "-c", program, flags], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[2] * len(rows), False]
    assert done.stderr.splitlines() == [f"error: {message}" for _, message in rows]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("sparsity", ["griffin", "cats"])
def test_a_model_without_a_gated_feed_forward_block_is_refused_by_its_name(
    sparsity: str, architecture: str, folder: Path, capsys: Capture
) -> None:
    config(model_type=architecture)(folder)
    line = line_of(capsys, "--model", str(folder), "--sparsity", sparsity)
    assert line == (
        f"{folder}/config.json: architecture '{architecture}' is not supported; known are llama, mistral, qwen2, qwen3"
    )


def test_memory_too_small_for_a_tree_is_one_line_that_says_what_works(capsys: Capture) -> None:
    line = line_of(capsys, "--model", TINY, "--tree-width", "8", "--device-memory", "800KiB")
    found = re.fullmatch(r"device budget 800\.00 KiB is too small: .* give at least --device-memory (\S+?)(, or .*)?", line)
    assert found is not None
    assert main([*SHORT_ANSWER, "--tree-width", "8", "--device-memory", found[1]]) == 0
