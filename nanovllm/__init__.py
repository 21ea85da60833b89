"""Nano-vLLM: an LLM inference engine to read, change and run.

Importing this loads no torch; the names below are fetched when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig as EngineConfig
    from nanovllm.llm import LLM as LLM
    from nanovllm.outputs import CompletionOutput as CompletionOutput
    from nanovllm.outputs import RequestOutput as RequestOutput
    from nanovllm.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

HOMES = {
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "EngineConfig": "config",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    return getattr(import_module(f"nanovllm.{HOMES[name]}"), name)
