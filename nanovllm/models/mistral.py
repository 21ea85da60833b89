"""Mistral 7B (Jiang et al., 2023): Llama with a sliding window in every layer."""

from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer


class MistralAttention(LlamaAttention):
    """What lies beyond the window is reached through the layers below; null is no window."""

    def biases(self, config: ModelConfig) -> tuple[bool, bool]:
        return False, False

    def sliding_window(self, config: ModelConfig, layer: int) -> int | None:
        return config.sliding_window


class MistralLayer(LlamaLayer):
    attention_class = MistralAttention


class MistralForCausalLM(LlamaForCausalLM):
    layer_class = MistralLayer
