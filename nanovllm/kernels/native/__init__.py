"""Kernels in C++ for CPUs that multiply bfloat16 and bytes (AVX-512 with BF16 and VNNI), compiled
when first used and kept in the cache.

The sources beside this file are read in this order: tile.h, linear.cpp, attention.cpp, norm.cpp.
"""

import ctypes
from ctypes import c_float, c_long, c_void_p
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanovllm.kernels import Angles, AttentionBatch, Backend, Form, KVCache, Product, log
from nanovllm.kernels.native.build import CompileError, cpu_flags, library

if TYPE_CHECKING:
    from nanovllm.kernels.quantized import Groups

NEEDED_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni"}
COLUMNS = 32  # of W in a panel
FEW_ROWS = 64  # whose results have a place of their own
SIGNATURES = {
    "linear": [*[c_void_p] * 3, c_long],
    "attention": [*[c_void_p, c_long] * 3, *[c_void_p] * 6, c_long, *[c_void_p] * 3, *[c_long] * 6],
    "norm": [c_void_p, c_long, c_void_p, c_float, c_void_p, *[c_long] * 3],
    "add_norm": [*[c_void_p] * 3, c_float, c_void_p, c_long, c_long],
}


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Why these kernels cannot be used, or nothing."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"computes in bfloat16 on a CPU, not in {dtype} on {device}"
    if head_dim % 32 or block_size % 16:
        return f"needs heads of 32·n and blocks of 16·n, not {head_dim} and {block_size}"
    if missing := NEEDED_FLAGS - cpu_flags():
        return f"this CPU lacks {', '.join(sorted(missing))}"
    try:
        functions()
    except (OSError, CompileError) as error:
        log.warning("no native kernels: %s", error)  # but there could be
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


def make(device: torch.device) -> Backend:
    return import_module(__name__)


def pack(weight: "Tensor | Groups", bias: Tensor | None, form: Form) -> Product:
    columns, size = weight.shape
    plain = isinstance(weight, Tensor) and form.quantization in (None, "gguf")
    if size % (2 if plain else 32) or (form.gated and columns % COLUMNS):
        from nanovllm.kernels import reference

        return reference.pack(weight, bias, form)
    if form.gated:
        order = torch.arange(columns).view(2, -1, 16).transpose(0, 1).flatten()
        weight, bias = weight[order], None if bias is None else bias[order]
    described = Described(kind=16, columns=columns, size=size)
    arrange: Any = pack_bf16
    if not plain:
        from nanovllm.kernels.native.quantized import describe

        arrange = describe(described, weight, form.quantization)
    # some rows at a time: temporaries stay small
    slices = zip(*map(arrange, weight.split(64 * COLUMNS)), strict=True)
    return Panels(described, [torch.cat(parts) for parts in slices], bias, form)


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
        self, described: Described, arrays: list[Tensor], bias: Tensor | None, form: Form
    ) -> None:
        self.function, self.described, self.dtype = functions().linear, described, form.result
        self.kept = [*arrays, *[None] * (2 - len(arrays)), None if bias is None else panels(bias)]
        pointers = [None if array is None else array.data_ptr() for array in self.kept]
        described.weights, described.scales, described.bias = pointers
        described.is_float, described.gated = form.result == torch.float32, form.gated
        self.pointer = ctypes.addressof(described)
        self.width = described.columns // 2 if form.gated else described.columns
        place = torch.empty((FEW_ROWS, self.width), dtype=self.dtype)
        self.results = [place[:rows] for rows in range(FEW_ROWS + 1)]

    def __call__(self, x: Tensor) -> Tensor:
        x, rows = x.contiguous(), len(x)
        few = rows <= FEW_ROWS
        y = self.results[rows] if few else torch.empty((rows, self.width), dtype=self.dtype)
        self.function(self.pointer, x.data_ptr(), y.data_ptr(), rows)
        return y


def panels(array: Tensor) -> Tensor:
    """[N, ...] as [panels, 32, ...], with rows of zeros to fill the last."""
    rows = torch.zeros((-len(array) % COLUMNS, *array.shape[1:]), dtype=array.dtype)
    whole: Tensor = torch.cat((array, rows)).unflatten(0, (-1, COLUMNS))
    return whole


def pack_bf16(weight: Tensor) -> list[Tensor]:
    """[panels, C / 2, 32, 2]."""
    return [panels(weight).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()]


class NativeOps:
    """One batch's operations; see kernels.Ops."""

    def __init__(self, batch: AttentionBatch, caches: list[KVCache]) -> None:
        self.kernels, self.caches = functions(), caches
        self.batch = [part.contiguous() for part in batch]  # what the pointers point into
        self.places = *(part.data_ptr() for part in self.batch), batch.block_tables.shape[1]
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
        read = x.data_ptr(), heads.stride(0), weight.data_ptr(), eps
        self.kernels.norm(*read, y.data_ptr(), *heads.shape)
        return y.view(x.shape)

    def add_norm(self, x_TH: Tensor, residual_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x_TH)
        read = x_TH.data_ptr(), residual_TH.data_ptr(), weight.data_ptr(), eps
        self.kernels.add_norm(*read, y.data_ptr(), *x_TH.shape)
        return y


plan = NativeOps
