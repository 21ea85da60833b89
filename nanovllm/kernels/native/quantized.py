"""Weights in fewer bits, as linear.cpp reads them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.native import Described, panels
from nanovllm.kernels.quantized import Groups, to_channels, to_groups


def describe(
    described: Described, weight: Tensor | Groups, quantization: str | None
) -> Callable[[Any], list[Tensor]]:
    """Say of what kind the weight's product is to be. Returns what arranges rows of it for that."""
    if isinstance(weight, Tensor) and quantization == "int8":
        described.kind, described.group = 8, 64 if weight.shape[1] % 64 == 0 else 32
        return pack_int8
    described.kind = 5 if isinstance(weight, Groups) and weight.bits == 8 else 4
    return pack_groups


def pack_int8(weight: Tensor) -> list[Tensor]:
    """[panels, C / 4, 32, 4] as q + 128, and the scales of the columns."""
    q, scales = to_channels(weight)
    unsigned = panels(q.view(torch.uint8) ^ 128).unflatten(2, (-1, 4))
    return [unsigned.transpose(1, 2).contiguous(), panels(scales)]


def pack_groups(weight: Tensor | Groups) -> list[Tensor]:
    """[panels, G, bytes]: a plane for each 4 bits, the scales, the minima (see linear.cpp)."""
    groups = to_groups(weight, 4) if isinstance(weight, Tensor) else weight
    planes = [groups.q] if groups.bits == 4 else [groups.q >> 4, groups.q & 15]
    parts = []
    for plane in planes:
        low, high = panels(plane).unflatten(1, (2, 16)).unflatten(3, (-1, 16, 2)).unbind(1)
        bytes_ = low | high << 4  # [panels, 16 columns, G, 16 pairs, 2]
        parts.append(bytes_.permute(0, 2, 3, 1, 4).flatten(2))
    for halves in (groups.scale, groups.minimum):
        lines = panels(halves).transpose(1, 2).contiguous()  # [panels, G, 32]
        parts.append(lines.view(torch.uint8))
    return [torch.cat(parts, dim=2)]
