"""Text to token ids and back, whatever a checkpoint keeps its tokenizer in. Knows no weights and runs no model.

tokenizer.json and GGUF metadata go through the `tokenizers` library; transformers is imported only for folders that have neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from offload_sirius.errors import CheckpointError, PromptError
from offload_sirius.model.chat_template import ChatTemplate, Message
from offload_sirius_loaders.shown import reason

if TYPE_CHECKING:
    import tokenizers

    from offload_sirius_loaders.checkpoint import TokenizerFiles
    from offload_sirius_loaders.spec import ModelSpec

__all__ = ["Message", "Tokenizer", "load_tokenizer"]

_PLACEHOLDER = "□"
"""Shown for the ids of a synthetic model that are no byte."""


class _Codec(Protocol):
    """What the libraries have in common."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def token_id(self, token: str) -> int | None:
        """None: not in the vocabulary."""

    def is_hidden(self, token_id: int) -> bool:
        """The id stands for no text: a special token, or one past the vocabulary."""


class Tokenizer:
    """A model's tokenizer and its chat template. Made by load_tokenizer."""

    def __init__(self, *, model_name: str, codec: _Codec, special_tokens: Mapping[str, str], chat_template: str | None) -> None:
        self._model_name = model_name
        self._codec = codec
        self._chat_template = ChatTemplate(chat_template, special_tokens, model_name) if chat_template else None
        end_token = special_tokens.get("eos_token")
        end_token_id = None if end_token is None else codec.token_id(end_token)
        self.end_token_ids: frozenset[int] = frozenset(() if end_token_id is None else (end_token_id,))
        """The end token that the tokenizer's own files name; the model's may name more."""
        begin_token = special_tokens.get("bos_token")
        self.begin_token_id: int | None = None if begin_token is None else codec.token_id(begin_token)
        """What stands before a text, where the model has it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. add_special_tokens: with the begin or end token that the model wants around a text.

        Special tokens written out in the text, `<|im_start|>` say, are found and become their ids, as in transformers. Raises
        PromptError for a text that no UTF-8 can be made of.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt is not valid Unicode: half of a surrogate pair, {text[error.start]!r}, at character {error.start}; "
                "remove it"
            ) from None
        try:
            return self._codec.encode(text, add_special_tokens)
        except Exception as error:  # all that the libraries raise, for want of a token that stands for what is unknown, say
            raise PromptError(
                f"the tokenizer of {self._model_name} cannot encode the prompt: {reason(error)}; "
                "download the tokenizer again, or change the prompt"
            ) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; U+FFFD for bytes that are not UTF-8. Ids past the vocabulary are passed over."""
        return self._codec.decode(token_ids, skip_special_tokens)

    def is_hidden(self, token_id: int) -> bool:
        """Whether decode passes over the id: a special token, or one past the vocabulary."""
        return self._codec.is_hidden(token_id)

    @property
    def has_chat_template(self) -> bool:
        """Whether apply_chat can be used."""
        return self._chat_template is not None

    def apply_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        The template writes special tokens as text and none are added to it; so a message can write them too, as in
        transformers. Raises PromptError for a conversation that the template does not accept.
        """
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The text that apply_chat encodes. Raises PromptError as it does."""
        if self._chat_template is None:
            raise PromptError(f"{self._model_name} has no chat template; give the prompt as it is with --no-chat")
        return self._chat_template.render(messages)


def load_tokenizer(files: TokenizerFiles, spec: ModelSpec) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError where there is none or it cannot be read."""
    if files.num_bytes_ids is not None:
        return Tokenizer(model_name=spec.name, codec=_BytesCodec(), special_tokens={}, chat_template=None)
    if files.gguf_metadata is not None:
        return _from_gguf(files.gguf_metadata, spec.name)
    if files.directory is None:
        raise CheckpointError(f"{spec.name}: the model has no tokenizer; put its tokenizer.json beside the weights")
    if (files.directory / "tokenizer.json").is_file():
        return _from_tokenizer_json(files.directory, spec.name)
    return _from_transformers(files.directory, spec.name)


class _TokenizersCodec:
    """tokenizer.json or GGUF, by the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A tokenizer.json may carry the lengths of its training; a prompt is neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def is_hidden(self, token_id: int) -> bool:
        return token_id in self._special_ids or self._tokenizer.id_to_token(token_id) is None


class _TransformersCodec:
    """Any other format that transformers reads, `tokenizer.model` for one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        known = [token_id for token_id in token_ids if token_id < len(self._tokenizer)]
        # Cleaning up drops spaces before punctuation, which the text may well have.
        clean = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(known, **clean))

    def token_id(self, token: str) -> int | None:
        token_id = self._tokenizer.get_vocab().get(token)
        return None if token_id is None else int(token_id)

    def is_hidden(self, token_id: int) -> bool:
        return token_id in self._special_ids or token_id >= len(self._tokenizer)


class _BytesCodec:
    """Synthetic models: the first 256 ids are bytes, the others are shown as a placeholder."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        placeholder = _PLACEHOLDER.encode()
        pieces = (bytes([token_id]) if token_id < 256 else placeholder for token_id in token_ids)
        return b"".join(pieces).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        return None

    def is_hidden(self, token_id: int) -> bool:
        return False


def _from_gguf(metadata: Mapping[str, Any], model_name: str) -> Tokenizer:
    from offload_sirius_loaders.gguf_tokenizer import build_tokenizer, special_tokens

    return Tokenizer(
        model_name=model_name,
        codec=_TokenizersCodec(build_tokenizer(metadata, model_name)),
        special_tokens=special_tokens(metadata, model_name),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _from_tokenizer_json(directory: Path, model_name: str) -> Tokenizer:
    import tokenizers

    path = directory / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # all that the library raises
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}; download the file again") from None
    config = _read_json(directory / "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_json(directory / "special_tokens_map.json"), **config})
    # The config may call tokens special that tokenizer.json holds as plain ones; those it does not hold have no embedding.
    tokenizer.add_special_tokens([token for token in special_tokens.values() if tokenizer.token_to_id(token) is not None])
    return Tokenizer(
        model_name=model_name,
        codec=_TokenizersCodec(tokenizer),
        special_tokens=special_tokens,
        chat_template=_chat_template(directory, config),
    )


def _from_transformers(directory: Path, model_name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it raises whatever the many libraries behind it do
        said = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"{directory}: transformers cannot read the tokenizer: {reason(said)}; put a tokenizer.json into the folder"
        ) from error
    return Tokenizer(
        model_name=model_name,
        codec=_TransformersCodec(tokenizer),
        special_tokens=_special_tokens(tokenizer.special_tokens_map),
        chat_template=_default_template(tokenizer.chat_template),
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like: plain texts, or objects with the text in `content`."""
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in config.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str) and _is_unicode(text)}


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which JSON can write and no tokenizer holds."""
    return text.isascii() or not any("\ud800" <= each <= "\udfff" for each in text)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """From the newest place to the oldest: a file of its own, the tokenizer's config, a processor's config."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template", _read_json(directory / "chat_template.json").get("chat_template"))
    return _default_template(template)


def _default_template(template: Any) -> str | None:
    """A model has one template, or several with names, as a list or as a mapping."""
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict) and isinstance(each.get("name"), str)]
        template = {each["name"]: each.get("template") for each in named}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where the file is absent."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested thousands deep
        raise CheckpointError(f"{path}: not valid JSON: {reason(error)}; download the file again") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: holds {type(fields).__name__}, an object is needed; download the file again")
    return fields


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; download the file again") from None
