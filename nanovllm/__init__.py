"""Nano-vLLM: an LLM inference engine to read, change and run.

Importing this loads no torch; the names below are fetched when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM as AsyncLLM
    from nanovllm.config import EngineConfig as EngineConfig
    from nanovllm.llm import LLM as LLM
    from nanovllm.outputs import CompletionOutput as CompletionOutput
    from nanovllm.outputs import RequestOutput as RequestOutput
    from nanovllm.sampling_params import RequestOutputKind as RequestOutputKind
    from nanovllm.sampling_params import SamplingParams as SamplingParams
    from nanovllm.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "sampling_params",
    "RequestOutputKind": "sampling_params",
    "StructuredOutputsParams": "structured_outputs",
    "EngineConfig": "config",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    return getattr(import_module(f"nanovllm.{HOMES[name]}"), name)
