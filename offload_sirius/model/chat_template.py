"""A model's chat template: turns a conversation into the text its model was trained on. Knows no tokenizer.

Templates are Jinja programs from strangers. They run in Jinja's sandbox, with the names that Hugging Face promises them
(https://huggingface.co/docs/transformers/chat_templating), and whatever one of them raises becomes an error of one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from offload_sirius.errors import CheckpointError, PromptError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str


class ChatTemplate:
    """Compiled when first used: Jinja costs time to import."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], model_name: str) -> None:
        """special_tokens: what the template may use by name, such as bos_token. model_name: for messages."""
        self._source = source
        self._special_tokens = special_tokens
        self._model_name = model_name
        self._template: Template | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """Text up to where the assistant's next answer begins.

        Raises CheckpointError for a template that is not valid, PromptError for a conversation that it does not accept.
        """
        if not messages:
            raise PromptError("the conversation is empty; give at least one message")
        template = self._compiled()
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # foreign code: any exception is possible, and none is a bug of this program
            raise PromptError(
                f"the chat template of {self._model_name} does not accept this conversation: {_line(error)}; "
                "change the messages, or give the prompt as it is with --no-chat"
            ) from error

    def _compiled(self) -> Template:
        if self._template is None:
            try:
                self._template = _environment().from_string(self._source)
            except Exception as error:  # syntax, or what a constant expression raises while it is folded
                raise CheckpointError(
                    f"{self._model_name}: the chat template is not valid: {_line(error)}; give the prompt as it is with --no-chat"
                ) from error
        return self._template


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlocks(Extension):
        """`{% generation %}` marks answers for training; here it only lets its content through."""

        tags = {"generation"}  # noqa: RUF012  so declared by Jinja

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which a model has never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
