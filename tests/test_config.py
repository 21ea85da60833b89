"""EngineConfig: what each setting may hold, and how settings go with each other and the model."""

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError, NanoVLLMError

FLAGS = ("skip_tokenizer_init", "enable_prefix_caching", "enable_chunked_prefill", "enforce_eager")
INTEGERS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_kv_blocks",
    "kv_cache_memory_bytes",
    "seed",
    "num_threads",
    "tensor_parallel_size",
    "distributed_timeout_seconds",
    "record_max_bytes",
)


def refusal(**settings: Any) -> ConfigError:
    with pytest.raises(ConfigError) as found:
        EngineConfig.make(**settings)
    return found.value


def resolved(longest: int = 8192, **settings: Any) -> tuple[int | None, int | None, int | None]:
    """max_model_len, max_num_seqs and max_num_batched_tokens for a model of `longest`."""
    config = EngineConfig.make(**settings).for_model(longest)
    return config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens


def test_the_defaults() -> None:
    config = EngineConfig()
    assert (config.model, config.tokenizer, config.dtype) == ("smollm2-135m", None, "auto")
    assert (config.device, config.load_format, config.attention_backend) == ("auto",) * 3
    assert (config.block_size, config.seed, config.tensor_parallel_size) == (16, 0, 1)
    assert config.gpu_memory_utilization == 0.9
    assert (config.enable_prefix_caching, config.enable_chunked_prefill) == (True, True)
    assert (config.scheduling_policy, config.quantization) == ("fcfs", None)
    assert (config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens) == (None,) * 3
    assert (config.num_kv_blocks, config.kv_cache_memory_bytes) == (None, None)
    assert config.num_threads is None
    assert EngineConfig.make() == config


def test_random_weights_have_no_blocks_of_a_gguf() -> None:
    with pytest.raises(
        ConfigError, match=r"quantization='gguf': load_format='dummy' reads no file"
    ):
        EngineConfig.make(quantization="gguf", load_format="dummy")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_model_len", [None, 2, 131_072]),
        ("max_num_seqs", [None, 1, 12, 65_536]),
        ("max_num_batched_tokens", [None, 1, 2**24]),
        ("block_size", [1, 16, 100, 1024]),
        ("num_kv_blocks", [None, 1, 10**6]),
        ("kv_cache_memory_bytes", [None, 1, 4 << 30]),
        ("gpu_memory_utilization", [0.01, 0.5, 1, 1.0]),
        ("seed", [0, 2**62]),
        ("dtype", ["auto", "float32", "bfloat16", "float16"]),
        ("device", ["auto", "cpu", "cuda"]),
        ("scheduling_policy", ["fcfs", "priority", "sjf", "nanovllm.core.policy:Policy"]),
        ("load_format", ["auto", "safetensors", "gguf", "dummy"]),
        ("attention_backend", ["auto", "native", "cpu", "triton", "reference"]),
        ("tensor_parallel_size", [1, 3]),
        ("distributed_executor_backend", ["mp", "ray"]),
        ("quantization", [None, "int8", "int4", "gguf"]),
        ("num_threads", [None, 1, 1024]),
        *((flag, [True, False]) for flag in FLAGS),
    ],
)
def test_values_in_range_are_taken_as_they_are(name: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(EngineConfig.make(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("max_model_len", 1, 2),
        ("max_model_len", 2**24 + 1, 2**24),
        ("max_num_seqs", 0, 1),
        ("max_num_seqs", 65_537, 65_536),
        ("max_num_batched_tokens", 0, 1),
        ("block_size", 0, 1),
        ("block_size", 1025, 1024),
        ("num_kv_blocks", 0, 1),
        ("kv_cache_memory_bytes", -1, 1),
        ("gpu_memory_utilization", 0, 0.01),
        ("gpu_memory_utilization", 90, 1.0),
        ("gpu_memory_utilization", math.inf, 1.0),
        ("gpu_memory_utilization", math.nan, 0.01),
        ("seed", -1, 0),
        ("dtype", "fp32", "float32"),
        ("dtype", "bf16", "bfloat16"),
        ("device", "gpu", "cpu"),
        ("scheduling_policy", "prio", "priority"),
        ("load_format", "safetensor", "safetensors"),
        ("attention_backend", "ref", "reference"),
        ("enforce_eager", "true", True),
        ("enable_prefix_caching", None, True),
        ("tensor_parallel_size", 0, 1),
        ("distributed_executor_backend", "rai", "ray"),
        ("quantization", "awq", "int8"),
        ("num_threads", 0, 1),
        ("num_threads", 1025, 1024),
    ],
)
def test_an_impossible_value_names_setting_value_and_nearest(
    name: str, value: Any, nearest: Any
) -> None:
    error = refusal(**{name: value})
    assert error.field == name
    assert error.value is value
    assert str(error).startswith(f"{name}={value!r}: ")
    assert str(error).endswith(f"the nearest is {nearest}")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [16.0, math.nan, math.inf, "16", True, [16]], ids=repr)
def test_an_integer_setting_refuses_other_kinds(name: str, value: Any) -> None:
    assert str(refusal(**{name: value})).startswith(f"{name}={value!r}: must be an integer ")


@pytest.mark.parametrize("value", ["0.9", True, None], ids=repr)
def test_the_share_of_memory_is_a_number(value: Any) -> None:
    error = refusal(gpu_memory_utilization=value)
    assert "must be a number from 0.01 to 1.0" in str(error)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_modle_len", "max_model_len"),
        ("num_gpu_blocks", "num_kv_blocks"),
        ("max_batched_tokens", "max_num_batched_tokens"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("Dtype", "dtype"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    error = refusal(**{name: 1})
    assert (error.field, error.value) == (name, 1)
    assert str(error) == f"{name}=1: no such setting; the nearest is {nearest}"


def test_a_name_that_is_like_none_still_gets_an_answer() -> None:
    nearest = str(refusal(zzz=1)).removeprefix("zzz=1: no such setting; the nearest is ")
    assert nearest in [entry.name for entry in fields(EngineConfig)]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineConfig().block_size = 32  # type: ignore[misc]


def test_the_error_is_a_value_error_and_one_of_ours() -> None:
    assert isinstance(refusal(block_size=0), ValueError)
    assert isinstance(refusal(block_size=0), NanoVLLMError)


def test_each_running_sequence_needs_a_token_of_the_step() -> None:
    error = refusal(max_num_batched_tokens=63, max_num_seqs=64)
    assert (error.field, error.value) == ("max_num_batched_tokens", 63)
    assert "max_num_seqs=64" in str(error) and str(error).endswith("the nearest is 64")
    assert EngineConfig(max_num_batched_tokens=64, max_num_seqs=64).max_num_seqs == 64


def test_for_model_fills_in_what_was_left_open() -> None:
    assert resolved() == (8192, 256, 2048)
    assert resolved(longest=32) == (32, 256, 2048)


def test_for_model_keeps_what_was_said() -> None:
    said = {"max_model_len": 100, "max_num_seqs": 3, "max_num_batched_tokens": 7}
    assert resolved(**said) == (100, 3, 7)
    config = EngineConfig(block_size=32, seed=9, model="m")
    assert config.for_model(64).block_size == 32
    assert (config.for_model(64).seed, config.for_model(64).model) == (9, "m")


def test_few_tokens_a_step_mean_few_sequences() -> None:
    assert resolved(max_num_batched_tokens=100) == (8192, 100, 100)


def test_many_sequences_mean_many_tokens_a_step() -> None:
    assert resolved(max_num_seqs=3000) == (8192, 3000, 3000)


def test_without_chunked_prefill_a_step_takes_the_longest_prompt() -> None:
    assert resolved(enable_chunked_prefill=False) == (8192, 256, 8192)
    assert resolved(enable_chunked_prefill=False, max_model_len=100) == (100, 256, 2048)


def test_without_chunked_prefill_a_smaller_step_is_refused() -> None:
    config = EngineConfig(enable_chunked_prefill=False, max_num_batched_tokens=4096)
    with pytest.raises(ConfigError, match="without chunked prefill") as found:
        config.for_model(8192)
    assert (found.value.field, found.value.value) == ("max_num_batched_tokens", 4096)
    assert "the nearest is max_model_len=8192" in str(found.value)
    assert config.for_model(4096).max_num_batched_tokens == 4096


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model takes 8192") as found:
        EngineConfig(max_model_len=8193).for_model(8192)
    assert (found.value.field, found.value.value) == ("max_model_len", 8193)
    assert EngineConfig(max_model_len=8192).for_model(8192).max_model_len == 8192
