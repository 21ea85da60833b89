"""The simulation: EngineCore, fed by a workload, with an executor that only tells how long."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b

from nanovllm.checks import check_fields, ranged
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.events import Event, EventLog, Kind
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import Policy, make_policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence, Terms
from nanovllm.errors import ConfigError, InvalidRequestError
from nanovllm.replay import VirtualClock
from nanovllm.sampling_params import SamplingParams
from nanovllm.sim.cost import CostModel, Work
from nanovllm.sim.report import Finished, Report
from nanovllm.traces import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The settings of an engine that a scheduler knows; the names are EngineConfig's.

    Raises:
        ConfigError: a value is impossible.
    """

    num_kv_blocks: int = ranged(1024, 1, 2**26)
    max_model_len: int = ranged(2**24, 2, 2**24)
    block_size: int = ranged(16, 1, 1024)
    max_num_seqs: int = ranged(256, 1, 2**16)
    max_num_batched_tokens: int = ranged(2048, 1, 2**24)
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.max_num_batched_tokens < self.max_num_seqs:
            why = f"each of max_num_seqs={self.max_num_seqs} needs a token"
            raise ConfigError("max_num_batched_tokens", self.max_num_batched_tokens, why)

    def caching_if(self, shares: bool) -> "Engine":
        """The same; without prefix caching if prompts share nothing, which saves the hashing."""
        return replace(self, enable_prefix_caching=self.enable_prefix_caching and shares)


class SimulatedExecutor:
    """Carries out a plan by letting its cost pass. It knows what the plans say, as a rank does.

    Args:
        observe: is told how long each step takes, before it is over.

    Attributes:
        num_tokens: computed so far, in all steps.
    """

    def __init__(
        self, cost: CostModel, clock: VirtualClock, observe: Callable[[float], None]
    ) -> None:
        self.cost, self.clock, self.observe, self.num_tokens = cost, clock, observe, 0
        self.rows: dict[int, list[int]] = {}  # seq_id -> tokens computed, tokens known, next token

    def execute(self, plan: StepPlan) -> StepResult:
        rows, sampled, num_kv, num_pairs = self.rows, [], 0, 0.0
        for seq_id in plan.removed:
            rows.pop(seq_id, None)
        for new in plan.new_sequences:
            rows[new.seq_id] = [new.num_computed_tokens, len(new.token_ids), new.token_ids[-1]]
        for seq_id, num_tokens in zip(plan.seq_ids, plan.num_scheduled_tokens, strict=True):
            row = rows[seq_id]
            end = row[0] = row[0] + num_tokens
            num_kv += end
            num_pairs += num_tokens * (end - (num_tokens - 1) / 2)
            if end == row[1]:
                row[1] = end + 1
                sampled.append(row[2])
            else:
                sampled.append(-1)
        num_tokens, count = sum(plan.num_scheduled_tokens), len(sampled)
        self.num_tokens += num_tokens
        work = Work(count, num_tokens, count - sampled.count(-1), num_kv, num_pairs)
        step_s = self.cost.step_s(work)
        self.observe(step_s)
        self.clock.now_s += step_s
        return StepResult(sampled)

    def close(self) -> None:
        self.rows.clear()


class OutputLength(SamplingParams):
    """Parameters of a request that ends after max_tokens and draws nothing, so that its samples
    need no copies with seeds."""

    __slots__ = ()

    def for_sample(self, index: int, default_seed: int) -> SamplingParams:
        return self


@lru_cache(2**16)
def output_length(max_tokens: int) -> OutputLength:
    return OutputLength(max_tokens=max_tokens, ignore_eos=True)


@lru_cache(2**16)
def piece_id(name: str) -> int:
    """The token that stands for all tokens of a piece: the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")


def token_ids(request: TraceRequest, number: int) -> list[int]:
    """A prompt that shares with others what the trace says, and no more."""
    ids: list[int] = []
    for name, size in request.pieces:
        ids += [piece_id(name)] * size
    return ids + [2**56 + number] * (request.num_prompt_tokens - len(ids))


def simulate(
    workload: Iterable[TraceRequest],
    engine: Engine,
    cost: CostModel,
    report: Report | None = None,
    sink: Callable[[Event], None] | None = None,
    policy: Policy | None = None,
) -> Report:
    """Serve a workload in virtual time.

    Args:
        workload: by time of arrival; read as the clock gets there.
        report: to fill; None makes one.
        sink: is handed each event of the log.
        policy: instead of the one that `engine` names.

    Raises:
        ConfigError: the workload is empty or not in order.
    """
    arrivals = iter(workload)
    upcoming = next(arrivals, None)
    if upcoming is None:
        raise ConfigError("workload", "", "has no requests")
    report, clock = report or Report(), VirtualClock()
    policy, caching = policy or make_policy(engine.scheduling_policy), engine.enable_prefix_caching
    blocks = BlockManager(engine.num_kv_blocks, engine.block_size, caching, policy.evict)
    limits = engine.max_num_seqs, engine.max_num_batched_tokens
    events = EventLog(clock, sink)
    scheduler = Scheduler(blocks, policy, *limits, events=events)
    executor = SimulatedExecutor(cost, clock, lambda s: report.add_usage(blocks.usage, s))
    core = EngineCore(scheduler, executor, engine.max_model_len)
    last_s: dict[int, float] = {}  # when each sequence got its last token
    needed = number = 0
    before_s = clock.now_s = upcoming.arrival_s
    while upcoming is not None or core.has_unfinished:
        if upcoming is not None and not core.has_unfinished:
            clock.now_s = max(clock.now_s, upcoming.arrival_s)
        while upcoming is not None and upcoming.arrival_s <= clock.now_s:
            add(core, upcoming, number, report)
            number += 1
            following = next(arrivals, None)
            if following is not None and following.arrival_s < upcoming.arrival_s:
                raise ConfigError(
                    "workload", f"request {number + 1}", "comes before the one before"
                )
            upcoming = following
        if not core.has_unfinished:
            continue
        advanced, num_steady = core.step(), 0
        for seq in advanced:
            then_s = last_s.get(seq.seq_id)
            if then_s == before_s:
                num_steady += 1
            elif then_s is not None:
                report.add_gaps(clock.now_s - then_s, 1)
            if seq.finish_reason is None:
                last_s[seq.seq_id] = clock.now_s
            else:
                last_s.pop(seq.seq_id, None)
                needed += seq.num_tokens - 1 - seq.num_cached_tokens
                report.add(finished(seq))
        if num_steady:
            report.add_gaps(clock.now_s - before_s, num_steady)
        before_s = clock.now_s
    counts = events.counts
    report.num_preemptions = counts[Kind.PREEMPTED]
    report.recomputed_tokens = executor.num_tokens - needed
    if blocks.enable_prefix_caching and counts["prompt_tokens"]:
        report.prefix_cache_hit_rate = counts["prefix_cache_hits"] / counts["prompt_tokens"]
    return report


def add(core: EngineCore, request: TraceRequest, number: int, report: Report) -> None:
    """Queue a request, or count it as rejected."""
    target, tpot = request.ttft_target_s, request.tpot_target_s
    try:
        core.check_length(request.num_prompt_tokens)  # before so many tokens are made
        [seq] = core.add(
            token_ids(request, number),
            output_length(request.num_output_tokens),
            priority=request.priority or 0,
            arrival_s=request.arrival_s,
            terms=Terms(request.tenant, target, tpot),
        )
    except InvalidRequestError:
        report.num_rejected += 1
    else:
        wanted = request.num_prompt_tokens + request.num_output_tokens
        report.num_truncated += seq.max_num_tokens < wanted


def finished(seq: Sequence) -> Finished:
    """What a report wants to know of a sequence that has ended."""
    assert seq.scheduled_s is not None and seq.first_token_s is not None
    assert seq.last_token_s is not None
    return Finished(
        arrival_s=seq.arrival_s,
        scheduled_s=seq.scheduled_s,
        first_token_s=seq.first_token_s,
        last_token_s=seq.last_token_s,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_output_tokens=seq.num_tokens - seq.num_prompt_tokens,
        tenant=seq.terms.tenant,
        priority=seq.priority,
        ttft_target_s=seq.terms.ttft_target_s,
        tpot_target_s=seq.terms.tpot_target_s,
    )
