"""Tables and matrix products, alone or several over the same input in one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.kernels import Form, Product
from nanovllm.layers.module import Module


class Embedding(Module):
    """A vector for each token id: weight [V, H]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return F.embedding(input_ids_T, self.weight)


class Linear(Module):
    """y = x Wᵀ + b, with W [out_features, in_features].

    Attributes:
        product: does the same once a backend has packed W; W is given up then.
    """

    gated = False

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.product: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.product:
            return self.product(x)
        from nanovllm.kernels.reference import pack

        return pack(self.weight, self.bias, Form(x.dtype, x.dtype, gated=self.gated))(x)


class MergedLinear(Linear):
    """Several products over one input, computed as one: W is their matrices, stacked.

    Args:
        parts: name of each in the checkpoint -> its out_features, in the order stacked.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self.parts = dict(parts)

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Where each tensor of the checkpoint goes, named relative to the parent module."""
        views: dict[str, Tensor] = {}
        for kind, parameter in self.named_parameters():
            split = parameter.data.split(list(self.parts.values()))
            views |= {f"{part}.{kind}": v for part, v in zip(self.parts, split, strict=True)}
        return views


class GatedLinear(MergedLinear):
    """silu(x Gᵀ) · x Uᵀ, with G and U of the same size (Shazeer, 2020)."""

    gated = True
