"""A recording's requests, served again by another engine: what would have happened is written as
a recording too, so one function makes the reports of both, and `explain` reads both."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.events import EventLog, Kind, Sink
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import make_policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence as CoreSequence
from nanovllm.errors import InvalidRequestError
from nanovllm.recording import (
    Arrival,
    Finish,
    Header,
    Record,
    Recorder,
    Rejected,
    Reset,
    Step,
)
from nanovllm.replay import RecordedTimes, VirtualClock
from nanovllm.sampling_params import SamplingParams
from nanovllm.sim.cost import CostModel
from nanovllm.sim.report import Finished, Report
from nanovllm.sim.run import SimulatedExecutor


class Wish(NamedTuple):
    """A sequence that was asked for.

    Attributes:
        ready_s: when an engine can have it. It is its arrival, but for those that came while the
            recorded engine was idle and had no step: they were handed over together.
        leaves_s: when its client has left; None if it stays to the end.
    """

    ready_s: float
    arrival: Arrival
    leaves_s: float | None


class ModelledTimes(SimulatedExecutor):
    """Takes as long as a cost model says, and samples what the recording has at that position."""

    def __init__(self, cost: CostModel, clock: VirtualClock, tokens: RecordedTimes) -> None:
        super().__init__(cost, clock, lambda step_s: None)
        self.tokens = tokens

    def execute(self, plan: StepPlan) -> StepResult:
        sampled = super().execute(plan).token_ids
        return StepResult(
            [
                self.tokens.token(seq_id, self.rows[seq_id][1] - 1) if token_id >= 0 else -1
                for seq_id, token_id in zip(plan.seq_ids, sampled, strict=True)
            ]
        )


def wishes(records: Sequence[Record], tokens: RecordedTimes) -> list[Wish]:
    """What was asked for, in the order in which an engine hears of it.

    Args:
        tokens: is told to stop each sequence where it ended, if not its client ended it.
    """
    ends = {record.seq_id: record for record in records if isinstance(record, Finish)}
    last_s = max(moment(record) for record in records)
    found: list[Wish] = []
    present: set[int] = set()
    together: list[Arrival] = []

    def hand_over(ready_s: float | None = None) -> None:
        for one in together:
            end = ends.get(one.seq_id)
            ready = min(one.arrival_s, one.time_s) if ready_s is None else ready_s
            leaves_s = last_s if end is None else None
            if end is not None and (end.reason == "abort" or not end.output_tokens):
                leaves_s = end.time_s
            elif end is not None and end.reason != "length":
                tokens.stops[one.seq_id] = one.prompt_tokens + end.output_tokens - 1
            found.append(Wish(ready, one, leaves_s))
        together.clear()

    for record in records:
        match record:
            case Arrival():
                idle = not present or bool(together)
                present.add(record.seq_id)
                together.append(record)
                if not idle:
                    hand_over()
            case Step():
                if together:
                    hand_over(together[-1].time_s)
            case Finish():
                present.discard(record.seq_id)
    if together:
        hand_over(together[-1].time_s)
    return sorted(found, key=lambda wish: (wish.ready_s, wish.arrival.seq_id))


def moment(record: Record) -> float:
    return record.end_s if isinstance(record, Step) else record.time_s


def rerun(
    records: Sequence[Record],
    header: Header,
    cost: CostModel,
    path: str,
    sink: Sink | None = None,
) -> int:
    """Serve what was asked of a recorded engine by another one, in virtual time.

    Outputs are as long as recorded; clients that left, leave at the same time; the prefix cache
    finds what prompts shared.

    Args:
        records: of one recording, whole.
        header: the other engine's settings.
        path: the file for its recording.
        sink: hears of the events.

    Returns:
        how many sequences were cut, as they outgrow the other engine.
    """
    clock = VirtualClock(header.time_s)
    policy, tokens = make_policy(header.policy), RecordedTimes(records, clock)
    caching = header.enable_prefix_caching
    blocks = BlockManager(header.num_blocks, header.block_size, caching, policy.evict)
    limits = header.max_num_seqs, header.max_num_batched_tokens, header.enable_chunked_prefill
    scheduler = Scheduler(blocks, policy, *limits, EventLog(clock, sink))
    core = EngineCore(scheduler, ModelledTimes(cost, clock, tokens), header.max_num_tokens)
    ends = {record.seq_id: record for record in records if isinstance(record, Finish)}
    coming = wishes(records, tokens)[::-1]
    others = [record for record in records if isinstance(record, Rejected | Reset)][::-1]
    leaving: list[tuple[float, int, CoreSequence]] = []
    num_cut = 0
    recorder = Recorder(core, path, max_bytes=2**62)
    while coming or others or core.has_unfinished:
        if not core.has_unfinished:
            starts = [coming[-1].ready_s] if coming else []
            starts += [others[-1].time_s] if others else []
            clock.now_s = max(clock.now_s, min(starts))
        while others and others[-1].time_s <= clock.now_s:
            other = others.pop()
            if isinstance(other, Reset):
                blocks.reset_prefix_cache()
            else:
                core.events.record(Kind.REJECTED, -1, other.reason)
        while coming and coming[-1].ready_s <= clock.now_s:
            wish = coming.pop()
            seq = add(core, wish.arrival, tokens)
            if seq is None:
                continue
            if wish.leaves_s is not None:
                heappush(leaving, (wish.leaves_s, seq.seq_id, seq))
            elif seq.num_prompt_tokens + ends[seq.seq_id].output_tokens > seq.max_num_tokens:
                num_cut += 1
        while leaving and leaving[0][0] <= clock.now_s:
            core.abort([heappop(leaving)[2]])
        if core.has_unfinished:
            core.step()
    recorder.close()
    return num_cut


def add(core: EngineCore, arrival: Arrival, tokens: RecordedTimes) -> CoreSequence | None:
    """Queue a recorded sequence under its own number; None if it can never fit."""
    core.num_added = arrival.seq_id
    params = SamplingParams(
        max_tokens=arrival.max_tokens,
        stop_token_ids=[RecordedTimes.STOP],
        prompt_logprobs=0 if arrival.own_prompt else None,
    )
    prompt = [tokens.token(arrival.seq_id, i) for i in range(arrival.prompt_tokens)]
    who = arrival.request_id, arrival.priority, arrival.salt, arrival.arrival_s
    try:
        [seq] = core.add(prompt, params, *who, arrival.terms)
    except InvalidRequestError:
        return None
    return seq


@dataclass(slots=True)
class Progress:
    """How far a sequence is."""

    arrival: Arrival
    scheduled_s: float | None = None
    num_cached: int = 0
    num_computed: int = 0
    times_s: "array[float]" = field(default_factory=lambda: array("d"))  # of its tokens


def report_of(
    records: Iterable[Record],
    ttft_target_s: float | None = None,
    tpot_target_s: float | None = None,
    price_per_hour: float | None = None,
) -> Report:
    """The report of what a recording tells. Sequences whose clients left, or that had not ended,
    are not in it.

    Args:
        price_per_hour: of all devices.
    """
    report = Report(ttft_target_s, tpot_target_s, price_per_hour)
    live: dict[int, Progress] = {}
    num_blocks, caching, prompt_tokens, num_hits = 1, False, 0, 0
    for record in records:
        match record:
            case Header():
                num_blocks, caching = record.num_blocks, record.enable_prefix_caching
            case Arrival():
                live[record.seq_id] = Progress(record)
            case Step():
                note_step(record, live, report)
                report.add_usage(record.blocks / num_blocks, record.duration_s)
            case Rejected():
                report.num_rejected += 1
            case Finish() if record.seq_id in live:
                one = live.pop(record.seq_id)
                if one.scheduled_s is not None:
                    prompt_tokens += one.arrival.prompt_tokens
                    num_hits += one.num_cached
                needed = one.arrival.prompt_tokens + record.output_tokens - 1 - one.num_cached
                report.recomputed_tokens += max(one.num_computed - needed, 0)
                if record.reason in ("stop", "length"):
                    note_finish(record, one, report)
    if caching and prompt_tokens:
        report.prefix_cache_hit_rate = num_hits / prompt_tokens
    return report


def note_step(step: Step, live: dict[int, Progress], report: Report) -> None:
    for choice in step.choices:
        one = live.get(choice.seq_id)
        if choice.kind is Kind.PREEMPTED:
            report.num_preemptions += 1
        elif one and choice.kind is Kind.ADMITTED and one.scheduled_s is None:
            one.scheduled_s = choice.time_s
        elif one and choice.kind is Kind.CACHE_HIT and not one.num_computed:
            one.num_cached = choice.data["tokens"]
    partial = set(step.partial)
    for seq_id in step.seq_ids or ():
        if seq_id in live:
            live[seq_id].num_computed += step.tokens.get(seq_id, 1)
            if seq_id not in partial:
                live[seq_id].times_s.append(step.end_s)


def note_finish(finish: Finish, one: Progress, report: Report) -> None:
    # an engine that plans ahead may have had a row for it after its last token
    times_s, arrival, terms = one.times_s[: finish.output_tokens], one.arrival, one.arrival.terms
    if not times_s or one.scheduled_s is None:
        return  # the recording began late
    for before_s, after_s in pairwise(times_s):
        report.add_gaps(after_s - before_s, 1)
    report.add(
        Finished(
            arrival.arrival_s,
            one.scheduled_s,
            times_s[0],
            times_s[-1],
            arrival.prompt_tokens,
            finish.output_tokens,
            terms.tenant if terms else "",
            arrival.priority,
            terms.ttft_target_s if terms else None,
            terms.tpot_target_s if terms else None,
        )
    )
