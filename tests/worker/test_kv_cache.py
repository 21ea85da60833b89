"""How many blocks there are, and the tensors that hold them."""

from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.models.config import ModelConfig
from nanovllm.worker.kv_cache import allocate, num_kv_blocks

MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
    {},
)
# Keys and values, 5 layers, 2 heads of 8, 16 tokens, float32: the bytes of a block.
BLOCK = 2 * 5 * 2 * 8 * 16 * 4


def count(like: torch.Tensor | None = None, **settings: Any) -> int:
    config = EngineConfig(**settings).for_model(1024)
    return num_kv_blocks(config, MODEL, torch.empty(0) if like is None else like)


def test_the_number_of_blocks_is_taken_as_said() -> None:
    assert count(num_kv_blocks=7) == 7
    assert count(num_kv_blocks=10**6, kv_cache_memory_bytes=1) == 10**6


def test_the_memory_says_how_many_blocks_fit() -> None:
    assert count(kv_cache_memory_bytes=10 * BLOCK) == 10
    assert count(kv_cache_memory_bytes=11 * BLOCK - 1) == 10
    assert count(kv_cache_memory_bytes=BLOCK) == 1


def test_smaller_elements_and_blocks_fit_more_often() -> None:
    half = torch.empty(0, dtype=torch.bfloat16)
    assert count(half, kv_cache_memory_bytes=10 * BLOCK) == 20
    assert count(kv_cache_memory_bytes=10 * BLOCK, block_size=8) == 20
    assert count(kv_cache_memory_bytes=10 * BLOCK, block_size=32) == 5


def test_no_more_blocks_than_all_sequences_together_could_use() -> None:
    settings = {"max_num_seqs": 3, "kv_cache_memory_bytes": 1 << 30}
    assert count(**settings) == 3 * 64
    assert count(max_model_len=100, **settings) == 3 * 7
    assert count(max_model_len=100, block_size=100, **settings) == 3


def test_memory_for_no_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes") as found:
        count(kv_cache_memory_bytes=BLOCK - 1)
    assert found.value.value == BLOCK - 1


def test_without_a_word_a_cpu_gives_at_most_4_gib() -> None:
    assert 1 <= count() <= (4 << 30) // BLOCK
    assert count(max_num_seqs=2) == 2 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_has_keys_and_values_of_its_own(dtype: torch.dtype) -> None:
    caches = allocate(MODEL, 3, 16, torch.empty(0, dtype=dtype))
    assert len(caches) == 5
    tensors = [tensor for cache in caches for tensor in (cache.k, cache.v)]
    for tensor in tensors:
        assert tensor.shape == (3, 2, 16, 8)
        assert (tensor.dtype, tensor.device.type) == (dtype, "cpu")
        assert tensor.is_contiguous()
    assert len({tensor.data_ptr() for tensor in tensors}) == 10
