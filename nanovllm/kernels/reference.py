"""All operations in plain torch, for any device: what the other kernels are tested against."""

from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels import Angles, AttentionBatch, Backend, Form, KVCache, Product
from nanovllm.kernels.quantized import Groups, rounded


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Why these kernels cannot be used: there is no reason."""
    return ""


def make(device: torch.device) -> Backend:
    return import_module(__name__)


class ReferenceOps:
    """One batch's operations (see kernels.Ops); attention gathers each sequence's blocks."""

    def __init__(self, batch: AttentionBatch, caches: list[KVCache]) -> None:
        self.caches, device, block_size = caches, caches[0].k.device, caches[0].k.shape[2]
        stored = (batch.slots >= 0).nonzero().squeeze(1)
        blocks, offsets = batch.slots[stored] // block_size, batch.slots[stored] % block_size
        self.stored, self.blocks, self.offsets = (t.to(device) for t in (stored, blocks, offsets))
        self.tables, self.lengths = batch.block_tables.to(device), batch.context_lens.tolist()
        self.starts = batch.query_starts.tolist()

    def attend(
        self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, angles: Angles,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        cache = self.caches[layer]
        q_TND, k_TKD = rotate(q_TND, angles), rotate(k_TKD, angles)
        cache.k[self.blocks, :, self.offsets] = k_TKD[self.stored]
        cache.v[self.blocks, :, self.offsets] = v_TKD[self.stored]
        return self.attend_stored(q_TND, cache, window)

    def attend_stored(self, q_TND: Tensor, cache: KVCache, window: int | None) -> Tensor:
        """Attention of the turned queries, when all keys and values are in the cache."""
        out_TND = torch.empty_like(q_TND)
        for b in range(len(self.lengths)):
            self.attend_one(b, q_TND, cache, window, out_TND)
        return out_TND

    def attend_one(
        self, b: int, q_TND: Tensor, cache: KVCache, window: int | None, out_TND: Tensor
    ) -> None:
        """Attention of one sequence, into its rows of `out`."""
        rows = slice(self.starts[b], self.starts[b + 1])
        out_TND[rows] = attend(q_TND[rows], cache, self.tables[b], self.lengths[b], window)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x_TH: Tensor, residual_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.norm(residual_TH.add_(x_TH), weight, eps)


plan = ReferenceOps


def pack(weight: Tensor | Groups, bias: Tensor | None, form: Form) -> Product:
    """The weight's rounded values, multiplied as any others are."""
    dense = rounded(weight, form.quantization, form.dtype)
    return partial(multiply, weight=dense, bias=bias, form=form)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    return finish(F.linear(x, weight, bias), form)


def finish(y: Tensor, form: Form) -> Tensor:
    """What follows a product."""
    return (silu_mul(y) if form.gated else y).to(form.result)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer, 2020): [T, F]."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def rotate(x_TND: Tensor, angles: Angles) -> Tensor:
    """Queries or keys [T, heads, D]: pairs (x[i], x[i + D/2]), turned by their token's angles."""
    cos_T1D, sin_T1D = (part.unsqueeze(1) for part in angles)
    half = x_TND.shape[-1] // 2
    turned = torch.cat((-x_TND[..., half:], x_TND[..., :half]), dim=-1)
    return x_TND * cos_T1D + turned * sin_T1D


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
