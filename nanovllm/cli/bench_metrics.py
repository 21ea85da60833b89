"""What `nanovllm bench serve` makes of the requests it sent: vLLM's metrics, by its definitions and
under its names."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(slots=True, kw_only=True)
class Record:
    """What one request came to. All times are on one clock.

    Attributes:
        num_input, num_output: tokens of prompt and answer, as the server counted them.
        arrival_s: when it was due to be sent. start_s: when it was, which is later if
            --max-concurrency held it back.
        times_s: when each chunk of the answer came.
        events: those chunks, if they were kept.
        error: why it failed; empty if it did not.
    """

    num_input: int
    num_output: int = 0
    arrival_s: float = 0.0
    start_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)
    error: str = ""

    @property
    def queue_s(self) -> float:
        return self.start_s - self.arrival_s

    @property
    def ttft_s(self) -> float:
        """Until the first chunk, whatever is in it."""
        return self.times_s[0] - self.start_s if self.times_s else 0.0

    @property
    def latency_s(self) -> float:
        """Until the last chunk that is more than a summary."""
        return self.times_s[-1] - self.start_s if self.times_s else 0.0

    @property
    def tpot_s(self) -> float:
        """Per token after the first; 0 if there is none."""
        return (self.latency_s - self.ttft_s) / max(self.num_output - 1, 1)

    @property
    def itls_s(self) -> list[float]:
        """From chunk to chunk, which may hold several tokens."""
        return [later - time_s for time_s, later in pairwise(self.times_s)]

    @property
    def text(self) -> str:
        """Of the answer, if its events were kept."""
        choices = (choice for event in self.events for choice in json.loads(event)["choices"])
        return "".join(text_of(choice) for choice in choices)


def text_of(choice: Mapping[str, Any]) -> str:
    """What a choice of a chunk adds, for completions or for a chat."""
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


@dataclass(frozen=True, slots=True)
class Metric:
    """A time that each request has, or has several of."""

    short: str
    title: str
    values_s: Callable[[Sequence[Record]], list[float]]


METRICS = {
    "ttft": Metric("TTFT", "Time to First Token", lambda done: [one.ttft_s for one in done]),
    "tpot": Metric(
        "TPOT",
        "Time per Output Token (excl. 1st token)",
        lambda done: [one.tpot_s for one in done if one.num_output > 1],
    ),
    "itl": Metric(
        "ITL", "Inter-token Latency", lambda done: [t for one in done for t in one.itls_s]
    ),
    "e2el": Metric("E2EL", "End-to-end Latency", lambda done: [one.latency_s for one in done]),
    "client_queue_time": Metric(
        "Client Queue Time", "Client-side Queueing", lambda done: [one.queue_s for one in done]
    ),
    "e2el_including_client_queue": Metric(
        "E2EL incl. Client Queue",
        "Queue-inclusive End-to-end Latency",
        lambda done: [one.latency_s + one.queue_s for one in done],
    ),
}
LIMITS: dict[str, Callable[[Record], float]] = {
    "ttft": lambda one: one.ttft_s,
    "tpot": lambda one: one.tpot_s,
    "e2el": lambda one: one.latency_s,
}
ROWS = {
    "Successful requests:": "completed",
    "Failed requests:": "failed",
    "Maximum request concurrency:": "max_concurrency",
    "Request rate configured (RPS):": "request_rate",
    "Benchmark duration (s):": "duration",
    "Total input tokens:": "total_input_tokens",
    "Total generated tokens:": "total_output_tokens",
    "Request throughput (req/s):": "request_throughput",
    "Request goodput (req/s):": "request_goodput",
    "Output token throughput (tok/s):": "output_throughput",
    "Peak output token throughput (tok/s):": "max_output_tokens_per_s",
    "Peak concurrent requests:": "max_concurrent_requests",
    "Total token throughput (tok/s):": "total_token_throughput",
}


def summary(
    records: Sequence[Record], duration_s: float, goodput_ms: Mapping[str, float]
) -> dict[str, Any]:
    """Counts and rates of a run. Only requests that succeeded count, except as failed.

    Args:
        goodput_ms: the most that a good request takes, by the names of LIMITS. None given: no
            goodput (Zhong et al., DistServe, 2024).
    """
    done = [one for one in records if not one.error]
    num_input, num_output = sum(one.num_input for one in done), sum(one.num_output for one in done)
    good = [
        one
        for one in done
        if all(LIMITS[name](one) <= most_ms / 1000 for name, most_ms in goodput_ms.items())
    ]
    peak_tokens, peak_requests = peaks(done)
    return {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": len(good) / duration_s if goodput_ms else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "latencies": [one.latency_s for one in records],
        "queue_times": [one.queue_s for one in records],
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }


def details(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Each request, in the order in which they were sent."""
    return {
        "input_lens": [one.num_input for one in records],
        "output_lens": [0 if one.error else one.num_output for one in records],
        "ttfts": [one.ttft_s for one in records],
        "itls": [one.itls_s for one in records],
        "start_times": [one.start_s for one in records],
        "generated_texts": [one.text for one in records],
        "errors": [one.error for one in records],
    }


def peaks(done: Sequence[Record]) -> tuple[float, int]:
    """The most chunks that came, and the most requests that ran, in one second of the run."""
    if not done:
        return 0.0, 0
    start_s = min(one.start_s for one in done)
    chunks: Counter[int] = Counter()
    running: Counter[int] = Counter()
    for one in done:
        chunks.update(int(time_s - start_s) for time_s in one.times_s)
        last = int(one.start_s + one.latency_s - start_s)
        running.update(range(int(one.start_s - start_s), last + 1))
    return float(max(chunks.values())), max(running.values())


def spread_of(
    name: str, records: Sequence[Record], percentages: Sequence[float]
) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in ms of one of METRICS, each 0 if no
    request has it."""
    values_s = METRICS[name].values_s([one for one in records if not one.error])
    values_ms = np.array(values_s or [0.0]) * 1000
    result = {"mean": values_ms.mean(), "median": np.median(values_ms), "std": values_ms.std()}
    for percentage in percentages:
        result[f"p{percentage:g}"] = np.percentile(values_ms, percentage)
    return {f"{key}_{name}_ms": float(value) for key, value in result.items()}


def table(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """A result as vLLM prints it.

    Args:
        metrics: names of METRICS that the result has.
    """
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [row(label, result[key]) for label, key in ROWS.items() if shown(result[key])]
    for name in metrics:
        lines.append(f"{METRICS[name].title:-^50}")
        for key, value in result.items():
            kind, _, rest = key.partition("_")
            if rest == f"{name}_ms" and kind != "std":
                lines.append(row(f"{kind.capitalize()} {METRICS[name].short} (ms):", value))
    return "\n".join([*lines, "=" * 50])


def shown(value: object) -> bool:
    return value is not None and value != "inf"


def row(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"
