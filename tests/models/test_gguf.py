"""GGUF files, against transformers, the gguf package, and values written out by hand."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.config import EngineConfig
from nanovllm.errors import MissingDependencyError, ModelLoadError
from nanovllm.kernels import reference
from nanovllm.kernels.quantized import Groups
from nanovllm.models.checkpoint import open_tensors, read_config
from nanovllm.models.config import ModelConfig
from nanovllm.models.gguf import convert, gguf_config, gguf_tensors
from nanovllm.models.gguf_tokenizer import gguf_tokenizer
from nanovllm.models.load import load_model
from tests.models.gguf_files import (
    METADATA,
    Array,
    small_gguf,
    small_tensors,
    to_gguf_tensors,
    write_gguf,
)

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
LLAMA, QWEN2, QWEN3, QWEN3MOE = (
    (name, getattr(gguf.MODEL_ARCH, name.upper()))
    for name in ("llama", "qwen2", "qwen3", "qwen3moe")
)
# name of the case -> (model_type, GGUF's architecture, changes to SMALL, metadata of its own)
FAMILIES: dict[str, tuple[str, tuple[str, gguf.MODEL_ARCH], dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", LLAMA, {}, {}),
    "llama, tied": ("llama", LLAMA, {"tie_word_embeddings": True}, {}),
    "llama, biases": ("llama", LLAMA, {"attention_bias": True, "mlp_bias": True}, {}),
    "llama, head_dim": ("llama", LLAMA, {"head_dim": 12}, {"llama.attention.key_length": 12}),
    "mistral": (
        "mistral",
        LLAMA,
        {"sliding_window": 16},
        {"llama.attention.sliding_window": 16},
    ),
    "qwen2": ("qwen2", QWEN2, {}, {}),
    "qwen3": ("qwen3", QWEN3, {"head_dim": 16}, {"qwen3.attention.key_length": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        QWEN3MOE,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
        {
            "qwen3moe.attention.key_length": 16,
            "qwen3moe.expert_count": 4,
            "qwen3moe.expert_used_count": 2,
            "qwen3moe.expert_feed_forward_length": 24,
        },
    ),
}


def save_random(folder: Path, model_type: str, changes: dict[str, Any]) -> None:
    """A small random model as transformers writes it; biases and norms are random too."""
    config = AutoConfig.for_model(model_type, **(SMALL | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The same model twice: a folder of Hugging Face's, and a GGUF file."""
    model_type, (prefix, architecture), changes, metadata = FAMILIES[request.param]
    folder = tmp_path / "hf"
    save_random(folder, model_type, changes)
    config = SMALL | changes
    metadata = metadata | {
        f"{prefix}.context_length": 64,
        f"{prefix}.embedding_length": 32,
        f"{prefix}.feed_forward_length": 48,
        f"{prefix}.block_count": 2,
        f"{prefix}.attention.head_count": 4,
        f"{prefix}.attention.head_count_kv": 2,
        f"{prefix}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{prefix}.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*(f"<{i}>" for i in range(37)), "x", "y", "xy"],
        "tokenizer.ggml.merges": ["x y"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tensors = to_gguf_tensors(load_file(folder / "model.safetensors"), config, architecture)
    return folder, write_gguf(tmp_path / "model.gguf", metadata, tensors, prefix)


def test_tensors_are_those_of_the_hugging_face_checkpoint(pair: tuple[Path, Path]) -> None:
    folder, path = pair
    expected, found = load_file(folder / "model.safetensors"), dict(gguf_tensors(path))
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_config_is_that_of_the_hugging_face_checkpoint(pair: tuple[Path, Path]) -> None:
    expected, found = ModelConfig.from_folder(pair[0]), gguf_config(pair[1])
    for name in (field.name for field in fields(ModelConfig)):
        if name not in ("extra", "rope_scaling", "sliding_window"):
            assert getattr(found, name) == getattr(expected, name), name
    if expected.architecture == "Qwen3MoeForCausalLM":
        for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            assert found.extra[name] == expected.extra[name]
        assert found.extra["num_experts"] == 4
    slides = expected.architecture == "MistralForCausalLM"
    assert found.sliding_window == (16 if slides else None)


def test_transformers_loads_what_convert_writes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = pair
    convert(path, tmp_path / "converted")
    ids = torch.tensor([[3, 9, 1, 30, 12, 7]])
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_gguf_file_is_a_model_for_the_engine(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "model.gguf")
    model = load_model(
        EngineConfig(max_model_len=8),
        read_config(path),
        path,
        reference,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    expected = torch.from_numpy(small_tensors()["token_embd.weight"])
    torch.testing.assert_close(model.logits(torch.eye(8)).T, expected, rtol=0, atol=0)


# Types of tensors


def one_tensor(path: Path, raw: Array, kind: str) -> torch.Tensor:
    """blk.0.ffn_down.weight, read from a file in which it has these bytes."""
    write_gguf(path, METADATA, {"blk.0.ffn_down.weight": (raw, kind)})
    ((name, tensor),) = gguf_tensors(path)
    assert name == "model.layers.0.mlp.down_proj.weight"
    return tensor


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def test_a_block_of_q8_0_is_a_scale_and_32_bytes(tmp_path: Path) -> None:
    block = half(0.5) + np.arange(-16, 16, dtype=np.int8).tobytes()
    tensor = one_tensor(tmp_path / "q8.gguf", np.frombuffer(block, np.uint8)[None], "Q8_0")
    assert tensor.tolist() == [[0.5 * i for i in range(-16, 16)]]


def test_a_block_of_q4_0_is_a_scale_and_halves_of_bytes_less_8(tmp_path: Path) -> None:
    block = half(0.25) + bytes(low | (15 - low) << 4 for low in range(16))
    tensor = one_tensor(tmp_path / "q4.gguf", np.frombuffer(block, np.uint8)[None], "Q4_0")
    low = [0.25 * (i - 8) for i in range(16)]
    assert tensor.tolist() == [low + [0.25 * (15 - i - 8) for i in range(16)]]


def test_a_block_of_q4_1_is_a_scale_a_minimum_and_halves_of_bytes(tmp_path: Path) -> None:
    block = half(0.25) + half(-3) + bytes(low | (15 - low) << 4 for low in range(16))
    tensor = one_tensor(tmp_path / "q4.gguf", np.frombuffer(block, np.uint8)[None], "Q4_1")
    low = [0.25 * i - 3 for i in range(16)]
    assert tensor.tolist() == [low + [0.25 * (15 - i) - 3 for i in range(16)]]


# type -> where its float16 scales are in a block; random bytes there could be infinite
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_quantized_tensors_are_what_the_gguf_package_makes_of_them(
    kind: str, tmp_path: Path
) -> None:
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(1).integers(0, 256, (3, 2 * size), np.uint8)
    for block in raw.reshape(-1, size):
        for at in SCALES.get(kind, (0, 2) if kind.endswith("_1") else (0,)):
            block[at : at + 2] = np.frombuffer(half(0.01 + at / 64), np.uint8)
    tensor = one_tensor(tmp_path / "model.gguf", raw, kind)
    assert tensor.shape == (3, 2 * length)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    torch.testing.assert_close(tensor, torch.from_numpy(expected), rtol=0, atol=0)
    assert tensor.unique().numel() > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_tensors_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = torch.arange(24).reshape(4, 6).to(dtype) / 7
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    raw = expected.view(torch.uint8).numpy()
    tensor = one_tensor(tmp_path / "model.gguf", raw, kind)
    assert tensor.dtype == dtype
    assert torch.equal(tensor, expected)


def test_rows_of_a_quantized_query_are_put_back_in_order(tmp_path: Path) -> None:
    rows = np.arange(8, dtype=np.float32).repeat(32).reshape(8, 32) * 16
    raw = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    path = write_gguf(tmp_path / "model.gguf", METADATA, {"blk.0.attn_q.weight": (raw, "Q8_0")})
    ((name, tensor),) = gguf_tensors(path)
    assert name == "model.layers.0.self_attn.q_proj.weight"
    assert tensor[:, 0].div(16).round().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # 2 heads of 4


def test_an_unsupported_type_names_the_type_and_the_tensor(tmp_path: Path) -> None:
    raw = np.zeros((2, 18), np.uint8)
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, {"blk.0.ffn_up.weight": (raw, "IQ4_NL")})
    with pytest.raises(ModelLoadError, match=r"model\.gguf: tensor blk\.0\.ffn_up\.weight.*IQ4_NL"):
        gguf_tensors(path)


# Blocks that stay as they are


def random_blocks(kind: str, rows: int, seed: int = 0) -> Array:
    """[rows, bytes of 64 weights] of any numbers, with scales and minima that float16 can hold."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, 2, size), np.uint8)
    for at in (0, 2) if kind == "Q4_1" else (0,):
        halves = random.standard_normal((rows, 2, 1)).astype(np.float16)
        blocks[..., at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(rows, -1)


def dense_and_kept(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    dense, kept = dict(gguf_tensors(path)), dict(gguf_tensors(path, keep_groups=True))
    assert list(dense) == list(kept)
    return dense, kept


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_kept_blocks_hold_the_numbers_that_the_gguf_package_reads(
    kind: str, bits: int, tmp_path: Path
) -> None:
    raw = random_blocks(kind, 5)
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, {"blk.0.ffn_down.weight": (raw, kind)})
    ((_, groups),) = gguf_tensors(path, keep_groups=True)
    assert isinstance(groups, Groups)
    assert (groups.bits, groups.shape) == (bits, (5, 64))
    assert groups.q.dtype == torch.uint8 and int(groups.q.max()) < 2**bits
    assert groups.scale.dtype == groups.minimum.dtype == torch.float16
    assert groups.scale.shape == groups.minimum.shape == (5, 2)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert torch.equal(groups.dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_rows_of_kept_queries_and_keys_are_put_back_in_order(kind: str, tmp_path: Path) -> None:
    metadata = METADATA | {"llama.attention.head_count_kv": 1}
    rows = {"q": 8, "k": 4, "v": 4}
    tensors = {
        f"blk.0.attn_{name}.weight": (random_blocks(kind, count, seed=count), kind)
        for name, count in rows.items()
    }
    dense, kept = dense_and_kept(write_gguf(tmp_path / "model.gguf", metadata, tensors))
    for (name, groups), (part, count) in zip(kept.items(), rows.items(), strict=True):
        assert name == f"model.layers.0.self_attn.{part}_proj.weight"
        assert isinstance(groups, Groups) and groups.shape == (count, 64)
        assert torch.equal(groups.dequantize(), dense[name])
        raw = tensors[f"blk.0.attn_{part}.weight"][0]
        in_file = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        order = {"q": [0, 2, 1, 3, 4, 6, 5, 7], "k": [0, 2, 1, 3], "v": [0, 1, 2, 3]}[part]
        assert torch.equal(groups.dequantize(), torch.from_numpy(in_file)[order])


def test_other_kinds_and_stacks_of_experts_become_dense(tmp_path: Path) -> None:
    experts = random_blocks("Q8_0", 6).reshape(2, 3, -1)
    q6 = np.random.default_rng(0).integers(0, 256, (3, 210), np.uint8)
    q6[:, 208:] = np.frombuffer(half(0.01), np.uint8)
    tensors = {
        "token_embd.weight": (random_blocks("Q4_1", 4), "Q4_1"),
        "blk.0.attn_norm.weight": np.ones(64, np.float32),
        "blk.0.ffn_gate_exps.weight": (experts, "Q8_0"),
        "blk.0.ffn_down.weight": (q6, "Q6_K"),
        "blk.0.ffn_up.weight": np.ones((2, 64), np.float16),
    }
    dense, kept = dense_and_kept(write_gguf(tmp_path / "model.gguf", METADATA, tensors))
    assert len(kept) == 6  # two experts
    for name, tensor in dense.items():
        if name == "model.embed_tokens.weight":
            assert isinstance(kept[name], Groups)
        else:
            torch.testing.assert_close(kept[name], tensor, rtol=0, atol=0, msg=name)


# Metadata


def config_of(path: Path, **metadata: Any) -> ModelConfig:
    """The config of the small model with changed metadata; __ stands for a dot."""
    return gguf_config(small_gguf(path, {k.replace("__", "."): v for k, v in metadata.items()}))


def test_quantized_models_run_in_bfloat16(tmp_path: Path) -> None:
    tensors: dict[str, Any] = small_tensors()
    tensors["blk.0.attn_q.weight"] = (np.zeros((8, 34), np.uint8), "Q8_0")
    assert gguf_config(write_gguf(tmp_path / "q.gguf", METADATA, tensors)).dtype == "bfloat16"


def test_a_turn_may_end_with_another_token_than_the_text(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert config_of(path).eos_token_ids == (4,)
    assert config_of(path, tokenizer__ggml__eot_token_id=5).eos_token_ids == (4, 5)
    assert config_of(path, tokenizer__ggml__eot_token_id=4).eos_token_ids == (4,)


def test_linear_scaling_by_its_old_and_its_new_name(tmp_path: Path) -> None:
    path, expected = tmp_path / "model.gguf", {"rope_type": "linear", "factor": 4.0}
    assert config_of(path, llama__rope__scale_linear=4.0).rope_scaling == expected
    new = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    assert config_of(path, **new).rope_scaling == expected


def test_yarn_scaling(tmp_path: Path) -> None:
    assert config_of(
        tmp_path / "model.gguf",
        llama__rope__scaling__type="yarn",
        llama__rope__scaling__factor=4.0,
        llama__rope__scaling__original_context_length=16,
        llama__rope__scaling__yarn_beta_fast=30.0,
        llama__rope__scaling__attn_factor=2.0,
    ).rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 30.0,
        "attention_factor": pytest.approx(2 * 1.1386294361119891),
    }


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path: Path) -> None:
    """The factors are worked out as llama.cpp's converter does it."""
    theta, dim, factor, low, high, original = 500_000.0, 64, 32.0, 1.0, 4.0, 8192
    factors = []
    for frequency in 1 / theta ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(factors)) > 3
    metadata = METADATA | {"llama.attention.key_length": 64, "llama.rope.freq_base": theta}
    tensors = small_tensors() | {
        "blk.0.attn_q.weight": np.zeros((128, 8), np.float32),
        "rope_freqs.weight": np.array(factors, np.float32),
    }
    path = write_gguf(tmp_path / "model.gguf", metadata, tensors)
    assert gguf_config(path).rope_scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in dict(gguf_tensors(path))
    tensors["rope_freqs.weight"][3] = 2
    with pytest.raises(ModelLoadError, match=r"rope_freqs\.weight"):
        gguf_config(write_gguf(path, metadata, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama__rope__dimension_count": 2}, r"llama\.rope\.dimension_count=2"),
        ({"llama__expert_count": 8}, r"llama\.expert_count"),
        ({"split__count": 2}, "llama-gguf-split --merge"),
        ({"llama__attention__head_count": [2, 2]}, r"llama\.attention\.head_count is \[2, 2\]"),
        ({"llama__attention__head_count": 0}, r"llama\.attention\.head_count=0"),
        ({"llama__context_length": "long"}, r"llama\.context_length is 'long'"),
        ({"general__alignment": 0}, r"general\.alignment=0"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        config_of(tmp_path / "model.gguf", **changes)


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    metadata = {key: value for key, value in METADATA.items() if key != "llama.block_count"}
    path = write_gguf(tmp_path / "model.gguf", metadata, small_tensors())
    with pytest.raises(
        ModelLoadError, match=r"model\.gguf: metadata llama\.block_count is missing"
    ):
        gguf_config(path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {}, {}, "gpt-9")
    with pytest.raises(ModelLoadError, match="'gpt-9' is not supported; these are: llama, qwen2"):
        gguf_config(path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    tensors = {"blk.0.ssm_in.weight": np.zeros((2, 2), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", METADATA, tensors)
    with pytest.raises(ModelLoadError, match=r"blk\.0\.ssm_in\.weight"):
        gguf_tensors(path)


def test_heads_that_do_not_divide_the_rows_name_the_tensor(tmp_path: Path) -> None:
    metadata = METADATA | {"llama.attention.head_count": 3}
    path = write_gguf(tmp_path / "model.gguf", metadata, small_tensors())
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_q\.weight is \[8, 8\], which 3 heads"):
        list(gguf_tensors(path))


# Damaged files


def read_all(path: Path) -> None:
    """Everything that is ever read of a file."""
    gguf_config(path)
    gguf_tokenizer(path)
    for _ in gguf_tensors(path):
        pass


def test_a_file_cut_anywhere_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    whole = small_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            gguf_tensors(path)


def test_a_tensor_past_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(
        ModelLoadError, match=r"tensor blk\.0\.ffn_down\.weight ends at byte \d+.*trunc"
    ):
        gguf_config(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_damage_to_a_header_is_more_than_a_load_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(small_gguf(tmp_path / "whole.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 1400))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole)
    message = "damaged.gguf"
    try:
        read_all(path)
    except ModelLoadError as error:
        message = str(error)
    assert "damaged.gguf" in message or "config.json" in message


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"model\.gguf: not a GGUF file"):
        gguf_config(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "model.gguf")
    whole = path.read_bytes()
    for version in (b"\x01\0\0\0", b"\0\0\0\x03"):  # too old; big-endian
        path.write_bytes(whole[:4] + version + whole[8:])
        with pytest.raises(ModelLoadError, match="version 0x"):
            gguf_config(path)


def test_without_the_gguf_package_the_error_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from pathlib import Path\n"
        "from nanovllm.models.gguf import gguf_tensors\n"
        "gguf_tensors(Path(sys.argv[1]))"
    )
    path = small_gguf(tmp_path / "model.gguf")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        "MissingDependencyError: reading a GGUF file needs the package gguf: "
        "pip install 'nano-vllm[gguf]'"
    )
    assert issubclass(MissingDependencyError, ImportError)


# The built-in model


def test_the_converted_folder_is_complete(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100_000)
    assert (config["head_dim"], config["tie_word_embeddings"]) == (64, True)
    assert (config["vocab_size"], config["dtype"]) == (49_152, "bfloat16")
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tensors = dict(open_tensors(smollm2, "auto"))
    assert len(tensors) == 272
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["model.embed_tokens.weight"].shape == (49_152, 576)
