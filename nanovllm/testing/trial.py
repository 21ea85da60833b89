"""A trial: requests, an engine without a model, and a clock that only steps move."""

from collections.abc import Iterable
from dataclasses import dataclass

from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.events import Event, EventLog
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import Policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence, Terms
from nanovllm.sampling_params import SamplingParams

NO_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: its prompt, and how many tokens it will have generated at its end."""

    arrival_s: float
    prompt: tuple[int, ...]
    num_output_tokens: int
    priority: int = 0
    terms: Terms = NO_TERMS


@dataclass(frozen=True, slots=True)
class Setting:
    """What a trial runs on; the names are EngineConfig's. A step takes step_s, and token_s more
    for each token in it."""

    num_kv_blocks: int = 256
    block_size: int = 16
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 256
    enable_chunked_prefill: bool = True
    step_s: float = 0.01
    token_s: float = 0.0001


class FakeExecutor:
    """Samples token 7 whenever a row reaches its last known token. Its clock stands still but for
    the time that steps take.

    Attributes:
        now_s: the time. num_steps: plans carried out.
    """

    def __init__(self, step_s: float = 0.01, token_s: float = 0.0001) -> None:
        self.step_s, self.token_s = step_s, token_s
        self.now_s, self.num_steps = 0.0, 0
        self.wanted: dict[int, int] = {}  # seq_id -> tokens up to the last known one

    def execute(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.removed:
            self.wanted.pop(seq_id, None)
        for new in plan.new_sequences:
            self.wanted[new.seq_id] = len(new.token_ids) - new.num_computed_tokens
        sampled = []
        for seq_id, num_tokens in zip(plan.seq_ids, plan.num_scheduled_tokens, strict=True):
            left = self.wanted[seq_id] - num_tokens
            sampled.append(-1 if left else 7)
            self.wanted[seq_id] = left or 1
        self.now_s += self.step_s + self.token_s * sum(plan.num_scheduled_tokens)
        self.num_steps += 1
        return StepResult(sampled)

    def close(self) -> None:
        pass


class Trial:
    """Requests on their way through an engine.

        sequences = Trial(arrivals, policy).run()

    Attributes:
        sequences: of the requests that have arrived, in the order of `arrivals`.
        events: all that was decided.
    """

    def __init__(
        self, arrivals: Iterable[Arrival], policy: Policy, setting: Setting | None = None
    ) -> None:
        setting = setting or Setting()
        self.to_come = sorted(arrivals, key=lambda arrival: arrival.arrival_s)
        self.sequences: list[Sequence] = []
        self.events: list[Event] = []
        self.executor = FakeExecutor(setting.step_s, setting.token_s)
        self.blocks = BlockManager(setting.num_kv_blocks, setting.block_size, evict=policy.evict)
        self.scheduler = Scheduler(
            self.blocks,
            policy,
            setting.max_num_seqs,
            setting.max_num_batched_tokens,
            setting.enable_chunked_prefill,
            EventLog(clock=lambda: self.executor.now_s, sink=self.events.append),
        )
        self.engine = EngineCore(self.scheduler, self.executor, max_model_len=2**20)

    @property
    def done(self) -> bool:
        return not (self.to_come or self.engine.has_unfinished)

    def step(self) -> bool:
        """Add what has arrived by now, or else what comes next, and make a step.

        Returns:
            whether anybody advanced.
        """
        executor = self.executor
        if not self.engine.has_unfinished and self.to_come:
            executor.now_s = max(executor.now_s, self.to_come[0].arrival_s)
        while self.to_come and self.to_come[0].arrival_s <= executor.now_s:
            new = self.to_come.pop(0)
            params = SamplingParams(max_tokens=new.num_output_tokens, ignore_eos=True)
            self.sequences += self.engine.add(
                list(new.prompt),
                params,
                priority=new.priority,
                arrival_s=new.arrival_s,
                terms=new.terms,
            )
        num_steps = executor.num_steps
        self.engine.step()
        return executor.num_steps > num_steps

    def run(self) -> list[Sequence]:
        """Step until all requests have ended.

        Raises:
            RuntimeError: the policy lets nobody advance.
        """
        while not self.done:
            if not self.step():
                raise RuntimeError("the policy lets nobody advance; check_policy says more")
        return self.sequences
