"""What was decided and why: counters that always run, and a log of events for those who ask."""

import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

Clock = Callable[[], float]  # seconds that never go back; the simulator injects its own


# What happened to a sequence; an event's `reason` says why, in words. WAITING: looked at and left
# in the queue. CHUNKED: got part of the prompt tokens it wanted. HELD: the policy left some of the
# running sequences that want one token out of a step.
Kind = StrEnum(
    "Kind",
    "ADDED WAITING ADMITTED CHUNKED HELD CACHE_HIT CACHE_MISS PREEMPTED FINISHED ABORTED REJECTED",
)


class Event(NamedTuple):
    """One decision.

    Attributes:
        time_s: on the engine's clock. step: the number of the step in which it was made.
        seq_id: the sequence concerned (-1: a request that never became one, or several).
        data: numbers that go with it (tokens, blocks, the other sequence).
    """

    time_s: float
    step: int
    kind: Kind
    seq_id: int
    reason: str
    data: dict[str, int]


Sink = Callable[[Event], None]


class EventLog:
    """Counts every decision; hands each on as an Event to `sink` if there is one."""

    def __init__(self, clock: Clock = time.monotonic, sink: Sink | None = None) -> None:
        self.clock, self.sink, self.step = clock, sink, 0
        self.counts: Counter[str] = Counter()

    def record(self, kind: Kind, seq_id: int, reason: str, **data: int) -> None:
        self.counts[kind] += 1
        if self.sink is not None:
            self.sink(Event(self.clock(), self.step, kind, seq_id, reason, data))
