"""All built-in policies beside one another: simulated over seeds; live, beside a simulation.

    python benchmarks/policies.py [--simulated | --live] [--keep DIR | --from DIR] [--json FILE]

Simulated are two workloads of Qwen3 4B on an L4, each drawn anew for each seed and served under all
policies. Live, a smaller one of SmolLM2 goes through the engine on a real clock, --rounds times
under each policy in turns, recorded; nothing else should run meanwhile. The step times of the first
recording of fcfs are fitted, the same requests simulated with them under each policy, and the ranks
compared. --keep leaves the recordings in DIR, and --from compares those in DIR anew.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import sqrt
from pathlib import Path
from random import Random
from statistics import correlation, mean, variance
from typing import Any

from msgspec.structs import replace

from nanovllm.core.policies import POLICIES
from nanovllm.recording import Arrival, Header, Record, read_recording
from nanovllm.sim.deployment import Deployment
from nanovllm.sim.report import Report
from nanovllm.sim.rerun import report_of
from nanovllm.sim.run import Engine, simulate
from nanovllm.sim.stats import T95, difference, interval
from nanovllm.sim.steps import fit_steps
from nanovllm.sim.workload import Synthetic, make_workload
from nanovllm.traces import TraceRequest

Values = dict[str, float]

# What is compared: the path in a report, what it is multiplied by, and decimals.
METRICS: dict[str, tuple[tuple[str, ...], float, int]] = {
    "TTFT mean, s": (("ttft_ms", "mean"), 1e-3, 2),
    "TTFT p99, s": (("ttft_ms", "p99"), 1e-3, 2),
    "urgent TTFT mean, s": (
        ("fairness", "priorities", "groups", "1", "ttft_ms", "mean"), 1e-3, 2
    ),
    "small tenant TTFT mean, s": (
        ("fairness", "tenants", "groups", "small", "ttft_ms", "mean"), 1e-3, 2
    ),
    "TPOT p99, ms": (("tpot_ms", "p99"), 1.0, 0),
    "e2e mean, s": (("e2e_ms", "mean"), 1e-3, 2),
    "goodput, 1/s": (("goodput",), 1.0, 2),
    "fairness, TTFT": (("fairness", "tenants", "jain_index_ttft"), 1.0, 2),
    "hit rate": (("prefix_cache_hit_rate",), 1.0, 2),
    "preemptions": (("num_preemptions",), 1.0, 0),
}  # fmt: skip


def values_of(report: dict[str, Any]) -> Values:
    found = {}
    for name, (path, factor, _) in METRICS.items():
        value: Any = report
        for key in path:
            value = value.get(key) or {}
        found[name] = factor * (value or 0.0)
    return found


# Workloads


def bursts(seed: int) -> Iterator[TraceRequest]:
    """Ten at a time: six of ten are short and urgent, the others long; a large tenant has four of
    five of both kinds."""
    rng, now_s = Random(seed), 0.0
    for _ in range(40):
        for _ in range(10):
            if rng.random() < 0.6:
                lengths = rng.randint(50, 400), rng.randint(20, 120)
                priority, targets = 1, (1.0, 0.06)
            else:
                lengths = rng.randint(1000, 4000), rng.randint(200, 500)
                priority, targets = 2, (20.0, 0.2)
            tenant = "large" if rng.random() < 0.8 else "small"
            yield TraceRequest(now_s, *lengths, (), priority, tenant, *targets)
        now_s += rng.expovariate(0.25)


CHAT = Synthetic(
    num_requests=500,
    request_rate=0.6,
    turns=5,
    think_s=6.0,
    prompt_tokens=120,
    output_tokens=150,
    system_prompts=6,
    system_prompt_tokens=1200,
    tenants=4,
)


def small(seed: int, most: int = 64) -> list[TraceRequest]:
    """For a CPU: half are short and urgent and begin with one of four system prompts, the others
    are longer; eight at a time, faster than they can be served."""
    rng, found = Random(seed), list[TraceRequest]()
    for i in range(most):
        now_s = 1.2 * (i // 8)
        if rng.random() < 0.5:
            lengths = 96 + rng.randint(8, 31), rng.randint(8, 40)
            pieces: tuple[tuple[str, int], ...] = ((f"system-{rng.randrange(4)}", 96),)
            priority, targets = 1, (2.0, 0.1)
        else:
            lengths, pieces = (rng.randint(256, 480), rng.randint(50, 120)), ()
            priority, targets = 2, (10.0, 0.2)
        tenant = "large" if rng.random() < 0.75 else "small"
        found.append(TraceRequest(now_s, *lengths, pieces, priority, tenant, *targets))
    return found


# Simulated


def simulated(num_seeds: int) -> dict[str, dict[str, list[Values]]]:
    """workload -> policy -> the values of each seed."""
    result: dict[str, dict[str, list[Values]]] = {"bursts": {}, "chat": {}}
    for policy in POLICIES:
        common: Any = {"hardware": "l4", "model": "qwen3-4b", "scheduling_policy": policy}
        burst = Deployment(max_num_seqs=64, **common)
        chat = Deployment(max_num_seqs=32, num_kv_blocks=1500, **common)
        for name, deployment in (("bursts", burst), ("chat", chat)):
            result[name][policy] = []
            for seed in range(num_seeds):
                requests = bursts(seed) if name == "bursts" else make_workload(CHAT, seed)
                report = Report(2.0, 0.06)  # of chats; those of bursts bring their own
                simulate(requests, deployment.engine(), deployment.cost(), report)
                result[name][policy].append(values_of(report.result()))
    return result


def table(policies: dict[str, list[Values]]) -> str:
    """In Markdown: means over seeds; for fcfs with half of their 95% interval, for the others with
    the paired difference from fcfs, or ~ if that is within the noise or below half a percent."""
    base = policies["fcfs"]
    shown = [name for name in METRICS if any(value[name] for value in base)]
    lines = [f"| | {' | '.join(shown)} |", "|---|" + "---:|" * len(shown)]
    for policy, runs in policies.items():
        cells = []
        for name in shown:
            first, own = [run[name] for run in base], [run[name] for run in runs]
            cells.append(cell(first, own, METRICS[name][2], policy == "fcfs"))
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(base: list[float], values: list[float], digits: int, is_base: bool) -> str:
    own = interval(values)
    text = f"{own.mean:.{digits}f}"
    if is_base:
        return text if own.half is None else f"{text} ± {own.half:.{digits}f}"
    if values == base:
        return f"{text} (=)"
    found = difference(base, values)
    if found is None:  # a base of 0
        return text
    if found.half is not None and not (found.sure and abs(found.mean) >= 0.005):
        return f"{text} (~)"
    half = "" if found.half is None else f" ± {100 * found.half:.0f}"
    return f"{text} ({100 * found.mean:+.0f}%{half})"


# Live

ENGINE: Any = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "num_kv_blocks": 160}


def prompt_of(request: TraceRequest, number: int, vocab_size: int) -> list[int]:
    """Random ids, the same for the same piece."""
    ids: list[int] = []
    for name, size in (*request.pieces, (f"request-{number}", request.num_prompt_tokens)):
        rng = Random(name)
        ids += [rng.randrange(100, vocab_size) for _ in range(size)]
    return ids[: request.num_prompt_tokens]


def run_live(requests: Sequence[TraceRequest], policy: str, model: str, path: str) -> None:
    """Serve requests as they come, and record it."""
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

    settings = {**ENGINE, "scheduling_policy": policy, "max_model_len": 1024}
    with LLM(model, record=path, **settings) as llm:
        engine, coming = llm.engine, []
        for i, one in enumerate(requests):
            params = SamplingParams(max_tokens=one.num_output_tokens, ignore_eos=True)
            prompt = {
                "prompt_token_ids": prompt_of(one, i, engine.vocab_size),
                "tenant": one.tenant,
                "ttft_target_ms": 1000 * (one.ttft_target_s or 1.0),
                "tpot_target_ms": 1000 * (one.tpot_target_s or 1.0),
            }
            coming.append((one.arrival_s, engine.prepare(prompt, params, one.priority or 0)))
        coming.reverse()
        gc.collect()
        start_s = time.monotonic()
        while coming or engine.core.has_unfinished:
            while coming and start_s + coming[-1][0] <= time.monotonic():
                engine.submit(coming.pop()[1])
            if engine.core.has_unfinished:
                engine.step()
            else:
                time.sleep(max(start_s + coming[-1][0] - time.monotonic(), 0.0))


def as_due(records: Sequence[Record], requests: Sequence[TraceRequest]) -> list[Record]:
    """The recording of a run as its users saw it: a request came when it was due, though an engine
    in a step saw it later."""
    first = next(one for one in records if isinstance(one, Arrival))
    start_s = first.time_s - requests[0].arrival_s
    return [
        replace(one, arrival_s=start_s + requests[one.seq_id - first.seq_id].arrival_s)
        if isinstance(one, Arrival)
        else one
        for one in records
    ]


def compare(folder: Path, requests: Sequence[TraceRequest], rounds: int) -> dict[str, Any]:
    """Live and simulated values of each policy, and how far their ranks agree."""
    live: dict[str, list[Values]] = {policy: [] for policy in POLICIES}
    predicted: dict[str, Values] = {}
    cost = fit_steps(list(read_recording(str(folder / "fcfs-1.jsonl"))))
    for policy in POLICIES:
        for i in range(rounds):
            records = list(read_recording(str(folder / f"{policy}-{i + 1}.jsonl")))
            live[policy].append(values_of(report_of(as_due(records, requests)).result()))
        header = records[0]
        assert isinstance(header, Header)
        engine = Engine(
            num_kv_blocks=header.num_blocks,
            max_model_len=header.max_num_tokens,
            block_size=header.block_size,
            max_num_seqs=header.max_num_seqs,
            max_num_batched_tokens=header.max_num_batched_tokens,
            scheduling_policy=policy,
        )
        predicted[policy] = values_of(simulate(requests, engine, cost).result())
    compared = {
        name: agreement(
            {policy: [run[name] for run in runs] for policy, runs in live.items()},
            {policy: values[name] for policy, values in predicted.items()},
        )
        for name in METRICS
    }
    return {"live": live, "simulated": predicted, "ranks": compared}


def agreement(live: dict[str, list[float]], predicted: dict[str, float]) -> dict[str, Any]:
    """Whether two rankings of policies are alike.

    Two policies are within the noise if their live means differ by less than rounds alone would
    make them: Student's t times the standard deviation of a difference, that of all policies
    pooled. One round says nothing of noise, and none is taken off.

    Returns:
        spearman: of the means (None if all are equal on one side); noise: in the metric's unit;
        the number of pairs within_noise, of others that agree, and those that do not.
    """
    rounds = len(next(iter(live.values())))
    noise = 0.0
    if rounds > 1:
        pooled = mean(variance(runs) for runs in live.values())
        noise = T95[min(len(live) * (rounds - 1), 30) - 1] * sqrt(2 * pooled / rounds)
    means = {policy: mean(runs) for policy, runs in live.items()}
    found: dict[str, Any] = {"noise": noise, "within_noise": 0, "agree": 0, "differ": []}
    for one, other in combinations(live, 2):
        apart = means[one] - means[other]
        if abs(apart) <= noise:
            found["within_noise"] += 1
        elif apart * (predicted[one] - predicted[other]) > 0:
            found["agree"] += 1
        else:
            found["differ"].append(f"{one}, {other}")
    sides = ranks(list(means.values())), ranks([predicted[policy] for policy in means])
    flat = any(min(side) == max(side) for side in sides)
    return {"spearman": None if flat else correlation(*sides), **found}


def ranks(values: list[float]) -> list[float]:
    """Of each its place by size; equal ones share the mean of theirs (Spearman, 1904)."""
    return [sum((b < a) + (b <= a) for b in values) / 2 for a in values]


def live_table(result: dict[str, Any]) -> str:
    """In Markdown: live / simulated."""
    lines = [f"| live / simulated | {' | '.join(METRICS)} |", "|---|" + "---:|" * len(METRICS)]
    for policy, runs in result["live"].items():
        cells = [
            f"{mean(run[name] for run in runs):.{digits}f} / "
            f"{result['simulated'][policy][name]:.{digits}f}"
            for name, (_, _, digits) in METRICS.items()
        ]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    lines += [
        "",
        "| | Spearman | pairs agree | within the noise | differ |",
        "|---|---:|---:|---:|---|",
    ]
    for name, found in result["ranks"].items():
        rho = "-" if found["spearman"] is None else f"{found['spearman']:.2f}"
        noise = f"{found['within_noise']} (± {found['noise']:.3g})"
        differ = "; ".join(found["differ"])
        lines.append(f"| {name} | {rho} | {found['agree']} | {noise} | {differ} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulated", action="store_true", help="only what needs no model")
    parser.add_argument("--live", action="store_true", help="only the live part")
    parser.add_argument("--model", default="smollm2-135m", help="of the live part")
    parser.add_argument("--seeds", type=int, default=10, help="workloads of each kind (default 10)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="live runs of each policy (default 2)"
    )
    parser.add_argument("--most", type=int, default=64, help="requests of a live run (default 64)")
    parser.add_argument("--keep", metavar="DIR", help="where to leave the recordings")
    parser.add_argument("--from", dest="source", metavar="DIR", help="of --keep; runs nothing")
    parser.add_argument("--json", metavar="FILE", help="where to write all values")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if not args.live:
        result["simulated"] = simulated(args.seeds)
        for name, policies in result["simulated"].items():
            print(
                f"{name}: Qwen3 4B on an L4, simulated, {args.seeds} seeds\n\n{table(policies)}\n"
            )
    if not args.simulated:
        requests = small(0, args.most)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(args.source or args.keep or folder)
            if not args.source:
                place.mkdir(parents=True, exist_ok=True)
                run_live(small(1, 12), "fcfs", args.model, os.devnull)  # warms up
                for name in (f"{p}-{i + 1}" for i in range(args.rounds) for p in POLICIES):
                    start_s = time.monotonic()
                    path = str(place / f"{name}.jsonl")
                    run_live(requests, name.rpartition("-")[0], args.model, path)
                    print(f"{name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr)
            result["live"] = compare(place, requests, args.rounds)
        print(f"{args.model} on this machine, {args.rounds} rounds\n\n{live_table(result['live'])}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
