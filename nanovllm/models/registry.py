"""Which file holds which architecture."""

from importlib import import_module

from nanovllm.errors import ModelLoadError
from nanovllm.models.llama import LlamaForCausalLM

# "architectures" of config.json -> (module, class)
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}


def model_class(architecture: str) -> type[LlamaForCausalLM]:
    """The class for an architecture; its module is imported now.

    Raises:
        ModelLoadError: the architecture is not supported.
    """
    if architecture not in ARCHITECTURES:
        known = f"these are: {', '.join(ARCHITECTURES)} (docs/add-a-model.md shows how to add one)"
        raise ModelLoadError(f"architecture {architecture!r} is not supported; {known}")
    module, name = ARCHITECTURES[architecture]
    found: type[LlamaForCausalLM] = getattr(import_module(f"nanovllm.models.{module}"), name)
    return found
