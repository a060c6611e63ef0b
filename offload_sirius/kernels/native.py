"""The C files of this room as libraries: compiled on first use by the machine's own compiler, kept in the cache folder. Knows no
tensors.

A file's name says what it was made of: source and headers, command, compiler and the CPU's instructions, so that a cache folder
shared by different machines is safe. One process compiles while others wait, and the file appears whole. Without a compiler there
is no library, and whoever asked computes by other means.

Threads are OpenMP's, and of the very runtime that torch has loaded: a second one would have threads of its own, which wait in
loops for work and take the cores from the others.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from offload_sirius.cache import made_cache_folder
from offload_sirius.errors import ConfigError

Name = Literal["products", "tiles", "quantise", "blocks", "rows"]
"""A C file, and the library that is made of it."""

COMPILERS = ("gcc", "cc")
"""clang would bring an OpenMP runtime of its own. CC names any other."""

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wl,--as-needed")
"""The math flags change no result: nobody looks at errno or at the flags of a floating point unit."""

OWN_FLAGS: dict[Name, tuple[str, ...]] = {"quantise": ("-ffp-contract=off",)}
"""Quantising gives the bits of its torch reference, which rounds each product."""

TIMEOUT_SECONDS = 120
"""Compiling takes two or three."""


@dataclass(frozen=True, kw_only=True)
class Native:
    """What came of it."""

    library: ctypes.CDLL | None
    problem: str = ""
    """One line: why there is no library."""


@cache
def native(name: Name) -> Native:
    """A library, compiled where it was not; asked for once a process. torch must have been imported."""
    try:
        path = compiled(name, made_cache_folder(), find_compiler())
        try:
            return Native(library=ctypes.CDLL(str(path)))
        except OSError:  # damaged since it was written
            path.unlink(missing_ok=True)
            return Native(library=ctypes.CDLL(str(compiled(name, made_cache_folder(), find_compiler()))))
    except (ConfigError, OSError) as error:
        return Native(library=None, problem=f"this CPU takes a few times longer than it has to: {error}")


def find_compiler() -> str:
    """The path of a C compiler. Raises ConfigError where there is none."""
    for name in (os.environ.get("CC", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise ConfigError(f"no C compiler was found, tried {', '.join(COMPILERS)}; install one, such as gcc")


def compiled(name: Name, folder: Path, compiler: str) -> Path:
    """The library's file in the folder, made by the compiler where it is not there. Raises ConfigError or OSError."""
    source = Path(__file__).with_name(f"{name}.c")
    command = [compiler, *FLAGS, *OWN_FLAGS.get(name, ()), str(source), *loaded_openmp(), "-lm"]
    library = folder / f"{name}-{_fingerprint(source, command)}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(source, command, library)
    return library


def loaded_openmp() -> list[str]:
    """The OpenMP runtimes that this process has loaded: the linker takes the first that has what the compiler wants."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))


def _compile(source: Path, command: list[str], library: Path) -> None:
    partial = library.with_suffix(f".partial-{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, "-o", str(partial)], capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
        if done.returncode != 0:
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
            raise ConfigError(f"{command[0]} could not compile {source.name}: {said.strip()}; set CC to another compiler")
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # an empty library under its name would stay there
        os.replace(partial, library)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} did not compile {source.name} in {TIMEOUT_SECONDS} s; set CC to another one") from error
    finally:
        partial.unlink(missing_ok=True)


def _fingerprint(source: Path, command: list[str]) -> str:
    compiler = Path(command[0]).resolve().stat()
    texts = (path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    parts = (*texts, *command, str(compiler.st_size), str(compiler.st_mtime_ns), _instructions())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _instructions() -> str:
    """What `-march=native` looks at: the CPU's model, and the instructions it has."""
    told = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.split("\t")[0].split(":")[0].strip() in told)
