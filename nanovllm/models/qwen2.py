"""Qwen 2 and 2.5 (Yang et al., 2024): Llama with biases on queries, keys and values, and a sliding
window in some of the layers."""

from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer


class Qwen2Attention(LlamaAttention):
    def biases(self, config: ModelConfig) -> tuple[bool, bool]:
        return True, False

    def sliding_window(self, config: ModelConfig, layer: int) -> int | None:
        return layer_window(config, layer)


class Qwen2Layer(LlamaLayer):
    attention_class = Qwen2Attention


class Qwen2ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen2Layer


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """The window of a layer: the layers that `layer_types` names have it, or, without that, those
    from `max_window_layers` up; and none unless `use_sliding_window` is set."""
    kinds = config.extra.get("layer_types")
    if kinds:
        slides = kinds[layer] == "sliding_attention"
    else:
        slides = layer >= config.extra.get("max_window_layers", 28)
    return config.sliding_window if slides and config.extra.get("use_sliding_window") else None
