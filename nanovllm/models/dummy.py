"""Weights out of nothing, for benchmarks and tests without a checkpoint."""

import torch
from torch import nn


def fill_randomly(model: nn.Module, seed: int) -> None:
    """Small random weights, for benchmarks and tests without a checkpoint."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            generator = torch.Generator(parameter.device).manual_seed(seed)
            parameter.data.normal_(0, 0.02, generator=generator)
