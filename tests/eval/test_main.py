"""`python -m offload_sirius.eval` where the harness is not installed."""

from __future__ import annotations

import sys

import pytest

from offload_sirius.eval.__main__ import main


def test_without_the_harness_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NotInstalled:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "lm_eval":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    assert main() == 2
    assert capsys.readouterr().err == "error: lm_eval is not installed; install it with pip install 'offload-sirius[eval]'\n"
