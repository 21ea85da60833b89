"""Rotary position embedding (Su et al., RoFormer, 2021)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import Angles


class Rope:
    """Turns pairs (x[i], x[i + D/2]) of each head by an angle that grows with the position.

    Args:
        scaling: "rope_type" and its parameters, as in config.json.
        max_positions: rows of the table. original_positions: what the model was trained for.
    """

    def __init__(
        self, head_dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int,
        original_positions: int,
    ) -> None:  # fmt: skip
        frequencies, factor = rope_frequencies(theta, head_dim), 1.0
        if scaling["rope_type"] != "default":
            from nanovllm.layers.rope_scaling import scale  # only long-context models need it

            # [D/2], or [positions, D/2] where each position has its own
            frequencies, factor = scale(scaling, theta, head_dim, max_positions, original_positions)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles_PD = (positions[:, None] * frequencies).repeat(1, 2)
        dtype = torch.get_default_dtype()
        self.cos_PD = (angles_PD.cos() * factor).to(dtype)
        self.sin_PD = (angles_PD.sin() * factor).to(dtype)

    def select(self, positions_T: Tensor) -> Angles:
        """(cos, sin) for the tokens of a batch, [T, D] each."""
        return self.cos_PD[positions_T], self.sin_PD[positions_T]


def rope_frequencies(theta: float | Tensor, head_dim: int, factor: float = 1) -> Tensor:
    """How far each pair turns at a step of one position, in radians: [D/2], or, for a column of
    thetas [P, 1], [P, D/2]. The first pair turns fastest; `factor` slows all of them."""
    periods: Tensor = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return 1 / (factor * periods)
