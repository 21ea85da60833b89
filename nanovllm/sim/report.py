"""The report: one schema for live benchmarks, replays and simulations, in bounded memory."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any, NamedTuple

import numpy as np

QUANTILES = (50, 90, 95, 99)
WIDTH = 1e-3  # relative width of a bucket of gaps


class Finished(NamedTuple):
    """A request that got all its tokens; times are on one clock."""

    arrival_s: float
    scheduled_s: float
    first_token_s: float
    last_token_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    tenant: str = ""
    priority: int = 0
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Per token after the first; 0 if there is none."""
        return (self.last_token_s - self.first_token_s) / max(self.num_output_tokens - 1, 1)

    @property
    def e2e_s(self) -> float:
        return self.last_token_s - self.arrival_s


class Group:
    """The requests of one tenant or priority."""

    def __init__(self) -> None:
        self.ttft_s, self.tpot_s = array("d"), array("d")
        self.num_requests = self.num_output_tokens = 0

    def add(self, one: Finished) -> None:
        self.num_requests += 1
        self.num_output_tokens += one.num_output_tokens
        self.ttft_s.append(one.ttft_s)
        if one.num_output_tokens > 1:
            self.tpot_s.append(one.tpot_s)


class Report:
    """Takes in what a run does and sums it up. A request costs a few floats, a token nothing.

    Args:
        ttft_target_s, tpot_target_s: for requests that bring none.
        price_per_hour: of the whole deployment.

    Attributes:
        num_rejected: requests that could never fit. num_truncated: cut at max_model_len or at
            the size of the pool.
        recomputed_tokens: computed more than once, because of preemptions.
        prefix_cache_hit_rate: share of prompt tokens; None without a cache.
    """

    def __init__(
        self,
        ttft_target_s: float | None = None,
        tpot_target_s: float | None = None,
        price_per_hour: float | None = None,
    ) -> None:
        self.ttft_target_s, self.tpot_target_s = ttft_target_s, tpot_target_s
        self.price_per_hour = price_per_hour
        self.num_rejected = self.num_truncated = self.num_preemptions = self.recomputed_tokens = 0
        self.prefix_cache_hit_rate: float | None = None
        self.ttft_s, self.tpot_s = array("d"), array("d")
        self.e2e_s, self.queue_s = array("d"), array("d")
        self.num_prompt_tokens = self.num_output_tokens = self.num_good = 0
        self.first_s, self.last_s, self.has_targets = float("inf"), float("-inf"), False
        self.gaps: Counter[int] = Counter()
        self.gaps_s, self.num_gaps = 0.0, 0
        self.usage_s = self.usage_max = self.busy_s = 0.0
        self.tenants: dict[str, Group] = {}
        self.priorities: dict[int, Group] = {}

    def add(self, one: Finished) -> None:
        """Count a request that has finished."""
        self.first_s, self.last_s = (
            min(self.first_s, one.arrival_s),
            max(self.last_s, one.last_token_s),
        )
        self.num_prompt_tokens += one.num_prompt_tokens
        self.num_output_tokens += one.num_output_tokens
        self.ttft_s.append(one.ttft_s)
        self.e2e_s.append(one.e2e_s)
        self.queue_s.append(one.scheduled_s - one.arrival_s)
        if one.num_output_tokens > 1:
            self.tpot_s.append(one.tpot_s)
        ttft_s = self.ttft_target_s if one.ttft_target_s is None else one.ttft_target_s
        tpot_s = self.tpot_target_s if one.tpot_target_s is None else one.tpot_target_s
        self.has_targets |= ttft_s is not None or tpot_s is not None
        late = ttft_s is not None and one.ttft_s > ttft_s
        self.num_good += not (late or (tpot_s is not None and one.tpot_s > tpot_s))
        self.tenants.setdefault(one.tenant, Group()).add(one)
        self.priorities.setdefault(one.priority, Group()).add(one)

    def add_gaps(self, gap_s: float, count: int) -> None:
        """Count tokens that came `gap_s` after the one before them."""
        self.gaps[round(log(max(gap_s, 1e-9)) / WIDTH)] += count
        self.gaps_s += gap_s * count
        self.num_gaps += count

    def add_usage(self, usage: float, duration_s: float) -> None:
        """The KV cache was used to a share from 0 to 1 for so long."""
        self.usage_s += usage * duration_s
        self.busy_s += duration_s
        self.usage_max = max(self.usage_max, usage)

    def result(self) -> dict[str, Any]:
        """All of it: times in ms, rates a second, shares from 0 to 1; None where nothing is known.

        ITL percentiles are within 0.1%; all else is exact.
        """
        num_finished = len(self.ttft_s)
        duration_s = max(self.last_s - self.first_s, 0.0) if num_finished else 0.0
        per_s = 1 / duration_s if duration_s else 0.0
        total = self.num_prompt_tokens + self.num_output_tokens
        cost = None if self.price_per_hour is None else self.price_per_hour * duration_s / 3600
        return {
            "num_requests": num_finished + self.num_rejected,
            "num_finished": num_finished,
            "num_rejected": self.num_rejected,
            "num_truncated": self.num_truncated,
            "duration_s": duration_s,
            "request_throughput": num_finished * per_s,
            "output_throughput": self.num_output_tokens * per_s,
            "total_token_throughput": total * per_s,
            "ttft_ms": spread_ms(self.ttft_s),
            "tpot_ms": spread_ms(self.tpot_s),
            "itl_ms": self._itl_ms(),
            "e2e_ms": spread_ms(self.e2e_s),
            "queue_ms": spread_ms(self.queue_s),
            "goodput": self.num_good * per_s if self.has_targets else None,
            "num_preemptions": self.num_preemptions,
            "recomputed_tokens": self.recomputed_tokens,
            "prefix_cache_hit_rate": self.prefix_cache_hit_rate,
            "kv_usage": {
                "mean": self.usage_s / self.busy_s if self.busy_s else 0.0,
                "max": self.usage_max,
            },
            "fairness": {
                "tenants": fairness(self.tenants),
                "priorities": fairness(self.priorities),
            },
            "cost_per_million_tokens": cost and cost / total * 1e6,
            "cost_per_million_output_tokens": cost and cost / self.num_output_tokens * 1e6,
        }

    def _itl_ms(self) -> dict[str, float | None]:
        if not self.num_gaps:
            return spread_ms(())
        buckets = sorted(self.gaps)
        upto = np.cumsum([self.gaps[bucket] for bucket in buckets])
        found = np.searchsorted(upto, [q / 100 * self.num_gaps for q in QUANTILES])
        values = {
            f"p{q}": exp(buckets[min(int(i), len(buckets) - 1)] * WIDTH) * 1000
            for q, i in zip(QUANTILES, found, strict=True)
        }
        return {"mean": self.gaps_s / self.num_gaps * 1000, **values}


def spread_ms(values_s: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles (linear between neighbours) in ms."""
    if not len(values_s):
        return {"mean": None, **{f"p{q}": None for q in QUANTILES}}
    values = np.asarray(values_s) * 1000
    points = np.percentile(values, QUANTILES)
    spread = {f"p{q}": float(point) for q, point in zip(QUANTILES, points, strict=True)}
    return {"mean": float(values.mean()), **spread}


def fairness(groups: Mapping[Any, Group]) -> dict[str, Any]:
    """Each group's share, and Jain's index (1984) over their mean TTFTs: 1 is even, 1/n is not."""
    means = [float(np.mean(group.ttft_s)) for group in groups.values()]
    squares = sum(mean * mean for mean in means) * len(means)
    return {
        "jain_index_ttft": sum(means) ** 2 / squares if squares else None,
        "groups": {
            str(name): {
                "num_requests": group.num_requests,
                "output_tokens": group.num_output_tokens,
                "ttft_ms": spread_ms(group.ttft_s),
                "tpot_ms": spread_ms(group.tpot_s),
            }
            for name, group in sorted(groups.items())
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """A result for people."""
    lines = []
    for name, value in result.items():
        if isinstance(value, int | float):
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
            lines.append(f"{name:<32}{shown:>14}")
    usage = result["kv_usage"]
    lines.append(f"{'kv_usage (mean, max)':<32}{usage['mean']:>14.3f}{usage['max']:>11.3f}")
    columns = ["mean", *(f"p{q}" for q in QUANTILES)]
    lines.append(f"\n{'':<10}" + "".join(f"{column:>12}" for column in columns))
    names = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms")
    lines += [f"{name:<10}" + cells(result[name], columns) for name in names]
    for kind, found in result["fairness"].items():
        if len(found["groups"]) > 1:
            lines.append(f"\n{kind}: TTFT in ms (Jain's index {found['jain_index_ttft']:.3f})")
            for name, group in found["groups"].items():
                lines.append(f"{name or '-':<10}" + cells(group["ttft_ms"], columns))
    return "\n".join(lines)


def cells(spread: Mapping[str, float | None], columns: Sequence[str]) -> str:
    values = [spread[column] for column in columns]
    return "".join(f"{'-':>12}" if value is None else f"{value:>12,.2f}" for value in values)
