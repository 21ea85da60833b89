"""How many threads compute."""

import os
import sys
from math import ceil, inf
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")


def available_cores(root: Path = CGROUPS) -> int:
    """Cores that this process may use: those it may run on, or fewer if its cgroup has a quota of
    CPU time (rounded up); at least 1.

    Args:
        root: where the system shows the cgroup, as a container sees its own.
    """
    where_pinned = hasattr(os, "sched_getaffinity")  # not on macOS or Windows
    cores = len(os.sched_getaffinity(0)) if where_pinned else os.cpu_count() or 1
    return max(1, ceil(min(cores, quota(root))))


def default_num_threads() -> int:
    """The cores there are, or fewer if OMP_NUM_THREADS says so, as all that uses OpenMP heeds."""
    wanted, cores = os.environ.get("OMP_NUM_THREADS", ""), available_cores()
    return min(int(wanted), cores) if wanted.isdigit() and int(wanted) else cores


def quota(root: Path) -> float:
    """Seconds of CPU time that a cgroup (version 2, or 1) may use in a second; inf is no limit."""
    files = [root / "cpu.max"]
    if not files[0].exists():
        files = [root / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    try:
        words = " ".join(file.read_text() for file in files).split()
        used_us, period_us = map(int, words)  # "max" is no number; -1 is version 1's "max"
        return used_us / period_us if used_us > 0 and period_us > 0 else inf
    except (OSError, ValueError):
        return inf


def set_num_threads(num_threads: int) -> None:
    """Let torch compute with so many threads, and with it the native kernels, which share its
    OpenMP; and Numba, if it is in use, with as many of its own as it has."""
    if numba := sys.modules.get("numba"):  # first, as its own start sets OpenMP's number
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(num_threads)
