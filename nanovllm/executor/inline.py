"""The executor for one device: the model runs in this process."""

from pathlib import Path

import torch

from nanovllm.config import EngineConfig
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.errors import ConfigError, EngineDeadError
from nanovllm.kernels import choose_backend
from nanovllm.models.checkpoint import locate
from nanovllm.models.config import ModelConfig
from nanovllm.models.load import load_model
from nanovllm.worker.inputs import SequenceTable
from nanovllm.worker.kv_cache import allocate, num_kv_blocks
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.threads import default_num_threads, set_num_threads


class InlineExecutor:
    """Loads the model and runs it.

    Args:
        config: resolved for the model. path: where the checkpoint is.

    Attributes:
        num_blocks: blocks in the KV cache.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, path: Path) -> None:
        assert config.max_model_len and config.max_num_seqs
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, model_config.dtype, device)
        shape = model_config.head_dim, config.block_size
        backend = choose_backend(config.attention_backend, device, dtype, *shape)
        if device.type == "cpu":
            set_num_threads(config.num_threads or default_num_threads())
        model = load_model(
            path, model_config, backend, dtype=dtype, device=device, seed=config.seed,
            load_format=config.load_format, max_positions=config.max_model_len,
            quantization=config.quantization,
        )  # fmt: skip
        like = torch.empty(0, dtype=dtype, device=device)
        self.num_blocks = num_kv_blocks(config, model_config, like)
        caches = allocate(model_config, self.num_blocks, config.block_size, like)
        table = SequenceTable(config.max_num_seqs, config.max_model_len, config.block_size)
        words = config.tokenizer if not config.skip_tokenizer_init else None
        parts = model, backend, caches, table, model_config, locate(words) if words else path
        self.runner: ModelRunner | None = ModelRunner(*parts)
        self.runner.warm_up()

    def execute(self, plan: StepPlan) -> StepResult:
        if self.runner is None:
            raise EngineDeadError("the engine is closed")
        return self.runner.execute(plan)

    def close(self) -> None:
        """Give up the model and the cache."""
        self.runner = None


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
