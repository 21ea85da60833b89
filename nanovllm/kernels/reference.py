"""Attention in plain torch, for any device: gathers each sequence's blocks, then calls SDPA.

The other kernels are tested against this one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels import AttentionBatch, KVCache


class ReferenceAttention:
    """One batch's attention (see kernels.Attention), sequence by sequence."""

    def __init__(self, batch: AttentionBatch, block_size: int, device: torch.device) -> None:
        stored = (batch.slots >= 0).nonzero().squeeze(1)
        blocks, offsets = batch.slots[stored] // block_size, batch.slots[stored] % block_size
        self.stored, self.blocks, self.offsets = (t.to(device) for t in (stored, blocks, offsets))
        self.tables, self.lengths = batch.block_tables.to(device), batch.context_lens.tolist()
        self.starts = batch.query_starts.tolist()
        self.sequences = list(range(len(self.lengths)))  # those attended to here

    def __call__(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: KVCache, window: int | None
    ) -> Tensor:
        cache.k[self.blocks, :, self.offsets] = k_TKD[self.stored]
        cache.v[self.blocks, :, self.offsets] = v_TKD[self.stored]
        out_TND = torch.empty_like(q_TND)
        for b in self.sequences:
            rows = slice(self.starts[b], self.starts[b + 1])
            out_TND[rows] = attend(q_TND[rows], cache, self.tables[b], self.lengths[b], window)
        return out_TND


plan = ReferenceAttention


def attend(q_TND: Tensor, cache: KVCache, table: Tensor, length: int, window: int | None) -> Tensor:
    """The last T tokens of one sequence attend to its `length` positions. Returns [T, N, D]."""
    num_queries, num_blocks = len(q_TND), -(-length // cache.k.shape[2])
    k_KLD, v_KLD = (
        part[table[:num_blocks]].transpose(0, 1).flatten(1, 2)[:, :length] for part in cache
    )
    mask, whole = None, num_queries == length and window is None
    if not whole and (num_queries > 1 or window is not None):
        query = torch.arange(length - num_queries, length, device=table.device)[:, None]
        key = torch.arange(length, device=table.device)
        mask = (key <= query) & (key > query - (window or length))
    return F.scaled_dot_product_attention(
        q_TND.transpose(0, 1)[None], k_KLD[None], v_KLD[None], mask, 0.0, whole, enable_gqa=True
    )[0].transpose(0, 1)
