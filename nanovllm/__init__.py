"""Nano-vLLM: an LLM inference engine to read, change and run."""

__version__ = "0.1.0"
