"""Qwen 3 mixture of experts (Yang et al., 2025): Qwen 3, with many small MLPs in place of one.

    token ─▶ router ─▶ softmax ─▶ the top k of E experts ─▶ Σ weight · expert(token)

Shapes, beside those of nanovllm.layers: E experts, X experts chosen for a token, S tokens that
chose one expert, F feed-forward size of an expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.errors import ModelLoadError
from nanovllm.kernels.reference import silu_mul
from nanovllm.layers.linear import Linear
from nanovllm.layers.module import Module
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3Layer


class Qwen3MoeAttention(Qwen3Attention):
    def sliding_window(self, config: ModelConfig, layer: int) -> int | None:
        return config.sliding_window if config.extra.get("use_sliding_window") else None


class Qwen3MoeMLP(Module):
    """The router (called gate in checkpoints) and its experts (Shazeer et al., 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_chosen = need(config, "num_experts_per_tok")
        self.weights_sum_to_1 = config.extra.get("norm_topk_prob", False)
        self.gate = Linear(config.hidden_size, num_experts(config))
        held = config.held_experts or (0, num_experts(config))
        size = need(config, "moe_intermediate_size")
        self.experts = Experts(held, config.hidden_size, size)

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TE = self.gate(x_TH).softmax(dim=-1, dtype=torch.float32)
        weights_TX, chosen_TX = weights_TE.topk(self.num_chosen)
        if self.weights_sum_to_1:
            weights_TX = weights_TX / weights_TX.sum(dim=-1, keepdim=True)
        return self.experts(x_TH, weights_TX.to(x_TH.dtype), chosen_TX)


class Experts(Module):
    """E gated MLPs, their matrices stacked.

    Args:
        held: the numbers of those that are here, from and to.

    Attributes:
        combine: if other ranks hold the others, what sums the results of all ranks.
    """

    def __init__(self, held: tuple[int, int], hidden_size: int, size: int) -> None:
        super().__init__()
        self.held, self.combine = held, None
        self.gate_up = nn.Parameter(torch.empty(held[1] - held[0], 2 * size, hidden_size))
        self.down = nn.Parameter(torch.empty(held[1] - held[0], hidden_size, size))

    def forward(self, x_TH: Tensor, weights_TX: Tensor, chosen_TX: Tensor) -> Tensor:
        out_TH = torch.zeros_like(x_TH)
        first, stop = self.held
        for expert in chosen_TX.unique().tolist():
            if not first <= expert < stop:
                continue
            tokens_S, rank_S = (chosen_TX == expert).nonzero(as_tuple=True)
            gate_up_S2F = F.linear(x_TH[tokens_S], self.gate_up[expert - first])
            y_SH = F.linear(silu_mul(gate_up_S2F), self.down[expert - first])
            out_TH.index_add_(0, tokens_S, y_SH * weights_TX[tokens_S, rank_S, None])
        return out_TH if self.combine is None else self.combine(out_TH)

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Where each expert's matrices go, named relative to the parent module."""
        views: dict[str, Tensor] = {}
        experts = zip(self.gate_up.data, self.down.data, strict=True)
        for i, (gate_up, down) in enumerate(experts, self.held[0]):
            gate, up = gate_up.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            views |= {f"experts.{i}.{name}.weight": part for name, part in parts.items()}
        return views


class Qwen3MoeLayer(Qwen3Layer):
    attention_class = Qwen3MoeAttention

    def make_mlp(self, config: ModelConfig, layer: int) -> nn.Module:
        """Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
        dense = layer in (config.extra.get("mlp_only_layers") or ())
        step = config.extra.get("decoder_sparse_step", 1)
        if dense or (layer + 1) % step or not num_experts(config):
            return super().make_mlp(config, layer)
        return Qwen3MoeMLP(config)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3MoeLayer
    recordable = False  # the host asks which experts were chosen


def num_experts(config: ModelConfig) -> int:
    """Checkpoints of Qwen say num_experts, transformers 5 saves num_local_experts."""
    return need(config, "num_experts", "num_local_experts")


def need(config: ModelConfig, *names: str) -> int:
    """The first of these fields that config.json has.

    Raises:
        ModelLoadError: it has none of them.
    """
    for name in names:
        if config.extra.get(name) is not None:
            return int(config.extra[name])
    raise ModelLoadError(f"config.json: {names[0]} is missing, but {config.architecture} needs it")
