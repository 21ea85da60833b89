"""The control plane loads neither torch nor numpy; the package itself loads no torch."""

import pkgutil
import subprocess
import sys

import nanovllm.core


def loaded_after(*modules: str) -> set[str]:
    """Top-level modules of a new interpreter that has imported `modules`."""
    code = f"import {', '.join(modules)}, sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_core_loads_no_torch_and_no_numpy():
    names = [module.name for module in pkgutil.iter_modules(nanovllm.core.__path__)]
    assert {"block_manager", "engine", "events", "plan", "policy", "scheduler"} <= set(names)
    loaded = loaded_after(*(f"nanovllm.core.{name}" for name in names))
    assert "nanovllm" in loaded
    assert loaded & {"torch", "numpy", "numba", "msgspec", "tokenizers", "transformers"} == set()


def test_the_package_and_its_settings_load_no_torch():
    loaded = loaded_after("nanovllm", "nanovllm.config", "nanovllm.sampling_params")
    assert loaded & {"torch", "numpy", "numba", "tokenizers", "transformers"} == set()
