"""The executor for devices of several machines: tensor parallelism over actors of a Ray cluster.

      this process                         actors, placed together where there is room
        EngineCore ─▶ plan ─▶ each actor's `step` ─▶ ModelRunner ◀── collectives ──▶ ...
                    result ◀─ rank 0's

Ray places, starts and watches the processes; between them it is as in ParallelExecutor.
"""

import logging
import os
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nanovllm.config import EngineConfig
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.errors import ConfigError, EngineDeadError, NanoVLLMError
from nanovllm.models.config import ModelConfig
from nanovllm.worker.threads import available_cores

START_S = 600.0  # for all ranks to load their part
PLACE_S = 60.0  # for the cluster to find room


class RankActor:
    """One rank, wherever Ray has put it."""

    def __init__(self) -> None:
        self.ended = Event()

    def meet(self) -> tuple[str, int]:
        """At rank 0: where the others find it."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host: str = get_node_ip_address()
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def load(self, config: bytes, model: bytes, rank: int, host: str, port: int) -> int:
        """Load this rank's part; returns how many blocks fit."""
        import torch
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        from nanovllm.models.checkpoint import locate
        from nanovllm.worker.rank import Rank, pick_device
        from nanovllm.worker.ranks import Ranks

        settings = msgspec.msgpack.decode(config, type=EngineConfig)
        if rank:
            self.store = TCPStore(host, port, is_master=False)
        kind = pick_device(settings.device).type
        device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")  # Ray's choice
        timeout_s = settings.distributed_timeout_seconds
        ranks = Ranks(self.store, rank, settings.tensor_parallel_size, device, timeout_s)
        shape = msgspec.msgpack.decode(model, type=ModelConfig)
        self.rank = Rank(settings, shape, locate(settings.model), ranks)
        return self.rank.num_blocks

    def start(self, num_blocks: int) -> None:
        self.runner = self.rank.runner(num_blocks)

    def step(self, plan: bytes) -> bytes:
        result = self.runner.execute(msgspec.msgpack.decode(plan, type=StepPlan))
        return msgspec.msgpack.encode(result)

    def until_end(self) -> None:
        """Return when the engine is closed; who waits for this hears of a death before."""
        self.ended.wait()

    def end(self) -> None:
        self.ended.set()


class RayExecutor:
    """Loads a part of the model into each of several actors.

    Args:
        config: resolved for the model, which each machine must be able to locate.
        died: called in a thread of its own when an actor is lost.

    Attributes:
        num_blocks: blocks in each rank's KV cache: as many as fit at the one with the least.
        device: the type of the ranks'.

    Raises:
        ConfigError: the model cannot be divided by so many, or the cluster has no room.
        NanoVLLMError: an actor could not load its part.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, died: Callable[[EngineDeadError], None]
    ) -> None:
        self.died, self.closed = died, False
        self.dead: EngineDeadError | None = None
        self.timeout_s = config.distributed_timeout_seconds
        self.started_ray = not ray.is_initialized()
        size = config.tensor_parallel_size
        if self.started_ray:  # on a machine with fewer cores than ranks, these share them
            elsewhere = os.environ.get("RAY_ADDRESS")
            cores = None if elsewhere else max(size, available_cores())
            ray.init(
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        self.actors: list[Any] = []
        resources: dict[str, float] = ray.cluster_resources()
        on_gpu = resources.get("GPU", 0) > 0 and config.device != "cpu"
        device = "GPU" if on_gpu else "CPU"
        self.device = "cuda" if on_gpu else "cpu"
        self.group = placement_group([{"CPU": 1.0, device: 1.0}] * size, strategy="PACK")
        try:
            most = int(resources.get(device, 0))
            if most < size or not self.group.wait(PLACE_S):
                nearest = min(most, size - 1)
                why = f"the cluster has room for {most} at most; the nearest is {nearest}"
                raise ConfigError("tensor_parallel_size", size, why)
            where = PlacementGroupSchedulingStrategy(self.group)
            kind = ray.remote(RankActor).options(
                num_cpus=1, num_gpus=int(on_gpu), max_concurrency=2, scheduling_strategy=where
            )
            self.actors = [kind.remote() for _ in range(size)]
            place = ray.get(self.actors[0].meet.remote(), timeout=START_S)
            parts = msgspec.msgpack.encode(config), msgspec.msgpack.encode(model)
            counts = [a.load.remote(*parts, rank, *place) for rank, a in enumerate(self.actors)]
            self.num_blocks = min(ray.get(counts, timeout=START_S))
            ray.get([a.start.remote(self.num_blocks) for a in self.actors], timeout=START_S)
        except BaseException as error:
            self.close()
            if isinstance(error, RayError):
                raise NanoVLLMError(f"a rank did not start: {last_line(error)}") from error
            raise
        Thread(target=self._watch, name="ranks", daemon=True).start()

    def execute(self, plan: StepPlan) -> StepResult:
        """
        Raises:
            EngineDeadError: an actor was lost, failed or hangs; no step can follow.
        """
        if self.dead is not None or self.closed:
            raise self.dead or EngineDeadError("the engine is closed")
        message = msgspec.msgpack.encode(plan)
        try:
            results = ray.get([a.step.remote(message) for a in self.actors], timeout=self.timeout_s)
        except (RayError, GetTimeoutError) as error:
            self._die(f"a step failed ({last_line(error)})")
            assert self.dead is not None
            raise self.dead from error
        return msgspec.msgpack.decode(results[0], type=StepResult)

    def close(self) -> None:
        """End the actors and give up their place; closing twice does nothing."""
        if self.closed:
            return
        self.closed = True
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)
        if self.started_ray:
            ray.shutdown()

    def _watch(self) -> None:
        """In a thread: hear of an actor's end."""
        waiting = [actor.until_end.remote() for actor in self.actors]
        try:
            ray.get(waiting)
        except RayError as error:
            self._die(f"a rank died ({last_line(error)})")
        except Exception:  # Ray itself was shut down
            self._die("the cluster is gone")

    def _die(self, why: str) -> None:
        if self.dead is None and not self.closed:
            self.dead = EngineDeadError(f"{why}; make a new engine")
            for actor in self.actors:
                ray.kill(actor)
            self.died(self.dead)


def last_line(error: BaseException) -> str:
    """What an error of Ray's says in the end, without the remote traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
