"""What the control plane costs: median time of schedule + update, with no model behind it.

python benchmarks/scheduler.py
"""

import statistics
import time

from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import make_policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.sampling_params import SamplingParams


class NoModel:
    """An executor that samples token 7 for every row, at no cost."""

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult([7] * len(plan.seq_ids))

    def close(self) -> None:
        pass


def microseconds_per_step(num_seqs: int, num_steps: int = 400) -> list[float]:
    """Times of steps in which all of `num_seqs` sequences decode."""
    scheduler = Scheduler(
        BlockManager(num_seqs * 40, 16),
        make_policy("fcfs"),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * 65,
    )
    engine = EngineCore(scheduler, NoModel(), max_model_len=4096)
    for i in range(num_seqs):
        engine.add([i] + [1] * (49 + i % 16), SamplingParams(max_tokens=None))
    engine.step()
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        plan = scheduler.schedule()
        between = time.perf_counter()
        result = engine.executor.execute(plan)
        resumed = time.perf_counter()
        scheduler.update(plan, result)
        times.append((time.perf_counter() - resumed + between - start) * 1e6)
        assert len(plan.seq_ids) == num_seqs
    return times


def main() -> None:
    print(f"{'decoding sequences':>20}{'median us':>12}{'p99 us':>10}{'us a sequence':>16}")
    for num_seqs in (1, 16, 64, 256, 1024):
        times = sorted(microseconds_per_step(num_seqs))
        median = statistics.median(times)
        p99 = times[int(len(times) * 0.99)]
        print(f"{num_seqs:>20}{median:>12.0f}{p99:>10.0f}{median / num_seqs:>16.2f}")


if __name__ == "__main__":
    main()
