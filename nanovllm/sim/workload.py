"""Synthetic workloads: made as they are asked for, so a million requests need no memory."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from heapq import heappop, heappush
from math import log, sqrt
from random import Random
from typing import Any

from nanovllm.checks import check_fields, one_of, ranged
from nanovllm.errors import ConfigError
from nanovllm.traces import TraceRequest, read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """A workload that is drawn.

    Args:
        num_requests: for chats, turns.
        request_rate: arrivals a second; for chats, new ones.
        arrivals: gaps between them: "poisson"; "gamma", with burstiness; "bursts", of burst_size at
            once, with Poisson gaps between the bursts.
        burstiness: shape of the gamma: below 1 is burstier than Poisson, above 1 is evener.
        burst_size: requests that come at once.
        lengths: "fixed"; "uniform", up to twice the mean; "lognormal", with length_spread.
        prompt_tokens, output_tokens: means. length_spread: standard deviation over the mean.
        turns: more than 1 makes chats of so many, each turn with all before it as its prefix.
        think_s: mean seconds between an answer's estimated end and the next turn.
        system_prompts: how many there are for chats to share. system_prompt_tokens: of each.
        tenants: among whom requests are drawn evenly; 1 names none.

    Raises:
        ConfigError: a value is impossible.
    """

    num_requests: int = ranged(1000, 1, 2**40)
    request_rate: float = ranged(10.0, 1e-6, 1e9)
    arrivals: str = one_of("poisson", "gamma", "bursts")
    burstiness: float = ranged(0.5, 1e-3, 1e6)
    burst_size: int = ranged(10, 1, 2**20)
    lengths: str = one_of("lognormal", "fixed", "uniform")
    prompt_tokens: int = ranged(512, 1, 2**20)
    output_tokens: int = ranged(128, 1, 2**20)
    length_spread: float = ranged(1.0, 1e-3, 10.0)
    turns: int = ranged(1, 1, 2**10)
    think_s: float = ranged(10.0, 0.0, 1e6)
    system_prompts: int = ranged(1, 1, 2**20)
    system_prompt_tokens: int = ranged(0, 0, 2**20)
    tenants: int = ranged(1, 1, 2**16)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    @property
    def shares(self) -> bool:
        """True if prompts begin alike."""
        return self.turns > 1 or self.system_prompt_tokens > 0


def make_workload(settings: Synthetic, seed: int) -> Iterator[TraceRequest]:
    """The requests in order of arrival, the same for the same seed."""
    made = chats(settings, Random(seed))
    for _ in range(settings.num_requests):
        yield next(made)


def chats(settings: Synthetic, rng: Random) -> Iterator[TraceRequest]:
    """Chats without end; a single request is a chat of one turn."""
    length, pending = draw_length(settings, rng), list[tuple[float, int, TraceRequest]]()
    number = 0
    for number, start_s in enumerate(start_times(settings, rng)):
        while pending and pending[0][0] <= start_s:
            yield heappop(pending)[2]
        tenant = f"tenant-{rng.randrange(settings.tenants)}" if settings.tenants > 1 else ""
        system = settings.system_prompt_tokens
        name, time_s, said = f"system-{rng.randrange(settings.system_prompts)}", start_s, 0
        for turn in range(settings.turns):
            said += length(settings.prompt_tokens)
            output = length(settings.output_tokens)
            pieces = ((name, system),) if system else ()
            if settings.turns > 1:
                pieces = (*pieces, (f"chat-{number}", said))
            request = TraceRequest(time_s, system + said, output, pieces, tenant=tenant)
            heappush(pending, (time_s, number * settings.turns + turn, request))
            said += output
            # An answer's length in time is not known yet: 20 ms a token is a reader's pace.
            time_s += 0.02 * output + rng.expovariate(1) * settings.think_s


def start_times(settings: Synthetic, rng: Random) -> Iterator[float]:
    time_s, rate, shape = 0.0, settings.request_rate, settings.burstiness
    while True:
        size = settings.burst_size if settings.arrivals == "bursts" else 1
        for _ in range(size):
            yield time_s
        if settings.arrivals == "gamma":
            time_s += rng.gammavariate(shape, 1 / (rate * shape))
        else:
            time_s += rng.expovariate(rate / size)


def draw_length(settings: Synthetic, rng: Random) -> Callable[[int], int]:
    """A function from a mean to a length of at least 1."""
    if settings.lengths == "fixed":
        return lambda mean: mean
    if settings.lengths == "uniform":
        return lambda mean: rng.randint(1, 2 * mean - 1)
    variance = log(1 + settings.length_spread**2)

    def lognormal(mean: int) -> int:
        return max(1, round(rng.lognormvariate(log(mean) - variance / 2, sqrt(variance))))

    return lognormal


def find_workload(name: str, settings: Synthetic, seed: int) -> tuple[Iterable[TraceRequest], bool]:
    """The requests of a file, or drawn ones for "synthetic" or "synthetic:name=value,...", and
    whether prompts begin alike.

    Raises:
        ConfigError: the file is wrong, and where; or a value of the spec is.
    """
    kind, _, spec = name.partition(":")
    if kind == "synthetic":
        settings = with_spec(settings, spec)
        return make_workload(settings, seed), settings.shares
    requests = read_trace(name, sys.maxsize)
    return requests, any(request.pieces for request in requests)


def with_spec(settings: Synthetic, spec: str) -> Synthetic:
    """Settings with those of "name=value,..." instead.

    Raises:
        ConfigError: a name is unknown or a value impossible.
    """
    changes: dict[str, Any] = {}
    kinds: dict[str, Callable[[str], Any]] = {
        entry.name: int if entry.type is int else float if entry.type is float else str
        for entry in fields(Synthetic)
    }
    for part in filter(None, spec.split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ConfigError("workload", part, f"choose from {', '.join(kinds)}")
        try:
            changes[name] = kinds[name](value)
        except ValueError as error:
            raise ConfigError(name, value, "must be a number") from error
    return replace(settings, **changes)
