"""Kernels in C++ for CPUs that multiply bfloat16 and bytes (AVX-512 with BF16 and VNNI), compiled
when first used and kept in the cache.

The sources beside this file are read in this order: tile.h, linear.cpp, attention.cpp, norm.cpp.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_long, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import Angles, AttentionBatch, Form, KVCache, Product, reference
from nanovllm.kernels.native.build import CompileError, compiler, cpu_flags, library
from nanovllm.kernels.quantized import Groups, to_channels, to_groups

NEEDED_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni"}
COLUMNS = 32  # of W in a panel
FEW_ROWS = 64  # whose results have a place of their own
SIGNATURES = {
    "linear": [*[c_void_p] * 3, c_long],
    "attention": [*[c_void_p, c_long] * 3, *[c_void_p] * 6, c_long, *[c_void_p] * 3, *[c_long] * 6],
    "norm": [c_void_p, c_long, c_void_p, c_float, c_void_p, *[c_long] * 3],
    "add_norm": [*[c_void_p] * 3, c_float, c_void_p, c_long, c_long],
}


def missing_flags() -> set[str]:
    """What this CPU cannot do, but these kernels need."""
    return NEEDED_FLAGS - cpu_flags()


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Why these kernels cannot be used, or nothing."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"computes in bfloat16 on a CPU, not in {dtype} on {device}"
    if head_dim % 32 or block_size % 16:
        return f"needs heads of 32·n and blocks of 16·n, not {head_dim} and {block_size}"
    if missing := missing_flags():
        return f"this CPU lacks {', '.join(sorted(missing))}"
    if not compiler():
        return "needs a C++ compiler: install g++, or set CXX"
    try:
        functions()
    except (OSError, CompileError) as error:
        return f"cannot be compiled ({error}); NANOVLLM_CACHE sets where, CXX by what"
    return ""


@cache
def functions() -> ctypes.CDLL:
    """The compiled kernels; a second call costs nothing."""
    found = ctypes.CDLL(str(library()))
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


class Native:
    """See kernels.Backend."""

    def __init__(self) -> None:
        self.kernels = functions()

    def plan(self, batch: AttentionBatch, caches: list[KVCache]) -> "NativeOps":
        return NativeOps(self.kernels, batch, caches)

    def pack(self, weight: Tensor | Groups, bias: Tensor | None, form: Form) -> Product:
        columns, size = weight.shape
        grouped, kind = isinstance(weight, Groups), form.quantization
        whole = size % 32 == 0 if grouped or kind else size % 2 == 0
        if not whole or (form.gated and columns % COLUMNS):
            return reference.pack(weight, bias, form)
        if form.gated:
            order = torch.arange(columns).view(2, -1, 16).transpose(0, 1).flatten()
            weight = weight.take(order) if isinstance(weight, Groups) else weight[order]
            bias = None if bias is None else bias[order]
        described = Described(columns=columns, size=size)
        if isinstance(weight, Groups) or kind == "int4":
            described.kind = 5 if isinstance(weight, Groups) and weight.bits == 8 else 4
            arrays = in_slices(pack_groups, weight)
        elif kind == "int8":
            described.kind, described.group = 8, 64 if size % 64 == 0 else 32
            arrays = in_slices(pack_int8, weight)
        else:
            described.kind, arrays = 16, in_slices(pack_bf16, weight)
        return Panels(self.kernels.linear, described, arrays, bias, form)


class Described(ctypes.Structure):
    """A product as linear.cpp takes it; see Product there."""

    _fields_ = (
        *((name, c_long) for name in ("kind", "columns", "size", "is_float", "gated", "group")),
        *((name, c_void_p) for name in ("weights", "scales", "bias")),
    )


class Panels:
    """A product with weights in panels of 32 columns.

    Its result for few rows is always in the same place, so it holds until the next call: making a
    tensor takes as long as the product of one row with a small matrix.

    Args:
        arrays: the weights in panels, and the scales of their columns if they have any.
    """

    def __init__(
        self, function: Any, described: Described, arrays: list[Tensor], bias: Tensor | None,
        form: Form,
    ) -> None:  # fmt: skip
        self.function, self.described, self.dtype = function, described, form.result
        bias = None if bias is None else panels(bias)
        self.kept = arrays, bias  # the pointers are into these
        described.weights = arrays[0].data_ptr()
        described.scales = arrays[1].data_ptr() if len(arrays) > 1 else None
        described.bias = None if bias is None else bias.data_ptr()
        described.is_float, described.gated = form.result == torch.float32, form.gated
        self.pointer = ctypes.addressof(described)
        self.width = described.columns // 2 if form.gated else described.columns
        self.place = torch.empty((FEW_ROWS, self.width), dtype=self.dtype)
        self.results: dict[int, Tensor] = {}  # rows -> the place of so many

    def __call__(self, x: Tensor) -> Tensor:
        x, rows = x.contiguous(), len(x)
        y = self.results.get(rows)
        if y is None:
            few = rows <= FEW_ROWS
            y = self.place[:rows] if few else torch.empty((rows, self.width), dtype=self.dtype)
            if few:
                self.results[rows] = y
        self.function(self.pointer, x.data_ptr(), y.data_ptr(), rows)
        return y


def panels(array: Tensor) -> Tensor:
    """[N, ...] as [panels, 32, ...], with rows of zeros to fill the last."""
    rows = torch.zeros((-len(array) % COLUMNS, *array.shape[1:]), dtype=array.dtype)
    whole: Tensor = torch.cat((array, rows)).unflatten(0, (-1, COLUMNS))
    return whole


def in_slices(form: Callable[[Any], list[Tensor]], weight: Tensor | Groups) -> list[Tensor]:
    """What `form` makes of the weight, some rows at a time: its temporaries stay small."""
    rows = 64 * COLUMNS
    if isinstance(weight, Groups):
        parts = zip(*(part.split(rows) for part in weight.arrays), strict=True)
        slices: Any = [Groups(weight.bits, *part) for part in parts]
    else:
        slices = weight.split(rows)
    return [torch.cat(arrays) for arrays in zip(*map(form, slices), strict=True)]


def pack_bf16(weight: Tensor) -> list[Tensor]:
    """[panels, C / 2, 32, 2]."""
    return [panels(weight).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()]


def pack_int8(weight: Tensor) -> list[Tensor]:
    """[panels, C / 4, 32, 4] as q + 128, and the scales of the columns."""
    q, scales = to_channels(weight)
    unsigned = panels(q.view(torch.uint8) ^ 128).unflatten(2, (-1, 4))
    return [unsigned.transpose(1, 2).contiguous(), panels(scales)]


def pack_groups(weight: Tensor | Groups) -> list[Tensor]:
    """[panels, G, bytes]: a plane for each 4 bits, the scales, the minima (see linear.cpp)."""
    groups = to_groups(weight, 4) if isinstance(weight, Tensor) else weight
    planes = [groups.q] if groups.bits == 4 else [groups.q >> 4, groups.q & 15]
    parts = []
    for plane in planes:
        low, high = panels(plane).unflatten(1, (2, 16)).unflatten(3, (-1, 16, 2)).unbind(1)
        bytes_ = low | high << 4  # [panels, 16 columns, G, 16 pairs, 2]
        parts.append(bytes_.permute(0, 2, 3, 1, 4).flatten(2))
    for halves in (groups.scale, groups.minimum):
        lines = panels(halves).transpose(1, 2).contiguous()  # [panels, G, 32]
        parts.append(lines.view(torch.uint8))
    return [torch.cat(parts, dim=2)]


class NativeOps:
    """One batch's operations; see kernels.Ops."""

    def __init__(self, kernels: ctypes.CDLL, batch: AttentionBatch, caches: list[KVCache]) -> None:
        self.kernels, self.caches = kernels, caches
        batch = AttentionBatch(*(part.contiguous() for part in batch))
        self.batch = batch  # holds the memory that the pointers mean
        slots, starts = batch.slots.data_ptr(), batch.query_starts.data_ptr()
        lengths, tables = batch.context_lens.data_ptr(), batch.block_tables.data_ptr()
        self.places = slots, starts, lengths, tables, batch.block_tables.shape[1]
        self.num_seqs = len(batch.context_lens)

    def attend(
        self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, angles: Angles,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        (k_cache, v_cache), (cos, sin) = self.caches[layer], angles
        num_heads, head_dim = q_TND.shape[1:]
        out = torch.empty(q_TND.shape, dtype=q_TND.dtype)
        self.kernels.attention(
            q_TND.data_ptr(), q_TND.stride(0), k_TKD.data_ptr(), k_TKD.stride(0),
            v_TKD.data_ptr(), v_TKD.stride(0), cos.data_ptr(), sin.data_ptr(), *self.places,
            k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), self.num_seqs, num_heads,
            k_cache.shape[1], head_dim, k_cache.shape[2], window or 0,
        )  # fmt: skip
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        heads = x if x.dim() == 3 else x[:, None]
        y = torch.empty(heads.shape, dtype=x.dtype)
        self.kernels.norm(
            x.data_ptr(), heads.stride(0), weight.data_ptr(), eps, y.data_ptr(), *heads.shape
        )
        return y.view(x.shape)

    def add_norm(self, x_TH: Tensor, residual_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x_TH)
        self.kernels.add_norm(
            x_TH.data_ptr(), residual_TH.data_ptr(), weight.data_ptr(), eps, y.data_ptr(),
            *x_TH.shape,
        )  # fmt: skip
        return y
