"""Many simulations, on all cores: the same results whatever the number of processes."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from signal import SIG_IGN, SIGINT, signal
from typing import Any, TypeVar

from nanovllm.errors import ConfigError
from nanovllm.sim.calibrate import read_calibration
from nanovllm.sim.deployment import Deployment
from nanovllm.sim.report import Report
from nanovllm.sim.run import simulate
from nanovllm.sim.workload import Synthetic, find_workload

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is served and how it is judged.

    Attributes:
        workload: as `simulate` takes it. synthetic: its settings, if it is drawn.
        ttft_target_s, tpot_target_s: for goodput.
    """

    workload: str = "synthetic"
    synthetic: Synthetic = field(default_factory=Synthetic)
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None

    @property
    def drawn(self) -> bool:
        """Another seed makes another workload; a trace is what it is."""
        return self.workload.partition(":")[0] == "synthetic"

    def at(self, request_rate: float) -> "Load":
        """The same kind of requests, so many a second."""
        return replace(self, synthetic=replace(self.synthetic, request_rate=request_rate))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One simulation.

    Attributes:
        num_replicas: engines, to which requests go in turn.
        price_per_hour: of one device.
        calibration: a file; None takes the usual efficiencies.
    """

    deployment: Deployment
    load: Load = field(default_factory=Load)
    seed: int = 0
    num_replicas: int = 1
    price_per_hour: float | None = None
    calibration: str | None = None

    @property
    def num_devices(self) -> int:
        return self.num_replicas * self.deployment.tensor_parallel_size


def measure(point: Point) -> dict[str, Any]:
    """The report of one simulation.

    Raises:
        ConfigError: it cannot be, as when the weights do not fit.
    """
    deployment, load = point.deployment, point.load
    fitted = read_calibration(point.calibration) if point.calibration else None
    cost, engine = deployment.cost(fitted), deployment.engine()
    hourly = None if point.price_per_hour is None else point.price_per_hour * point.num_devices
    report = Report(load.ttft_target_s, load.tpot_target_s, hourly)
    num_preemptions = recomputed = 0
    hit_rates: list[float] = []
    for i in range(point.num_replicas):
        requests, shares = find_workload(load.workload, load.synthetic, point.seed)
        mine = islice(requests, i, None, point.num_replicas)
        simulate(mine, engine.caching_if(shares), cost, report)
        num_preemptions += report.num_preemptions
        recomputed += report.recomputed_tokens
        if report.prefix_cache_hit_rate is not None:
            hit_rates.append(report.prefix_cache_hit_rate)
    report.num_preemptions, report.recomputed_tokens = num_preemptions, recomputed
    report.prefix_cache_hit_rate = sum(hit_rates) / len(hit_rates) if hit_rates else None
    return report.result()


def attempt(point: Point) -> dict[str, Any]:
    """{"report": ...}, or {"error": why there is none}."""
    try:
        return {"report": measure(point), "error": None}
    except ConfigError as error:
        return {"report": None, "error": str(error)}


def usable_cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    num_workers: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Result]:
    """The result of each task, in the order of the tasks.

    Args:
        work: a function of a module. num_workers: processes; 1 stays in this one.
        progress: is told of each task that is done: 1.
    """
    if num_workers <= 1 or len(tasks) <= 1:
        return list(counted(map(work, tasks), progress))
    context = get_context("spawn")  # a fork would copy locks that other threads hold
    count = min(num_workers, len(tasks))
    pool = ProcessPoolExecutor(count, context, initializer=signal, initargs=(SIGINT, SIG_IGN))
    try:
        futures = [pool.submit(work, task) for task in tasks]
        for _ in counted(as_completed(futures), progress):
            pass
        return [future.result() for future in futures]
    except BaseException:  # Ctrl-C too: what runs is of no use to anybody
        workers = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    finally:
        pool.shutdown()


def counted(items: Iterable[Result], progress: Callable[[int], object]) -> Iterator[Result]:
    for item in items:
        progress(1)
        yield item
