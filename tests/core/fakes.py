"""Small stand-ins for the parts around the control plane: an executor, a clock, sequences."""

from collections.abc import Callable
from functools import partial

from nanovllm.core.ahead import AheadEngine
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.events import Event, EventLog
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import Policy, make_policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


def make_seq(token_ids: list[int], seq_id: int = 0, salt: str = "", **params: object) -> Sequence:
    return Sequence(seq_id, token_ids, SamplingParams(**params), cache_salt=salt)


class FakeExecutor:
    """A worker without a model. It knows what the plans tell it and nothing else.

    Its KV cache holds, per block and offset, the hash of the whole stream of tokens up to there:
    what real keys and values depend on. Each row it executes reads every position up to its
    query's end and finds its own stream there, or the books of the scheduler are wrong.

    Attributes:
        plans: all that came. last_written: (seq_id, position) that the last step stored.
        sample: tokens so far -> the next one.
        owner: seq_id -> what else the content depends on (the salt).
        failures: exceptions to raise, one a step, None for a good step. Each comes after the
            step has spoilt what it was to store.
        bad_rows: sequences whose sampling fails in the next step.
        deaf: the next failure comes before anything of the plan is read.
        broken: a step failed that was submitted ahead, and nobody has heard of it: those after it
            fail too.
    """

    def __init__(
        self,
        block_size: int,
        sample: Callable[[list[int]], int] = lambda tokens: 7,
        owner: Callable[[int], str] = lambda seq_id: "",
    ) -> None:
        self.block_size, self.sample, self.owner = block_size, sample, owner
        self.plans: list[StepPlan] = []
        self.last_written: list[tuple[int, int]] = []
        self.tokens: dict[int, list[int]] = {}
        self.streams: dict[int, list[int]] = {}  # hash of the stream up to each position
        self.tables: dict[int, list[int]] = {}
        self.num_computed: dict[int, int] = {}
        self.num_stored: dict[int, int] = {}
        self.kv: dict[tuple[int, int], int | None] = {}  # (block id, offset) -> stream
        self.failures: list[BaseException | None] = []
        self.bad_rows: set[int] = set()
        self.deaf = self.broken = False
        self.closed = False

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        failure = self.failures.pop(0) if self.failures else None
        deaf, self.deaf = self.deaf and failure is not None, False
        if not deaf:
            self.apply(plan)
            self.store(plan, spoilt=failure is not None)
        if failure is not None:
            raise failure
        token_ids = [self.attend(*row) for row in self.rows(plan)]
        errors = {}
        for i, seq_id in enumerate(plan.seq_ids):
            if token_ids[i] >= 0 and seq_id in self.bad_rows:
                token_ids[i], errors[seq_id] = -1, "no distribution"
                self.tokens[seq_id].append(0)  # a step planned ahead computes it
            elif token_ids[i] >= 0:
                self.tokens[seq_id].append(token_ids[i])
        self.bad_rows = set()
        return StepResult(token_ids, errors=errors)

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Carry it out now; say what came of it when asked, as a GPU does."""
        if self.broken:  # it can only fail as well
            self.plans.append(plan)
            return partial(self.report, RuntimeError("broken before"))
        try:
            result = self.execute(plan)
            return lambda: result
        except Exception as error:
            self.broken = True
            return partial(self.report, error)

    def report(self, error: Exception) -> StepResult:
        self.broken = False
        raise error

    def close(self) -> None:
        self.closed = True

    def rows(self, plan: StepPlan) -> list[tuple[int, int]]:
        return list(zip(plan.seq_ids, plan.num_scheduled_tokens, strict=True))

    def apply(self, plan: StepPlan) -> None:
        known = (self.tokens, self.streams, self.tables, self.num_computed, self.num_stored)
        for seq_id in plan.removed:
            for part in known:
                part.pop(seq_id, None)
        for new in plan.new_sequences:
            self.tokens[new.seq_id] = list(new.token_ids)
            self.streams[new.seq_id], self.tables[new.seq_id] = [], []
            self.num_computed[new.seq_id] = new.num_computed_tokens
            self.num_stored[new.seq_id] = new.num_stored_tokens
        for seq_id, block_ids in plan.new_block_ids.items():
            self.tables[seq_id] += block_ids

    def written(self, plan: StepPlan) -> list[tuple[int, int]]:
        """(seq_id, position) of all that the step stores; apply comes first."""
        found = []
        for seq_id, num_tokens in self.rows(plan):
            start = self.num_computed[seq_id]
            first = max(start, self.num_stored[seq_id])
            found += [(seq_id, position) for position in range(first, start + num_tokens)]
        return found

    def slot(self, seq_id: int, position: int) -> tuple[int, int]:
        return self.tables[seq_id][position // self.block_size], position % self.block_size

    def store(self, plan: StepPlan, spoilt: bool) -> None:
        for seq_id in plan.seq_ids:
            tokens, streams = self.tokens[seq_id], self.streams[seq_id]
            for position in range(len(streams), len(tokens)):
                before = streams[-1] if streams else hash(self.owner(seq_id))
                streams.append(hash((before, tokens[position])))
        self.last_written = self.written(plan)
        for seq_id, position in self.last_written:
            stream = None if spoilt else self.streams[seq_id][position]
            self.kv[self.slot(seq_id, position)] = stream

    def attend(self, seq_id: int, num_tokens: int) -> int:
        """Read all keys and values up to the query's end; sample if that is the last token."""
        self.num_computed[seq_id] += num_tokens
        tokens, end = self.tokens[seq_id], self.num_computed[seq_id]
        assert end <= len(tokens), f"sequence {seq_id} computes a token that nobody knows"
        for position in range(end):
            slot = self.slot(seq_id, position)
            if self.kv[slot] != self.streams[seq_id][position]:
                raise AssertionError(f"sequence {seq_id} reads what is not its own at {slot}")
        return self.sample(tokens) if end == len(tokens) else -1


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    policy: str | Policy = "fcfs",
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    enable_chunked_prefill: bool = True,
    enable_prefix_caching: bool = True,
    events: EventLog | None = None,
) -> Scheduler:
    policy = make_policy(policy) if isinstance(policy, str) else policy
    return Scheduler(
        BlockManager(
            num_blocks,
            block_size,
            enable_prefix_caching=enable_prefix_caching,
            evict=policy.evict,
        ),
        policy,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        events=events,
    )


class Rig:
    """A scheduler, a fake executor and the events of both, on a clock that stands still."""

    def __init__(
        self,
        *args: object,
        sample: Callable[[list[int]], int] = lambda tokens: 7,
        max_model_len: int = 8192,
        eos_token_ids: tuple[int, ...] = (),
        seed: int = 0,
        ahead: bool = False,
        **settings: object,
    ) -> None:
        self.now_s = 0.0
        self.events: list[Event] = []
        log = EventLog(clock=lambda: self.now_s, sink=self.events.append)
        self.scheduler = make_scheduler(*args, **settings, events=log)
        self.blocks = self.scheduler.blocks
        self.salts: dict[int, str] = {}
        self.executor = FakeExecutor(
            self.blocks.block_size, sample, lambda seq_id: self.salts.get(seq_id, "")
        )
        self.engine = (AheadEngine if ahead else EngineCore)(
            self.scheduler,
            self.executor,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            seed=seed,
        )
        self.ahead = ahead

    def add(self, prompt: list[int], max_tokens: int | None = 16, **options: object) -> Sequence:
        """Add a request of one sample. Options go to SamplingParams or EngineCore.add."""
        own = ("priority", "request_id", "cache_salt", "arrival_s")
        to_engine = {name: options.pop(name) for name in own if name in options}
        self.salts[self.engine.num_added] = str(to_engine.get("cache_salt", ""))
        [seq] = self.engine.add(
            prompt, SamplingParams(max_tokens=max_tokens, **options), **to_engine
        )
        return seq

    def step(self) -> dict[int, int]:
        """One step. Returns seq_id -> tokens scheduled, in the order of the batch."""
        sent = len(self.executor.plans)
        self.engine.step()
        if len(self.executor.plans) == sent:
            return {}
        plan = self.executor.plans[-1]
        return dict(zip(plan.seq_ids, plan.num_scheduled_tokens, strict=True))

    @property
    def plan(self) -> StepPlan:
        return self.executor.plans[-1]

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left; each step advances something."""
        for _ in range(max_steps):
            if not self.engine.has_unfinished:
                return
            assert self.step() or self.ahead, "unfinished work, and nobody advances"
        raise AssertionError(f"not done after {max_steps} steps")

    def said(self, *kinds: str) -> list[tuple[str, int, str]]:
        """(kind, seq_id, reason) of the events so far, of these kinds or all."""
        return [
            (e.kind.value, e.seq_id, e.reason) for e in self.events if not kinds or e.kind in kinds
        ]
