"""Norms, activations and products: the native kernels equal the reference in float32, up to the
rounding of their bfloat16 results; quantized products equal their weights dequantized."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels import AttentionBatch, Form, KVCache, Ops, native, reference
from nanovllm.kernels import cpu as cpu_backend
from nanovllm.kernels.quantized import Groups, rounded, to_channels, to_groups
from tests.kernels.test_attention import needs_native

BF16, F32 = torch.bfloat16, torch.float32
ONE = torch.tensor([0, 1])
BATCH = AttentionBatch(ONE, ONE[1:], ONE[None], ONE[:1])
SIZES = st.sampled_from([1, 2, 16, 31, 64, 100])
ROWS = st.sampled_from([1, 2, 5, 6, 7, 12, 13, 24, 25, 97, 200])


def ops(backend: object, dtype: torch.dtype) -> Ops:
    cache = KVCache(torch.zeros(1, 1, 16, 32, dtype=dtype), torch.zeros(1, 1, 16, 32, dtype=dtype))
    return backend.plan(BATCH, [cache])  # type: ignore[attr-defined, no-any-return]


def random(*shape: int, scale: float = 1) -> Tensor:
    return (torch.randn(shape) * scale).to(BF16)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=1e-3)


@needs_native
@settings(max_examples=40, deadline=None)
@given(rows=ROWS, size=SIZES, scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_the_native_norms_are_the_reference(rows: int, size: int, scale: float) -> None:
    x, residual, weight = random(rows, size, scale=scale), random(rows, size), random(size)
    expected = ops(reference, F32).norm(x.float(), weight.float(), 1e-5)
    assert_near(ops(native, BF16).norm(x, weight, 1e-5), expected)
    total = (x.float() + residual.float()).to(BF16)
    expected = ops(reference, F32).norm(total.float(), weight.float(), 1e-5)
    assert_near(ops(native, BF16).add_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, total)


@needs_native
def test_the_native_norm_of_heads_that_lie_between_others() -> None:
    x, weight = random(5, 7, 64)[:, 2:5], random(64)
    expected = ops(reference, F32).norm(x.float(), weight.float(), 1e-5)
    assert_near(ops(native, BF16).norm(x, weight, 1e-5), expected)


SHAPES = {
    "rows": ROWS,
    "columns": st.sampled_from([1, 31, 32, 40, 96]),
    "size": st.sampled_from([32, 64, 96, 160]),
    "bias": st.booleans(),
    "form": st.builds(
        Form,
        st.just(BF16),
        st.sampled_from([BF16, F32]),
        st.sampled_from([None, "int8", "int4"]),
        st.booleans(),
    ),
}


def in_bytes(x: Tensor) -> Tensor:
    """Each 64 neighbours of a row (32, where 64 do not divide it) rounded to 8 bits."""
    x = x.float().unflatten(1, (-1, 64 if x.shape[1] % 64 == 0 else 32))
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale).nan_to_num(0).flatten(1)


def assert_product(
    actual: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None, form: Form
) -> None:
    """Equal up to the rounding of weights and result to bfloat16."""
    exact = x.float() @ dense.float().T + (0 if bias is None else bias.float())
    limit = 2**-8 * (x.float().abs() @ dense.float().abs().T) + 2**-7 * exact.abs() + 1e-4
    if form.gated:  # the slope of silu is at most 1.1
        limits, halves = limit.chunk(2, -1), exact.chunk(2, -1)
        exact = reference.silu_mul(exact)
        limit = 1.1 * limits[0] * halves[1].abs() + halves[0].abs() * limits[1] + limits[1] ** 2
        limit += 2**-7 * exact.abs() + 1e-4
    assert actual.shape == exact.shape and actual.dtype == form.result
    assert bool(((actual.float() - exact).abs() <= limit).all())


@needs_native
@settings(max_examples=100, deadline=None)
@given(**SHAPES)
@example(rows=0, columns=32, size=32, bias=False, form=Form(BF16, BF16))
@example(rows=8, columns=33, size=64, bias=True, form=Form(BF16, F32, "int4"))
@example(rows=30, columns=64, size=64, bias=True, form=Form(BF16, BF16, "int8", True))
def test_a_native_product_is_that_with_the_rounded_weight(
    rows: int, columns: int, size: int, bias: bool, form: Form
) -> None:
    columns *= 1 + form.gated
    x, weight, added = random(rows, size), random(columns, size), random(columns) if bias else None
    actual = native.pack(weight.clone(), added, form)(x)
    native_form = not form.gated or columns % 32 == 0
    x = in_bytes(x) if form.quantization == "int8" and native_form else x
    dense = rounded(weight, form.quantization, F32 if native_form else BF16)
    assert_product(actual, x, dense, added, form)


@settings(max_examples=30, deadline=None)
@given(**SHAPES)
def test_other_products_are_those_with_the_rounded_weight(
    rows: int, columns: int, size: int, bias: bool, form: Form
) -> None:
    columns *= 1 + form.gated
    x, weight, added = random(rows, size), random(columns, size), random(columns) if bias else None
    for backend in (cpu_backend, reference):
        actual = backend.pack(weight.clone(), added, form)(x)
        assert_product(actual, x, rounded(weight, form.quantization, BF16), added, form)


@needs_native
@pytest.mark.parametrize(("size", "kind"), [(3, None), (34, "int4"), (34, "int8"), (31, "int8")])
def test_sizes_that_the_native_products_cannot_do(size: int, kind: str | None) -> None:
    x, weight, form = random(5, size), random(40, size), Form(BF16, BF16, kind)
    actual = native.pack(weight.clone(), None, form)(x)
    assert_product(actual, x, rounded(weight, kind, BF16), None, form)


@needs_native
@settings(max_examples=30, deadline=None)
@given(rows=ROWS, size=st.sampled_from([32, 96]), bits=st.sampled_from([4, 8]))
def test_a_product_from_groups_is_that_with_their_numbers(rows: int, size: int, bits: int) -> None:
    q = torch.randint(0, 2**bits, (40, size), dtype=torch.uint8)
    scale, minimum = torch.rand(40, size // 32).half() / 2**bits, -torch.rand(40, size // 32).half()
    groups, x = Groups(bits, q, scale, minimum), random(rows, size)
    product = native.pack(groups, None, Form(BF16, F32, "gguf"))
    expected = x.float() @ groups.dequantize().T
    torch.testing.assert_close(product(x), expected, rtol=0, atol=0.02 * size**0.5)


def test_groups_written_out() -> None:
    weight = torch.cat((torch.arange(32.0) - 3, torch.full((32,), 5.0)))[None]
    groups = to_groups(weight, 4)
    assert groups.scale.tolist() == [[pytest.approx(31 / 15, rel=1e-3), 0]]
    assert groups.minimum.tolist() == [[-3, 5]]
    assert groups.q[0, :32].tolist() == [round(i * 15 / 31) for i in range(32)]
    assert groups.dequantize()[0, 32:].tolist() == [5] * 32
    assert groups.dequantize()[0, 31].item() == pytest.approx(28, abs=0.01)


def test_channels_written_out() -> None:
    q, scale = to_channels(torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, -64, 32], [0, 0, 0]]
    assert scale.tolist() == [pytest.approx(1 / 127), 0]
