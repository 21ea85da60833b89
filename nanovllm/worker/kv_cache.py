"""The memory that blocks stand for: how many fit, and the tensors themselves."""

import os

import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.kernels import KVCache
from nanovllm.models.config import ModelConfig

CPU_LIMIT = 4 << 30  # bytes; the system gives a page when it is first written


def num_kv_blocks(config: EngineConfig, model: ModelConfig, like: Tensor) -> int:
    """Blocks of the pool: as the settings say, or as many as the memory holds and all sequences
    together could use. Call it with the weights in place.

    Args:
        config: resolved for the model. like: a tensor of the cache's dtype, on its device.

    Raises:
        ConfigError: not one block fits.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    assert config.max_num_seqs and config.max_model_len
    block_elements = model.num_layers * model.num_kv_heads * model.head_dim * config.block_size
    memory = config.kv_cache_memory_bytes
    if memory is None and like.is_cuda:
        free, total = torch.cuda.mem_get_info(like.device)
        memory = int(free - (1 - config.gpu_memory_utilization) * total)
    elif memory is None:
        unused = "SC_AVPHYS_PAGES" in os.sysconf_names  # macOS only tells what there is in all
        pages = os.sysconf("SC_AVPHYS_PAGES" if unused else "SC_PHYS_PAGES")
        memory = min(CPU_LIMIT, pages * os.sysconf("SC_PAGE_SIZE") // 2)
        memory //= config.tensor_parallel_size  # all ranks are on this machine
    fitting = memory // (2 * block_elements * like.element_size())
    if fitting < 1:
        raise ConfigError("kv_cache_memory_bytes", memory, "holds no block; give it more")
    return min(fitting, config.max_num_seqs * -(-config.max_model_len // config.block_size))


def allocate(model: ModelConfig, num_blocks: int, block_size: int, like: Tensor) -> list[KVCache]:
    """A cache for each layer; unwritten blocks hold nothing meaningful."""
    shape = (num_blocks, model.num_kv_heads, block_size, model.head_dim)
    return [KVCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(model.num_layers)]
