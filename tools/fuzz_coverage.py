"""The fuzzer of tools/fuzz.py led by which lines of the loaders are reached: atheris, which keeps what reaches new ones and
goes on there.

    python3 -m venv av && av/bin/pip install atheris      # beside the project's own packages, of the same Python
    PYTHONPATH=.:loaders:$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])') \\
        av/bin/python tools/fuzz_coverage.py -runs=50000 -seed=1

Flags are libFuzzer's. Each input is a kind of model, one of its files, and that file's content; atheris changes the content as
it likes, and half of the time it is changed as tools/fuzz.py does. What must hold is the same. The first finding ends the run,
with its traceback, and is written to a file by libFuzzer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["offload_sirius_loaders"]):
    from fuzzing.check import judge, write_files
    from fuzzing.corpus import make_corpus
    from fuzzing.mutate import mutated_file, sealed

MOST_NBYTES = 1 << 20


class Inputs:
    """Between bytes and models: two bytes choose the model and the file, the rest is its content."""

    def __init__(self, folder: Path) -> None:
        self._corpus = make_corpus(folder / "corpus")
        self._work = folder / "work"
        self._work.mkdir()
        models = {
            model: [name for name in sorted(files) if name.endswith((".json", ".safetensors", ".gguf"))]
            for model, files in self._corpus.items()
        }
        self.files = [(model, name) for model, names in sorted(models.items()) for name in names]

    def write_seeds(self, folder: Path) -> None:
        """The good models."""
        folder.mkdir()
        for index, (model, name) in enumerate(self.files):
            (folder / f"{index}").write_bytes(index.to_bytes(2, "big") + self._corpus[model][name])

    def place(self, data: bytes) -> tuple[str, str]:
        """Which model and file."""
        return self.files[int.from_bytes(data[:2], "big") % len(self.files)]

    def run(self, data: bytes) -> None:
        """One case. Raises AssertionError for a finding."""
        model, name = self.place(data)
        files = self._corpus[model] | {name: data[2:]}
        if "pack.json" in files and name != "pack.json":
            files = sealed(files)
        verdict = judge(write_files(files, self._work), sum(map(len, files.values())), deep=False, chat=False)
        assert verdict.outcome != "found", (model, name, verdict.signature, verdict.detail)

    def change(self, data: bytes, most_nbytes: int, seed: int) -> bytes:
        """libFuzzer's own way, or this project's."""
        random = Random(seed)
        if random.random() < 0.5 or len(data) < 3:
            return bytes(atheris.Mutate(data, most_nbytes))
        changed = data[:2] + mutated_file(self.place(data)[1], data[2:], random)
        return changed[:most_nbytes]


def main() -> None:
    """Run it; libFuzzer ends the process."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs(Path(scratch))
        inputs.write_seeds(Path(scratch) / "seeds")
        flags = [sys.argv[0], f"-max_len={MOST_NBYTES}", *sys.argv[1:], str(Path(scratch) / "seeds")]
        atheris.Setup(flags, inputs.run, custom_mutator=inputs.change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
