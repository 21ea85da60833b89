"""Which setting meets latency targets at the lowest cost, and with how many replicas."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.errors import ConfigError
from nanovllm.sim.calibrate import read_calibration
from nanovllm.sim.deployment import Deployment
from nanovllm.sim.experiment import Load, Point, measure, run_all
from nanovllm.sim.run import simulate
from nanovllm.sim.sweep import digits, line, said
from nanovllm.sim.workload import find_workload

SHORT = 8  # output tokens that tell a lone request's TPOT
AXES = ("hardware", "tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens",
        "scheduling_policy")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the 99th percentiles must not exceed.

    Attributes:
        margin: share by which they must stay below, as a simulation may be off.
    """

    ttft_p99_ms: float | None = None
    tpot_p99_ms: float | None = None
    margin: float = 0.1

    @property
    def most_ms(self) -> dict[str, float]:
        """By kind; only those that are set."""
        found = {"ttft": self.ttft_p99_ms, "tpot": self.tpot_p99_ms}
        return {kind: most for kind, most in found.items() if most is not None}


@dataclass(frozen=True, slots=True)
class Trial:
    """So many replicas, over all seeds.

    Attributes:
        p99_ms: the worst seed's, by kind.
        num_unfit: requests that were rejected or cut, of all seeds.
        cost_per_million: US dollars for a million tokens, prompt and output, mean of the seeds.
    """

    num_replicas: int
    p99_ms: dict[str, float]
    num_unfit: int = 0
    cost_per_million: float | None = None

    def worst(self, target: Target) -> tuple[float, str]:
        """The percentile that is farthest up its target: its share of it, margin included."""
        shares = {
            kind: self.p99_ms[kind] * (1 + target.margin) / most
            for kind, most in target.most_ms.items()
        }
        return max((share, kind) for kind, share in shares.items())

    def meets(self, target: Target) -> bool:
        return not self.num_unfit and self.worst(target)[0] <= 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found for a deployment.

    Attributes:
        trial: the fewest replicas that meet the target, or the nearest miss; None if it cannot run.
        fewer: one replica fewer, which does not meet it.
        hourly: US dollars, of all devices.
        error: why it cannot run, or why no number of replicas will do.
    """

    deployment: Deployment
    trial: Trial | None = None
    fewer: Trial | None = None
    met: bool = False
    hourly: float | None = None
    error: str | None = None

    @property
    def num_devices(self) -> int:
        replicas = self.trial.num_replicas if self.trial else 1
        return replicas * self.deployment.tensor_parallel_size

    @property
    def cost(self) -> float:
        """What answers are ranked by: dollars an hour, or without prices devices. Under one load
        that is the order of dollars per token too, without the noise of a run's last seconds."""
        return self.num_devices if self.hourly is None else self.hourly

    @property
    def devices(self) -> tuple[str, int]:
        return self.deployment.hardware, self.deployment.tensor_parallel_size


@dataclass(frozen=True, slots=True)
class Search:
    """What is asked of one process: a deployment, and all that it is to be tried with."""

    deployment: Deployment
    load: Load
    target: Target
    seeds: tuple[int, ...]
    price_per_hour: float | None
    calibration: str | None
    max_replicas: int


def search(task: Search) -> Answer:
    """The fewest replicas of a deployment that meet the target with each seed.

    What so many can do, more can: doubling finds enough, halving the fewest.
    """
    deployment, target = task.deployment, task.target
    try:
        lone = alone(task)
        if not lone.meets(target):
            return Answer(deployment, lone, error=unfit(lone) or "requests are late even alone")
        tried = {1: attempt(task, 1)}
        most = min(task.max_replicas, num_requests(task.load))
        high = 1
        while not tried[high].meets(target) and high < most and not tried[high].num_unfit:
            high = min(2 * high, most)
            tried[high] = attempt(task, high)
    except ConfigError as error:
        return Answer(deployment, error=str(error))
    if not tried[high].meets(target):
        nearest = min(tried.values(), key=lambda trial: trial.worst(target))
        why = unfit(nearest) or f"{count(high, 'replica')} too few"
        return Answer(deployment, nearest, error=why)
    low = max((n for n, trial in tried.items() if not trial.meets(target)), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = attempt(task, middle)
        low, high = (low, middle) if tried[middle].meets(target) else (middle, high)
    price, size = task.price_per_hour, deployment.tensor_parallel_size
    hourly = None if price is None else price * high * size
    return Answer(deployment, tried[high], tried.get(high - 1), True, hourly)


def unfit(trial: Trial) -> str | None:
    return f"{count(trial.num_unfit, 'request')} too long for it" if trial.num_unfit else None


def attempt(task: Search, num_replicas: int) -> Trial:
    """Serve the load of each seed."""
    worst: dict[str, float] = {}
    costs, num_unfit = list[float](), 0
    for seed in task.seeds:
        report = measure(
            Point(
                deployment=task.deployment,
                load=task.load,
                seed=seed,
                num_replicas=num_replicas,
                price_per_hour=task.price_per_hour,
                calibration=task.calibration,
            )
        )
        num_unfit += report["num_rejected"] + report["num_truncated"]
        for kind in ("ttft", "tpot"):
            worst[kind] = max(worst.get(kind, 0.0), report[f"{kind}_ms"]["p99"] or 0.0)
        if report["cost_per_million_tokens"] is not None:
            costs.append(report["cost_per_million_tokens"])
    return Trial(num_replicas, worst, num_unfit, sum(costs) / len(costs) if costs else None)


def alone(task: Search) -> Trial:
    """The load's requests, each by itself: no number of replicas does better. Outputs are cut
    short, which makes TPOT a little better than it is, unless later prompts hold them."""
    load, engine = task.load, task.deployment.engine()
    requests, shares = find_workload(load.workload, load.synthetic, task.seeds[0])
    far = (
        replace(
            request,
            arrival_s=1e5 * i,
            num_output_tokens=request.num_output_tokens
            if shares
            else min(request.num_output_tokens, SHORT),
        )
        for i, request in enumerate(requests)
    )
    fitted = read_calibration(task.calibration) if task.calibration else None
    result = simulate(far, engine.caching_if(shares), task.deployment.cost(fitted)).result()
    worst = {kind: result[f"{kind}_ms"]["p99"] or 0.0 for kind in ("ttft", "tpot")}
    return Trial(1, worst, result["num_rejected"])


def num_requests(load: Load) -> int:
    if load.drawn:
        return load.synthetic.num_requests
    requests, _ = find_workload(load.workload, load.synthetic, 0)
    return sum(1 for _ in requests)


def advise(
    candidates: Sequence[Deployment],
    load: Load,
    target: Target,
    seeds: Sequence[int] = (0,),
    prices: Mapping[str, float] | None = None,
    calibration: str | None = None,
    max_replicas: int = 64,
    num_workers: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Answer]:
    """What each deployment needs, the cheapest that meets the target first (of equal ones that
    with most to spare), then those that do not, the nearest first.

    Args:
        prices: hardware -> US dollars an hour for one device; without, devices are counted.
        num_workers: processes. progress: is told of each deployment that is done.
    """
    tasks = [
        Search(
            deployment,
            load,
            target,
            tuple(seeds),
            (prices or {}).get(deployment.hardware),
            calibration,
            max_replicas,
        )
        for deployment in candidates
    ]
    return ranked(run_all(search, tasks, num_workers, progress), target)


def ranked(answers: Iterable[Answer], target: Target) -> list[Answer]:
    def place(answer: Answer) -> tuple[int, float, float]:
        if answer.trial is None:
            return 2, 0.0, 0.0
        share = round(answer.trial.worst(target)[0], 2)
        if answer.met:
            return 0, answer.cost, share
        return 1, float(answer.trial.num_unfit > 0), share

    return sorted(answers, key=place)


def in_words(answers: Sequence[Answer], target: Target, num_seeds: int) -> str:
    """What to take, what binds, and what comes next; or how near the best came."""
    wanted = " and ".join(
        f"{kind.upper()} p99 of {digits(most)} ms" for kind, most in target.most_ms.items()
    )
    best = answers[0]
    if not best.met or best.trial is None:
        return nothing(best, target, wanted)
    p99 = " and ".join(
        f"{kind.upper()} {digits(best.trial.p99_ms[kind])} ms" for kind in target.most_ms
    )
    runs = f"the worst of {num_seeds} seeds" if num_seeds > 1 else "one workload"
    lines = [
        f"Take {name(best)}: {needs(best)}.",
        f"Wanted: {wanted}, with {target.margin:.0%} to spare; p99 there, {runs}: {p99}.",
        binds(best, target),
    ]
    others = [answer for answer in answers if answer.met and answer.devices != best.devices]
    if others:
        more = others[0].cost / best.cost - 1 if best.cost else 0.0
        dearer = f", {more:.0%} more" if more > 5e-3 else ", which costs the same"
        lines.append(f"Next: {name(others[0])}: {needs(others[0])}{dearer}.")
    else:
        lines.append("No other devices meet it.")
    return "\n".join(lines)


def nothing(best: Answer, target: Target, wanted: str) -> str:
    if best.trial is None:
        return f"No setting can run. {name(best)}: {best.error}"
    if best.trial.num_unfit:
        return (
            f"No setting meets it. {name(best)}: {best.error}, so that they never fit or are cut."
        )
    _, kind = best.trial.worst(target)
    found, most = best.trial.p99_ms[kind], target.most_ms[kind]
    return (
        f"No setting meets {wanted} with {target.margin:.0%} to spare.\n"
        f"Nearest: {name(best)} ({best.error}): {kind.upper()} p99 is {digits(found)} ms, "
        f"{found / most:.2f} times the target."
    )


def binds(answer: Answer, target: Target) -> str:
    """Which target is in the way of something cheaper."""
    assert answer.trial is not None
    if answer.fewer is not None:
        _, kind = answer.fewer.worst(target)
        one = answer.fewer.num_replicas
        return (
            f"What binds is {kind.upper()}: with {count(one, 'replica')} its p99 is "
            f"{digits(answer.fewer.p99_ms[kind])} ms."
        )
    share, kind = answer.trial.worst(target)
    return f"One replica does it; nearest to its target is {kind.upper()}, at {share:.0%} of it."


def name(answer: Answer) -> str:
    values = ((axis, getattr(answer.deployment, axis)) for axis in AXES)
    return ", ".join(said(axis, value) for axis, value in values)


def needs(answer: Answer) -> str:
    assert answer.trial is not None
    devices = count(answer.num_devices, "device")
    text = f"{count(answer.trial.num_replicas, 'replica')} ({devices})"
    if answer.hourly is not None:
        text += f", ${answer.hourly:,.2f} an hour"
    if answer.trial.cost_per_million is not None:
        text += f", ${digits(answer.trial.cost_per_million)} per million tokens"
    return text


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def table(answers: Sequence[Answer], target: Target, most: int = 8) -> str:
    """The best of each kind of devices as a Markdown table."""
    kinds: dict[tuple[str, int], Answer] = {}
    for answer in answers:
        kinds.setdefault(answer.devices, answer)
    answers = list(kinds.values())
    priced = any(answer.hourly is not None for answer in answers)
    heads = ["hardware", "TP", "seqs", "tokens", "policy", "replicas", "devices"]
    heads += ["$ an hour", "$ per M tokens"] if priced else []
    heads += [f"{kind.upper()} p99, ms" for kind in target.most_ms] + ["meets it"]
    lines = [line(heads), line(["---"] * len(heads))]
    for answer in answers[:most]:
        cells = [str(getattr(answer.deployment, axis)) for axis in AXES]
        if answer.trial is None:
            cells += [""] * (len(heads) - len(cells) - 1) + [f"cannot run: {answer.error}"]
        else:
            cells += [str(answer.trial.num_replicas), str(answer.num_devices)]
            if priced:
                dear = answer.hourly, answer.trial.cost_per_million
                cells += ["-" if value is None else digits(value) for value in dear]
            cells += [digits(answer.trial.p99_ms[kind]) for kind in target.most_ms]
            cells += ["yes" if answer.met else f"no: {answer.error}"]
        lines.append(line(cells))
    left = len(answers) - most
    return "\n".join([*lines, *([f"\nand {left} more"] if left > 0 else [])])


def as_json(answer: Answer, target: Target) -> dict[str, Any]:
    """One answer."""
    trial = answer.trial
    return {
        "setting": {axis: getattr(answer.deployment, axis) for axis in AXES},
        "met": answer.met,
        "num_replicas": trial.num_replicas if trial else None,
        "num_devices": answer.num_devices if trial else None,
        "hourly": answer.hourly,
        "cost_per_million_tokens": trial.cost_per_million if trial else None,
        "p99_ms": trial.p99_ms if trial else None,
        "share_of_target": trial.worst(target)[0] if trial else None,
        "error": answer.error,
    }
