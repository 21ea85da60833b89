"""Llama 2 and 3 (Touvron et al., 2023), and what the families that came after it build on.

tokens ─▶ embedding ─▶ [ norm ─▶ attention ─▶ + ─▶ norm ─▶ MLP ─▶ + ] × layers ─▶ norm ─▶ head
"""

import torch
from torch import Tensor, nn

from nanovllm.kernels import Angles, Ops
from nanovllm.layers.linear import Embedding, GatedLinear, Linear, MergedLinear
from nanovllm.layers.module import Module
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope import Rope
from nanovllm.models.config import ModelConfig


class LlamaAttention(Module):
    """Grouped-query attention: N query heads, K key-value heads, N/K queries to each."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = self.sliding_window(config, layer)
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        sizes = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        input_bias, output_bias = self.biases(config)
        self.qkv_proj = MergedLinear(config.hidden_size, sizes, bias=input_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=output_bias)

    def biases(self, config: ModelConfig) -> tuple[bool, bool]:
        """Whether (queries, keys and values; the output) have one."""
        return config.attention_bias, config.attention_bias

    def sliding_window(self, config: ModelConfig, layer: int) -> int | None:
        """Positions that a token sees in this layer, itself included; None is all."""
        return None

    def norm_heads(self, q_TND: Tensor, k_TKD: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """For the families that normalise queries and keys before they are turned."""
        return q_TND, k_TKD

    def forward(self, x_TH: Tensor, angles: Angles, ops: Ops, rows_R: Tensor | None) -> Tensor:
        """[T, H], or [R, H] for only those rows."""
        heads = self.qkv_proj(x_TH).view(len(x_TH), -1, self.head_dim)
        q_TND, k_TKD, v_TKD = heads.split_with_sizes(self.heads, dim=1)
        q_TND, k_TKD = self.norm_heads(q_TND, k_TKD, ops)
        attended_TND = ops.attend(self.layer, q_TND, k_TKD, v_TKD, angles, self.window)
        return self.o_proj((attended_TND if rows_R is None else attended_TND[rows_R]).flatten(1))


class LlamaMLP(Module):
    """down(silu(gate(x)) · up(x)), the gated unit of Shazeer (2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        sizes = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = GatedLinear(config.hidden_size, sizes, bias=config.mlp_bias)
        self.down_proj = Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(x_TH))


class LlamaLayer(Module):
    """One block of the transformer; the residual stream beside x is added to in place."""

    attention_class: type[LlamaAttention] = LlamaAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.attention_class(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = self.make_mlp(config, layer)

    def make_mlp(self, config: ModelConfig, layer: int) -> nn.Module:
        return LlamaMLP(config)

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor, angles: Angles, ops: Ops, rows_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x and the residual stream of all tokens, or of the rows: those wanted after this."""
        x_TH = self.input_layernorm.add(x_TH, residual_TH, ops)
        x_TH = self.self_attn(x_TH, angles, ops, rows_R)
        if rows_R is not None:
            residual_TH = residual_TH[rows_R]
        x_TH = self.post_attention_layernorm.add(x_TH, residual_TH, ops)
        return self.mlp(x_TH), residual_TH


class LlamaModel(Module):
    """From token ids to the normalised hidden states."""

    def __init__(self, config: ModelConfig, layer_class: type[LlamaLayer]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer_class(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids_T: Tensor, angles: Angles, ops: Ops, rows_R: Tensor | None
    ) -> Tensor:
        x_TH = self.embed_tokens(input_ids_T)
        residual_TH = torch.zeros_like(x_TH)
        for i, layer in enumerate(self.layers, 1):
            rows = rows_R if i == len(self.layers) else None  # no layer needs the others after it
            x_TH, residual_TH = layer(x_TH, residual_TH, angles, ops, rows)
        return self.norm.add(x_TH, residual_TH, ops)


class LlamaForCausalLM(Module):
    """The model and its head. Attribute names are those of the checkpoints.

    Args:
        max_positions: positions that sequences may reach.
    """

    layer_class: type[LlamaLayer] = LlamaLayer
    recordable = True  # a step is all launches, which do not depend on what was computed

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        super().__init__()
        self.model = LlamaModel(config, self.layer_class)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        rope = config.head_dim, config.rope_theta, config.rope_scaling
        lengths = max_positions, config.max_position_embeddings
        self.rope = Rope(*rope, *lengths)

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, ops: Ops, rows_R: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the last norm: [T, H], or [R, H] if only those rows are wanted.

        Args:
            ops: planned for these tokens.
        """
        return self.model(input_ids_T, self.rope.select(positions_T), ops, rows_R)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] of the rows that are sampled."""
        return self.lm_head(hidden_RH)
