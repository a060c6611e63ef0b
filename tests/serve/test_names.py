"""What a model is called by."""

from __future__ import annotations

from pathlib import Path

from offload_sirius.serve.server import names_of_model


def test_a_model_has_the_name_it_was_asked_for_by_and_its_own() -> None:
    assert names_of_model("llama-3-8b", "Meta-Llama-3-8B", ()) == ("llama-3-8b", "Meta-Llama-3-8B")
    assert names_of_model("synthetic:tiny", "synthetic:tiny", ()) == ("synthetic:tiny",)


def test_a_path_is_nobodys_name(tmp_path: Path) -> None:
    assert names_of_model(str(tmp_path), "tiny", ()) == ("tiny",)


def test_given_names_replace_all_others() -> None:
    assert names_of_model("llama-3-8b", "Meta-Llama-3-8B", ("gpt-4", "small")) == ("gpt-4", "small")
