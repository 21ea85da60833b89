"""A grid of settings over the same workloads: what each gives, and how far it is from the first."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from nanovllm.errors import ConfigError
from nanovllm.sim.deployment import Deployment
from nanovllm.sim.experiment import Load, Point, attempt, run_all
from nanovllm.sim.hardware import find_hardware
from nanovllm.sim.shape import find_shape
from nanovllm.sim.stats import Interval, difference, in_words, interval

# A name, where a report has it, what a table calls it.
METRICS = {
    "output_throughput": (("output_throughput",), "out tok/s"),
    "ttft_ms_p50": (("ttft_ms", "p50"), "TTFT p50, ms"),
    "ttft_ms_p99": (("ttft_ms", "p99"), "TTFT p99, ms"),
    "tpot_ms_p50": (("tpot_ms", "p50"), "TPOT p50, ms"),
    "tpot_ms_p99": (("tpot_ms", "p99"), "TPOT p99, ms"),
    "e2e_ms_mean": (("e2e_ms", "mean"), "end to end, ms"),
    "goodput": (("goodput",), "goodput, req/s"),
    "cost_per_million_output_tokens": (("cost_per_million_output_tokens",), "$ per M out tok"),
}
COMPARED = ("output_throughput", "ttft_ms_p99", "tpot_ms_p99")


@dataclass(frozen=True, slots=True)
class Row:
    """A setting, run once for each seed.

    Attributes:
        setting: by the names of the grid, and "request_rate" if the load is drawn.
        reports: by seed; empty if it cannot run, and `error` says why.
        num_devices: that it takes.
    """

    setting: dict[str, Any]
    reports: list[dict[str, Any]]
    error: str | None
    num_devices: int

    def values(self, metric: str) -> list[float | None]:
        """A number of each seed."""
        return [dig(report, METRICS[metric][0]) for report in self.reports]

    def interval(self, metric: str) -> Interval | None:
        """None if a run has no such number."""
        values = [value for value in self.values(metric) if value is not None]
        return interval(values) if values and len(values) == len(self.reports) else None

    def mean(self, metric: str) -> float | None:
        found = self.interval(metric)
        return None if found is None else found.mean

    def name(self, axes: Iterable[str]) -> str:
        return ", ".join(said(axis, self.setting[axis]) for axis in axes) or "as given"


def dig(report: Mapping[str, Any], path: Sequence[str]) -> float | None:
    found: Any = report
    for name in path:
        found = found[name]
    return None if found is None else float(found)


def said(axis: str, value: Any) -> str:
    """A value with what it is, where it does not say so."""
    forms = {
        "tensor_parallel_size": "TP {}",
        "max_num_seqs": "{} seqs",
        "max_num_batched_tokens": "{} tokens",
        "request_rate": "{:g} req/s",
    }
    return forms.get(axis, "{}").format(value)


def deployments(grid: Mapping[str, Sequence[Any]], others: Mapping[str, Any]) -> list[Deployment]:
    """One for each combination of a grid.

    Args:
        grid: fields of Deployment -> values; the first name varies slowest.
        others: the fields that do not vary.

    Raises:
        ConfigError: a value is impossible whatever the others are.
    """
    made = [
        Deployment(**others, **dict(zip(grid, values, strict=True)))
        for values in product(*grid.values())
    ]
    for deployment in made:
        find_hardware(deployment.hardware)
        find_shape(deployment.model)
    return made


def sweep(
    candidates: Sequence[Deployment],
    axes: Iterable[str],
    load: Load,
    rates: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    prices: Mapping[str, float] | None = None,
    calibration: str | None = None,
    num_workers: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Row]:
    """Run each deployment under each rate with each seed.

    Args:
        axes: the fields of a deployment that a row names.
        rates: requests a second; none keeps the load's own.
        prices: hardware -> US dollars an hour for one device.
        num_workers: processes. progress: is told of each simulation that is done.

    Returns:
        a row for each deployment and rate, in this order.

    Raises:
        ConfigError: a trace has no rate and no other seed.
    """
    if not load.drawn and (len(seeds) > 1 or rates):
        field, value = ("request_rate", rates) if rates else ("seeds", len(seeds))
        raise ConfigError(field, value, "a trace is served once, as it came; leave this out")
    loads = [load.at(rate) for rate in rates] or [load]
    settings = list(product(candidates, loads))
    points = [
        Point(
            deployment=deployment,
            load=at,
            seed=seed,
            price_per_hour=(prices or {}).get(deployment.hardware),
            calibration=calibration,
        )
        for deployment, at in settings
        for seed in seeds
    ]
    found = run_all(attempt, points, num_workers, progress)
    rows, names = [], list(axes)
    for i, (deployment, at) in enumerate(settings):
        mine = found[i * len(seeds) : (i + 1) * len(seeds)]
        setting = {name: getattr(deployment, name) for name in names}
        if load.drawn:
            setting["request_rate"] = at.synthetic.request_rate
        error = next((one["error"] for one in mine if one["error"]), None)
        reports = [] if error else [one["report"] for one in mine]
        rows.append(Row(setting, reports, error, deployment.tensor_parallel_size))
    return rows


def baseline(rows: Sequence[Row], row: Row) -> Row:
    """The first setting under the same load."""
    rate = row.setting.get("request_rate")
    return next(one for one in rows if one.setting.get("request_rate") == rate)


def against(rows: Sequence[Row], row: Row, metric: str) -> Interval | None:
    """How far a row is from the first setting under the same workloads; None if it is that."""
    base = baseline(rows, row)
    if base is row or base.error or row.error:
        return None
    return difference(base.values(metric), row.values(metric))


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (throughput, latency) of which no other is better in one and as good in the
    other, by throughput; of equal ones the first."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept[::-1]


def on_frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows on the frontier of output throughput and mean time from end to end."""
    points: list[tuple[float, float]] = []
    able: list[Row] = []
    for row in rows:
        throughput, latency = row.mean("output_throughput"), row.mean("e2e_ms_mean")
        if throughput is not None and latency is not None:
            points.append((throughput, latency))
            able.append(row)
    return [able[i] for i in frontier(points)]


def varied(rows: Sequence[Row]) -> list[str]:
    """The parts of a setting that are not the same in all rows."""
    return [name for name in rows[0].setting if len({row.setting[name] for row in rows}) > 1]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, and what it needs to be read."""
    axes = varied(rows)
    shown = [name for name in METRICS if any(row.mean(name) is not None for row in rows)]
    several = any(axis != "request_rate" for axis in axes)
    compared = [name for name in COMPARED if name in shown] if several else []
    best = on_frontier(rows)
    heads = [axis.replace("_", " ") for axis in axes] or ["setting"]
    heads += [METRICS[name][1] for name in shown]
    heads += [f"Δ {METRICS[name][1].partition(',')[0]}" for name in compared] + ["frontier"]
    lines = [line(heads), line(["---"] * len(heads))]
    for row in rows:
        values = (row.setting[axis] for axis in axes)
        cells = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        cells = cells or ["as given"]
        if row.error:
            cells += [f"cannot run: {row.error}"] + [""] * (len(heads) - len(cells) - 1)
        else:
            cells += [number(row.interval(name)) for name in shown]
            first = baseline(rows, row) is row
            cells += [
                "baseline" if first else in_words(against(rows, row, name)) for name in compared
            ]
            cells += ["yes" if any(row is one for one in best) else ""]
        lines.append(line(cells))
    return "\n".join([*lines, "", *notes(rows, compared)])


def notes(rows: Sequence[Row], compared: Sequence[str]) -> list[str]:
    count = max(len(row.reports) for row in rows)
    texts = ["frontier: no other row has more output throughput in less mean time end to end."]
    if count > 1:
        texts.append(f'Means of {count} seeds; ± and "within the noise": 95% intervals (t).')
    elif rows[0].setting.get("request_rate") is None:
        texts.append("One trace: no interval.")
    else:
        texts.append("One seed: no interval; --seeds 5 gives them.")
    if compared:
        texts.append("Δ: against the first setting under the same workload, seed by seed.")
    return texts


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(found: Interval | None) -> str:
    """Three digits are more than a simulation knows."""
    if found is None:
        return "-"
    shown = digits(found.mean)
    return f"{shown} ± {digits(found.half)}" if found.half else shown


def digits(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def as_json(rows: Sequence[Row], seeds: Sequence[int], about: Mapping[str, Any]) -> dict[str, Any]:
    """All of it: each simulation, and each setting's means and differences."""
    points: list[dict[str, Any]] = []
    for row in rows:
        nothing: list[dict[str, Any] | None] = [None] * len(seeds)
        reports = row.reports or nothing
        points += [
            {"setting": row.setting, "seed": seed, "report": report, "error": row.error}
            for seed, report in zip(seeds, reports, strict=True)
        ]
    summary = [
        {
            "setting": row.setting,
            "error": row.error,
            "metrics": {name: pair(row.interval(name)) for name in METRICS},
            "against_first": {name: pair(against(rows, row, name)) for name in COMPARED},
        }
        for row in rows
    ]
    return {**about, "points": points, "summary": summary}


def pair(found: Interval | None) -> dict[str, float | None] | None:
    """An interval as JSON; `half` is half its width."""
    return None if found is None else {"mean": found.mean, "half": found.half}
