"""Where downloaded models and compiled kernels are kept."""

import os
from pathlib import Path


def cache_root() -> Path:
    """NANOVLLM_CACHE, or nanovllm in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("NANOVLLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanovllm"


def kernel_cache() -> Path:
    """NANOVLLM_KERNEL_CACHE, or kernels in the cache."""
    own = os.environ.get("NANOVLLM_KERNEL_CACHE")
    return Path(own).expanduser() if own else cache_root() / "kernels"
