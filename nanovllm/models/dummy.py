"""Weights out of nothing, for benchmarks and tests without a checkpoint."""

import torch
from torch import nn


def fill_randomly(model: nn.Module, seed: int) -> None:
    """Small random weights, for benchmarks and tests without a checkpoint."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
