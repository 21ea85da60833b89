"""The memory that blocks stand for: how many fit, and the tensors themselves."""

import os

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.kernels import KVCache
from nanovllm.models.config import ModelConfig

CPU_LIMIT = 4 << 30  # bytes; pages are taken only when a block is first written


def num_kv_blocks(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Blocks of the pool: as the settings say, or as many as the memory holds and all sequences
    together could use. Call it with the weights in place.

    Args:
        config: resolved for the model.

    Raises:
        ConfigError: not one block fits.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    assert config.max_num_seqs is not None and config.max_model_len is not None
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    memory = config.kv_cache_memory_bytes
    if memory is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = int(free - (1 - config.gpu_memory_utilization) * total)
    elif memory is None:
        memory = min(CPU_LIMIT, available_memory() // 2)
    fitting = memory // (token_bytes * config.block_size)
    if fitting < 1:
        raise ConfigError("kv_cache_memory_bytes", memory, "holds no block; give it more")
    return min(fitting, config.max_num_seqs * -(-config.max_model_len // config.block_size))


def available_memory() -> int:
    """Bytes of physical memory that nobody uses (where the system does not say: half of all)."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        return page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return page * os.sysconf("SC_PHYS_PAGES") // 2


def allocate(
    model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """A cache for each layer; unwritten blocks hold nothing meaningful."""
    shape = (num_blocks, model.num_kv_heads, block_size, model.head_dim)
    return [
        KVCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in "kv"))
        for _ in range(model.num_layers)
    ]
