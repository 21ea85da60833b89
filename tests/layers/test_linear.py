"""Products, whole and merged, packed and not."""

import pytest
import torch

from nanovllm.layers.linear import Linear, MergedLinear


def filled(layer: Linear) -> Linear:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer.requires_grad_(False)


def test_a_merged_product_is_that_of_each_part() -> None:
    merged = filled(MergedLinear(8, {"q_proj": 4, "k_proj": 2}, bias=True))
    views = merged.checkpoint_views()
    x = torch.randn(3, 8)
    for name, y in zip(("q_proj", "k_proj"), merged(x), strict=True):
        expected = x @ views[f"{name}.weight"].T + views[f"{name}.bias"]
        torch.testing.assert_close(y, expected)


def test_a_tensor_of_the_checkpoint_goes_to_its_rows() -> None:
    merged = filled(MergedLinear(2, {"gate_proj": 1, "up_proj": 2}))
    merged.checkpoint_views()["up_proj.weight"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert merged.weight[1:].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 products in oneDNN",
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 65])
def test_packed_weights_give_the_same_product(rows: int, bias: bool) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = filled(Linear(96, 40, bias=bias))
        x = torch.randn(rows, 96)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = layer(x)
    layer.pack()
    assert layer.weight.is_mkldnn
    torch.testing.assert_close(layer(x), expected)
