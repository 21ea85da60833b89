"""What was decided and why: counters that always run, and a log of events for those who ask."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

Clock = Callable[[], float]  # seconds that never go back; the simulator injects its own
monotonic: Clock = time.monotonic


class Kind(StrEnum):
    """What happened to a sequence. An event's `reason` says why, in words."""

    ADDED = "added"
    WAITING = "waiting"  # looked at and left in the queue: no blocks, no budget, max_num_seqs
    ADMITTED = "admitted"
    CHUNKED = "chunked"  # got part of the prompt tokens it wanted
    CACHE_HIT = "cache_hit"
    CACHE_MISS = "cache_miss"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    ABORTED = "aborted"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Event:
    """One decision.

    Attributes:
        time_s: on the engine's clock.
        step: number of the step in which it was made.
        seq_id: the sequence concerned (-1: a request that never became one).
        data: numbers that go with it (tokens, blocks, the other sequence).
    """

    time_s: float
    step: int
    kind: Kind
    seq_id: int
    reason: str
    data: dict[str, int]


@dataclass(slots=True)
class EventLog:
    """Counts every decision; hands each on as an Event to `sink` if there is one."""

    clock: Clock = monotonic
    sink: Callable[[Event], None] | None = None
    step: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def record(self, kind: Kind, seq_id: int, reason: str, **data: int) -> None:
        self.counts[kind] += 1
        if self.sink is not None:
            self.sink(Event(self.clock(), self.step, kind, seq_id, reason, data))
