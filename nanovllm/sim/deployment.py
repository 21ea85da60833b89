"""What is simulated: a model on devices, and the engine's settings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanovllm.checks import check_fields, ranged
from nanovllm.core.policy import make_policy
from nanovllm.errors import ConfigError

if TYPE_CHECKING:
    from nanovllm.sim.cost import Calibration, CostModel
    from nanovllm.sim.run import Engine
    from nanovllm.sim.steps import StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is simulated.

    Args:
        hardware: rtx4090, rtx-pro-6000, rtx-pro-6000-workstation, l4, l40s, a100, h100, h200, b200,
            mi300x or cpu.
        model: llama-3.1-8b, llama-3.1-70b, qwen3-0.6b (1.7b, 4b, 8b, 14b, 32b, 30b-a3b),
            smollm2-135m, or a config.json.
        tensor_parallel_size: devices that share the model.
        max_model_len: tokens that a sequence may have; None is what the model was trained for.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens that a step computes at most.
        block_size: tokens in a block of the KV cache.
        num_kv_blocks: blocks in the pool; None is what fits beside the weights.
        gpu_memory_utilization: share of the memory that the engine may take.
        enable_prefix_caching: share the blocks of equal prefixes.
        scheduling_policy: a built-in policy, or "module:Class".

    Raises:
        ConfigError: a value is impossible.
    """

    hardware: str = "h100"
    model: str = "llama-3.1-8b"
    tensor_parallel_size: int = ranged(1, 1, 1024)
    max_model_len: int | None = ranged(None, 2, 2**24)
    max_num_seqs: int = ranged(256, 1, 2**16)
    max_num_batched_tokens: int = ranged(2048, 1, 2**24)
    block_size: int = ranged(16, 1, 1024)
    num_kv_blocks: int | None = ranged(None, 1, 2**26)
    gpu_memory_utilization: float = ranged(0.9, 0.01, 1.0)
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        make_policy(self.scheduling_policy)

    def cost(self, calibration: "Calibration | StepTimes | None" = None) -> "CostModel":
        """The step times of a recording, or the roofline of this model on this hardware."""
        from nanovllm.sim.cost import Roofline
        from nanovllm.sim.hardware import find_hardware
        from nanovllm.sim.shape import find_shape
        from nanovllm.sim.steps import StepTimes

        if isinstance(calibration, StepTimes):
            return calibration
        shape, size = find_shape(self.model), self.tensor_parallel_size
        return Roofline(find_hardware(self.hardware), shape, size, calibration)

    def engine(self) -> "Engine":
        """The settings of the engine, with the block count that fits."""
        from nanovllm.sim.cost import num_blocks_in
        from nanovllm.sim.hardware import find_hardware
        from nanovllm.sim.run import Engine
        from nanovllm.sim.shape import find_shape

        shape = find_shape(self.model)
        parts = find_hardware(self.hardware), shape, self.block_size, self.max_num_batched_tokens
        shared = self.tensor_parallel_size, self.gpu_memory_utilization
        if self.max_model_len is not None and self.max_model_len > shape.max_model_len:
            why = f"the model takes {shape.max_model_len}, the nearest"
            raise ConfigError("max_model_len", self.max_model_len, why)
        return Engine(
            num_kv_blocks=self.num_kv_blocks or num_blocks_in(*parts, *shared),
            max_model_len=self.max_model_len or shape.max_model_len,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enable_prefix_caching=self.enable_prefix_caching,
            scheduling_policy=self.scheduling_policy,
        )
