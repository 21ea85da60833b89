"""Fitting the roofline to what an engine was seen to do, by searching over simulations; and what a
calibration file holds: that, or the step times of a recording (steps.py)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import exp, log
from typing import Any

import numpy as np

from nanovllm.errors import ConfigError
from nanovllm.sim.cost import Calibration, Roofline
from nanovllm.sim.hardware import Hardware
from nanovllm.sim.report import Finished, Report
from nanovllm.sim.run import Engine, simulate
from nanovllm.sim.shape import ModelShape
from nanovllm.sim.steps import StepTimes
from nanovllm.traces import TraceRequest

# What is compared, and how far off each may be to weigh the same.
METRICS = {
    (kind, point): (0.01 if kind == "tpot_ms" else 0.02) if point == "mean" else 0.04
    for kind in ("tpot_ms", "ttft_ms")
    for point in ("mean", "p50", "p90", "p99")
}
FORMS: dict[str, type[Calibration] | type[StepTimes]] = {
    "roofline": Calibration,
    "steps": StepTimes,
}
# Compute, bandwidth, overhead: one search may end in a worse place than another.
STARTS = (0.9, 0.85, 1e-3), (0.55, 0.8, 1e-3)


@dataclass(frozen=True, slots=True)
class Measured:
    """Requests that an engine served, and the report of it."""

    requests: list[TraceRequest]
    report: dict[str, Any]


def read_requests(path: str) -> Measured:
    """From JSON lines of `input_toks, output_toks, queued_ts, first_token_ts, last_token_ts` and
    maybe `scheduled_ts`, in seconds on one clock; all that any engine can log.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong; its number is told.
    """
    rows: list[Finished] = []
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    rows.append(read_row(json.loads(line)))
    except OSError as error:
        raise ConfigError("requests", path, f"cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ConfigError("requests", path, f"line {number} has no {error.args[0]}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError("requests", path, f"line {number}: {error}") from error
    if not rows:
        raise ConfigError("requests", path, "has no requests")
    rows.sort(key=lambda row: row.arrival_s)
    report = Report()
    for row in rows:
        report.add(row)
    start_s = rows[0].arrival_s
    requests = [
        TraceRequest(row.arrival_s - start_s, row.num_prompt_tokens, row.num_output_tokens)
        for row in rows
    ]
    return Measured(requests, report.result())


def read_row(row: Mapping[str, Any]) -> Finished:
    """One request.

    Raises:
        KeyError, ValueError, TypeError: a field is missing or impossible.
    """
    queued_s = float(row["queued_ts"])
    scheduled_s = float(row.get("scheduled_ts", queued_s))
    times = queued_s, scheduled_s, float(row["first_token_ts"]), float(row["last_token_ts"])
    lengths = int(row["input_toks"]), int(row["output_toks"])
    if min(lengths) < 1:
        raise ValueError("prompt and output need at least 1 token")
    if not np.isfinite(times).all() or list(times) != sorted(times):
        raise ValueError("its times are not in order")
    return Finished(*times, *lengths)


def as_file(fitted: Calibration | StepTimes) -> dict[str, Any]:
    """What a calibration file says of a fit."""
    [form] = (name for name, kind in FORMS.items() if isinstance(fitted, kind))
    return {"form": form, **fitted.as_dict()}


def read_calibration(path: str) -> Calibration | StepTimes:
    """From a file that `nanovllm calibrate` wrote; what else it holds is ignored.

    Raises:
        ConfigError: it cannot be read, or holds no calibration.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        form: Any = FORMS[found.get("form", "roofline")]
        values = [found[entry.name] for entry in fields(form) if entry.init]
        fitted: Calibration | StepTimes = form(
            *(tuple(value) if isinstance(value, list) else value for value in values)
        )
        return fitted
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"no file that `nanovllm calibrate` wrote ({type(error).__name__}: {error})"
        raise ConfigError("calibration", path, why) from error


def errors(simulated: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float]:
    """Signed relative error of each of METRICS; one that was not measured has none."""
    return {
        f"{kind} {point}": simulated[kind][point] / measured[kind][point] - 1
        for kind, point in METRICS
        if measured[kind][point]
    }


def calibrate(
    measured: Measured, engine: Engine, hardware: Hardware, shape: ModelShape, tp: int = 1
) -> tuple[Calibration, dict[str, float]]:
    """The numbers with which a simulation comes nearest to what was measured.

    Three are fitted (compute, bandwidth, overhead of a step), on a logarithmic scale, by the
    method of Nelder and Mead (1965) from two starts. The same input gives the same output.

    Returns:
        the calibration, and the errors that are left.
    """

    def compare(point: Sequence[float]) -> dict[str, float]:
        cost = Roofline(hardware, shape, tp, calibration_at(point))
        return errors(simulate(measured.requests, engine, cost).result(), measured.report)

    def loss(point: Sequence[float]) -> float:
        if not all(-7 < value < 0.6 for value in point[:2]) or not -14 < point[2] < 2:
            return 1e9
        found = compare(point)
        weights = {f"{kind} {name}": tolerance for (kind, name), tolerance in METRICS.items()}
        return sum((error / weights[name]) ** 2 for name, error in found.items())

    found = [minimize(loss, [log(value) for value in start]) for start in STARTS]
    _, best = min(found)
    return calibration_at(best), compare(best)


def calibration_at(point: Sequence[float]) -> Calibration:
    """Six digits are more than is known, and read better."""
    return Calibration(*(float(f"{exp(value):.6g}") for value in point))


def minimize(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], most: int = 50
) -> tuple[float, list[float]]:
    """The least value of a function and where it is, by the method of Nelder and Mead.

    Args:
        most: times that the function may be called, about.
    """
    count = len(start)
    points = [np.array(start) + 0.15 * np.eye(count + 1, count, -1)[i] for i in range(count + 1)]
    simplex = [(loss(point), i, point) for i, point in enumerate(points)]
    calls = made = count + 1
    while calls < most:
        simplex.sort(key=lambda entry: entry[:2])
        worst, centre = simplex[-1], np.mean([point for *_, point in simplex[:-1]], axis=0)
        if np.abs(worst[2] - simplex[0][2]).max() < 2e-3:
            break
        away = centre - worst[2]
        tries = [(loss(centre + away), made, centre + away)]
        if tries[0][0] < simplex[0][0]:
            tries.append((loss(centre + 2 * away), made, centre + 2 * away))
        elif tries[0][0] >= simplex[-2][0]:
            side = 0.5 if tries[0][0] < worst[0] else -0.5
            tries.append((loss(centre + side * away), made, centre + side * away))
        calls, made = calls + len(tries), made + 1
        simplex[-1] = min(tries, key=lambda entry: entry[0])
        if simplex[-1][0] >= worst[0]:  # nothing helped: draw all towards the best
            best = simplex[0][2]
            points = [(point + best) / 2 for *_, point in simplex[:-1]] + [(worst[2] + best) / 2]
            simplex = [simplex[0]]
            simplex += [(loss(point), made + i, point) for i, point in enumerate(points[1:])]
            calls, made = calls + count, made + count
    value, _, point = min(simplex, key=lambda entry: entry[:2])
    return value, [float(x) for x in point]
