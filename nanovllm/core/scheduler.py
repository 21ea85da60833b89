"""The scheduler: which sequences compute how many tokens in the next step.

There is no prefill phase and no decode phase. Each sequence has num_computed_tokens and wants to
reach num_tokens; a step gives out a budget of tokens. Prefill, chunked prefill, decode,
recomputing after a preemption and going on after a cache hit are all that one rule, and they
share a batch.

A plan may be made while the steps before it are still under way: a token that one of them will
sample is awaited, and the plan computes it as it will be.
"""

from bisect import insort
from heapq import merge
from typing import NamedTuple

from nanovllm.core.block_manager import Block, BlockManager
from nanovllm.core.events import EventLog, Kind
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import Decision, Policy, StepView
from nanovllm.core.sequence import Sequence, Status

Key = tuple[tuple[float, ...], int]
Limit = Decision[int]  # of tokens, and what it is a limit of


class UnderWay(NamedTuple):
    """A step that was planned: the sequences of its rows, the blocks that it fills and hashed."""

    plan: StepPlan
    sequences: list[Sequence]
    hashed: list[Block]


class Scheduler:
    """Makes a plan of each step and takes in what the step found.

    Args:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens that a step computes at most.
        enable_chunked_prefill: False computes a prompt in one step or not at all.
    """

    def __init__(
        self,
        blocks: BlockManager,
        policy: Policy,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool = True,
        events: EventLog | None = None,
    ) -> None:
        self.blocks, self.policy, self.events = blocks, policy, events or EventLog()
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: list[tuple[Key, Sequence]] = []  # sorted: the next to be admitted first
        self.running: dict[int, Sequence] = {}  # in order of admission
        self.removed: list[int] = []  # for the next plan
        self.hashed: list[Block] = []  # by the next plan
        self.under_way: dict[int, UnderWay] = {}  # by number of step

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self.policy.added(seq)
        insort(self.waiting, (self._key(seq), seq))
        self._record(Kind.ADDED, seq, "", prompt_tokens=seq.num_prompt_tokens)

    def schedule(self) -> StepPlan:
        """Plan the next step: first running sequences that want one token (decodes), then all
        that want more, running or waiting, in the order of the policy's keys."""
        self.events.step += 1
        plan = StepPlan(self.events.step, removed=self.removed)
        running, prefills = self.running.values(), []
        for _, seq in self.waiting if self.policy.wants_matches else ():
            seq.num_matched_tokens = self.blocks.num_matched(seq)
        if self.policy.keys_change:
            self.waiting = sorted((self._key(seq), seq) for _, seq in self.waiting)
        self._preempt_for_arrival()
        decodes = [
            seq
            for seq in running
            if seq.num_tokens - seq.num_computed_tokens == 1 and seq.num_tokens < seq.max_num_tokens
        ]
        if len(decodes) < len(running):
            prefills = [seq for seq in running if seq.num_tokens - seq.num_computed_tokens > 1]
        budget = self.max_num_batched_tokens
        wanted, why = self.policy.share_budget(self._view(budget, len(prefills)))
        for shares in (wanted, (budget, budget)):  # whoever lets nobody go has no say
            if plan.seq_ids:
                break
            self._schedule_decodes(plan, decodes, min(shares[0], budget))
            rest = budget - len(plan.seq_ids)
            scarce = "budget" if shares[1] >= rest else f"budget: {why}"
            self._schedule_prefills(plan, prefills, Decision(min(shares[1], rest), scarce))
            if plan.seq_ids and shares[0] < min(len(decodes), budget):
                self.events.record(Kind.HELD, -1, why, sequences=len(decodes) - shares[0])
        if plan.seq_ids:  # else the plan is not sent
            rows = [self.running[seq_id] for seq_id in plan.seq_ids]
            self.policy.served(zip(rows, plan.num_scheduled_tokens, strict=True))
            self.under_way[plan.step] = UnderWay(plan, rows, self.hashed)
            self.removed, self.hashed = [], []
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Append what the step sampled and end the sequences that are done.

        Returns:
            the sequences that got a token or ended with an error.
        """
        now_s, advanced = self.events.clock(), []
        sequences = self.under_way.pop(plan.step).sequences
        for seq in sequences if result.logprobs or result.prompt_logprobs else ():
            if seq.finish_reason is None:
                seq.prompt_logprobs |= result.prompt_logprobs.get(seq.seq_id, {})
                if seq.seq_id in result.logprobs:
                    seq.logprobs.append(result.logprobs[seq.seq_id])
        for seq, token_id in zip(sequences, result.token_ids, strict=True):
            if token_id < 0 or seq.finish_reason is not None:
                continue  # part of a prompt, or ended meanwhile
            seq.token_ids.append(token_id)
            seq.last_token_s = now_s
            if seq.first_token_s is None:
                seq.first_token_s = now_s
            advanced.append(seq)
            if token_id in seq.stop_token_ids:
                self.finish(seq, "stop", token_id)
            elif len(seq.token_ids) >= seq.max_num_tokens:
                self.finish(seq, "length")
        self.events.counts["generation_tokens"] += len(advanced)
        for seq in sequences if result.errors else ():
            if seq.seq_id in result.errors and seq.finish_reason is None:
                advanced.append(seq)
                self.finish(seq, "error", result.errors[seq.seq_id])
        return advanced

    def fail(self, message: str) -> list[Sequence]:
        """A step raised an exception: end the sequences of all steps under way, since each goes on
        from the one before it, and forget what they were to store."""
        failed: dict[int, Sequence] = {}
        for plan, sequences, hashed in self.under_way.values():
            self.blocks.forget(hashed)
            failed |= {seq.seq_id: seq for seq in sequences if seq.finish_reason is None}
            self.removed += plan.removed  # a rank may not have come to it
        self.under_way.clear()
        for seq in failed.values():
            self.finish(seq, "error", message)
        return list(failed.values())

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence, running or waiting, and release its blocks."""
        if seq.status is Status.RUNNING:
            self._stop_running(seq)
        else:
            self.waiting = [entry for entry in self.waiting if entry[1] is not seq]
        seq.status, seq.finish_reason, seq.stop_reason = Status.FINISHED, reason, stop_reason
        kind = Kind.ABORTED if reason == "abort" else Kind.FINISHED
        self.events.counts["success"] += reason in ("stop", "length")
        seq.num_tokens = len(seq.token_ids)  # nothing is awaited
        self._record(kind, seq, reason, output_tokens=seq.num_tokens - seq.num_prompt_tokens)
        self.policy.finished(seq)

    # The parts of a plan

    def _preempt_for_arrival(self) -> None:
        """Let the first in the queue take the place of running sequences, if the policy wants."""
        limit = Decision(self.max_num_batched_tokens, "budget")
        while self.waiting and self.running:
            seq = self.waiting[0][1]
            victim, why = self.policy.victim(list(self.running.values()), seq)
            if victim is None or seq.num_awaited or self._may_run(seq, limit, 0).value:
                return
            self._preempt(self.running[victim.seq_id], seq, why)

    def _schedule_decodes(self, plan: StepPlan, decodes: list[Sequence], limit: int) -> None:
        if len(decodes) > min(limit, self.blocks.num_available):  # not all may go: the best first
            decodes.sort(key=self._key)
        for seq in decodes[: max(limit, 0)]:
            end = seq.num_computed_tokens + 1
            if end < seq.num_slots or self._reach(plan, seq, end):
                seq.num_computed_tokens, seq.num_tokens = end, end + 1
                plan.seq_ids.append(seq.seq_id)
        plan.num_scheduled_tokens.extend([1] * len(plan.seq_ids))

    def _reach(self, plan: StepPlan, seq: Sequence, end: int) -> bool:
        """Have a decoding sequence come to the end of a block, or to a new one, for which it may
        take the place of another. False if it had to give way itself."""
        while seq.status is Status.RUNNING and end > seq.num_slots:
            if self.blocks.num_available:
                plan.new_block_ids[seq.seq_id] = self.blocks.allocate(seq, end)
            else:
                scheduled = set(plan.seq_ids)
                others = [s for s in self.running.values() if s.seq_id not in scheduled]
                victim, why = self.policy.victim(others, seq)
                self._preempt(self.running[victim.seq_id] if victim else seq, seq, why)
        if seq.status is Status.RUNNING:
            self.hashed += self.blocks.cache_full_blocks(seq, end)
        return seq.status is Status.RUNNING

    def _schedule_prefills(self, plan: StepPlan, prefills: list[Sequence], limit: Limit) -> None:
        running = sorted((self._key(s), s) for s in prefills if s.status is Status.RUNNING)
        queue, admitting = self.waiting[: self.max_num_seqs], True
        for _, seq in merge(running, queue):
            if seq.status is Status.WAITING:
                admitting = admitting and self._admit(plan, seq, limit, len(prefills))
            num_wanted = seq.num_tokens - seq.num_computed_tokens
            num_tokens = min(num_wanted, limit.value)
            if seq.status is Status.WAITING or num_tokens <= 0:
                continue
            limit = limit._replace(value=limit.value - num_tokens)
            seq.num_computed_tokens += num_tokens
            self.hashed += self.blocks.cache_full_blocks(seq, seq.num_computed_tokens)
            plan.seq_ids.append(seq.seq_id)
            plan.num_scheduled_tokens.append(num_tokens)
            if num_tokens < num_wanted:
                self._record(Kind.CHUNKED, seq, limit.reason, tokens=num_tokens, wanted=num_wanted)
            else:
                seq.num_tokens += 1

    def _admit(self, plan: StepPlan, seq: Sequence, limit: Limit, num_prefills: int) -> bool:
        """Let the first waiting sequence run, with blocks for all its tokens; those that the
        prefix cache has, it shares. False if it goes on waiting."""
        allowed, why = self._may_run(seq, limit, num_prefills + len(plan.new_sequences))
        if not allowed:
            if seq.waiting_reason != why:  # say it once
                self._record(Kind.WAITING, seq, why)
            seq.waiting_reason = why
            return False
        del self.waiting[0]
        self.running[seq.seq_id] = seq
        seq.status, seq.waiting_reason = Status.RUNNING, ""
        num_stored = self.blocks.share(seq, self.blocks.match(seq))
        self.blocks.allocate(seq, seq.num_tokens)
        # Even if all is cached, the last token is computed: its logits are wanted.
        seq.num_computed_tokens = min(num_stored, seq.num_tokens - 1)
        plan.new_sequences.append(seq.whole(num_stored))
        plan.new_block_ids[seq.seq_id] = list(seq.block_table)
        self._record(Kind.ADMITTED, seq, why, tokens=seq.num_tokens)
        if num_stored:
            self._record(Kind.CACHE_HIT, seq, "prefix", tokens=seq.num_computed_tokens)
        elif self.blocks.enable_prefix_caching:
            self._record(Kind.CACHE_MISS, seq, "first block not cached")
        if seq.scheduled_s is None:
            seq.scheduled_s, seq.num_cached_tokens = self.events.clock(), seq.num_computed_tokens
            self.events.counts["prompt_tokens"] += seq.num_prompt_tokens
            self.events.counts["prefix_cache_hits"] += seq.num_cached_tokens
        return True

    def _may_run(self, seq: Sequence, limit: Limit, num_prefills: int) -> Decision[bool]:
        """Whether a waiting sequence can run with `limit` tokens of budget, and why."""
        if seq.num_awaited:  # it was preempted after the step that samples it was planned
            return Decision(False, "token under way")
        matched = self.blocks.match(seq)
        num_cached = min(len(matched) * self.blocks.block_size, seq.num_tokens - 1)
        num_wanted = 1 if self.enable_chunked_prefill else seq.num_tokens - num_cached
        if num_wanted > limit.value:
            return Decision(False, f"no {limit.reason}")
        if len(self.running) >= self.max_num_seqs:
            return Decision(False, "max_num_seqs")
        num_new = self.blocks.num_blocks_for(seq.num_tokens) - len(matched)
        num_blocks = self.blocks.num_to_take(matched, num_new)
        if num_blocks > self.blocks.num_available:
            return Decision(False, "no blocks")
        return self.policy.admit(seq, num_blocks, self._view(limit.value, num_prefills))

    def _preempt(self, seq: Sequence, needy: Sequence, why: str) -> None:
        """Take the blocks of `seq`; it waits, and computes its tokens anew when it is back."""
        lost = {"blocks": len(seq.block_table), "computed_tokens": seq.num_computed_tokens}
        self._record(Kind.PREEMPTED, seq, why, by=needy.seq_id, **lost)
        self._stop_running(seq)
        seq.status, seq.num_computed_tokens = Status.WAITING, 0
        seq.num_preemptions += 1
        insort(self.waiting, (self._key(seq), seq))

    def _stop_running(self, seq: Sequence) -> None:
        del self.running[seq.seq_id]
        self.removed.append(seq.seq_id)
        self.blocks.release(seq)

    def _key(self, seq: Sequence) -> Key:
        return self.policy.key(seq, self.events.clock()), seq.seq_id

    def _record(self, kind: Kind, seq: Sequence, reason: str, **numbers: int) -> None:
        self.events.record(kind, seq.seq_id, reason, **numbers)

    def _view(self, budget: int, num_prefills: int) -> StepView:
        decodes, waiting = len(self.running) - num_prefills, len(self.waiting)
        available, now_s = self.blocks.num_available, self.events.clock()
        return StepView(now_s, budget, decodes, num_prefills, waiting, available)
