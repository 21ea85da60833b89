"""Compiles the kernels once for each machine, compiler and version of the sources."""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def compiler() -> str | None:
    """The C++ compiler: CXX, g++ or c++, where it is; none if there is none."""
    names = [os.environ.get("CXX"), "g++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def library() -> Path:
    """The compiled kernels, from the cache if they are there.

    Raises:
        OSError: the cache cannot be written. CompileError: the compiler failed, or there is none.
    """
    files, command = sorted(SOURCES.glob("*.cpp")), compiler()
    if command is None:
        raise CompileError("needs a C++ compiler: install g++, or set CXX")
    key = hashlib.sha256("\0".join([*OPTIONS, command, *sorted(cpu_flags())]).encode())
    for file in [*files, SOURCES / "tile.h"]:
        key.update(file.read_bytes())
    target = kernel_cache() / f"{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    print("Compiling kernels for this CPU (once) ...", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made, objects = Path(folder, "all.so"), [Path(folder, f"{file.stem}.o") for file in files]
        with ThreadPoolExecutor() as pool:  # each file at the same time
            list(pool.map(lambda file, made: run(command, "-c", file, "-o", made), files, objects))
        run(command, "-shared", *objects, "-o", made)
        os.replace(made, target)  # another process may do the same
    return target


def run(command: str, *arguments: str | Path) -> None:
    """
    Raises:
        CompileError: the compiler failed.
    """
    done = subprocess.run([command, *OPTIONS, *arguments], capture_output=True, errors="replace")
    if done.returncode:
        raise CompileError(f"{command}: {done.stderr[-2000:]}")
