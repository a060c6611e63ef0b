"""A model's chat template: turns a conversation into the text its model was trained on. Knows no tokenizer.

Templates are Jinja programs from strangers: they are rendered by template_worker.py, in a process of their own, with limits on
time and memory, and whatever one of them does becomes an error of one line.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from offload_sirius.errors import CheckpointError, PromptError

RENDER_SECONDS = 5.0
"""CPU time that a template may take: a conversation of a hundred thousand words takes a hundredth of it."""

RENDER_NBYTES = 1 << 29
"""Memory that it may take beside Python and Jinja, which have 20 MB."""

_PROGRAM = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from offload_sirius.model.template_worker import serve
serve(float(sys.argv[2]), int(sys.argv[3]), sys.stdin, sys.stdout)"""
"""Imports what this process would, and nothing that stands in the folder it was started in."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str


class ChatTemplate:
    """Thread-safe. Its process is started when it is first used, and again after one that was ended."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], model_name: str) -> None:
        """special_tokens: what the template may use by name, such as bos_token. model_name: for messages."""
        self._source = source
        self._special_tokens = special_tokens
        self._model_name = model_name
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalize: Callable[[], object] = lambda: None
        """Ends it, once."""

    def render(self, messages: Sequence[Message]) -> str:
        """Text up to where the assistant's next answer begins.

        Raises CheckpointError for a template that is not valid or does not end, PromptError for a conversation that it does not
        accept.
        """
        if not messages:
            raise PromptError("the conversation is empty; give at least one message")
        variables = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
        }
        try:
            request = json.dumps({"source": self._source, "variables": variables}).encode()
        except (TypeError, ValueError) as error:
            raise PromptError(f"the conversation is not of texts: {error}; change the messages") from error
        with self._lock:
            reply = self._asked(request)
        if "invalid" in reply:
            raise self._invalid(f"is not valid: {reply['invalid']}")
        if "refused" in reply:
            raise PromptError(
                f"the chat template of {self._model_name} does not accept this conversation: {reply['refused']}; "
                "change the messages, or give the prompt as it is with --no-chat"
            )
        return reply["text"]

    def _asked(self, request: bytes) -> dict[str, str]:
        """What the process says."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # Ctrl-C: what the process would still say is not the answer to the next request
            self._process = None
            self._finalize()
            raise
        if not line:
            self._process = None
            code = process.wait()
            self._finalize()
            how = f"takes more than {RENDER_SECONDS:g} s" if code == -signal.SIGPROF else f"ends its process with {code}"
            raise self._invalid(f"cannot be used, it {how}")
        reply: dict[str, str] = json.loads(line)
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        given = [json.dumps(sys.path), str(RENDER_SECONDS), str(RENDER_NBYTES)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for whoever asks
            )
        except OSError as error:
            raise self._invalid(f"cannot be used, no process can be started for it: {error.strerror}") from error
        self._finalize = weakref.finalize(self, _end, process)
        return process

    def _invalid(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._model_name}: the chat template {what}; give the prompt as it is with --no-chat")


def _end(process: subprocess.Popen[bytes]) -> None:
    """It has nothing that must be kept."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # a request that was not read
                pipe.close()
