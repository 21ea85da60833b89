"""How true the simulator is on this machine: one live run calibrates it, and it predicts others.

python benchmarks/sim_accuracy.py [--keep FOLDER | --from FOLDER] [--json FILE]

Four workloads with Poisson arrivals go through the engine on a real clock, each recorded. The step
times of the first are fitted, as by `nanovllm calibrate --recording`. The others differ from it in
rate, in lengths, in policy and max_num_seqs; simulated with those step times they are compared with
the median of three live runs. Nothing else should run meanwhile. --keep leaves the recordings in
a folder, and --from compares those of a folder anew.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanovllm.core.events import Kind
from nanovllm.recording import Arrival, Finish, Header, Record, Step, read_recording
from nanovllm.sim.cost import CostModel
from nanovllm.sim.report import Finished, Report
from nanovllm.sim.run import Engine, simulate
from nanovllm.sim.steps import check, fit_steps, steps_to_fit
from nanovllm.sim.workload import Synthetic, make_workload
from nanovllm.traces import TraceRequest

# What is compared, and how far off it may be.
METRICS = {
    "output_throughput": 0.05,
    "tpot_ms mean": 0.05,
    "ttft_ms mean": 0.10,
    "ttft_ms p99": 0.10,
}


@dataclass(frozen=True, slots=True)
class Run:
    """A workload and what differs in the engine."""

    workload: Synthetic
    seed: int
    max_num_seqs: int = 16
    scheduling_policy: str = "fcfs"

    def requests(self) -> list[TraceRequest]:
        return list(make_workload(self.workload, self.seed))


def workload(rate: float, count: int, prompt: int, output: int, spread: float = 0.8) -> Synthetic:
    return Synthetic(
        request_rate=rate,
        num_requests=count,
        prompt_tokens=prompt,
        output_tokens=output,
        length_spread=spread,
    )


FIRST = "calibration"
RUNS = {
    FIRST: Run(workload(2.5, 110, 220, 70, 1.2), 0),
    "rate": Run(workload(1.5, 60, 160, 60), 1),
    "lengths": Run(workload(1.0, 45, 350, 100, 0.5), 2),
    "policy": Run(workload(12.0, 100, 160, 60), 3, 6, "prefill-first"),
}


def run_live(run: Run, model: str, path: str) -> None:
    """Serve a workload as it comes, and record it."""
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

    requests, rng = run.requests(), random.Random(run.seed)
    settings = {"max_num_seqs": run.max_num_seqs, "scheduling_policy": run.scheduling_policy}
    with LLM(model, record=path, max_model_len=4096, max_num_batched_tokens=512, **settings) as llm:
        engine, pending = llm.engine, []
        for one in requests:
            params = SamplingParams(max_tokens=one.num_output_tokens, ignore_eos=True)
            prompt = [rng.randrange(100, engine.vocab_size) for _ in range(one.num_prompt_tokens)]
            pending.append((one.arrival_s, engine.prepare(prompt, params)))
        pending.reverse()
        gc.collect()
        start_s = time.monotonic()
        while pending or engine.core.has_unfinished:
            while pending and start_s + pending[-1][0] <= time.monotonic():
                engine.submit(pending.pop()[1])
            if engine.core.has_unfinished:
                engine.step()
            else:
                time.sleep(max(start_s + pending[-1][0] - time.monotonic(), 0.0))


def report_of(records: Sequence[Record], requests: Sequence[TraceRequest]) -> dict[str, Any]:
    """The report of a live run. A request came when it was due: the engine, in a step, may have
    seen it later."""
    report = Report()
    arrivals = {one.seq_id: one for one in records if isinstance(one, Arrival)}
    first = next(iter(arrivals))
    start_s = arrivals[first].time_s - requests[0].arrival_s
    scheduled_s: dict[int, float] = {}
    token_s: dict[int, list[float]] = {seq_id: [] for seq_id in arrivals}
    for record in records:
        if isinstance(record, Step):
            for choice in record.choices:
                if choice.kind is Kind.ADMITTED:
                    scheduled_s.setdefault(choice.seq_id, choice.time_s)
            for seq_id in set(record.seq_ids or []).difference(record.partial, record.failed):
                token_s[seq_id].append(record.end_s)
        elif isinstance(record, Finish):
            seq_id, times = record.seq_id, token_s.pop(record.seq_id)
            for early, late in pairwise(times):
                report.add_gaps(late - early, 1)
            ends = start_s + requests[seq_id - first].arrival_s, scheduled_s[seq_id]
            lengths = arrivals[seq_id].prompt_tokens, record.output_tokens
            report.add(Finished(*ends, times[0], times[-1], *lengths))
    return report.result()


def predict(header: Header, run: Run, cost: CostModel) -> dict[str, Any]:
    """The report of the same run in virtual time."""
    engine = Engine(
        num_kv_blocks=header.num_blocks,
        max_model_len=header.max_num_tokens,
        block_size=header.block_size,
        max_num_seqs=header.max_num_seqs,
        max_num_batched_tokens=header.max_num_batched_tokens,
        enable_prefix_caching=header.enable_prefix_caching,
        scheduling_policy=header.policy,
    )
    return simulate(run.requests(), engine, cost).result()


def value(report: dict[str, Any], metric: str) -> float:
    name, _, point = metric.partition(" ")
    return float(report[name][point] if point else report[name])


def compare(folder: Path, runs: dict[str, Run], count: int) -> dict[str, Any]:
    """All errors, from the recordings in a folder."""
    records = {
        path.stem: list(read_recording(str(path)))
        for path in (folder / f"{name}.jsonl" for name in names(runs, count))
    }
    cost, result = fit_steps(records[FIRST]), dict[str, Any]()
    for name, run in runs.items():
        taken = [records[key] for key in names({name: run}, count)]
        header = taken[0][0]
        assert isinstance(header, Header)
        simulated, requests = predict(header, run, cost), run.requests()
        reports = [report_of(one, requests) for one in taken]
        result[name] = {"simulated": simulated, "live": reports, "metrics": {}}
        for metric in METRICS:
            live = [value(report, metric) for report in reports]
            found = value(simulated, metric)
            error = found / statistics.median(live) - 1
            row = {"live": live, "simulated": found, "error": error}
            result[name]["metrics"][metric] = row
    steps = {"fitted": cost.as_dict(), "errors": check(steps_to_fit(records[FIRST]))}
    return {"steps": steps, "runs": result}


def names(runs: dict[str, Run], count: int) -> Iterator[str]:
    """The recordings in the order in which they are made: if the machine gets slower in the course
    of it, it does so for all runs."""
    if FIRST in runs:
        yield FIRST
    for i in range(count):
        yield from (f"{name}-{i + 1}" for name in runs if name != FIRST)


def table(result: dict[str, Any]) -> str:
    lines = ["step times, each fifth of the calibrating run by a fit to the others:"]
    lines += [f"  {name:<14}{error:>+8.2%}" for name, error in result["steps"]["errors"].items()]
    title = f"\n{'run':<12}{'metric':<20}{'simulated':>12}{'live, median':>14}{'error':>9}"
    lines.append(f"{title}   live, least to most")
    for name, run in result["runs"].items():
        for metric, row in run["metrics"].items():
            live, error = row["live"], row["error"]
            within = "" if abs(error) <= METRICS[metric] else f", beyond {METRICS[metric]:.0%}"
            spread = f"{min(live):.2f} to {max(live):.2f}"
            middle = statistics.median(live)
            numbers = f"{row['simulated']:>12.2f}{middle:>14.2f}{error:>+9.2%}"
            lines.append(f"{name:<12}{metric:<20}{numbers}   {spread}{within}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--live", type=int, default=3, help="live runs of each (default: 3)")
    parser.add_argument("--load", type=float, default=1.0, help="multiplies all request rates")
    parser.add_argument("--most", type=int, default=10**6, help="requests of a run, at most")
    parser.add_argument("--keep", metavar="FOLDER", help="where to leave the recordings")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="of --keep; runs nothing")
    parser.add_argument("--json", metavar="FILE", help="where to write all reports")
    args = parser.parse_args()
    runs = {name: scaled(run, args.load, args.most) for name, run in RUNS.items()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(args.source or args.keep or folder)
        place.mkdir(parents=True, exist_ok=True)
        if not args.source:
            warm_up = Run(workload(100.0, 20, 100, 10), 9)
            run_live(warm_up, args.model, os.devnull)
            for name in names(runs, args.live):
                start_s = time.monotonic()
                run = runs[name.rpartition("-")[0] or name]
                run_live(run, args.model, str(place / f"{name}.jsonl"))
                print(f"{name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr)
        result = compare(place, runs, args.live)
    print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def scaled(run: Run, load: float, most: int) -> Run:
    rate, count = run.workload.request_rate * load, min(run.workload.num_requests, most)
    return replace(run, workload=replace(run.workload, request_rate=rate, num_requests=count))


if __name__ == "__main__":
    main()
