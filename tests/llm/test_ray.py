"""An engine whose ranks are actors of a Ray cluster: the same tokens, and what happens when one of
them is lost."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from nanovllm.errors import ConfigError, EngineDeadError
from nanovllm.executor.ray import RayExecutor
from nanovllm.llm import LLM
from tests.llm.helpers import greedy, make_ids, save_tiny, tokens_of

LIMIT_S = 30.0
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_kv_blocks": 64}
OVER_RAY: dict[str, Any] = {"distributed_executor_backend": "ray", "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, smollm2)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local one with room for two ranks."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_two_actors_have_the_tokens_of_one_process(tiny: Path, cluster: None) -> None:
    prompts = [make_ids(seed, 20) for seed in range(4)]
    with LLM(tiny, **SETTINGS) as one:
        expected = tokens_of(one.generate(prompts, greedy(8), use_tqdm=False))
    with LLM(tiny, **SETTINGS, **OVER_RAY) as two:
        assert tokens_of(two.generate(prompts, greedy(8), use_tqdm=False)) == expected


def test_an_actor_that_is_lost_ends_the_engine(tiny: Path, cluster: None) -> None:
    with LLM(tiny, **SETTINGS, **OVER_RAY) as llm:
        executor = llm.engine.core.executor
        assert isinstance(executor, RayExecutor)
        ray.kill(executor.actors[1])
        limit_s = time.monotonic() + LIMIT_S
        while executor.dead is None:  # heard of though nothing runs
            assert time.monotonic() < limit_s
            time.sleep(0.01)
        with pytest.raises(EngineDeadError, match="make a new engine"):
            llm.generate([make_ids(2, 5)], greedy(1), use_tqdm=False)


def test_a_cluster_without_room_is_an_error(tiny: Path, cluster: None) -> None:
    with pytest.raises(ConfigError, match="room for 2 at most; the nearest is 2"):
        LLM(tiny, **SETTINGS, **OVER_RAY | {"tensor_parallel_size": 4})
