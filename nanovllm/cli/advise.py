"""`nanovllm advise`: the cheapest setting that meets latency targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from nanovllm.checks import check_fields, ranged
from nanovllm.cli.bench import check_writable, write
from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.cli.sweep import (
    AXES,
    add_lists,
    check_calibration,
    check_prices,
    checked_load,
    progress_bar,
    read_prices,
    split,
)
from nanovllm.errors import ConfigError
from nanovllm.sim.deployment import Deployment

DEVICES = (1, 2, 4, 8)
# What the best few are tried with, if the command line leaves it open.
TUNED: dict[str, list[Any]] = {
    "max_num_seqs": [64, 256],
    "max_num_batched_tokens": [512, 2048, 8192],
    "scheduling_policy": ["fcfs", "sarathi"],
}
NUM_TUNED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What is wanted.

    Args:
        ttft_p99_ms, tpot_p99_ms: what 99 of 100 requests must keep; give one or both.
        margin: share of it to stay below by, as a simulation may be off.
        workload: a trace, or "synthetic:name=value,...", as `simulate` takes it.
        calibration: a file that `nanovllm calibrate` wrote; it is used for all settings.
        price: NAME=USD, of an hour of one device of that hardware; can be repeated. Without prices,
            fewer devices are better.
        max_replicas: engines that share the load in turn.
        seeds: workloads that each must keep it; a trace is one. seed: of the first.
        num_workers: processes; None is one for each core that may be used.
        json: the file to write all answers to.

    Raises:
        ConfigError: a value is impossible.
    """

    ttft_p99_ms: float | None = ranged(None, 1e-3, 1e9)
    tpot_p99_ms: float | None = ranged(None, 1e-3, 1e9)
    margin: float = ranged(0.1, 0.0, 10.0)
    workload: str = "synthetic"
    calibration: str | None = None
    price: Sequence[str] | None = None
    max_replicas: int = ranged(64, 1, 4096)
    seeds: int | None = ranged(None, 1, 10_000)
    seed: int = ranged(0, 0, 2**62)
    num_workers: int | None = ranged(None, 1, 4096)
    json: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        check_writable("json", self.json)
        if self.ttft_p99_ms is None and self.tpot_p99_ms is None:
            raise ConfigError("ttft_p99_ms", None, "give this, tpot_p99_ms or both")


def run(argv: list[str]) -> int:
    from nanovllm.sim.workload import Synthetic

    parser = Parser(
        prog="nanovllm advise",
        description="Find the setting that meets latency targets at the lowest cost, and how many\n"
        "replicas of it. Left open, all hardware of the table (or all with a price) is tried on\n"
        "1, 2, 4 and 8 devices, and the best with other limits and policies.",
    )
    add_flags(parser, Advice)
    add_lists(parser, Deployment, AXES)
    add_flags(parser, Deployment, skip=AXES)
    add_flags(parser, Synthetic)
    args = parser.parse_args(argv)
    how, synthetic = Advice(**given(args, Advice)), Synthetic(**given(args, Synthetic))
    grid, others = split(given(args, Deployment))

    from nanovllm.sim import advise
    from nanovllm.sim.experiment import usable_cores
    from nanovllm.sim.hardware import HARDWARE
    from nanovllm.sim.sweep import deployments

    prices = read_prices(how.price or ())
    tune = not any(name in grid for name in TUNED)
    grid.setdefault("hardware", list(prices or [name for name in HARDWARE if name != "cpu"]))
    grid.setdefault("tensor_parallel_size", list(DEVICES))
    load = checked_load(how.workload, synthetic, (), None, None)
    candidates = deployments(grid, others)
    check_prices(prices, candidates)
    check_calibration(how.calibration)
    count = how.seeds or (3 if load.drawn else 1)
    if not load.drawn and count > 1:
        raise ConfigError("seeds", count, "a trace is served once, as it came; leave this out")
    target = advise.Target(
        ttft_p99_ms=how.ttft_p99_ms, tpot_p99_ms=how.tpot_p99_ms, margin=how.margin
    )
    seeds = range(how.seed, how.seed + count)
    fixed = load, target, seeds, prices, how.calibration, how.max_replicas
    workers = how.num_workers or usable_cores()
    with progress_bar(len(candidates), "settings") as progress:
        answers = advise.advise(candidates, *fixed, workers, progress.update)
        if tune:
            best = [answer.deployment for answer in answers[:NUM_TUNED] if answer.trial]
            more = [one for deployment in best for one in variants(deployment)]
            progress.total += len(more)
            progress.refresh()
            tuned = advise.advise(more, *fixed, workers, progress.update)
            answers = advise.ranked([*answers, *tuned], target)
    print(advise.in_words(answers, target, count))
    print(f"\n{advise.table(answers, target)}")
    found = [advise.as_json(answer, target) for answer in answers]
    write(how.json, {"workload": how.workload, "seeds": list(seeds), "answers": found})
    return 0


def variants(deployment: Deployment) -> list[Deployment]:
    """The same devices with other limits and policies."""
    changes = (dict(zip(TUNED, values, strict=True)) for values in product(*TUNED.values()))
    found = [replace(deployment, **change) for change in changes]
    return [one for one in found if one != deployment]
