"""The executor for one device: the model runs in this process."""

from collections.abc import Callable
from pathlib import Path

from nanovllm.config import EngineConfig
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.errors import EngineDeadError
from nanovllm.models.config import ModelConfig
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.rank import Rank


class InlineExecutor:
    """Loads the model and runs it.

    Args:
        config: resolved for the model. path: where the checkpoint is.

    Attributes:
        num_blocks: blocks in the KV cache. device: its type.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, path: Path) -> None:
        rank = Rank(config, model, path)
        self.num_blocks, self.device = rank.num_blocks, rank.device.type
        self.runner: ModelRunner | None = rank.runner(self.num_blocks)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.submit(plan)()

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step; see core.engine.AsyncExecutor."""
        if self.runner is None:
            raise EngineDeadError("the engine is closed")
        return self.runner.submit(plan)

    def close(self) -> None:
        """Give up the model and the cache."""
        self.runner = None
