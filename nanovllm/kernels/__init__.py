"""What a model is computed with, behind one interface; each backend is imported when named.

Shapes: B sequences, T tokens of the batch, N query heads, K key-value heads, D head dimension,
H hidden size, F feed-forward size.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.errors import ConfigError, MissingDependencyError
from nanovllm.kernels.quantized import Groups

log = logging.getLogger(__name__)

Angles = tuple[Tensor, Tensor]  # cos and sin of each token's position: [T, D], halves alike
Product = Callable[[Tensor], Tensor]  # [rows, in] -> [rows, out]


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
        quantization: "int8" or "int4" rounds the weight.
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
        self,
        layer: int,
        q_TND: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        angles: Angles,
        window: int | None,
    ) -> Tensor:
        """Turn q and k by the angles, store k and v, then attend to all that the layer's cache
        holds of each sequence, causally (and to no more than `window` positions back, itself
        included). Returns [T, N, D]."""  # fmt: skip

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight, over the last dimension, computed in float32."""

    def add_norm(self, x_TH: Tensor, residual_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to the residual stream, in place, and return the norm of that."""


class Backend(Protocol):
    """Kernels that belong together."""

    def plan(self, batch: AttentionBatch, caches: list[KVCache]) -> Ops:
        """Work out once a step what every layer needs. caches: one for each layer."""

    def pack(self, weight: Tensor | Groups, bias: Tensor | None, form: Form) -> Product:
        """The product with a weight [out, in], brought once into the order it is read in."""


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> Backend:
    """The backend called `name`; "auto" is the fastest one that works here.

    Raises:
        ConfigError: the one named cannot do this dtype, head or block size, or not on this machine.
        MissingDependencyError: the one named needs a package that is not installed.
    """
    on_cpu = device.type == "cpu"
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        try:
            triton = import_module("nanovllm.kernels.triton")
        except ImportError as error:
            if name == "triton":
                purpose = "attention_backend='triton'"
                raise MissingDependencyError("triton", "gpu", purpose) from error
        else:
            reason = triton.obstacle(device, dtype, head_dim)
            if not reason:
                backend: Backend = triton.make(device)
                return backend
            if name == "triton":
                raise ConfigError("attention_backend", name, f"{reason}; the nearest is auto")
    if name == "native" or (name == "auto" and on_cpu and dtype == torch.bfloat16):
        from nanovllm.kernels import native

        reason = native.obstacle(device, dtype, head_dim, block_size)
        if not reason:
            return native.Native()
        if name == "native":
            raise ConfigError("attention_backend", name, f"{reason}; the nearest is auto")
        level = logging.INFO if native.missing_flags() else logging.WARNING  # it could be faster
        log.log(level, "no native kernels: %s", reason)
    if name == "cpu" or (name == "auto" and on_cpu and dtype in (torch.float32, torch.bfloat16)):
        try:
            return import_module("nanovllm.kernels.cpu")
        except ImportError as error:
            if name == "cpu":
                raise MissingDependencyError("numba", "cpu", "attention_backend='cpu'") from error
    return import_module("nanovllm.kernels.reference")
