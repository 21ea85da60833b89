"""Products, whole and merged, and those that a backend puts in their place."""

import torch

from nanovllm.layers.linear import GatedLinear, Linear, MergedLinear


def filled(layer: Linear) -> Linear:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer.requires_grad_(False)


def test_a_merged_product_is_that_of_each_part() -> None:
    merged = filled(MergedLinear(8, {"q_proj": 4, "k_proj": 2}, bias=True))
    views = merged.checkpoint_views()
    x = torch.randn(3, 8)
    for name, y in zip(("q_proj", "k_proj"), merged(x).split([4, 2], dim=1), strict=True):
        expected = x @ views[f"{name}.weight"].T + views[f"{name}.bias"]
        torch.testing.assert_close(y, expected)


def test_a_tensor_of_the_checkpoint_goes_to_its_rows() -> None:
    merged = filled(MergedLinear(2, {"gate_proj": 1, "up_proj": 2}))
    merged.checkpoint_views()["up_proj.weight"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert merged.weight[1:].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_gated_product_is_silu_of_the_gate_times_the_rest() -> None:
    gated = filled(GatedLinear(8, {"gate_proj": 3, "up_proj": 3}, bias=True))
    x = torch.randn(2, 8)
    gate, up = (x @ gated.weight.T + gated.bias).split(3, dim=1)
    torch.testing.assert_close(gated(x), gate * gate.sigmoid() * up)


def test_a_product_that_is_set_takes_the_place_of_the_weight() -> None:
    layer = filled(Linear(2, 2, bias=True))
    layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    layer.product = lambda x: 3 * x
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[3.0, 6.0]]
