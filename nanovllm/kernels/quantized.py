"""Weights in fewer bits, in plain torch: what the fast products must equal.

Shapes: N rows (out_features), C columns (in_features), G = C / 32 groups of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Neighbours in a row that share a scale and a minimum: weight = scale · q + minimum. These are
    llama.cpp's blocks Q4_0, Q4_1 (4 bits) and Q8_0 (8 bits), their numbers unchanged.

    Attributes:
        bits: 4 or 8. q: [N, C] uint8, below 2 ** bits. scale, minimum: [N, G] float16.
    """

    bits: int
    q: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def dequantize_to(self, weight_NC: Tensor) -> None:
        """Write the values into a weight, some rows at a time: in float32 they are large."""
        for first in range(0, len(weight_NC), 4096):
            rows = slice(first, first + 4096)
            weight_NC[rows] = self[rows].dequantize()

    def __getitem__(self, rows: Tensor | slice) -> "Groups":
        return Groups(self.bits, *(array[rows] for array in self.arrays))

    def split(self, num_rows: int) -> "list[Groups]":
        parts = zip(*(array.split(num_rows) for array in self.arrays), strict=True)
        return [Groups(self.bits, *part) for part in parts]

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.scale, self.minimum

    def dequantize(self) -> Tensor:
        """[N, C] in float32."""
        scale_NG1, minimum_NG1 = self.scale.float()[..., None], self.minimum.float()[..., None]
        q_NGc: Tensor = self.q.float().unflatten(1, (-1, GROUP))
        return (q_NGc * scale_NG1 + minimum_NG1).flatten(1)


def to_groups(weight_NC: Tensor, bits: int) -> Groups:
    """Each group from its smallest to its largest value, in equal steps."""
    weight_NGc = weight_NC.float().unflatten(1, (-1, GROUP))
    low, high = weight_NGc.aminmax(dim=-1)
    scale, minimum = ((high - low) / (2**bits - 1)).half(), low.half()
    steps = (weight_NGc - minimum.float()[..., None]) / scale.float()[..., None]
    q = steps.nan_to_num(0).round().clamp(0, 2**bits - 1)  # a flat group has no steps
    return Groups(bits, q.to(torch.uint8).flatten(1), scale, minimum)


def to_channels(weight_NC: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, C], float32 [N]): weight = q · scale of its row, symmetric around 0."""
    scale_N = weight_NC.float().abs().amax(1) / 127
    q = (weight_NC.float() / scale_N[:, None]).nan_to_num(0).round()
    return q.to(torch.int8), scale_N


def rounded(weight_NC: Tensor | Groups, quantization: str | None, dtype: torch.dtype) -> Tensor:
    """The values that a weight has after quantization; its own where rows are no whole groups."""
    if isinstance(weight_NC, Groups):
        return weight_NC.dequantize().to(dtype)
    if quantization == "int8":
        q, scale_N = to_channels(weight_NC)
        return (q.float() * scale_N[:, None]).to(dtype)
    if quantization == "int4" and weight_NC.shape[1] % GROUP == 0:
        return to_groups(weight_NC, 4).dequantize().to(dtype)
    return weight_NC.to(dtype)
