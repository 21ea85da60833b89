"""The executors whose model is divided over several processes, by name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.errors import EngineDeadError, MissingDependencyError
from nanovllm.models.config import ModelConfig

if TYPE_CHECKING:
    from nanovllm.executor.parallel import ParallelExecutor
    from nanovllm.executor.ray import RayExecutor


def make_executor(
    config: EngineConfig, model: ModelConfig, path: Path, died: Callable[[EngineDeadError], None]
) -> "ParallelExecutor | RayExecutor":
    """The executor that config.distributed_executor_backend names.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    if config.distributed_executor_backend == "mp":
        from nanovllm.executor.parallel import ParallelExecutor

        return ParallelExecutor(config, model, path, died)
    try:
        from nanovllm.executor.ray import RayExecutor
    except ImportError as error:
        raise MissingDependencyError("ray", "ray", "distributed_executor_backend") from error
    return RayExecutor(config, model, died)
