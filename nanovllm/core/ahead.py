"""AheadEngine: plans a step while the one before it is still under way (asynchronous scheduling).

    host     schedule 1 │ schedule 2 │ update 1 │ schedule 3 │ update 2 │ ...
    device              └─ step 1 ─────┘└─ step 2 ───────────────┘└─ step 3 ...

The device need not wait for the scheduler. Tokens are the same as from an EngineCore; a sequence
whose end is seen in a result has had a row in one more step, for nothing.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from nanovllm.core.engine import EngineCore, Executor
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence


class AsyncExecutor(Executor, Protocol):
    """One that may be handed a plan while it is still busy with the one before."""

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step. What is returned waits for its result; to be called in the same order."""
        ...


class AheadEngine(EngineCore):
    """See EngineCore.

    Attributes:
        under_way: plans that were submitted, each with what waits for its result; two at most.
    """

    executor: AsyncExecutor

    def __init__(
        self,
        scheduler: Scheduler,
        executor: AsyncExecutor,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scheduler, executor, max_model_len, eos_token_ids, seed)
        self.under_way: deque[tuple[StepPlan, Callable[[], StepResult]]] = deque()

    @property
    def has_unfinished(self) -> bool:
        return super().has_unfinished or bool(self.under_way)

    def carry_out(self, plan: StepPlan) -> tuple[StepPlan, StepResult] | None:
        """Submit the plan; the step before it, once that is done."""
        if plan.seq_ids:
            self.under_way.append((plan, self.executor.submit(plan)))
        if len(self.under_way) <= bool(plan.seq_ids):
            return None
        oldest, wait = self.under_way.popleft()
        return oldest, wait()

    def fail(self, message: str) -> list[Sequence]:
        self.under_way.clear()
        return super().fail(message)
