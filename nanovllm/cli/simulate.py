"""`nanovllm simulate`: a workload, served in virtual time on hardware that need not be here."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanovllm.checks import check_fields, ranged
from nanovllm.cli.bench import check_writable, write
from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.errors import ConfigError
from nanovllm.sim.deployment import Deployment as Deployment

if TYPE_CHECKING:
    from nanovllm.core.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """How it is simulated and what is told.

    Args:
        workload: a trace (Azure's CSV, Mooncake's or own JSON lines), "synthetic", or
            "synthetic:name=value,...", with the names of the flags below.
        calibration: a file that `nanovllm calibrate` wrote. If it was fitted to a recording, it
            holds for that model and machine, and hardware and model only say how many blocks fit.
        seed: of a synthetic workload.
        ttft_target_ms, tpot_target_ms: what counts as good for requests that bring no targets.
        price_per_hour: of all devices together, for the cost of a million tokens.
        json: the file to write the report to.
        events: the file to write the event log to, as JSON lines.

    Raises:
        ConfigError: a value is impossible.
    """

    workload: str = "synthetic"
    calibration: str | None = None
    seed: int = ranged(0, 0, 2**62)
    ttft_target_ms: float | None = ranged(None, 1e-3, 1e9)
    tpot_target_ms: float | None = ranged(None, 1e-3, 1e9)
    price_per_hour: float | None = ranged(None, 0.0, 1e9)
    json: str | None = None
    events: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        check_writable("json", self.json)
        check_writable("events", self.events)


def run(argv: list[str]) -> int:
    from nanovllm.sim.workload import Synthetic, find_workload

    parser = Parser(
        prog="nanovllm simulate",
        description="Serve a workload in virtual time and report what users would have seen.",
    )
    for kind in (Simulation, Deployment, Synthetic):
        add_flags(parser, kind)
    args = parser.parse_args(argv)
    deployment, how = Deployment(**given(args, Deployment)), Simulation(**given(args, Simulation))
    synthetic = Synthetic(**given(args, Synthetic))

    from nanovllm.sim.calibrate import read_calibration
    from nanovllm.sim.report import Report, table
    from nanovllm.sim.run import simulate

    cost = deployment.cost(read_calibration(how.calibration) if how.calibration else None)
    requests, shares = find_workload(how.workload, synthetic, how.seed)
    engine = deployment.engine().caching_if(shares)
    ttft_s, tpot_s = (ms and ms / 1000 for ms in (how.ttft_target_ms, how.tpot_target_ms))
    report = Report(ttft_s, tpot_s, how.price_per_hour)
    with event_file(how.events) as sink:
        simulate(requests, engine, cost, report, sink)
    result = report.result()
    print(table(result))
    write(how.json, result)
    return 0


@contextmanager
def event_file(path: str | None) -> "Iterator[Callable[[Event], None] | None]":
    """A sink that writes events as JSON lines to a file, which is there when all are written."""
    if path is None:
        yield None
        return
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            yield lambda event: print(json.dumps(event._asdict()), file=file)
        os.replace(part, path)
    except OSError as error:
        raise ConfigError("events", path, f"cannot be written: {error.strerror}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)
