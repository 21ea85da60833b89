"""Weights that stay in the blocks of their GGUF file."""

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.quantized import Groups
from nanovllm.layers.linear import Embedding, Linear


def join(module: Any, parts: list[tuple[Tensor, Groups]]) -> Tensor | Groups:
    """The weight of a module whose tensors are all there: as groups if all of it came so and they
    go together, else dense.

    Args:
        parts: each with the view of the module's weight that it fills.
    """
    parts.sort(key=lambda part: part[0].storage_offset())
    groups, bits = [groups for _, groups in parts], {groups.bits for _, groups in parts}
    rows = sum(len(part.q) for part in groups)
    if isinstance(module, Linear) and rows == len(module.weight) and len(bits) == 1:
        arrays = zip(*(part.arrays for part in groups), strict=True)
        return Groups(bits.pop(), *map(torch.cat, arrays))
    for view, part in parts:
        part.dequantize_to(view)
    weight: Tensor = module.weight
    return groups[0] if isinstance(module, Embedding) else weight
