"""For any CPU: oneDNN's products, and attention in which decodes read the paged blocks in place, in
Numba, parallel over sequences and heads. All else is the reference's.

bfloat16 is unknown to NumPy and Numba: its bits travel as uint16, and become a float32 by moving
them to the upper half of its 32 bits.
"""

from functools import partial
from importlib import import_module
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from nanovllm.kernels import AttentionBatch, Backend, Form, KVCache, Product, reference
from nanovllm.kernels.quantized import Groups, rounded
from nanovllm.kernels.reference import ReferenceOps

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # omp shares torch's cores


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Why these kernels cannot be used, or nothing."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"computes in float32 or bfloat16 on a CPU, not in {dtype} on {device}"
    return ""


def make(device: torch.device) -> Backend:
    return import_module(__name__)


class CpuOps(ReferenceOps):
    """One batch's operations: sequences with one query attend in place, the rest is the
    reference's."""

    def __init__(self, batch: AttentionBatch, caches: list[KVCache]) -> None:
        super().__init__(batch, caches)
        single = batch.query_starts.diff() == 1
        self.prompts = (~single).nonzero().flatten().tolist()
        self.tokens = batch.query_starts[:-1][single]  # where in T each single query is
        self.decode_tables = batch.block_tables[single].numpy()
        self.decode_lengths = batch.context_lens[single].numpy()

    def attend_stored(self, q_TND: Tensor, cache: KVCache, window: int | None) -> Tensor:
        out_TND = torch.empty_like(q_TND)
        for b in self.prompts:
            self.attend_one(b, q_TND, cache, window, out_TND)
        if len(self.tokens):
            q_BND = q_TND[self.tokens].float()
            out_BND, bf16 = torch.empty_like(q_BND), cache.k.dtype == torch.bfloat16
            k, v = (part.view(torch.uint16).numpy() if bf16 else part.numpy() for part in cache)
            tables, lengths = self.decode_tables, self.decode_lengths
            attend_paged(q_BND.numpy(), k, v, tables, lengths, window or 0, out_BND.numpy())
            out_TND[self.tokens] = out_BND.to(q_TND.dtype)
        return out_TND


plan = CpuOps


def pack(weight: Tensor | Groups, bias: Tensor | None, form: Form) -> Product:
    """As the reference's; a bfloat16 weight is put into the order in which oneDNN reads it, once
    instead of in each product: up to twice as fast for few rows."""
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if form.dtype != torch.bfloat16 or not onednn:
        return reference.pack(weight, bias, form)
    dense = rounded(weight, form.quantization, form.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(dense)
    return partial(multiply_packed, weight=packed, bias=bias, form=form)


def multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return reference.finish(y, form)


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
        b, head = item // num_kv_heads, item % num_kv_heads
        queries = q[b, head * group : (head + 1) * group]
        first = max(0, lengths[b] - window) if window > 0 else 0
        weights = np.empty((group, lengths[b] - first), np.float32)
        for position in range(first, lengths[b]):
            key = k_cache[tables[b, position // block_size], head, position % block_size]
            for g in range(group):
                score = np.float32(0)
                for d in range(head_dim):
                    score += queries[g, d] * _float(key[d])
                weights[g, position - first] = score * scale
        for g in range(group):
            weights[g] = np.exp(weights[g] - weights[g].max())
            weights[g] /= weights[g].sum()
        sums = np.zeros((group, head_dim), np.float32)
        for position in range(first, lengths[b]):
            value = v_cache[tables[b, position // block_size], head, position % block_size]
            for g in range(group):
                for d in range(head_dim):
                    sums[g, d] += weights[g, position - first] * _float(value[d])
        out[b, head * group : (head + 1) * group] = sums
