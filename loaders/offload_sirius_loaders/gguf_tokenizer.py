"""The tokenizer inside a GGUF file: its `tokenizer.ggml.*` fields -> a tokenizer of the `tokenizers` library.

Two families exist: `gpt2`, byte-level BPE whose text splitting the file only names, and `llama`, SentencePiece with scores.
Knows neither GGUF's container nor chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.shown import reason, short

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SPACE = "▁"

_T = TypeVar("_T")

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, kw_only=True)
class _Splitting:
    """What `tokenizer.ggml.pre` stands for: how text is cut before merging, and what goes with it."""

    pattern: str | None = None
    """None: the pattern of GPT-2."""
    single_digits: bool = False
    whole_words_first: bool = False
    """A piece that is a token as it stands is not merged up from bytes."""
    compose: bool = False
    """Text is put into Unicode's composed form (NFC)."""
    adds_bos: bool = False
    """Where the file does not say."""


_LLAMA3 = _Splitting(pattern=_LLAMA3_SPLIT, whole_words_first=True, adds_bos=True)
_QWEN2 = _Splitting(pattern=_QWEN2_SPLIT, compose=True)
_SPLITTINGS = {
    "default": _Splitting(),
    "gpt-2": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def build_tokenizer(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """metadata: the `tokenizer.*` fields; name: the model's, for messages. Raises CheckpointError for what cannot be built.

    Control tokens are special: they are found in text and left out by decode(skip_special_tokens=True).
    """
    fields = _Fields(metadata, name)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(fields)
    if kind == "llama":
        return _sentencepiece(fields)
    raise fields.error(f"is of kind {short(kind)}, gpt2 and llama are supported")


def special_tokens(metadata: Mapping[str, Any], name: str) -> dict[str, str]:
    """Name in tokenizer_config.json, such as eos_token -> text, for those that the file names. Raises CheckpointError."""
    fields = _Fields(metadata, name)
    texts = {name: fields.special_token(which) for name, which in _SPECIAL_TOKENS.items()}
    return {name: text for name, text in texts.items() if text is not None}


class _Fields:
    """The fields every tokenizer has, checked."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self.metadata = metadata
        self.name = name
        self.tokens = self.items("tokens", str)
        self.vocabulary = {token: token_id for token_id, token in enumerate(self.tokens)}
        self.types = self._types()

    def items(self, key: str, kind: type[_T]) -> list[_T]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.error(f"has no tokenizer.ggml.{key}, a list of {kind.__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def tokens_of(self, *kinds: int) -> list[str]:
        """The tokens of these types, in the order of their ids."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]

    def special_token(self, which: str) -> str | None:
        """Text of the bos, eos, unknown or padding token."""
        token_id = self.metadata.get(f"tokenizer.ggml.{which}_token_id")
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise self.error(f"has {len(self.tokens)} tokens and its {which} token is number {short(token_id)}")
        return self.tokens[token_id]

    def error(self, found: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: the tokenizer in the GGUF file {found}; use another GGUF file, or safetensors")

    def _types(self) -> list[int]:
        """A type for each token. Files without types still say which tokens begin and end a text."""
        if "tokenizer.ggml.token_type" in self.metadata:
            types = self.items("token_type", int)
            if len(types) != len(self.tokens):
                raise self.error(f"has {len(self.tokens)} tokens and {len(types)} token types")
            return types
        ends = {self.special_token("bos"), self.special_token("eos")}
        return [_CONTROL if token in ends else _NORMAL for token in self.tokens]


def _byte_level(fields: _Fields) -> Tokenizer:
    splitting = _splitting(fields)
    merges = [_pair(merge) for merge in fields.items("merges", str)]
    tokenizer = _bpe(fields, merges, ignore_merges=splitting.whole_words_first)
    if splitting.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    _finish(tokenizer, fields, adds_bos=splitting.adds_bos)
    return tokenizer


def _bpe(fields: _Fields, merges: list[tuple[str, str]], **settings: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=fields.vocabulary, merges=merges, **settings))
    except Exception as error:  # all that the library raises
        raise fields.error(f"cannot be built: {reason(error)}") from None


def _splitting(fields: _Fields) -> _Splitting:
    name = fields.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in _SPLITTINGS:
        raise fields.error(f"splits text the way of {short(name)}, known are {', '.join(_SPLITTINGS)}")
    return _SPLITTINGS[name]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _pre_tokenizer(splitting: _Splitting) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(fields: _Fields) -> Tokenizer:
    scores = fields.items("scores", float)
    if len(scores) != len(fields.tokens):
        raise fields.error(f"has {len(fields.tokens)} tokens and {len(scores)} scores")
    unknown = fields.special_token("unknown")
    tokenizer = _bpe(fields, _merges_of_scores(fields, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    adds_space = fields.flag("add_space_prefix", True)
    tokenizer.normalizer = _space_normalizer(adds_space)
    tokenizer.decoder = _space_decoder(adds_space)
    _finish(tokenizer, fields, adds_bos=True)
    return tokenizer


def _merges_of_scores(fields: _Fields, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union scores highest: as merges, all cuts of all tokens, best token first."""
    normal = set(fields.tokens_of(_NORMAL))
    best_first = sorted(normal, key=lambda token: (-scores[fields.vocabulary[token]], fields.vocabulary[token]))
    cuts = ((token[:cut], token[cut:]) for token in best_first for cut in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in normal and right in normal]


def _space_normalizer(adds_space: bool) -> normalizers.Normalizer:
    """Spaces become visible, and text that follows nothing or a special token begins with one."""
    replace = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if adds_space else replace


def _space_decoder(adds_space: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)


def _finish(tokenizer: Tokenizer, fields: _Fields, adds_bos: bool) -> None:
    special = fields.tokens_of(_CONTROL, _UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in fields.tokens_of(_USER_DEFINED)])
    before = fields.special_token("bos") if fields.flag("add_bos_token", adds_bos) else None
    after = fields.special_token("eos") if fields.flag("add_eos_token", False) else None
    template = " ".join(part for part in (before, "$A", after) if part)
    ends = [(token, fields.vocabulary[token]) for token in (before, after) if token]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
