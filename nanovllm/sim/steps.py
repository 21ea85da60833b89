"""How long the steps of a recording took, and a cost model fitted to them: a sum of pieces."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanovllm.core.events import Kind
from nanovllm.errors import ConfigError
from nanovllm.recording import Arrival, Finish, Record, Step
from nanovllm.sim.cost import Work

# Tokens in a step beyond which one more may cost something else: kernels round up to their tiles,
# and small batches wait for weights where large ones compute.
EDGES = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 32, 64, 128, 256)
STIFFNESS = 1.0  # how much the fit wants neighbouring prices to be alike
FAR = 0.5  # of a step: an error beyond it is a stall, unless errors are larger as a rule
LEAST = 10  # steps that a fit wants
KINDS = ("decode only", "with prefill", "all steps")

Floats = npt.NDArray[np.float64]


class Taken(NamedTuple):
    """A step and what it took.

    Attributes:
        step_s: from the end of the step before it, or from the arrival that ended an idle time.
        gap_s: the part of it before the executor began.
    """

    work: Work
    step_s: float
    gap_s: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step as a sum, for one model on one machine.

    Args:
        overhead_s: of each step, between steps included. row_s: of each row. sampled_s: of each
            row whose next token is wanted. kv_token_s: of each position that a row reads.
        pair_s: of each token and position that it attends to.
        token_s: of a token above each of `edges`, up to the next edge.

    Raises:
        ConfigError: a number is impossible.
    """

    overhead_s: float
    row_s: float
    sampled_s: float
    kv_token_s: float
    pair_s: float
    token_s: tuple[float, ...]
    edges: tuple[int, ...] = EDGES
    _below_s: list[float] = field(init=False, repr=False, compare=False)  # all up to each edge

    def __post_init__(self) -> None:
        if not all(0 <= number <= 10 for number in (*self.numbers, *self.token_s)):
            raise ConfigError("calibration", self, "each number must be 0 to 10 seconds")
        rising = self.edges[:1] == (0,) and all(a < b for a, b in pairwise(self.edges))
        if not rising or len(self.token_s) != len(self.edges):
            why = "edges must rise from 0, and token_s have a number for each"
            raise ConfigError("calibration", self.edges, why)
        below_s = [0.0]
        for price_s, (start, end) in zip(self.token_s, pairwise(self.edges), strict=False):
            below_s.append(below_s[-1] + price_s * (end - start))
        object.__setattr__(self, "_below_s", below_s)

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those that are the same however many tokens there are."""
        return self.overhead_s, self.row_s, self.sampled_s, self.kv_token_s, self.pair_s

    def step_s(self, work: Work) -> float:
        """Seconds that a step takes."""
        i = bisect_right(self.edges, work.num_tokens) - 1
        return (
            self.overhead_s
            + self.row_s * work.num_seqs
            + self.sampled_s * work.num_sampled
            + self.kv_token_s * work.num_kv_tokens
            + self.pair_s * work.num_pairs
            + self._below_s[i]
            + self.token_s[i] * (work.num_tokens - self.edges[i])
        )

    def as_dict(self) -> dict[str, Any]:
        """What a calibration file holds."""
        return {key: value for key, value in asdict(self).items() if key != "_below_s"}


def steps_taken(records: Iterable[Record]) -> Iterator[Taken]:
    """The steps of a recording that went well. Time in which nobody was there is no step's."""
    computed: dict[int, int] = {}
    present: set[int] = set()
    ready_s = 0.0  # since when the engine could have begun the next step
    for record in records:
        match record:
            case Arrival():
                ready_s = ready_s if present else record.time_s
                present.add(record.seq_id)
            case Finish():
                present.discard(record.seq_id)
                computed.pop(record.seq_id, None)
            case Step():
                work = work_of(record, computed)
                if not record.error:
                    gap_s = max(record.start_s - ready_s, 0.0)
                    yield Taken(work, record.duration_s + gap_s, gap_s)
                ready_s = record.end_s


def work_of(step: Step, computed: dict[int, int]) -> Work:
    """What a step computed.

    Args:
        computed: seq_id -> tokens in the cache; brought up to date.
    """
    for choice in step.choices:
        if choice.kind in (Kind.ADMITTED, Kind.CACHE_HIT):
            computed[choice.seq_id] = choice.data["tokens"] * (choice.kind is Kind.CACHE_HIT)
    seq_ids, num_kv, num_pairs = step.seq_ids or [], 0, 0.0
    for seq_id in seq_ids:
        count = step.tokens.get(seq_id, 1)
        end = computed[seq_id] = computed.get(seq_id, 0) + count
        num_kv += end
        num_pairs += count * (end - (count - 1) / 2)
    num_tokens = len(seq_ids) - len(step.tokens) + sum(step.tokens.values())
    return Work(len(seq_ids), num_tokens, len(seq_ids) - len(step.partial), num_kv, num_pairs)


def fit_steps(records: Iterable[Record]) -> StepTimes:
    """The cost model that tells best how long the steps of a recording took.

    Raises:
        ConfigError: the recording has too few steps.
    """
    return fit(steps_to_fit(records))


def steps_to_fit(records: Iterable[Record]) -> list[Taken]:
    """
    Raises:
        ConfigError: the recording has too few steps.
    """
    steps = list(steps_taken(records))
    if len(steps) < LEAST:
        why = f"steps went well, too few for a fit: record {LEAST} or more"
        raise ConfigError("recording", len(steps), why)
    return steps


def fit(steps: Sequence[Taken]) -> StepTimes:
    """Least squares without negative numbers, reweighted: an error counts by its share of a step,
    and a stall by little more than an error of FAR (Huber, 1964). But for stalls, the sum over all
    steps is right. Where steps say little about the price of a token, it is its neighbours'."""
    table = np.array([pieces(step.work) for step in steps])
    taken_s = np.array([step.step_s for step in steps])
    first = table.shape[1] - len(EDGES)  # column of tokens
    scale = np.maximum(table.max(axis=0), 1.0)
    scale[first:] = table[:, first:].sum() / taken_s.sum()  # so that a usual price is 1
    table /= scale
    alike = STIFFNESS * np.diff(np.eye(len(scale))[first:], axis=0)
    expected_s = taken_s
    for _ in range(20):
        floor_s = np.maximum(expected_s, 1e-9)
        share = np.abs(taken_s - expected_s) / floor_s
        far = max(4 * float(np.median(share)), FAR)
        weight = np.sqrt(far / np.maximum(share, far) / floor_s / taken_s.mean())
        rows = np.concatenate([table * weight[:, None], alike])
        found = least_squares(rows, np.concatenate([taken_s * weight, np.zeros(len(alike))]))
        expected_s = table @ found
    numbers = [float(f"{number:.6g}") for number in found / scale]
    overhead_s, row_s, sampled_s, kv_token_s, pair_s, *token_s = numbers
    return StepTimes(overhead_s, row_s, sampled_s, kv_token_s, pair_s, tuple(token_s))


def pieces(work: Work) -> list[float]:
    """What each number of a StepTimes is multiplied by."""
    counts = 1, work.num_seqs, work.num_sampled, work.num_kv_tokens, work.num_pairs
    ends = (*EDGES[1:], work.num_tokens)
    tokens = (max(0, min(work.num_tokens, b) - a) for a, b in zip(EDGES, ends, strict=True))
    return [*map(float, counts), *map(float, tokens)]


def check(steps: Sequence[Taken], num_folds: int = 5) -> dict[str, float]:
    """How wrong a fit to the other parts of a recording is about each part of it.

    Returns:
        signed relative error of the sum over all steps that only decode, over all that also (or
        only) prefill, and over both; a kind of which there are no steps is left out.
    """
    expected: dict[str, float] = defaultdict(float)
    taken: dict[str, float] = defaultdict(float)
    bounds = [len(steps) * i // num_folds for i in range(num_folds + 1)]
    for start, end in pairwise(bounds):
        cost = fit([*steps[:start], *steps[end:]])
        for step in steps[start:end]:
            kind = "decode only" if step.work.num_tokens == step.work.num_seqs else "with prefill"
            for name in (kind, "all steps"):
                expected[name] += cost.step_s(step.work)
                taken[name] += step.step_s
    return {name: expected[name] / taken[name] - 1 for name in sorted(taken, key=KINDS.index)}


def least_squares(table: Floats, wanted: Floats) -> Floats:
    """The x without negative numbers for which table @ x is nearest to `wanted` (Lawson and
    Hanson, 1974)."""
    count = table.shape[1]
    square, side = table.T @ table, table.T @ wanted
    x, free = np.zeros(count), np.zeros(count, bool)
    small = 1e-10 * max(float(np.abs(side).max()), 1e-300)
    for _ in range(10 * count):
        slope = np.where(free, -np.inf, side - square @ x)
        if slope.max() <= small:
            break
        free[slope.argmax()] = True
        while True:
            tried = np.zeros(count)
            tried[free] = np.linalg.lstsq(square[np.ix_(free, free)], side[free], rcond=None)[0]
            low = free & (tried <= 0)
            if not low.any():
                break
            share = (x[low] / np.maximum(x[low] - tried[low], 1e-300)).min()
            x = x + share * (tried - x)
            free &= x > 1e-12 * max(float(x.max()), 1e-300)
            x[~free] = 0.0
        x = tried
    return x
