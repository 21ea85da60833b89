"""Kernels in Triton, for GPUs; under TRITON_INTERPRET=1 they run, slowly, on a CPU.

Grids depend on the number of tokens, tiles and splits of a step, never on what is in its tensors,
and everything that kernels read of a batch lies in one tensor, TritonOps.fields. So a CUDA graph
of DecodeOps, whose splits and fields stay as they are, serves all batches up to its size. A padded
row (slot -1, a context of 0) stores nothing and gets zeros.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels import Angles, AttentionBatch, Form, KVCache, Product
from nanovllm.kernels.quantized import Groups, rounded
from nanovllm.kernels.triton import attention, norm

FACTORS = {  # what products are taken of
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip
CHUNK_QUERIES = 32  # of a prefill chunk in a tile
CHUNK_HEADS = 4  # at most
MIN_SPLIT = 256  # keys; fewer are not worth a program and its result
MAX_SPLITS = 64
TILE_BYTES = 16384  # of the keys that a program holds at a time; twice that with their values


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Why these kernels cannot be used, or nothing."""
    on_gpu = device.type == "cuda"
    if not (torch.cuda.is_available() if on_gpu else triton.knobs.runtime.interpret):
        return f"needs a GPU (or TRITON_INTERPRET=1, which is slow), not {device}"
    if dtype not in FACTORS or head_dim % 2 or head_dim > 256:
        return f"needs 16 or 32-bit floats and even heads up to 256, not {dtype} and {head_dim}"
    return ""


class Triton:
    """See kernels.Backend.

    Args:
        num_programs: of attention that keep the device busy.
    """

    def __init__(self, num_programs: int) -> None:
        self.num_programs = num_programs

    def plan(self, batch: AttentionBatch, caches: list[KVCache]) -> "TritonOps":
        return TritonOps(batch, caches, self.num_programs)

    def plan_decodes(self, size: int, width: int, caches: list[KVCache]) -> "DecodeOps":
        """See worker.cuda_graphs.StaticBackend."""
        return DecodeOps(size, width, caches, self.num_programs)

    def pack(self, weight: Tensor | Groups, bias: Tensor | None, form: Form) -> Product:
        dense = rounded(weight, form.quantization, form.dtype)
        return partial(multiply, weight=dense, bias=bias, form=form)


def make(device: torch.device) -> Triton:
    """The backend, with four programs to each multiprocessor of the GPU."""
    if device.type != "cuda":
        return Triton(16)
    return Triton(4 * torch.cuda.get_device_properties(device).multi_processor_count)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    y = F.linear(x, weight, bias)
    return silu_mul(y, form.result) if form.gated else y.to(form.result)


def silu_mul(gate_up_T2F: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) · up (Shazeer, 2020): [T, F]."""
    rows, size = len(gate_up_T2F), gate_up_T2F.shape[1] // 2
    y_TF = gate_up_T2F.new_empty((rows, size), dtype=dtype)
    width = min(1024, triton.next_power_of_2(size))
    norm.silu_mul_kernel[rows, triton.cdiv(size, width)](gate_up_T2F, y_TF, size, width)
    return y_TF


class TritonOps:
    """One batch's operations; see kernels.Ops. Needs q, k, v and x with heads that lie together
    in each token, as a merged product or a norm leaves them.

    Attributes:
        fields: int32 on the device: the parts of the batch and the tiles, one after another.
    """

    def __init__(self, batch: AttentionBatch, caches: list[KVCache], num_programs: int) -> None:
        self.set_shape(caches)
        counts = batch.query_starts.diff()
        decodes, chunks = (counts == 1).nonzero().flatten(), (counts > 1).nonzero().flatten()
        tiles_of = -(-counts[chunks] // CHUNK_QUERIES)
        before = (tiles_of.cumsum(0) - tiles_of).repeat_interleave(tiles_of)
        firsts = (torch.arange(len(before)) - before) * CHUNK_QUERIES
        groups = (1, decodes, torch.zeros_like(decodes)), (
            CHUNK_QUERIES, chunks.repeat_interleave(tiles_of), firsts,
        )  # fmt: skip
        parts, self.launches = list(batch), []
        for queries, sequences, first in groups:
            if len(sequences):
                lengths = batch.context_lens[sequences]
                wanted = num_programs // self.num_kv_heads
                num_splits, keys = split(lengths, wanted, self.keys)
                parts.append(torch.stack((sequences, first, torch.full_like(first, keys)), dim=1))
                self.launches.append((queries, num_splits))
        self.fields, views = to_device(parts, caches[0].k.device)
        self.starts, self.lengths, self.tables, self.slots = views[:4]
        self.tiles = views[4:]

    def set_shape(self, caches: list[KVCache]) -> None:
        """What is the same for all batches."""
        self.caches = caches
        self.num_kv_heads, self.block_size, self.head_dim = caches[0].k.shape[1:]
        self.dim = max(16, triton.next_power_of_2(self.head_dim))
        key_bytes = self.dim * caches[0].k.element_size()
        self.keys = max(16, min(128, TILE_BYTES // key_bytes))
        self.factor = FACTORS[caches[0].k.dtype]
        if triton.knobs.runtime.interpret:  # it multiplies the bits of a bfloat16
            self.factor = tl.float32

    def attend(
        self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, angles: Angles,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        cache, (cos, sin), shape = self.caches[layer], angles, q_TND.shape
        heads, group = self.num_kv_heads, shape[1] // self.num_kv_heads
        turned, out = (torch.empty(shape, dtype=q_TND.dtype, device=q_TND.device) for _ in "12")
        attention.store_kernel[shape[0], heads](
            q_TND, k_TKD, v_TKD, cos, sin, self.slots, turned, *cache,
            q_TND.stride(0), k_TKD.stride(0), v_TKD.stride(0),
            heads, group, self.head_dim, self.block_size,
            triton.next_power_of_2(group), triton.next_power_of_2(self.head_dim // 2),
            num_warps=1 if group <= 8 else 4,
        )  # fmt: skip
        for (queries, num_splits), tiles in zip(self.launches, self.tiles, strict=True):
            together = triton.next_power_of_2(group)  # heads in a tile
            together = max(16, together) if queries == 1 else min(CHUNK_HEADS, together)
            rows, parts = queries * together, -(-group // together)
            partial = sums = out
            if num_splits > 1:
                results = len(tiles), heads * parts, num_splits, rows
                partial = out.new_empty((*results, self.head_dim), dtype=torch.float32)
                sums = out.new_empty(results, dtype=torch.float32)
            warps = 8 if rows * self.dim > 64 * 128 else 4
            attention.attend_kernel[len(tiles), heads * parts, num_splits](
                turned, *cache, tiles, self.starts, self.lengths, self.tables, out, partial, sums,
                self.tables.shape[1], window or 2**31 - 1,
                attention.LOG2_E / self.head_dim**0.5,
                heads, group, self.head_dim, self.block_size, self.dim,
                queries, together, self.keys, num_splits, self.factor, num_warps=warps,
            )  # fmt: skip
            if num_splits > 1:
                attention.combine_kernel[len(tiles), heads * parts](
                    tiles, self.starts, out, partial, sums,
                    heads, group, self.head_dim, self.dim, queries, together, num_splits,
                    num_warps=warps,
                )  # fmt: skip
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        heads, size = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        width, num_rows = triton.next_power_of_2(size), x.shape[0] * heads
        rows = max(1, 1024 // width)
        norm.norm_kernel[triton.cdiv(num_rows, rows),](
            x, weight, y, num_rows, x.stride(0), eps, heads, size, rows, width
        )
        return y

    def add_norm(self, x_TH: Tensor, residual_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, size = torch.empty_like(x_TH), x_TH.shape[1]
        norm.add_norm_kernel[len(x_TH),](
            x_TH, residual_TH, weight, y, eps, size, triton.next_power_of_2(size)
        )
        return y


class DecodeOps(TritonOps):
    """Operations on up to `size` sequences with one token each, in fields that stay where they are.

    Splits are as many as keep the device busy if all contexts are long; those past the end of one
    find nothing to do.
    """

    def __init__(self, size: int, width: int, caches: list[KVCache], num_programs: int) -> None:
        self.set_shape(caches)
        wanted = -(-num_programs // (self.num_kv_heads * size))
        useful = max(1, width * self.block_size // MIN_SPLIT)
        num_splits = min(MAX_SPLITS, triton.next_power_of_2(min(wanted, useful)))
        self.launches, rows = [(1, num_splits)], torch.arange(size)
        self.host = torch.zeros_like(rows), torch.full_like(rows, -1), torch.zeros(size, 3).long()
        self.host[2][:, 0] = rows
        tables = torch.zeros(size, width, dtype=torch.int64)
        parts = [*self.host, torch.arange(size + 1), tables]
        self.fields, views = to_device(parts, caches[0].k.device)
        self.lengths, self.slots, tiles, self.starts, self.tables = views
        self.tiles = [tiles]

    def fill(self, batch: AttentionBatch) -> None:
        """Copy a batch to where the kernels read it; rows that it lacks are empty."""
        num_seqs, width = batch.block_tables.shape
        (lengths, slots, tiles), (_, num_splits) = self.host, self.launches[0]
        lengths[:num_seqs], lengths[num_seqs:] = batch.context_lens, 0
        slots[:num_seqs], slots[num_seqs:] = batch.slots, -1
        tiles[:, 2] = -(-int(lengths.max()) // (num_splits * self.keys)) * self.keys
        changed, _ = to_device([*self.host], self.fields.device)  # in pinned memory of its own
        self.fields[: len(changed)] = changed
        _, (tables,) = to_device([batch.block_tables], self.fields.device)
        self.tables[:num_seqs, :width] = tables


def split(lengths: Tensor, wanted: int, step: int) -> tuple[int, int]:
    """How to divide contexts so that as many programs as are wanted have about as much to read.

    Args:
        lengths: of each tile's context. step: that splits are multiples of.

    Returns:
        Splits that each tile gets, a power of two, and the keys of one: short contexts end in an
        early split, and the programs of the later ones at once.
    """
    fair = max(MIN_SPLIT, -(-int(lengths.sum()) // max(1, wanted)))
    longest = int(lengths.max())
    num_splits = min(MAX_SPLITS, triton.next_power_of_2(max(1, -(-longest // fair))))
    return num_splits, -(-longest // (num_splits * step)) * step


def to_device(parts: list[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """All parts in one tensor, as int32, and where each is in it: from a multiple of 16 bytes,
    which lets kernels load much at a time."""
    starts, total = [], 0
    for part in parts:
        starts.append(total)
        total += -(-part.numel() // 4) * 4
    host = torch.empty(total, dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, part in zip(starts, parts, strict=True):
        host[start : start + part.numel()] = part.flatten()
    fields = host.to(device, non_blocking=True)
    views = [
        fields[start : start + part.numel()].view(part.shape)
        for start, part in zip(starts, parts, strict=True)
    ]
    return fields, views
