"""Attention for CPUs: decodes read the paged blocks in place, in Numba, parallel over sequences
and heads; prompts go through the reference, whose matrix products suit them.

bfloat16 is unknown to NumPy and Numba: its bits travel as uint16, and become a float32 by moving
them to the upper half of its 32 bits.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from nanovllm.kernels import AttentionBatch, KVCache, reference

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # omp shares torch's cores


@dataclass(frozen=True, slots=True)
class CpuAttention:
    """One batch's attention."""

    batch: AttentionBatch
    rest: reference.ReferenceAttention
    decodes: Tensor  # [rows] sequences with one query
    tokens: Tensor  # [rows] and where it is in T
    prefills: list[tuple[int, int, int]]  # (sequence, first token, past the last one)

    def __call__(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: KVCache, window: int | None
    ) -> Tensor:
        self.rest.store(k_TKD, v_TKD, cache)
        out_TND = torch.empty_like(q_TND)
        if len(self.decodes):
            out_BND = torch.empty((len(self.decodes), *q_TND.shape[1:]), dtype=torch.float32)
            attend_paged(
                q_TND[self.tokens].float().numpy(),
                _numpy(cache.k),
                _numpy(cache.v),
                self.batch.block_tables[self.decodes].numpy(),
                self.batch.context_lens[self.decodes].numpy(),
                0 if window is None else window,
                out_BND.numpy(),
            )
            out_TND[self.tokens] = out_BND.to(q_TND.dtype)
        for b, start, end in self.prefills:
            length = int(self.batch.context_lens[b])
            table = self.batch.block_tables[b]
            out_TND[start:end] = reference.attend_one(
                q_TND[start:end], cache, table, length, window
            )
        return out_TND


def plan(batch: AttentionBatch, block_size: int, device: torch.device) -> CpuAttention:
    """See kernels.AttentionBackend."""
    starts = batch.query_starts
    single = starts.diff() == 1
    decodes = single.nonzero().squeeze(1)
    prefills = [
        (b, int(starts[b]), int(starts[b + 1])) for b in (~single).nonzero().squeeze(1).tolist()
    ]
    rest = reference.plan(batch, block_size, device)
    return CpuAttention(batch, rest, decodes, starts[decodes], prefills)


def _numpy(cache: Tensor) -> np.ndarray[Any, Any]:
    return (cache.view(torch.uint16) if cache.dtype == torch.bfloat16 else cache).numpy()


@intrinsic
def _float(_: Any, value: Any) -> Any:
    """One element of the cache as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.float32:
            return args[0]
        word = context.get_value_type(types.uint32)
        bits = builder.shl(builder.zext(args[0], word), word(16))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(value), generate


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def attend_paged(
    q: Any, k_cache: Any, v_cache: Any, tables: Any, lengths: Any, window: int, out: Any
) -> None:
    """Each of B sequences' one query attends to its context.

    Args:
        q: [B, N, D] float32.
        k_cache, v_cache: [blocks, K, block_size, D] float32, or uint16 holding bfloat16.
        tables: [B, blocks] int64. lengths: [B] positions of each context.
        window: positions seen, from the last one back; 0 is all.
        out: [B, N, D] float32, written.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    scale = np.float32(1 / np.sqrt(head_dim))
    for item in numba.prange(num_seqs * num_kv_heads):
        b, kv_head = item // num_kv_heads, item % num_kv_heads
        length = lengths[b]
        first = max(0, length - window) if window > 0 else 0
        scores = np.empty((group, length - first), np.float32)
        largest = np.full(group, -1e30, np.float32)  # fastmath knows no infinity
        for position in range(first, length):
            key = k_cache[tables[b, position // block_size], kv_head, position % block_size]
            for g in range(group):
                query = q[b, kv_head * group + g]
                score = np.float32(0)
                for d in range(head_dim):
                    score += query[d] * _float(key[d])
                score *= scale
                scores[g, position - first] = score
                largest[g] = max(largest[g], score)
        totals = np.zeros(group, np.float32)
        for g in range(group):
            for i in range(length - first):
                scores[g, i] = np.exp(scores[g, i] - largest[g])
                totals[g] += scores[g, i]
        sums = np.zeros((group, head_dim), np.float32)
        for position in range(first, length):
            value = v_cache[tables[b, position // block_size], kv_head, position % block_size]
            for g in range(group):
                weight = scores[g, position - first]
                for d in range(head_dim):
                    sums[g, d] += weight * _float(value[d])
        for g in range(group):
            for d in range(head_dim):
                out[b, kv_head * group + g, d] = sums[g, d] / totals[g]
