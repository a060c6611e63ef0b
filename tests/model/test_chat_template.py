"""Chat templates: what a stranger's program cannot do. How they render conversations is in test_tokenizer.py."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from offload_sirius.errors import CheckpointError, PromptError
from offload_sirius.model import chat_template
from offload_sirius.model.chat_template import ChatTemplate

HELLO: list[chat_template.Message] = [{"role": "user", "content": "hello"}]


def rendered(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, "m").render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ raise_exception.__globals__.sys }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update(content='x') %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_that_leaves_the_sandbox_is_refused(source: str) -> None:
    with pytest.raises(
        PromptError, match=r"the chat template of m does not accept this conversation: .*; change the messages, or"
    ):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ 7 ** (7 ** 9) }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.3)
    with pytest.raises(CheckpointError) as caught:
        rendered(source)
    assert str(caught.value) == (
        "m: the chat template cannot be used, it takes more than 0.3 s; give the prompt as it is with --no-chat"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a' | center(10**10) }}",
        "{{ [1] | tojson(indent=10**10) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{% set x = namespace(a='aaaa') %}{% for i in range(60) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a }}",
    ],
)
def test_a_template_that_fills_the_memory_is_refused(source: str) -> None:
    with pytest.raises((PromptError, CheckpointError), match=r"memory|more than \d+ characters"):
        rendered(source)


def test_a_text_of_any_size_is_refused_before_it_is_handed_over() -> None:
    with pytest.raises(PromptError, match=r"it gives more than \d+ characters"):
        rendered("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}")


def test_a_template_can_be_used_again_after_one_was_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.3)
    template = ChatTemplate(
        "{% if messages[0].content == 'loop' %}{{ (messages | length + 6) ** (7 ** 9) }}{% endif %}{{ bos_token }}",
        {"bos_token": "<s>"},
        "m",
    )
    assert template.render(HELLO) == "<s>"
    with pytest.raises(CheckpointError, match="takes more than"):
        template.render([{"role": "user", "content": "loop"}])
    assert template.render(HELLO) == "<s>"


def test_a_process_that_was_killed_is_said_and_started_anew() -> None:
    template = ChatTemplate("{{ bos_token }}", {"bos_token": "<s>"}, "m")
    template.render(HELLO)
    assert template._process is not None
    os.kill(template._process.pid, signal.SIGKILL)
    template._process.wait()
    with pytest.raises(
        CheckpointError, match=r"m: the chat template cannot be used, it ends its process with -9; give the prompt"
    ):
        template.render(HELLO)
    assert template.render(HELLO) == "<s>"


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_process_that_has_ended_leaves_no_pipes_and_no_zombie(is_interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ bos_token }}", {"bos_token": "<s>"}, "m")
    template.render(HELLO)
    process = template._process
    assert process is not None
    assert process.stdin is not None
    assert process.stdout is not None
    if is_interrupted:
        monkeypatch.setattr(process.stdout, "readline", lambda: signal.raise_signal(signal.SIGINT))
    else:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(KeyboardInterrupt if is_interrupted else CheckpointError):
        template.render(HELLO)
    assert process.returncode is not None
    assert (process.stdin.closed, process.stdout.closed) == (True, True)


def test_many_threads_each_get_their_own_answer() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "m")
    with ThreadPoolExecutor(8) as executor:
        texts = list(executor.map(lambda n: template.render([{"role": "user", "content": str(n)}]), range(100)))
    assert texts == [str(n) for n in range(100)]


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("x", {}, "m")
    template.render(HELLO)
    process = template._process
    assert process is not None
    del template
    assert process.poll() is not None


def test_a_conversation_that_is_not_of_texts_is_refused() -> None:
    with pytest.raises(PromptError, match=r"the conversation is not of texts: .*bytes.*; change the messages"):
        ChatTemplate("x", {}, "m").render([{"role": "user", "content": b"x"}])  # type: ignore[typeddict-item]
