"""Weights out of nothing, for benchmarks and tests without a checkpoint."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanovllm.models.load import destinations


def random_tensors(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each tensor that a checkpoint would have, one at a time: small random
    numbers, and ones for norms."""
    views = {name: view for name, (_, view) in destinations(model).items()}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    def make(name: str) -> Tensor:
        tensor = torch.ones_like(views[name])
        return tensor if "norm" in name else tensor.normal_(0, 0.02, generator=generator)

    return ((name, make(name)) for name in views)
