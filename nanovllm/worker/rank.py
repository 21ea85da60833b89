"""Rank: a model, or one rank's part of it, loaded onto its device, and its KV cache."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.kernels import choose_backend
from nanovllm.models.checkpoint import locate
from nanovllm.models.config import ModelConfig
from nanovllm.models.load import load_model
from nanovllm.worker.inputs import SequenceTable
from nanovllm.worker.kv_cache import allocate, num_kv_blocks
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.threads import default_num_threads, set_num_threads

if TYPE_CHECKING:
    from nanovllm.worker.ranks import Ranks


class Rank:
    """What there is before the number of blocks is known.

    Args:
        config: resolved for the model. path: where the checkpoint is.
        ranks: those that share the model; None: this one has all of it.

    Attributes:
        num_blocks: blocks of KV cache that its memory holds.
    """

    def __init__(
        self, config: EngineConfig, whole: ModelConfig, path: Path, ranks: "Ranks | None" = None
    ) -> None:
        self.config, self.whole, self.path, self.ranks = config, whole, path, ranks
        self.device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, whole.dtype, self.device)
        shape = whole.head_dim, config.block_size
        self.backend = choose_backend(config.attention_backend, self.device, dtype, *shape)
        if self.device.type == "cpu":
            share = max(default_num_threads() // config.tensor_parallel_size, 1)
            set_num_threads(config.num_threads or share)
        self.part, cut, packer = whole, None, self.backend
        if ranks is not None:
            self.part, cut, packer = ranks.divide(whole, self.backend)
        what = config, self.part, path, packer
        self.model = load_model(*what, dtype=dtype, device=self.device, cut=cut)
        if ranks is not None:
            ranks.connect(self.model)
        self.like = torch.empty(0, dtype=dtype, device=self.device)
        if self.device.type == "cuda" and config.num_kv_blocks is None:
            self.runner(1)  # what steps and graphs take is theirs; the cache has the rest
        self.num_blocks = num_kv_blocks(config, self.part, self.like)

    def runner(self, num_blocks: int) -> ModelRunner:
        """What carries out plans, with a cache of so many blocks, warmed up."""
        config, path = self.config, self.path
        assert config.max_model_len and config.max_num_seqs
        caches = allocate(self.part, num_blocks, config.block_size, self.like)
        table = SequenceTable(config.max_num_seqs, config.max_model_len, config.block_size)
        words = config.tokenizer if not config.skip_tokenizer_init else None
        parts = self.whole, locate(words) if words else path, self.ranks
        what = self.model, self.backend, caches, table, *parts
        if self.device.type == "cuda" or config.async_scheduling:
            from nanovllm.worker.gpu_runner import make_runner

            return make_runner(config, *what)
        runner = ModelRunner(*what)
        runner.warm_up()
        return runner


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("device", name, "torch finds no GPU here; the nearest is cpu")
    return torch.device(name if name != "auto" else "cuda" if found else "cpu")


def pick_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is the checkpoint's (on a CPU bfloat16 for float16)."""
    if name == "auto":
        name = "bfloat16" if (checkpoint, device.type) == ("float16", "cpu") else checkpoint
    dtype: torch.dtype = getattr(torch, name)
    return dtype
