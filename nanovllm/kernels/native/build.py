"""Compiles the kernels once for each machine, compiler and version of the sources."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from nanovllm.cache import kernel_cache

SOURCES = Path(__file__).parent
OPTIONS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-w"]


class CompileError(Exception):
    """The compiler failed; the message is its own."""


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, as Linux names it; nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def compiler() -> str | None:
    """The C++ compiler: CXX, g++ or c++, where it is; none if there is none."""
    names = [os.environ.get("CXX"), "g++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def library() -> Path:
    """The compiled kernels, from the cache if they are there.

    Raises:
        OSError: the cache cannot be written. CompileError: the compiler failed.
    """
    files, command = sorted(SOURCES.glob("*.cpp")), compiler()
    assert command
    key = hashlib.sha256("\0".join([*OPTIONS, command, *sorted(cpu_flags())]).encode())
    for file in [*files, SOURCES / "tile.h"]:
        key.update(file.read_bytes())
    target = kernel_cache() / f"{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    print("Compiling kernels for this CPU (once) ...", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made = Path(folder) / target.name
        compile_all(command, files, Path(folder), made)
        os.replace(made, target)  # another process may do the same
    return target


def compile_all(command: str, files: list[Path], folder: Path, target: Path) -> None:
    """Each file at the same time, then all together."""
    objects = [folder / f"{file.stem}.o" for file in files]
    parts = [
        subprocess.Popen([command, *OPTIONS, "-c", file, "-o", made], stderr=subprocess.PIPE)
        for file, made in zip(files, objects, strict=True)
    ]
    errors = [part.communicate()[1].decode(errors="replace") for part in parts]
    link = [command, *OPTIONS, "-shared", *map(str, objects), "-o", str(target)]
    if not any(part.returncode for part in parts):
        done = subprocess.run(link, capture_output=True, text=True)
        if done.returncode == 0:
            return
        errors.append(done.stderr)
    raise CompileError(f"{command}: {''.join(errors)[-2000:]}")
