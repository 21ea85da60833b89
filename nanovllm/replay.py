"""A recording played again: the same arrivals and step times through a new EngineCore."""

from collections.abc import Iterable, Iterator

from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.events import EventLog, Kind, Sink
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import Policy, make_policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence
from nanovllm.recording import Arrival, End, Finish, Header, Record, Rejected, Reset, Step
from nanovllm.sampling_params import SamplingParams


class VirtualClock:
    """A clock that shows `now_s` until somebody sets it."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class RecordedTimes:
    """An Executor that takes as long as the recorded steps did, and samples as many tokens.

    Tokens are made up so that two sequences share a block where they did when recorded: those of a
    block stand for its chain hash, the ones after the last full block for their sequence.

    Args:
        records: of one recording.
        clock: set to the end of each step.

    Attributes:
        last_plan: that came.
    """

    STOP = 0  # the token that ends a sequence

    def __init__(self, records: Iterable[Record], clock: VirtualClock) -> None:
        self.clock, self.block_size = clock, 1
        self.steps: dict[int, Step] = {}
        self.blocks: dict[int, list[str]] = {}
        self.stops: dict[int, int] = {}  # seq_id -> the position of its STOP
        self.numbers: dict[str, int] = {}  # of chain hashes
        self.left: dict[int, int] = {}  # tokens to compute before the next is sampled
        self.lengths: dict[int, int] = {}
        self.last_plan = StepPlan(0)
        prompts: dict[int, int] = {}
        for record in records:
            match record:
                case Header():
                    self.block_size = record.block_size
                case Step():
                    self.steps[record.step] = record
                case Arrival():
                    self.blocks[record.seq_id] = list(record.blocks)
                    prompts[record.seq_id] = record.prompt_tokens
                case Finish():
                    self.blocks[record.seq_id] += record.blocks
                    if record.reason == "stop" and not record.outside:
                        end = prompts[record.seq_id] + record.output_tokens
                        self.stops[record.seq_id] = end - 1

    def token(self, seq_id: int, position: int) -> int:
        """What stands at a position of a sequence."""
        if self.stops.get(seq_id) == position:
            return self.STOP
        block, blocks = position // self.block_size, self.blocks[seq_id]
        if block < len(blocks):
            return 2 + 2 * self.numbers.setdefault(blocks[block], len(self.numbers))
        return 1 + 2 * seq_id

    def execute(self, plan: StepPlan) -> StepResult:
        self.last_plan = plan
        for new in plan.new_sequences:
            self.left[new.seq_id] = len(new.token_ids) - new.num_computed_tokens
            self.lengths[new.seq_id] = len(new.token_ids)
        step, token_ids = self.steps.get(plan.step), []
        if step is None:
            raise ValueError(f"the recording has no step {plan.step}")
        self.clock.now_s = step.end_s
        if step.error:
            raise ValueError(step.error)
        for seq_id, num_tokens in zip(plan.seq_ids, plan.num_scheduled_tokens, strict=True):
            self.left[seq_id] -= num_tokens
            done = self.left[seq_id] == 0 and seq_id not in step.failed
            token_ids.append(self.token(seq_id, self.lengths[seq_id]) if done else -1)
            if done:
                self.left[seq_id] = 1
                self.lengths[seq_id] += 1
        return StepResult(token_ids, errors=dict.fromkeys(step.failed, "as recorded"))

    def close(self) -> None:
        pass


def replay(
    records: list[Record], policy: Policy | None = None, sink: Sink | None = None
) -> Iterator[StepPlan]:
    """Take a new EngineCore through a recording: what came and was given up from outside, before
    the same steps, and steps that take as long.

    With the recorded policy, the plans and events are those recorded, one for one (a policy whose
    keys change with time may see a step begin by microseconds later).

    Args:
        records: of one recording, whole. policy: None is that of its header.
        sink: hears of the events.

    Yields:
        the plan of each recorded step.
    """
    header = records[0]
    assert isinstance(header, Header)
    clock = VirtualClock(header.time_s)
    policy = policy or make_policy(header.policy)
    caching, evict = header.enable_prefix_caching, policy.evict
    blocks = BlockManager(header.num_blocks, header.block_size, caching, evict)
    limits = header.max_num_seqs, header.max_num_batched_tokens, header.enable_chunked_prefill
    scheduler = Scheduler(blocks, policy, *limits, EventLog(clock, sink))
    executor = RecordedTimes(records, clock)
    core = EngineCore(scheduler, executor, header.max_num_tokens)
    sequences: dict[int, Sequence] = {}
    for record in records:
        if isinstance(record, Header | End):
            continue
        while core.events.step < record.step - isinstance(record, Step):
            core.step()  # one in which nobody could go
        clock.now_s = record.start_s if isinstance(record, Step) else record.time_s
        match record:
            case Step():
                core.step()
                yield executor.last_plan
            case Arrival():
                core.num_added = record.seq_id  # the recording may have begun late
                prompt = [executor.token(record.seq_id, i) for i in range(record.prompt_tokens)]
                params = SamplingParams(
                    max_tokens=record.max_tokens,
                    stop_token_ids=[RecordedTimes.STOP],
                    prompt_logprobs=0 if record.own_prompt else None,
                )
                who = record.request_id, record.priority, record.salt, record.arrival_s
                [sequences[record.seq_id]] = core.add(prompt, params, *who, record.terms)
            case Finish(outside=True):
                core.finish([sequences[record.seq_id]], record.reason)
            case Rejected():
                core.events.record(Kind.REJECTED, -1, record.reason)
            case Reset():
                blocks.reset_prefix_cache()
