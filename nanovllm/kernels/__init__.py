"""What a model is computed with, behind one interface; each backend is imported when named.

Shapes: B sequences, T tokens of the batch, N query heads, K key-value heads, D head dimension,
H hidden size, F feed-forward size.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from nanovllm.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from nanovllm.kernels.quantized import Groups

log = logging.getLogger(__name__)

Angles = tuple[Tensor, Tensor]  # cos and sin of each token's position: [T, D], halves alike
Product = Callable[[Tensor], Tensor]  # [rows, in] -> [rows, out]

# What "auto" tries on each kind of device, the fastest first; what some need, and its extra.
AUTO = {"cuda": ["triton", "reference"], "cpu": ["native", "cpu", "reference"]}
PACKAGES = {"triton": ("triton", "gpu"), "cpu": ("numba", "cpu")}


class KVCache(NamedTuple):
    """Keys and values of one layer, [blocks, K, block_size, D] each: what one head of one block
    holds lies together. How it is arranged in there is the backend's own affair."""

    k: Tensor
    v: Tensor


class AttentionBatch(NamedTuple):
    """Where a batch reads and writes; all on the CPU, int64.

    Attributes:
        query_starts: [B + 1] offsets of each sequence's tokens in T.
        context_lens: [B] positions that its last token sees, itself included.
        block_tables: [B, blocks of the longest] block ids; entries past a context mean nothing.
        slots: [T] block_id * block_size + offset to store each token at; -1 stores nothing.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slots: Tensor


class Form(NamedTuple):
    """What a product is to be.

    Attributes:
        dtype: of x. result: of the product.
        quantization: "int8" or "int4" rounds the weight; None or "gguf" takes it as it is.
        gated: silu(gate) · up, where gate and up are the halves of the product: [rows, out / 2].
        name: of the layer that it is for, such as "model.layers.0.mlp.down_proj".
    """

    dtype: torch.dtype
    result: torch.dtype
    quantization: str | None = None
    gated: bool = False
    name: str = ""


class Ops(Protocol):
    """What happens in a model between its products, planned for one batch."""

    def attend(
        self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, angles: Angles,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """Turn q and k by the angles, store k and v, then attend to all that the layer's cache
        holds of each sequence, causally (and to no more than `window` positions back, itself
        included). Returns [T, N, D]."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight, over the last dimension, computed in float32."""

    def add_norm(self, x_TH: Tensor, residual_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to the residual stream, in place, and return the norm of that."""


class Backend(Protocol):
    """Kernels that belong together. Their module has two more functions: `obstacle`, which says why
    they cannot be used here, and `make`, which returns the backend."""

    def plan(self, batch: AttentionBatch, caches: list[KVCache]) -> Ops:
        """Work out once a step what every layer needs. caches: one for each layer."""

    def pack(self, weight: "Tensor | Groups", bias: Tensor | None, form: Form) -> Product:
        """The product with a weight [out, in], brought once into the order it is read in."""


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> Backend:
    """The backend called `name`; "auto" is the fastest one that works here.

    Raises:
        ConfigError: the one named cannot do this dtype, head or block size, or not on this machine.
        MissingDependencyError: the one named needs a package that is not installed.
    """
    refused: Exception | None = None
    for candidate in AUTO[device.type] if name == "auto" else [name]:
        try:
            module = import_module(f"nanovllm.kernels.{candidate}")
        except ImportError as error:
            purpose = f"attention_backend={candidate!r}"
            refused = MissingDependencyError(*PACKAGES[candidate], purpose)
            refused.__cause__ = error
            continue
        reason = module.obstacle(device, dtype, head_dim, block_size)
        if not reason:
            return cast(Backend, module.make(device))
        log.info("no %s kernels: %s", candidate, reason)
        refused = ConfigError("attention_backend", name, f"{reason}; the nearest is auto")
    assert refused  # of the one named: "auto" comes to the reference, which can do all
    raise refused
