"""Qwen 3 (Yang et al., 2025): Qwen 2 with the bias gone, each head's queries and keys normalised
instead, and a head_dim of its own."""

from torch import Tensor

from nanovllm.kernels import Ops
from nanovllm.layers.norm import RMSNorm
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer
from nanovllm.models.qwen2 import layer_window


class Qwen3Attention(LlamaAttention):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def norm_heads(self, q_TND: Tensor, k_TKD: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        return self.q_norm(q_TND, ops), self.k_norm(k_TKD, ops)

    def sliding_window(self, config: ModelConfig, layer: int) -> int | None:
        return layer_window(config, layer)


class Qwen3Layer(LlamaLayer):
    attention_class = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3Layer
