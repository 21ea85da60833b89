"""The rotary embedding at the sizes of real models, and the lengths that its scaling allows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanovllm.errors import ModelLoadError
from nanovllm.kernels.reference import rotate
from nanovllm.layers.rope import Rope
from nanovllm.models.config import ModelConfig


def make_rope(
    scaling: dict[str, Any],
    *,
    head_dim: int = 128,
    theta: float = 1e4,
    max_positions: int,
    original_positions: int,
) -> Rope:
    return Rope(head_dim, theta, scaling, max_positions, original_positions)


def transformers_table(
    scaling: dict[str, Any], positions: Tensor, *, head_dim: int, theta: float, original: int
) -> tuple[Tensor, Tensor]:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=original,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return cos[0], sin[0]


LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_2_5_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
DEEPSEEK_YARN = QWEN_2_5_YARN | {"mscale": 0.707, "mscale_all_dim": 0.5, "beta_fast": 16}


@pytest.mark.parametrize(
    ("scaling", "head_dim", "theta", "original"),
    [
        ({"rope_type": "default"}, 64, 1e5, 8192),
        ({"rope_type": "linear", "factor": 2.5}, 64, 1e4, 4096),
        (LLAMA_3_1, 128, 5e5, 131072),
        (QWEN_2_5_YARN, 128, 1e6, 32768),
        (QWEN_2_5_YARN | {"truncate": False}, 128, 1e6, 32768),
        (DEEPSEEK_YARN, 64, 1e4, 131072),
    ],
)
def test_tables_are_those_of_transformers(
    scaling: dict[str, Any], head_dim: int, theta: float, original: int
) -> None:
    ours = make_rope(
        scaling,
        head_dim=head_dim,
        theta=theta,
        max_positions=40_000,
        original_positions=original,
    )
    positions = torch.arange(0, 40_000, 7)
    theirs = transformers_table(
        scaling, positions, head_dim=head_dim, theta=theta, original=original
    )
    for table, expected in zip(ours.select(positions), theirs, strict=True):
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("position", [0, 4095, 4096, 5000, 8191])
def test_a_row_of_the_dynamic_kind_is_for_the_length_that_ends_there(position: int) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    ours = make_rope(scaling, head_dim=64, max_positions=8192, original_positions=4096)
    positions = torch.tensor([position])
    theirs = transformers_table(scaling, positions, head_dim=64, theta=1e4, original=4096)
    for table, expected in zip(ours.select(positions), theirs, strict=True):
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


def test_rotate_turns_each_pair_by_its_angle() -> None:
    rope = make_rope(
        {"rope_type": "default"}, head_dim=4, theta=100.0, max_positions=4, original_positions=4
    )
    x = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])  # pairs (x0, x2) and (x1, x3)
    turned = rotate(x, rope.select(torch.tensor([3])))
    # 3 positions of 1 radian and of 1/10: their cosines, then their sines
    expected = torch.tensor([[[-0.9899925, 0.9553365, 0.1411200, 0.2955202]]])
    torch.testing.assert_close(turned, expected)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ModelLoadError, match="rope_type 'longrope' is not supported; these are: d"):
        make_rope({"rope_type": "longrope"}, max_positions=8, original_positions=8)


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ModelLoadError, match="rope_type 'llama3' needs 'low_freq_factor'"):
        make_rope({"rope_type": "llama3", "factor": 8.0}, max_positions=8, original_positions=8)


def test_a_parameter_that_is_no_number_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="rope_type 'linear'"):
        make_rope({"rope_type": "linear", "factor": "4"}, max_positions=8, original_positions=8)


RAW = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 4096),
        ({"rope_scaling": None}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 10240),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 16384),
        ({"rope_parameters": LLAMA_3_1, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 16384),
        ({"rope_parameters": QWEN_2_5_YARN, "max_position_embeddings": 32768}, 131072),
        ({"rope_parameters": QWEN_2_5_YARN, "max_position_embeddings": 131072}, 131072),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 1024}},
            4096,
        ),
    ],
)
def test_max_model_len_is_the_trained_length_stretched(
    fields: dict[str, Any], expected: int
) -> None:
    assert ModelConfig.from_hf(RAW | fields, {}).max_model_len == expected


def test_theta_inside_the_rope_parameters_comes_first() -> None:
    raw = RAW | {"rope_theta": 10.0, "rope_parameters": {"rope_theta": 500.0}}
    assert ModelConfig.from_hf(raw, {}).rope_theta == 500.0
    assert ModelConfig.from_hf(RAW | {"rope_theta": 10.0}, {}).rope_theta == 10.0
    assert ModelConfig.from_hf(RAW, {}).rope_theta == 10_000.0
