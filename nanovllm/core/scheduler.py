"""The scheduler: which sequences compute how many tokens in the next step.

There is no prefill phase and no decode phase. Each sequence has num_computed_tokens and wants to
reach num_tokens; a step gives out a budget of tokens. Prefill, chunked prefill, decode,
recomputing after a preemption and going on after a cache hit are all that one rule, and they
share a batch.
"""

from bisect import insort
from dataclasses import dataclass, field

from nanovllm.core.block_manager import BlockManager
from nanovllm.core.events import EventLog, Kind
from nanovllm.core.plan import NewSequence, StepPlan, StepResult
from nanovllm.core.policy import Policy, StepView
from nanovllm.core.sequence import Sequence, Status

Key = tuple[tuple[float, ...], int]


@dataclass(slots=True)
class Draft:
    """A plan while it is being made.

    Attributes:
        rows: seq_id -> tokens to compute, in the order of the batch.
        filled: sequences with a block that becomes full in this step. A twin may share it
            already, so these are no longer preempted.
        preempted: sequences that lost their blocks in this step.
        lacking: running sequence with prompt tokens left -> blocks that it has yet to allocate.
    """

    rows: dict[int, int] = field(default_factory=dict)
    new_sequences: dict[int, NewSequence] = field(default_factory=dict)
    new_block_ids: dict[int, list[int]] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)
    preempted: set[int] = field(default_factory=set)
    lacking: dict[int, int] = field(default_factory=dict)


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
        *,
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

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self._enqueue(seq)
        self.events.record(Kind.ADDED, seq.seq_id, "", prompt_tokens=seq.num_prompt_tokens)

    def schedule(self) -> StepPlan:
        """Plan the next step: running sequences that want one token (decodes), then all that
        want more, running or waiting, in the order of the policy's keys."""
        self.events.step += 1
        draft = Draft()
        decodes = [s for s in self.running.values() if s.num_tokens - s.num_computed_tokens == 1]
        prefills = []
        if len(decodes) < len(self.running):
            prefills = [
                s for s in self.running.values() if s.num_tokens - s.num_computed_tokens > 1
            ]
        for seq in prefills:
            draft.lacking[seq.seq_id] = self._num_lacking(seq)
        view = self._view(draft, self.max_num_batched_tokens)
        (decode_limit, prefill_limit), _ = self.policy.share_budget(view)
        self._schedule_decodes(draft, decodes, min(decode_limit, self.max_num_batched_tokens))
        left = self.max_num_batched_tokens - len(draft.rows)
        self._schedule_prefills(draft, prefills, min(prefill_limit, left))
        removed: list[int] = []
        if draft.rows:  # else the plan is not sent
            removed, self.removed = self.removed, removed
        return StepPlan(
            self.events.step,
            list(draft.rows),
            list(draft.rows.values()),
            list(draft.new_sequences.values()),
            draft.new_block_ids,
            removed,
        )

    def update(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Append what the step sampled and end the sequences that are done.

        Returns:
            the sequences that got a token or ended with an error.
        """
        now_s, advanced, running = self.events.clock(), [], self.running
        for seq_id, (position, entries) in result.prompt_logprobs.items():
            if seq_id in running:
                known = running[seq_id].prompt_logprobs
                known.extend(entries[len(known) + 1 - position :])  # computed anew: once is enough
        for seq_id, token_id in zip(plan.seq_ids, result.token_ids, strict=True):
            if token_id < 0 or (seq := running.get(seq_id)) is None:
                continue  # part of a prompt, or aborted meanwhile
            seq.token_ids.append(token_id)
            seq.num_tokens += 1
            seq.last_token_s = now_s
            if seq.first_token_s is None:
                seq.first_token_s = now_s
            advanced.append(seq)
            if token_id in seq.stop_token_ids:
                self.finish(seq, "stop", token_id)
            elif seq.num_tokens >= seq.max_num_tokens:
                self.finish(seq, "length")
        self.events.counts["generation_tokens"] += len(advanced)
        for seq in advanced if result.logprobs else ():
            if seq.seq_id in result.logprobs:
                seq.logprobs.append(result.logprobs[seq.seq_id])
        for seq_id, message in result.errors.items():
            if seq_id in running:
                advanced.append(running[seq_id])
                self.finish(running[seq_id], "error", message)
        return advanced

    def fail(self, plan: StepPlan, message: str) -> list[Sequence]:
        """The step raised an exception: end the sequences in it, whatever it has stored."""
        failed = [self.running[seq_id] for seq_id in plan.seq_ids if seq_id in self.running]
        scheduled = dict(zip(plan.seq_ids, plan.num_scheduled_tokens, strict=True))
        for seq in failed:
            self.blocks.forget(seq, seq.num_computed_tokens - scheduled[seq.seq_id])
        for seq in failed:
            self.finish(seq, "error", message)
        self.removed += plan.removed  # a rank may not have come to it
        return failed

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence, running or waiting, and release its blocks."""
        if seq.status is Status.RUNNING:
            del self.running[seq.seq_id]
            self.removed.append(seq.seq_id)
            self.blocks.release(seq)
        elif seq.status is Status.WAITING:
            self.waiting = [entry for entry in self.waiting if entry[1] is not seq]
        seq.status, seq.finish_reason, seq.stop_reason = Status.FINISHED, reason, stop_reason
        kind = Kind.ABORTED if reason == "abort" else Kind.FINISHED
        output_tokens = seq.num_tokens - seq.num_prompt_tokens
        self.events.record(kind, seq.seq_id, reason, output_tokens=output_tokens)

    # The two halves of a plan

    def _schedule_decodes(self, draft: Draft, decodes: list[Sequence], limit: int) -> None:
        if len(decodes) > min(limit, self.blocks.num_available):  # not all may go: the best first
            decodes.sort(key=self._key)
        rows, preempted = draft.rows, draft.preempted
        for seq in decodes[: max(limit, 0)]:
            if preempted and seq.seq_id in preempted:
                continue
            end = seq.num_computed_tokens + 1
            if end >= seq.num_slots and not self._reserve(draft, seq, end):
                continue
            rows[seq.seq_id] = 1
            seq.num_computed_tokens = end

    def _schedule_prefills(self, draft: Draft, prefills: list[Sequence], limit: int) -> None:
        prefills.sort(key=self._key, reverse=True)
        if self.policy.keys_change:
            self.waiting = sorted((self._key(seq), seq) for _, seq in self.waiting)
        admitting = bool(self.waiting) and not draft.preempted
        while prefills or admitting:
            if prefills and not (admitting and self.waiting[0][0] < self._key(prefills[-1])):
                seq = prefills.pop()
                if seq.seq_id not in draft.preempted and limit > 0:
                    limit -= self._continue(draft, seq, limit)
                    admitting = admitting and not draft.preempted
            else:
                num_tokens = self._admit(draft, self.waiting[0][1], limit)
                limit -= num_tokens
                admitting = bool(num_tokens and self.waiting) and not draft.preempted

    def _continue(self, draft: Draft, seq: Sequence, limit: int) -> int:
        """Give a running sequence up to `limit` of the tokens it wants."""
        wanted = seq.num_tokens - seq.num_computed_tokens
        num_tokens = min(wanted, limit)
        if not self._reserve(draft, seq, seq.num_computed_tokens + num_tokens):
            return 0
        self._take(draft, seq, num_tokens, wanted)
        return num_tokens

    def _admit(self, draft: Draft, seq: Sequence, limit: int) -> int:
        """Let the first waiting sequence run, on top of what the prefix cache has of it.

        Returns:
            the tokens it computes in this step; 0 if it goes on waiting.
        """
        if limit <= 0:
            return self._wait(seq, "no budget")
        matched = self.blocks.match(seq)
        num_stored = len(matched) * self.blocks.block_size
        num_cached = min(num_stored, seq.num_tokens - 1)  # the last token's logits are wanted
        wanted = seq.num_tokens - num_cached
        if wanted > limit and not self.enable_chunked_prefill:
            return self._wait(seq, "no budget")
        num_new = self.blocks.num_blocks_for(seq.num_tokens) - len(matched)
        while True:
            need = self.blocks.num_to_take(matched, num_new)
            allowed, reason = self.policy.admit(seq, need, self._view(draft, limit))
            if allowed and len(self.running) < self.max_num_seqs:
                break
            if not self._preempt_for(draft, seq):
                return self._wait(seq, "max_num_seqs" if allowed else reason)
        del self.waiting[next(i for i, (_, other) in enumerate(self.waiting) if other is seq)]
        self.running[seq.seq_id] = seq
        seq.status, seq.waiting_reason = Status.RUNNING, ""
        self.blocks.share(seq, matched)
        seq.num_computed_tokens = num_cached
        draft.lacking[seq.seq_id] = num_new
        num_tokens = min(wanted, limit)
        draft.new_sequences[seq.seq_id] = NewSequence(
            seq.seq_id,
            list(seq.token_ids),
            seq.num_prompt_tokens,
            num_cached,
            num_stored,
            seq.params,
            sorted(seq.stop_token_ids),
        )
        if not self._reserve(draft, seq, num_cached + num_tokens):
            return 0
        draft.new_block_ids[seq.seq_id] = list(seq.block_table)
        self._record_admission(seq, num_cached, reason)
        self._take(draft, seq, num_tokens, wanted)
        return num_tokens

    # What they are made of

    def _reserve(self, draft: Draft, seq: Sequence, end: int) -> bool:
        """Make room in the block table for `end` tokens, preempting if need be.

        Returns:
            False if `seq` itself had to give way.
        """
        num_new = self.blocks.num_blocks_for(end) - len(seq.block_table)
        while num_new > self.blocks.num_available:
            if not self._preempt_for(draft, seq):
                self._preempt(draft, seq, seq, "nobody else can give way")
            if seq.status is not Status.RUNNING:
                return False
        if num_new > 0:
            draft.new_block_ids[seq.seq_id] = self.blocks.allocate(seq, end)
            if seq.seq_id in draft.lacking:
                draft.lacking[seq.seq_id] = self._num_lacking(seq)
        if self.blocks.cache_full_blocks(seq, end):
            draft.filled.add(seq.seq_id)
        return True

    def _take(self, draft: Draft, seq: Sequence, num_tokens: int, wanted: int) -> None:
        draft.rows[seq.seq_id] = num_tokens
        seq.num_computed_tokens += num_tokens
        if num_tokens < wanted:
            self.events.record(Kind.CHUNKED, seq.seq_id, "budget", tokens=num_tokens, wanted=wanted)

    def _preempt_for(self, draft: Draft, needy: Sequence) -> bool:
        """Preempt the policy's choice for the sake of `needy`. False if it chooses nobody."""
        candidates = [s for s in self.running.values() if s.seq_id not in draft.filled]
        if not candidates:
            return False
        victim, reason = self.policy.victim(candidates, needy)
        if victim is None:
            return False
        self._preempt(draft, self.running[victim.seq_id], needy, reason)
        return True

    def _preempt(self, draft: Draft, seq: Sequence, needy: Sequence, reason: str) -> None:
        """Take the blocks of `seq`; it waits, and computes its tokens anew when it is back."""
        self.events.record(
            Kind.PREEMPTED,
            seq.seq_id,
            reason,
            by=needy.seq_id,
            blocks=len(seq.block_table),
            computed_tokens=seq.num_computed_tokens,
        )
        del self.running[seq.seq_id]
        self.removed.append(seq.seq_id)
        for part in (draft.rows, draft.new_sequences, draft.new_block_ids):
            part.pop(seq.seq_id, None)
        draft.lacking.pop(seq.seq_id, None)
        draft.preempted.add(seq.seq_id)
        self.blocks.release(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self._enqueue(seq)

    def _enqueue(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        insort(self.waiting, (self._key(seq), seq))

    def _wait(self, seq: Sequence, reason: str) -> int:
        if seq.waiting_reason != reason:  # say it once
            seq.waiting_reason = reason
            self.events.record(Kind.WAITING, seq.seq_id, reason)
        return 0

    def _record_admission(self, seq: Sequence, num_cached: int, reason: str) -> None:
        self.events.record(Kind.ADMITTED, seq.seq_id, reason, tokens=seq.num_tokens)
        if seq.scheduled_s is None:
            seq.scheduled_s = self.events.clock()
            seq.num_cached_tokens = num_cached
            self.events.counts["prompt_tokens"] += seq.num_prompt_tokens
            if self.blocks.enable_prefix_caching:
                self.events.counts["prefix_cache_queries"] += seq.num_prompt_tokens
                self.events.counts["prefix_cache_hits"] += num_cached
        if num_cached:
            self.events.record(Kind.CACHE_HIT, seq.seq_id, "prefix", tokens=num_cached)
        elif self.blocks.enable_prefix_caching:
            self.events.record(Kind.CACHE_MISS, seq.seq_id, "first block not cached")

    def _key(self, seq: Sequence) -> Key:
        return (self.policy.key(seq, self.events.clock()), seq.seq_id)

    def _num_lacking(self, seq: Sequence) -> int:
        return self.blocks.num_blocks_for(seq.num_tokens) - len(seq.block_table)

    def _view(self, draft: Draft, budget: int) -> StepView:
        return StepView(
            self.events.clock(),
            budget,
            len(self.running) - len(draft.lacking),
            len(draft.lacking),
            len(self.waiting),
            self.blocks.num_available - sum(draft.lacking.values()),
        )
