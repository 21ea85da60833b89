"""Root-mean-square norm (Zhang & Sennrich, 2019)."""

import torch
from torch import Tensor, nn

from nanovllm.kernels import Ops
from nanovllm.layers.module import Module


class RMSNorm(Module):
    """See kernels.Ops.norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return ops.norm(x, self.weight, self.eps)

    def add(self, x_TH: Tensor, residual_TH: Tensor, ops: Ops) -> Tensor:
        """Add x to the residual stream, in place; its norm."""
        return ops.add_norm(x_TH, residual_TH, self.weight, self.eps)
