"""Attention over a paged KV cache, behind one interface; each kernel is imported when named.

Shapes: B sequences, T tokens of the batch, N query heads, K key-value heads, D head dimension.
"""

from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.errors import MissingDependencyError


class KVCache(NamedTuple):
    """Keys and values of one layer, [blocks, K, block_size, D] each: what one head of one block
    holds lies together, and is what the loop over a context reads."""

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


class Attention(Protocol):
    """Attention planned for one batch, to be run in each layer."""

    def __call__(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: KVCache, window: int | None
    ) -> Tensor:
        """Store k and v, then attend to all that the cache holds of each sequence, causally
        (and to no more than `window` positions back, itself included). Returns [T, N, D]."""


class AttentionBackend(Protocol):
    """A module of kernels: `plan` works out once a step what every layer needs."""

    def plan(self, batch: AttentionBatch, block_size: int, device: torch.device) -> Attention: ...


def attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name`; "auto" is the fastest one that works here.

    Raises:
        MissingDependencyError: the backend named needs a package that is not installed.
    """
    fits = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if name == "cpu" or (name == "auto" and fits):
        try:
            return import_module("nanovllm.kernels.cpu")
        except ImportError as error:
            if name == "cpu":
                raise MissingDependencyError("numba", "cpu", "attention_backend='cpu'") from error
    return import_module("nanovllm.kernels.reference")
