"""EngineCore: add, abort, step. The loop that everything else feeds or reads."""

import logging
from collections.abc import Iterable
from typing import Protocol

from nanovllm.core.events import Kind
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import Sequence
from nanovllm.errors import InvalidRequestError
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
        *,
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
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        arrival_s: float | None = None,
    ) -> list[Sequence]:
        """Queue a request: one sequence per sample.

        Args:
            request_id: the caller's name for it; empty takes the number of its first sequence.
            priority: lower goes first under the priority policy.
            cache_salt: shares cached blocks only with requests of the same salt.
            arrival_s: on the engine's clock; None is now.

        Raises:
            InvalidRequestError: the prompt is empty or can never fit; nothing was queued.
        """
        try:
            self.check_length(len(prompt_token_ids))
        except InvalidRequestError as error:
            self.events.record(Kind.REJECTED, -1, str(error))
            raise
        ends = frozenset(params.stop_token_ids or ())
        longest = len(prompt_token_ids) + (params.max_tokens or self.max_num_tokens)
        sequences = []
        for index in range(params.n):
            seq_id, self.num_added = self.num_added, self.num_added + 1
            seq = Sequence(
                seq_id,
                prompt_token_ids,
                params.for_sample(index, self.seed + seq_id),
                request_id=request_id or str(seq_id - index),
                index=index,
                priority=priority,
                cache_salt=cache_salt,
                arrival_s=self.events.clock() if arrival_s is None else arrival_s,
                stop_token_ids=ends if params.ignore_eos else ends | self.eos_token_ids,
                max_num_tokens=min(longest, self.max_num_tokens),
            )
            self.scheduler.add(seq)
            sequences.append(seq)
        return sequences

    def check_length(self, num_prompt_tokens: int) -> None:
        """Refuse a prompt that is empty or leaves no room for a token of output."""
        if num_prompt_tokens == 0:
            raise InvalidRequestError("prompt", "", "must hold at least one token")
        if num_prompt_tokens >= self.max_num_tokens:
            raise InvalidRequestError(
                "prompt",
                f"{num_prompt_tokens} tokens",
                f"must be shorter than {self.max_num_tokens} tokens (the smallest of "
                "max_model_len, the KV cache and, without chunked prefill, "
                "max_num_batched_tokens): shorten it, or raise that setting",
            )

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
        if not plan.seq_ids:
            return []
        try:
            result = self.executor.execute(plan)
        except Exception as error:  # this step's sequences end; the engine goes on
            logger.exception("step %d failed; its %d sequences end", plan.step, len(plan.seq_ids))
            return self.scheduler.fail(plan, f"{type(error).__name__}: {error}")
        except BaseException:  # Ctrl-C: the same, and the caller hears of it
            self.scheduler.fail(plan, "interrupted")
            raise
        return self.scheduler.update(plan, result)

    def get_metrics(self) -> dict[str, float]:
        """Counters and gauges under vLLM's names; token counts where they count tokens."""
        counts, scheduler = self.events.counts, self.scheduler
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting),
            "kv_cache_usage_perc": scheduler.blocks.usage,
            "num_preemptions_total": counts[Kind.PREEMPTED],
            "prefix_cache_queries_total": counts["prefix_cache_queries"],
            "prefix_cache_hits_total": counts["prefix_cache_hits"],
            "prompt_tokens_total": counts["prompt_tokens"],
            "generation_tokens_total": counts["generation_tokens"],
            "request_success_total": counts[Kind.FINISHED],
        }
