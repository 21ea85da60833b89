"""The executor for one device: the model runs in this process."""

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
        num_blocks: blocks in the KV cache.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, path: Path) -> None:
        rank = Rank(config, model, path)
        self.num_blocks = rank.num_blocks
        self.runner: ModelRunner | None = rank.runner(self.num_blocks)

    def execute(self, plan: StepPlan) -> StepResult:
        if self.runner is None:
            raise EngineDeadError("the engine is closed")
        return self.runner.execute(plan)

    def close(self) -> None:
        """Give up the model and the cache."""
        self.runner = None
