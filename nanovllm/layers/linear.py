"""Tables and matrix products, alone or several over the same input in one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """A vector for each token id: weight [V, H]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return F.embedding(input_ids_T, self.weight)


class Linear(nn.Module):
    """y = x Wᵀ + b, with W [out_features, in_features], or packed for oneDNN (`pack`)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            ops = torch.ops.mkldnn
            return ops._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Bring W into the order in which oneDNN reads it, once instead of in each product: up to
        twice as fast for few rows."""
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self.weight = nn.Parameter(packed, requires_grad=False)


class MergedLinear(Linear):
    """Several products over one input, computed as one: W is their matrices, stacked.

    Args:
        parts: name of each in the checkpoint -> its out_features, in the order stacked.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self.parts = dict(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x).split(list(self.parts.values()), dim=-1)

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Where each tensor of the checkpoint goes, named relative to the parent module."""
        views: dict[str, Tensor] = {}
        for kind, parameter in self.named_parameters():
            split = parameter.data.split(list(self.parts.values()))
            views |= {f"{part}.{kind}": v for part, v in zip(self.parts, split, strict=True)}
        return views
