"""A model that has been opened but not loaded: its shape, its tokenizer, and where its weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload_sirius.errors import PromptError
from offload_sirius.model.tokenizer import Message, Tokenizer, load_tokenizer
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.spec import ModelSpec

Prompt = str | Sequence[Message] | Sequence[int]
"""Text, a conversation, or token ids as they are."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An opened model: headers are validated, no weight has been read. Prompts can be encoded."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @property
    def spec(self) -> ModelSpec:
        """Its shape."""
        return self.checkpoint.spec

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Every id that ends an answer."""
        return frozenset(self.spec.eos_token_ids) | self.tokenizer.end_token_ids

    def encode(self, prompt: Prompt, *, chat: bool = True) -> list[int]:
        """Token ids of a prompt. chat: a text becomes a user's message where the model has a template. Raises PromptError."""
        token_ids = self._encode(prompt, chat)
        limit = self.spec.max_positions
        if not token_ids:
            raise PromptError("the prompt is empty; give --prompt TEXT, --prompt-file FILE, or text on standard input")
        if len(token_ids) >= limit:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, {self.spec.name} takes {limit} positions, prompt and answer together; "
                "shorten the prompt"
            )
        bad = next((token_id for token_id in token_ids if not 0 <= token_id < self.spec.vocab_size), None)
        if bad is not None:
            raise PromptError(f"token id {bad} is outside the vocabulary of {self.spec.vocab_size}; use this model's tokenizer")
        return token_ids

    def room_for(self, num_prompt: int, max_new_tokens: int, context: int) -> int:
        """New tokens for which a context of that many positions has room; the last one of an answer needs none.

        Fewer than asked for where that is all the model has. Raises PromptError where a larger context would have room for more.
        """
        room = context - num_prompt + 1
        if room < 1 or (room < max_new_tokens and context < self.spec.max_positions):
            raise PromptError(
                f"prompt and answer take {num_prompt + max_new_tokens} positions, {context} were planned for; "
                "shorten them, or load with a larger --max-context"
            )
        return min(room, max_new_tokens)

    def _encode(self, prompt: Prompt, chat: bool) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                return []
            if chat and self.tokenizer.has_chat_template:
                return self.tokenizer.apply_chat([{"role": "user", "content": prompt}])
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self.tokenizer.apply_chat(prompt)  # type: ignore[arg-type]
        return list(prompt)  # type: ignore[arg-type]


def open_model(model: str) -> Model:
    """Find a model and validate what describes it. Raises CheckpointError."""
    checkpoint = open_checkpoint(model)
    return Model(checkpoint=checkpoint, tokenizer=load_tokenizer(checkpoint.tokenizer, checkpoint.spec))
