"""Attention in plain torch, for any device: gathers each sequence's blocks, then calls SDPA.

The other kernels are tested against this one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels import AttentionBatch, KVCache


@dataclass(frozen=True, slots=True)
class ReferenceAttention:
    """One batch's attention, sequence by sequence."""

    batch: AttentionBatch
    stored: Tensor  # [S] tokens of the batch that are stored
    blocks: Tensor  # [S] the block of each
    offsets: Tensor  # [S] and the offset in it
    tables: Tensor  # [B, blocks of the longest], on the device

    def __call__(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: KVCache, window: int | None
    ) -> Tensor:
        self.store(k_TKD, v_TKD, cache)
        out_TND = torch.empty_like(q_TND)
        starts, lengths = self.batch.query_starts.tolist(), self.batch.context_lens.tolist()
        for b, length in enumerate(lengths):
            rows = slice(starts[b], starts[b + 1])
            out_TND[rows] = attend_one(q_TND[rows], cache, self.tables[b], length, window)
        return out_TND

    def store(self, k_TKD: Tensor, v_TKD: Tensor, cache: KVCache) -> None:
        cache.k[self.blocks, :, self.offsets] = k_TKD[self.stored]
        cache.v[self.blocks, :, self.offsets] = v_TKD[self.stored]


def plan(batch: AttentionBatch, block_size: int, device: torch.device) -> ReferenceAttention:
    """See kernels.AttentionBackend."""
    stored = (batch.slots >= 0).nonzero().squeeze(1)
    slots = batch.slots[stored]
    places = (stored, slots // block_size, slots % block_size, batch.block_tables)
    return ReferenceAttention(batch, *(place.to(device) for place in places))


def attend_one(
    q_TND: Tensor, cache: KVCache, table: Tensor, length: int, window: int | None
) -> Tensor:
    """The last T tokens of one sequence attend to its `length` positions. Returns [T, N, D]."""
    num_queries, block_size = q_TND.shape[0], cache.k.shape[2]
    table = table[: -(-length // block_size)]
    k_KLD, v_KLD = (part[table].transpose(0, 1).flatten(1, 2)[:, :length] for part in cache)
    mask = None
    if num_queries > 1 or window is not None:
        query = torch.arange(length - num_queries, length, device=table.device)[:, None]
        key = torch.arange(length, device=table.device)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
    return F.scaled_dot_product_attention(
        q_TND.transpose(0, 1)[None], k_KLD[None], v_KLD[None], mask, enable_gqa=True
    )[0].transpose(0, 1)
