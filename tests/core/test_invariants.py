"""A stateful Hypothesis machine over scheduler and block manager, held against naive models.

`make test` runs it for seconds, `make fuzz` for FUZZ_MINUTES.

Three models stand beside the engine:
    a reference that generates each request alone, token by token;
    a KV store (fakes.FakeExecutor) that knows only what plans say, holds the whole prefix of each
        stored position, and refuses to read another one;
    recounts of all books from the block tables.
"""

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm.core.plan import StepPlan
from nanovllm.core.policies import POLICIES
from nanovllm.core.policies.priority import Priority
from nanovllm.core.policy import Policy, make_policy
from nanovllm.core.sequence import Sequence, Status
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from tests.core.fakes import Rig

EOS = 4


def next_token(tokens: list[int]) -> int:
    """The fake model: 0 to 4, of which 4 ends a sequence; depends on all tokens before it."""
    state = 1
    for token_id in tokens:
        state = (state * 31 + token_id + 7) % 1009
    return min(state % 32 // 2, EOS) if state % 32 < 10 else state % 3


@dataclass
class Arrival:
    """A request that is about to be added."""

    prompt: list[int]
    max_tokens: int
    priority: int
    salt: str
    n: int


def arrivals() -> st.SearchStrategy[Arrival]:
    """Few prefixes and tails, so that many requests share blocks; a prompt may be empty."""
    prefixes = [(), (0,) * 2, (0,) * 4, (0,) * 8, (1, 2) * 4, (0,) * 4 + (3,) * 5]
    prompts = st.builds(
        lambda prefix, tail: [*prefix, *tail],
        st.sampled_from(prefixes),
        st.lists(st.integers(0, 1), max_size=3),
    )
    return st.builds(
        Arrival,
        prompt=prompts,
        max_tokens=st.sampled_from([16, 12, 8, 4, 2, 1]),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "", "x"]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
    )


@dataclass
class Request:
    """One sequence and what the models know of it."""

    seq: Sequence
    max_tokens: int
    activity: int  # when it was added; see Machine.activity
    ended_outside: str = ""  # the reason, if the test ended it

    def expected(self, max_num_tokens: int) -> tuple[list[int], str]:
        """Output and finish reason of the request alone."""
        prompt = self.seq.token_ids[: self.seq.num_prompt_tokens]
        tokens = list(prompt)
        while True:
            tokens.append(next_token(tokens))
            if tokens[-1] == EOS:
                return tokens[len(prompt) :], "stop"
            if len(tokens) == min(len(prompt) + self.max_tokens, max_num_tokens):
                return tokens[len(prompt) :], "length"


class Machine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        num_blocks=st.sampled_from([6, 5, 8, 10, 4, 3]),
        block_size=st.sampled_from([2, 4, 1]),
        max_num_seqs=st.sampled_from([4, 6, 3, 2, 1]),
        budget=st.sampled_from([8, 16, 64, 5, 3, 2, 1]),
        caching=st.sampled_from([True, True, False]),
        chunking=st.sampled_from([True, True, False]),
        newest_first=st.sampled_from([False, False, True]),
        ahead=st.booleans(),
    )
    def start(
        self,
        policy: str,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        chunking: bool,
        newest_first: bool,
        ahead: bool,
    ) -> None:
        chosen: Policy = make_policy(policy)
        if newest_first:  # the worst order for chains of blocks: heads before tails
            chosen.evict = lambda idle: next(reversed(list(idle)))
        self.ahead = ahead  # steps are planned before the last one's result is in
        self.rig = Rig(
            num_blocks,
            block_size,
            chosen,
            sample=next_token,
            eos_token_ids=(EOS,),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
            enable_chunked_prefill=chunking,
            ahead=ahead,
        )
        self.requests: list[Request] = []
        self.num_rejected = 0
        # Tokens sampled, sequences added and steps failed, altogether. A sequence that was
        # preempted comes back only when it fits beside all that runs, so nothing can push it out
        # again before one of these has happened: they bound its preemptions.
        self.activity = 0
        self.num_tokens_seen = 0

    # Rules

    @rule(arrivals=st.lists(arrivals(), min_size=1, max_size=5))
    def add(self, arrivals: list[Arrival]) -> None:
        engine, waiting = self.rig.engine, self.rig.scheduler.waiting
        for arrival in arrivals:
            self.rig.now_s += 1.0
            ids = range(engine.num_added, engine.num_added + arrival.n)
            self.rig.salts |= dict.fromkeys(ids, arrival.salt)
            params = SamplingParams(n=arrival.n, max_tokens=arrival.max_tokens)
            options = {"priority": arrival.priority, "cache_salt": arrival.salt}
            if not 0 < len(arrival.prompt) < engine.max_num_tokens:
                before = (len(waiting), engine.num_added)
                with pytest.raises(InvalidRequestError):
                    engine.add(arrival.prompt, params, **options)
                assert (len(waiting), engine.num_added) == before
                self.num_rejected += 1
                continue
            self.activity += arrival.n
            for seq in engine.add(arrival.prompt, params, **options):
                self.requests.append(Request(seq, arrival.max_tokens, self.activity))

    @precondition(lambda self: self.unfinished())
    @rule(pick=st.integers(0, 99), reason=st.sampled_from(["abort", "stop"]))
    def end_from_outside(self, pick: int, reason: str) -> None:
        """Abort a sequence, or end it for a stop string."""
        live = self.unfinished()
        request = live[pick % len(live)]
        request.ended_outside = reason
        self.rig.engine.finish([request.seq], reason, None if reason == "abort" else "###")
        assert (request.seq.status, request.seq.block_table) == (Status.FINISHED, [])

    @rule()
    def step(self) -> None:
        self.one_step()

    @rule()
    def several_steps(self) -> None:
        for _ in range(5):
            self.one_step()
            self.books_are_right()

    @precondition(lambda self: self.unfinished())
    @rule(deaf=st.booleans())
    def step_that_fails(self, deaf: bool) -> None:
        """The executor raises, before it reads the plan or after it has spoilt what it stores."""
        self.rig.executor.failures, self.rig.executor.deaf = [RuntimeError("broken")], deaf
        self.activity += 1
        self.one_step()

    @precondition(lambda self: self.unfinished())
    @rule(pick=st.integers(0, 99))
    def step_with_a_bad_row(self, pick: int) -> None:
        """Sampling fails for one sequence, should it get so far."""
        live = self.unfinished()
        request = live[pick % len(live)]
        self.rig.executor.bad_rows = {request.seq.seq_id}
        self.one_step()
        if request.seq.finish_reason == "error":
            request.ended_outside = "error"
        self.rig.executor.bad_rows = set()

    @precondition(lambda self: self.unfinished() and not self.ahead)
    @rule(pick=st.integers(0, 99))
    def abort_during_a_step(self, pick: int) -> None:
        """An abort comes between plan and result."""
        scheduler, executor = self.rig.scheduler, self.rig.executor
        plan = self.checked_plan()
        result = executor.execute(plan)
        live = self.unfinished()
        request = live[pick % len(live)]
        request.ended_outside = "abort"
        self.rig.engine.abort([request.seq])
        assert request.seq not in scheduler.update(plan, result)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.rig.blocks.reset_prefix_cache()
        assert not self.rig.blocks.cached

    @rule()
    def run_until_idle(self) -> None:
        for _ in range(2000):
            if not self.rig.engine.has_unfinished:
                break
            self.one_step()
        assert not self.rig.engine.has_unfinished

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.run_until_idle()
        self.books_are_right()
        self.ends_are_right()

    # One step and what holds for it

    @property
    def under_way(self) -> list[Any]:
        """Steps that were submitted and whose result nobody has read."""
        return list(self.rig.engine.under_way) if self.ahead else []

    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if request.seq.finish_reason is None]

    def one_step(self) -> None:
        """EngineCore.step, with the plan checked before it is executed."""
        engine, executor = self.rig.engine, self.rig.executor
        if not engine.has_unfinished:
            assert engine.step() == []
            executor.failures, executor.deaf = [], False
            return
        execute = executor.execute

        def checked_execute(plan: StepPlan) -> object:
            self.check_plan(plan)
            return execute(plan)

        self.decodes = self.wanting_one()
        executor.execute = checked_execute
        num_plans, num_under_way = len(executor.plans), len(self.under_way)
        try:
            ended_or_advanced = engine.step()
        finally:
            del executor.execute
        begun = len(executor.plans) - num_plans
        assert begun == 1 or num_under_way, "unfinished work, and nobody advances"
        for request in self.requests:
            if request.seq in ended_or_advanced and request.seq.finish_reason == "error":
                assert request.seq.stop_reason in ("RuntimeError: broken", "no distribution")
                request.ended_outside = "error"

    def checked_plan(self) -> StepPlan:
        self.decodes = self.wanting_one()
        plan = self.rig.scheduler.schedule()
        self.check_plan(plan)
        return plan

    def wanting_one(self) -> list[Sequence]:
        running = self.rig.scheduler.running.values()
        goes_on = [seq for seq in running if seq.num_tokens < seq.max_num_tokens]
        return [seq for seq in goes_on if seq.num_tokens - seq.num_computed_tokens == 1]

    def check_plan(self, plan: StepPlan) -> None:
        scheduler, running = self.rig.scheduler, self.rig.scheduler.running
        assert plan.seq_ids, "unfinished work, and nobody advances"
        assert len(set(plan.seq_ids)) == len(plan.seq_ids)
        assert set(plan.seq_ids) <= set(running)
        assert min(plan.num_scheduled_tokens) >= 1
        assert sum(plan.num_scheduled_tokens) <= scheduler.max_num_batched_tokens
        assert len(running) <= scheduler.max_num_seqs
        whole = type(scheduler.policy).share_budget is Policy.share_budget
        may_go = whole and len(self.decodes) <= scheduler.max_num_batched_tokens
        for seq in self.decodes if may_go else ():
            assert seq.seq_id in plan.seq_ids or seq.status is Status.WAITING
        new_ids = {new.seq_id for new in plan.new_sequences}
        assert new_ids <= set(plan.new_block_ids) <= set(plan.seq_ids)
        if not scheduler.enable_chunked_prefill:
            assert all(running[i].num_computed_tokens == len(running[i].token_ids) for i in new_ids)
        self.check_writes(plan)

    def check_writes(self, plan: StepPlan) -> None:
        """Each block is written by the one sequence that allocated it; whoever else holds it came
        with this very plan, and its shared positions are marked as stored."""
        size, running = self.rig.blocks.block_size, self.rig.scheduler.running
        executor = self.rig.executor
        stored = {new.seq_id: new.num_stored_tokens for new in plan.new_sequences}
        writers: dict[int, int] = {}
        for seq_id, num_tokens in zip(plan.seq_ids, plan.num_scheduled_tokens, strict=True):
            end = running[seq_id].num_computed_tokens
            first = stored.get(seq_id, executor.num_stored.get(seq_id, 0))
            for position in range(max(end - num_tokens, first), end):
                block_id = running[seq_id].block_table[position // size]
                assert writers.setdefault(block_id, seq_id) == seq_id
        for seq_id, seq in running.items():
            for i, block_id in enumerate(seq.block_table):
                if writers.get(block_id, seq_id) != seq_id:
                    assert stored[seq_id] >= (i + 1) * size

    # What holds after each rule

    @invariant()
    def books_are_right(self) -> None:
        blocks, scheduler = self.rig.blocks, self.rig.scheduler
        waiting = [seq for _, seq in scheduler.waiting]
        held: dict[int, set[str]] = {}
        ref_counts = [0] * blocks.num_blocks
        for seq in scheduler.running.values():
            assert seq.status is Status.RUNNING
            assert len(set(seq.block_table)) == len(seq.block_table)
            assert seq.num_computed_tokens <= seq.num_slots
            assert seq.num_slots == len(seq.block_table) * blocks.block_size
            if blocks.enable_prefix_caching:  # each block is offered when it is full
                num_full = seq.num_computed_tokens // blocks.block_size
                assert num_full - seq.num_hashed_blocks in ((0, 1) if self.ahead else (0,))
            for block_id in seq.block_table:
                ref_counts[block_id] += 1
                held.setdefault(block_id, set()).add(seq.cache_salt)
        assert [block.ref_count for block in blocks.blocks] == ref_counts
        assert all(len(salts) == 1 for salts in held.values()), "two salts share a block"
        places = [*blocks.free, *blocks.idle, *held]
        assert sorted(places) == list(range(blocks.num_blocks))
        assert blocks.num_available == blocks.num_blocks - len(held)
        for seq in waiting:
            assert (seq.status, seq.block_table) == (Status.WAITING, [])
            assert (seq.num_computed_tokens, seq.num_slots, seq.num_hashed_blocks) == (0, 0, 0)
        assert waiting == [seq for _, seq in sorted(scheduler.waiting)]
        unread = {i for plan, _ in self.under_way for i in plan.removed}
        assert set(self.rig.executor.tokens) <= {*scheduler.running, *scheduler.removed, *unread}

    @invariant()
    def hashes_are_right(self) -> None:
        blocks, kv = self.rig.blocks, self.rig.executor.kv
        answering = [block for block in blocks.blocks if block.block_hash is not None]
        assert {block.block_hash: block for block in answering} == blocks.cached
        assert len(blocks.cached) == len(answering)
        assert all(blocks.blocks[i].block_hash is None for i in blocks.free)
        assert all(blocks.blocks[i].block_hash is not None for i in blocks.idle)
        assert blocks.enable_prefix_caching or not answering
        contents = set()
        for block in blocks.blocks:
            if block.block_hash is None:
                assert block.token_ids == []
                continue
            assert len(block.token_ids) == blocks.block_size
            if not self.rig.executor.broken:  # nobody has heard of that step yet
                last = kv[block.block_id, blocks.block_size - 1]
                assert last is not None, "what a failed step spoilt answers to a hash"
                contents.add(last)  # it stands for the whole prefix
        assert self.rig.executor.broken or len(contents) == len(answering), (
            "two blocks of equal content answer"
        )
        for seq in self.rig.scheduler.running.values():
            for i, block_id in enumerate(seq.block_table):
                block = blocks.blocks[block_id]
                if block.block_hash is not None:
                    first = i * blocks.block_size
                    assert block.token_ids == seq.token_ids[first : first + blocks.block_size]
                    assert block.block_hash == seq.block_hashes[i]
                    assert first + blocks.block_size <= seq.num_computed_tokens

    @invariant()
    def nobody_gives_way_to_one_who_comes_after(self) -> None:
        if type(self.rig.scheduler.policy) not in (Policy, Priority):
            return  # keys of others change, or are not what they choose victims by
        for event in self.rig.events:
            if event.kind == "preempted":
                victim = self.requests[event.seq_id].seq
                needy = self.requests[event.data["by"]].seq
                assert self.place(needy) <= self.place(victim)

    def place(self, seq: Sequence) -> tuple[tuple[float, ...], int]:
        return self.rig.scheduler.policy.key(seq, self.rig.now_s), seq.seq_id

    @invariant()
    def ends_are_right(self) -> None:
        engine = self.rig.engine
        num_tokens = sum(len(request.seq.output_token_ids) for request in self.requests)
        self.activity += num_tokens - self.num_tokens_seen
        self.num_tokens_seen = num_tokens
        ends = dict.fromkeys(("finished", "aborted", "rejected"), 0)
        ended_ids = set()
        for event in self.rig.events:
            if event.kind in ends:
                ends[event.kind] += 1
                assert event.seq_id == -1 or event.seq_id not in ended_ids, "it ended twice"
                ended_ids.add(event.seq_id)
        assert ends["rejected"] == self.num_rejected
        live = {*self.rig.scheduler.running, *(seq.seq_id for _, seq in self.rig.scheduler.waiting)}
        for request in self.requests:
            seq = request.seq
            assert seq.num_preemptions <= self.activity - request.activity + 1
            assert (seq.finish_reason is None) == (seq.seq_id in live)
            assert (seq.finish_reason is not None) == (seq.seq_id in ended_ids)
            if seq.finish_reason is None:
                continue
            assert seq.status is Status.FINISHED
            output, reason = request.expected(engine.max_num_tokens)
            if request.ended_outside:
                assert seq.finish_reason == request.ended_outside
                assert seq.output_token_ids == output[: len(seq.output_token_ids)]
            else:
                assert (seq.output_token_ids, seq.finish_reason) == (output, reason)
        if not live:
            assert not engine.has_unfinished or self.under_way
            assert self.rig.blocks.num_available == self.rig.blocks.num_blocks, "blocks leaked"


BRIEF = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_no_order_of_requests_failures_and_aborts_breaks_the_books(caplog):
    caplog.set_level(logging.CRITICAL)  # the engine logs each failed step
    minutes = float(os.environ.get("FUZZ_MINUTES", "0"))
    if minutes == 0:
        run_state_machine_as_test(Machine, settings=BRIEF)
        return
    end = time.monotonic() + 60 * minutes
    thorough = settings(
        BRIEF, max_examples=200, stateful_step_count=60, derandomize=False, print_blob=True
    )
    while time.monotonic() < end:
        run_state_machine_as_test(Machine, settings=thorough)  # with fresh seeds each time
