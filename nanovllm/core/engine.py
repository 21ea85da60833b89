"""EngineCore: add, abort, step. The loop that everything else feeds or reads."""

import logging
from collections.abc import Iterable
from typing import Protocol

from nanovllm.core.events import Kind
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence, Terms
from nanovllm.errors import EngineDeadError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Whatever can carry out a plan: a model in this process, ranks in others, a cost model."""

    def execute(self, plan: StepPlan) -> StepResult: ...
    def close(self) -> None: ...


class EngineCore:
    """Takes requests in as token ids and advances them a step at a time.

    Args:
        max_model_len: tokens that a sequence may have, prompt and output together.
        eos_token_ids: the model's own ends.
        seed: from which requests without a seed get theirs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        seed: int = 0,
    ) -> None:
        self.scheduler, self.executor, self.events = scheduler, executor, scheduler.events
        self.eos_token_ids, self.seed = frozenset(eos_token_ids), seed
        limits = [max_model_len, scheduler.blocks.num_blocks * scheduler.blocks.block_size]
        if not scheduler.enable_chunked_prefill:
            limits.append(scheduler.max_num_batched_tokens)
        self.max_num_tokens = min(limits)  # so that each sequence can end, alone
        self.num_added = 0

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        arrival_s: float | None = None,
        terms: Terms | None = None,
    ) -> list[Sequence]:
        """Queue a request: one sequence per sample.

        Args:
            request_id: the caller's name for it; empty takes the number of its first sequence.
            priority: lower goes first under the priority policy.
            cache_salt: shares cached blocks only with requests of the same salt.
            arrival_s: on the engine's clock; None is now.
            terms: whose it is and how fast it wants to be served, for policies.

        Raises:
            InvalidRequestError: the prompt is empty or can never fit; nothing was queued.
        """
        self.check_length(len(prompt_token_ids))
        first, sequences = self.num_added, []
        now_s = self.events.clock() if arrival_s is None else arrival_s
        ends = frozenset(params.stop_token_ids or ())
        ends = ends if params.ignore_eos else ends | self.eos_token_ids
        longest = len(prompt_token_ids) + (params.max_tokens or self.max_num_tokens)
        longest, terms = min(longest, self.max_num_tokens), terms or Terms()
        for index in range(params.n):
            sample = params.for_sample(index, self.seed + self.num_added)
            who = self.num_added, prompt_token_ids, sample, request_id or str(first), index
            sequences.append(Sequence(*who, priority, cache_salt, now_s, ends, longest, terms))
            self.scheduler.add(sequences[-1])
            self.num_added += 1
        return sequences

    def check_length(self, num_prompt_tokens: int) -> None:
        """Refuse a prompt that is empty or leaves no room for a token of output."""
        why = "must hold at least one token"
        if num_prompt_tokens >= self.max_num_tokens:
            why = (
                f"must be shorter than {self.max_num_tokens} tokens (the smallest of "
                "max_model_len, the KV cache and, without chunked prefill, "
                "max_num_batched_tokens): shorten it, or raise that setting"
            )
        if not 0 < num_prompt_tokens < self.max_num_tokens:
            self.events.record(Kind.REJECTED, -1, why)
            raise InvalidRequestError("prompt", f"{num_prompt_tokens} tokens", why)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """End sequences, wherever they are; those that have ended already stay as they are."""
        self.finish(sequences, "abort")

    def finish(
        self, sequences: Iterable[Sequence], reason: str, stop_reason: int | str | None = None
    ) -> None:
        """End sequences for a reason found outside: a stop string, an error in detokenizing."""
        for seq in sequences:
            if seq.finish_reason is None:
                self.scheduler.finish(seq, reason, stop_reason)

    def step(self) -> list[Sequence]:
        """One turn: plan, execute, update.

        Returns:
            the sequences that got a token or ended.
        """
        plan = self.scheduler.schedule()
        try:
            done = self.carry_out(plan)
        except EngineDeadError:  # no step can follow
            self.fail("the engine died")
            raise
        except Exception as error:  # the sequences under way end; the engine goes on
            logger.exception("step %d failed; its sequences end", plan.step)
            return self.fail(f"{type(error).__name__}: {error}")
        except BaseException:  # Ctrl-C: the same, and the caller hears of it
            self.fail("interrupted")
            raise
        return self.scheduler.update(*done) if done else []

    def carry_out(self, plan: StepPlan) -> tuple[StepPlan, StepResult] | None:
        """The step whose result is in, if there is one; core/ahead.py has another way."""
        return (plan, self.executor.execute(plan)) if plan.seq_ids else None

    def fail(self, message: str) -> list[Sequence]:
        """End the sequences of the steps under way with an error, and return them."""
        return self.scheduler.fail(message)

    def get_metrics(self) -> dict[str, float]:
        """Counters and gauges under vLLM's names."""
        from nanovllm.core.metrics import metrics

        return metrics(self.scheduler)
