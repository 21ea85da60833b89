"""What happens between the products besides attention: norms, and the gate of the MLP."""

import triton
import triton.language as tl
from triton.language import constexpr, tensor


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    x: tensor, weight: tensor, y: tensor, num_rows: tensor, stride: tensor, eps: tensor,
    HEADS: constexpr, SIZE: constexpr, ROWS: constexpr, WIDTH: constexpr,
) -> None:  # fmt: skip
    """Program i: the norm of ROWS rows of SIZE.

    Args:
        x: [tokens, HEADS, SIZE], tokens a stride apart. y: the same without gaps.
        num_rows: tokens · HEADS.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    source = row // HEADS * stride + row % HEADS * SIZE
    values = tl.load(x + source[:, None] + column[None, :], mask, 0).to(tl.float32)
    scales = tl.load(weight + column, column < SIZE, 0).to(tl.float32)
    size = tl.rsqrt(tl.sum(values * values, 1) / SIZE + eps)
    normed = values * size[:, None] * scales[None, :]
    tl.store(y + row[:, None] * SIZE + column[None, :], normed.to(y.dtype.element_ty), mask)


@triton.jit
def add_norm_kernel(
    x: tensor, residual: tensor, weight: tensor, y: tensor, eps: tensor,
    SIZE: constexpr, WIDTH: constexpr,
) -> None:  # fmt: skip
    """Program i: add row i of x [rows, SIZE] to the residual, and the norm of the sum, as it was
    rounded, to y."""
    column = tl.arange(0, WIDTH)
    place, mask = tl.program_id(0).to(tl.int64) * SIZE + column, column < SIZE
    added = tl.load(x + place, mask, 0).to(tl.float32)
    total = (tl.load(residual + place, mask, 0).to(tl.float32) + added).to(x.dtype.element_ty)
    tl.store(residual + place, total, mask)
    values = total.to(tl.float32)
    scales = tl.load(weight + column, mask, 0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps) * scales
    tl.store(y + place, normed.to(y.dtype.element_ty), mask)


@triton.jit
def silu_mul_kernel(gate_up: tensor, y: tensor, SIZE: constexpr, WIDTH: constexpr) -> None:
    """Program (i, j): WIDTH columns of row i of silu(gate) · up, from [rows, 2 · SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = column < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + column, mask, 0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + column, mask, 0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(y + row * SIZE + column, product.to(y.dtype.element_ty), mask)
