"""Lines of prompts: what they may say, and which line and field is named where they say something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_sirius.batch.lines import read_input
from offload_sirius.config import DecodingConfig, GenerationConfig, SamplingConfig
from offload_sirius.errors import ConfigError

DEFAULTS = GenerationConfig(max_new_tokens=7, stop=("end",), sampling=SamplingConfig(temperature=0.5, seed=3))


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_line_has_a_prompt_or_messages_and_settings_of_its_own(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    objects = [
        {"prompt": "hello"},
        {"id": "a", "messages": messages, "max_tokens": 5, "temperature": 1, "stop": "x", "seed": None},
        {"id": 7, "prompt": "hey", "max_new_tokens": 9, "stop": ["x", "y"], "seed": 8, "ignore_eos": True, "chat": False},
    ]
    path = written(tmp_path, "\r\n\n".join(json.dumps(each) for each in objects))
    first, second, third = read_input(path, DEFAULTS).lines
    assert (first.id, first.number, first.prompt, first.config) == (1, 1, "hello", DEFAULTS)
    assert (second.id, second.number, second.prompt, second.config.max_new_tokens) == ("a", 3, messages, 5)
    assert (second.config.sampling, second.config.stop) == (SamplingConfig(temperature=1.0, seed=3), ("x",))
    assert (third.id, third.config.max_new_tokens, third.config.stop, third.config.sampling.seed) == (7, 9, ("x", "y"), 8)
    assert (third.config.ignore_eos, third.config.chat) == (True, False)


REFUSED = {
    "broken": ('{"prompt": ', "line 1: is no JSON in UTF-8: Expecting value: line 1 column 12"),
    "not UTF-8": (b'{"prompt": "\xff"}', "line 1: is no JSON in UTF-8: 'utf-8' codec can't decode byte 0xff"),
    "half a character": ('{"prompt": "\\ud800"}', "line 1: is no JSON in UTF-8: 'utf-8' codec can't encode"),
    "not a number": ('{"prompt": "a", "temperature": NaN}', "line 1: is no JSON in UTF-8: NaN is no number in JSON"),
    "too deep": ('{"prompt": ' + "[" * 100_000, "line 1: is no JSON in UTF-8: nested too deeply"),
    "twice": ('{"prompt": "a", "prompt": "b"}', "line 1: is no JSON in UTF-8: a field is there twice"),
    "a list": ("[1]", "line 1: is [1]; it must be a JSON object"),
    "no prompt": ('{"id": 1}', "line 1: has neither prompt nor messages; it must have one of them"),
    "both": ('{"prompt": "a", "messages": []}', "line 1: has prompt and messages; it must have one of them"),
    "an empty prompt": ('{"prompt": ""}', 'line 1: prompt is ""; it must be a text that is not empty'),
    "token ids": ('{"prompt": [1]}', "line 1: prompt is [1]; it must be a text that is not empty"),
    "no messages": ('{"messages": []}', "line 1: messages is []; it must be a list of objects with role and content"),
    "no content": ('{"messages": [{"role": "user"}]}', 'line 1: messages[0] is {"role": "user"}; messages must be a list'),
    "unknown": ('{"prompt": "a"}\n{"prompt": "a", "tempreature": 1}', "line 2: unknown field tempreature; known are id, mess"),
    "text for a number": ('{"prompt": "a", "seed": "1"}', 'line 1: seed is "1"; it must be a whole number'),
    "a switch for a number": ('{"prompt": "a", "temperature": true}', "line 1: temperature is true; it must be a number"),
    "a huge number": ('{"prompt": "a", "top_p": 1' + "0" * 400 + "}", "line 1: top_p is 1000"),
    "a number for a switch": ('{"prompt": "a", "chat": 1}', "line 1: chat is 1; it must be true or false"),
    "stops that are none": ('{"prompt": "a", "stop": [1]}', "line 1: stop is [1]; it must be a text or a list of texts"),
    "out of range": ('{"prompt": "a", "top_p": 2}', "line 1: --top-p is 2.0; it must be above 0 and at most 1"),
    "both limits": ('{"prompt": "a", "max_tokens": 1, "max_new_tokens": 1}', "line 1: max_new_tokens is given beside another"),
    "an id that is none": ('{"prompt": "a", "id": true}', "line 1: id is true; it must be a text or a whole number"),
    "an id that is there": ('{"prompt": "a"}\n{"prompt": "a", "id": 1}', "line 2: id 1 is that of line 1 already; give each"),
    "nothing": ("\n \n", 'has no lines; give a JSON object a line, such as {"prompt": "Hello"}'),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_a_line_that_says_something_else_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_input(path, DEFAULTS)
    assert str(caught.value).startswith(f"--in {path}: {message}")


def test_a_line_cannot_draw_where_a_threshold_decides(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a", "temperature": 1}')
    greedy = GenerationConfig(decoding=DecodingConfig(accept="threshold"))
    with pytest.raises(ConfigError, match=r"line 1: --accept threshold is greedy, and --temperature is 1\.0"):
        read_input(path, greedy)
