"""The server's command, as far as it fails before it serves."""

from __future__ import annotations

import socket
import sys

import pytest

from .conftest import TINY, Run


def test_a_port_that_is_taken_ends_with_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ran = run("serve", *TINY, "--port", port)
    assert ran.code == 2
    assert (
        ran.err == f"error: 127.0.0.1 port {port}: cannot listen there: Address already in use; give another --port or --host\n"
    )


def test_a_host_that_is_none_ends_with_one_line(run: Run) -> None:
    ran = run("serve", *TINY, "--host", "no such host")
    assert ran.code == 2
    assert ran.err.startswith("error: --host no such host: not found: ")
    assert ran.err.count("\n") == 1


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(run: Run) -> None:
    ran = run("serve", *TINY, "--port", "0", "--device-memory", "1KiB")
    assert ran.code == 2
    loading, error = ran.err.splitlines()
    assert loading.endswith(": loading synthetic:tiny?dtype=F32")
    assert error.startswith("error: device budget 1.00 KiB is too small")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--port", "70000"), ("--api-key", " "), ("--max-queue", "-1"), ("--max-request-size", "0.5"), ("--grace", "-1")],
)
def test_settings_outside_their_range_are_named(run: Run, flag: str, value: str) -> None:
    ran = run("serve", *TINY, flag, value)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {flag} is ")


def test_without_the_extra_the_command_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("offload_sirius.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ran = run("serve", *TINY)
    assert ran.code == 2
    assert ran.err == "error: uvicorn is not installed; pip install 'offload-sirius[serve]'\n"
