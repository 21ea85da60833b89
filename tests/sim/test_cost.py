"""The roofline, by hand."""

import json

import pytest

from nanovllm.errors import ConfigError
from nanovllm.sim.cost import Calibration, Roofline, Work, num_blocks_in
from nanovllm.sim.hardware import HARDWARE, Hardware, find_hardware
from nanovllm.sim.shape import SHAPES, ModelShape, find_shape

SMALL = ModelShape(2, 8, 16, 2, 1, 4, 10, 100)
SHEET = Calibration(1.0, 1.0, 0.5, 0.25)
DEVICE = Hardware(1e6, 1e6, 1e6, 1e6)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("qwen3-14b", 14.77),
        ("qwen3-32b", 32.76),
        ("qwen3-30b-a3b", 30.53),
        ("smollm2-135m", 0.1345),
    ],
)
def test_presets_have_the_weights_that_their_names_say(name, billions):
    assert SHAPES[name].num_weights / 1e9 == pytest.approx(billions, rel=2e-3)


def test_kv_bytes_of_llama_8b():
    assert SHAPES["llama-3.1-8b"].kv_bytes == 131_072


def test_a_step_of_two_decodes_waits_for_the_memory():
    # a layer: 8 x (2 x 3 heads x 4) + 3 x 8 x 16 = 576 weights; the head has 80
    # weights (2 x 576 + 80) x 2 bytes = 2,464; a token's KV 2 x 2 x 4 x 2 = 32 bytes
    # FLOPs: 2 x 2 x (1,152 + 80) + 30 pairs x 4 x 2 x 8 = 6,848: longer than the weights take
    seconds = Roofline(DEVICE, SMALL, 1, SHEET).step_s(Work(2, 2, 2, 30, 30))
    assert seconds == pytest.approx(0.5 + 2 * 0.25 + 6848e-6 + 30 * 32e-6)
    faster = Hardware(1e9, 1e6, 1e6, 1e6)
    seconds = Roofline(faster, SMALL, 1, SHEET).step_s(Work(2, 2, 2, 30, 30))
    assert seconds == pytest.approx(0.5 + 2 * 0.25 + 2464e-6 + 30 * 32e-6)


def test_two_devices_halve_the_weights_and_talk():
    # the one KV head is on both; 4 all-reduces of 8 x 2 bytes x 2 tokens, and 10 us each
    seconds = Roofline(Hardware(1e9, 1e6, 1e6, 1e6), SMALL, 2, SHEET).step_s(Work(2, 2, 2, 30, 30))
    talk = 4 * (10e-6 + 2 * 8 * 2 * 2 * (1 / 2) * 1e-6)
    assert seconds == pytest.approx(0.5 + 2 * 0.25 + 1232e-6 + 30 * 32e-6 + talk)


def test_experts_are_read_when_a_token_chooses_them():
    moe = SHAPES["qwen3-30b-a3b"]
    one = Roofline(HARDWARE["h100"], moe)._weights_read(1)
    active = moe.num_layers * (moe.shared_weights + 8 * moe.mlp_weights) + moe.head_weights
    assert one == pytest.approx(active)
    assert Roofline(HARDWARE["h100"], moe)._weights_read(4096) == pytest.approx(
        moe.num_weights - moe.head_weights
    )


def test_blocks_beside_the_weights():
    """vLLM found room for 2,588 blocks."""
    blocks = num_blocks_in(HARDWARE["rtx4090"], SHAPES["llama-3.1-8b"], 16, 2048)
    assert blocks == pytest.approx(2588, rel=0.01)


def test_what_is_impossible_is_refused():
    with pytest.raises(ConfigError, match="take larger devices or more"):
        num_blocks_in(HARDWARE["rtx4090"], SHAPES["llama-3.1-70b"], 16, 2048)
    with pytest.raises(ConfigError, match="must divide the model's 32 heads"):
        Roofline(HARDWARE["h100"], SHAPES["llama-3.1-8b"], 3)
    with pytest.raises(ConfigError, match="choose one of rtx4090"):
        find_hardware("abacus")
    with pytest.raises(ConfigError, match="flops"):
        Hardware(-1.0, 1e6, 1e6, 1e6)
    with pytest.raises(ConfigError, match=r"name a config\.json"):
        find_shape("nothing")


def test_a_shape_from_a_config_json(tmp_path):
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 99,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 100,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = ModelShape(2, 8, 16, 2, 1, 4, 10, 100, False, 4, 2)
    assert find_shape(str(tmp_path)) == find_shape(str(tmp_path / "config.json")) == expected
    del config["num_experts_per_tok"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        find_shape(str(tmp_path))
