"""Scheduler: what each step computes. Blocks of 4 tokens and a clock at 0 unless said."""

from collections.abc import Mapping

import msgspec
import pytest

from nanovllm.core.plan import NewSequence, StepPlan, StepResult, TokenLogprobs
from nanovllm.core.policies.priority import Priority
from nanovllm.core.policy import Decision, Policy, StepView
from nanovllm.core.sequence import Status
from nanovllm.core.views import SequenceView
from nanovllm.sampling_params import SamplingParams
from tests.core.fakes import Rig


def distinct(i: int, num_tokens: int) -> list[int]:
    """A prompt that shares no block with those of other `i`."""
    return [1000 + i] * num_tokens


# The one rule: num_computed_tokens goes up to num_tokens


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    rig = Rig(max_num_batched_tokens=8)
    seq = rig.add(distinct(0, 20))
    assert rig.step() == {0: 8}
    assert rig.plan.new_block_ids == {0: [0, 1, 2, 3, 4]}
    assert rig.step() == {0: 8}
    assert rig.plan.new_block_ids == {}
    assert seq.output_token_ids == []
    assert rig.step() == {0: 4}
    assert rig.plan.new_block_ids == {}
    assert seq.output_token_ids == [7]
    assert rig.step() == {0: 1}
    assert rig.plan.new_block_ids == {0: [5]}
    assert rig.step() == {0: 1}
    assert rig.plan.new_block_ids == {}
    assert seq.block_table == [0, 1, 2, 3, 4, 5]
    chunks = [event.data for event in rig.events if event.kind == "chunked"]
    assert chunks == [{"tokens": 8, "wanted": 20}, {"tokens": 8, "wanted": 12}]


def test_prefill_and_decode_share_a_batch():
    rig = Rig(max_num_batched_tokens=8)
    rig.add(distinct(0, 3))
    assert rig.step() == {0: 3}
    rig.add(distinct(1, 20))
    assert [rig.step() for _ in range(4)] == [
        {0: 1, 1: 7},
        {0: 1, 1: 7},
        {0: 1, 1: 6},
        {0: 1, 1: 1},
    ]


def test_several_prompts_share_a_step_until_its_budget_is_spent():
    rig = Rig(max_num_batched_tokens=10)
    for i in range(3):
        rig.add(distinct(i, 6))
    assert rig.step() == {0: 6, 1: 4}
    assert rig.step() == {0: 1, 1: 2, 2: 6}
    assert rig.step() == {0: 1, 1: 1, 2: 1}


def test_a_running_prompt_goes_on_before_a_later_one_is_admitted():
    rig = Rig(max_num_batched_tokens=4)
    rig.add(distinct(0, 6))
    rig.add(distinct(1, 4))
    assert [rig.step() for _ in range(3)] == [{0: 4}, {0: 2, 1: 2}, {0: 1, 1: 2}]


def test_ten_long_prompts_never_keep_four_decodes_from_a_step():
    rig = Rig(4000, 16, max_num_seqs=16, max_num_batched_tokens=512)
    for i in range(4):
        rig.add(distinct(i, 10), max_tokens=None)
    rig.step()
    late = [rig.add(distinct(4 + i, 4096), max_tokens=None) for i in range(10)]
    num_prefilling = 0
    while any(seq.num_tokens == seq.num_prompt_tokens for seq in late):
        scheduled = rig.step()
        assert [scheduled.get(i) for i in range(4)] == [1, 1, 1, 1]
        assert sum(scheduled.values()) <= 512
        num_prefilling += any(num_tokens > 1 for num_tokens in scheduled.values())
    assert num_prefilling == 82  # 40,960 tokens at 508 a step, one less for each prompt done


# Sharing


def test_a_full_hit_computes_one_token_and_shares_even_the_last_block():
    rig = Rig()
    rig.add(distinct(0, 8), max_tokens=1)
    rig.run()
    seq = rig.add(distinct(0, 8))
    assert rig.step() == {1: 1}
    [new] = rig.plan.new_sequences
    assert (new.num_computed_tokens, new.num_stored_tokens) == (7, 8)
    assert rig.plan.new_block_ids == {1: [0, 1]}
    assert rig.executor.last_written == []
    assert (seq.num_cached_tokens, seq.output_token_ids) == (7, [7])
    rig.step()
    assert rig.plan.new_block_ids == {1: [2]}


def test_a_partial_hit_goes_on_where_the_cache_ends():
    rig = Rig()
    rig.add([1] * 8 + [2] * 3, max_tokens=1)
    rig.run()
    seq = rig.add([1] * 8 + [3] * 3)
    assert rig.step() == {1: 3}
    [new] = rig.plan.new_sequences
    assert (new.num_computed_tokens, new.num_stored_tokens) == (8, 8)
    assert rig.plan.new_block_ids == {1: [0, 1, 3]}
    assert seq.num_cached_tokens == 8


def test_eight_identical_prompts_of_one_step_take_the_blocks_of_one():
    rig = Rig(200, 16, max_num_batched_tokens=2048)
    for _ in range(8):
        rig.add(distinct(0, 1024))
    assert rig.step() == {0: 1024} | dict.fromkeys(range(1, 8), 1)
    assert rig.plan.new_block_ids == {i: list(range(64)) for i in range(8)}
    assert rig.blocks.num_available == 200 - 64
    assert {block.ref_count for block in rig.blocks.blocks[:64]} == {8}
    assert rig.step() == dict.fromkeys(range(8), 1)
    assert rig.plan.new_block_ids == {i: [64 + i] for i in range(8)}


def test_identical_prompts_with_a_tail_share_all_but_the_tail():
    rig = Rig(max_num_batched_tokens=64)
    for _ in range(3):
        rig.add(distinct(0, 10))
    assert rig.step() == {0: 10, 1: 2, 2: 2}
    assert rig.plan.new_block_ids == {0: [0, 1, 2], 1: [0, 1, 3], 2: [0, 1, 4]}


def test_without_prefix_caching_each_computes_its_own():
    rig = Rig(enable_prefix_caching=False)
    for _ in range(2):
        rig.add(distinct(0, 8))
    assert rig.step() == {0: 8, 1: 8}
    assert rig.plan.new_block_ids == {0: [0, 1], 1: [2, 3]}
    assert rig.said("cache_hit", "cache_miss") == []


def test_prompt_logprobs_compute_every_position_though_the_prompt_is_cached():
    rig = Rig()
    rig.add(distinct(0, 8), max_tokens=1)
    rig.run()
    rig.add(distinct(0, 8), prompt_logprobs=0)
    assert rig.step() == {1: 8}


# Admission


def test_a_request_waits_for_blocks_and_says_so_once():
    rig = Rig(4)
    rig.add(distinct(0, 10), max_tokens=3)
    rig.add(distinct(1, 8), max_tokens=1)
    assert [rig.step() for _ in range(4)] == [{0: 10}, {0: 1}, {0: 1}, {1: 8}]
    assert rig.said("waiting") == [("waiting", 1, "no blocks")]


def test_a_request_waits_for_budget():
    rig = Rig(max_num_batched_tokens=8)
    rig.add(distinct(0, 8))
    rig.add(distinct(1, 8))
    assert rig.step() == {0: 8}
    assert rig.said("waiting") == [("waiting", 1, "no budget")]


def test_at_most_max_num_seqs_run():
    rig = Rig(max_num_seqs=2)
    for i in range(3):
        rig.add(distinct(i, 4), max_tokens=2)
    assert [rig.step() for _ in range(3)] == [{0: 4, 1: 4}, {0: 1, 1: 1}, {2: 4}]
    assert rig.said("waiting") == [("waiting", 2, "max_num_seqs")]


def test_a_prompt_takes_the_blocks_of_all_its_tokens_when_it_is_admitted():
    rig = Rig(6, max_num_batched_tokens=8)
    rig.add(distinct(0, 9), max_tokens=1)
    rig.add(distinct(1, 16), max_tokens=1)
    assert rig.step() == {0: 8}
    assert rig.step() == {0: 1}  # 3 blocks held, 3 left, and 4 wanted
    assert rig.step() == {1: 8}
    rig.add(distinct(2, 12), max_tokens=1)  # 2 blocks are available
    assert rig.step() == {1: 8}
    assert rig.step() == {2: 8}
    assert rig.said("waiting") == [
        ("waiting", 1, "no budget"),
        ("waiting", 1, "no blocks"),
        ("waiting", 2, "no budget"),
    ]


def test_nobody_overtakes_the_first_in_the_queue():
    rig = Rig(4)
    rig.add(distinct(0, 8))
    rig.add(distinct(1, 12))
    rig.add(distinct(2, 2))
    assert rig.step() == {0: 8}
    assert [seq.seq_id for _, seq in rig.scheduler.waiting] == [1, 2]


def test_without_chunked_prefill_a_prompt_is_computed_in_one_step_or_not_at_all():
    rig = Rig(max_num_batched_tokens=20, enable_chunked_prefill=False)
    rig.add(distinct(0, 4), max_tokens=3)
    rig.step()
    rig.add(distinct(1, 10), max_tokens=1)
    rig.add(distinct(2, 10), max_tokens=1)  # 9 of its tokens would fit
    assert [rig.step() for _ in range(2)] == [{0: 1, 1: 10}, {0: 1, 2: 10}]
    assert rig.said("waiting", "chunked") == [("waiting", 2, "no budget")]


# Preemption


def test_the_last_to_come_is_preempted_keeps_its_tokens_and_resumes_from_the_cache():
    rig = Rig(4, sample=lambda tokens: len(tokens))
    a, b = rig.add(distinct(0, 7), max_tokens=4), rig.add(distinct(1, 7), max_tokens=6)
    assert [rig.step() for _ in range(2)] == [{0: 7, 1: 7}, {0: 1, 1: 1}]
    assert (a.block_table, b.block_table) == ([0, 1], [2, 3])
    assert rig.step() == {0: 1}  # each wants a third block and there is none
    assert (b.status, b.num_computed_tokens, b.block_table) == (Status.WAITING, 0, [])
    assert b.output_token_ids == [7, 8]
    assert rig.plan.removed == [1]
    assert a.block_table == [0, 1, 3]  # the tail of b was evicted first
    [preempted] = [event for event in rig.events if event.kind == "preempted"]
    assert preempted.reason == "came last"
    assert preempted.data == {"by": 0, "blocks": 2, "computed_tokens": 8}
    assert rig.step() == {0: 1}
    assert (a.finish_reason, a.output_token_ids) == ("length", [7, 8, 9, 10])
    assert rig.step() == {1: 5}  # 9 tokens, of which block 2 has 4
    [new] = rig.plan.new_sequences
    assert new == NewSequence(1, [*distinct(1, 7), 7, 8], 7, 4, 4, b.params, [])
    assert (rig.plan.removed, b.block_table[0]) == ([0], 2)
    rig.run()
    assert b.output_token_ids == [7, 8, 9, 10, 11, 12]
    assert (b.num_preemptions, b.num_cached_tokens) == (1, 0)


def test_the_preempted_resume_in_order_of_arrival_and_before_newcomers():
    rig = Rig(6)
    for i in range(3):
        rig.add(distinct(i, 7), max_tokens=8)
    rig.step()
    rig.step()
    assert rig.step() == {0: 1, 1: 1}  # 2 gives way to 0, which takes one block; 1 the other
    rig.add(distinct(3, 2), max_tokens=1)
    rig.run()
    assert [seq_id for _, seq_id, _ in rig.said("preempted")] == [2, 1]
    assert [seq_id for _, seq_id, _ in rig.said("admitted")] == [0, 1, 2, 1, 2, 3]


def test_a_preempted_sequence_comes_back_when_there_is_a_spare_block_for_each_running():
    rig = Rig(5)
    rig.add(distinct(0, 7), max_tokens=9)
    rig.add(distinct(1, 7), max_tokens=9)
    for _ in range(2):
        rig.step()
    rig.step()  # 5 blocks: 0 takes the last, 1 gives way to itself
    assert rig.said("preempted") == [("preempted", 1, "came last")]
    for _ in range(3):
        assert rig.step() == {0: 1}  # 1 needs 3 blocks; 2 are available
    assert rig.said("waiting") == [("waiting", 1, "no blocks")]


def test_a_sequence_planned_before_the_blocks_ran_out_is_spared():
    rig = Rig(5, policy=(policy := OldestGoes()))
    for i in range(2):
        rig.add(distinct(i, 7), max_tokens=9)
    assert [rig.step() for _ in range(3)] == [{0: 7, 1: 7}, {0: 1, 1: 1}, {0: 1}]
    assert policy.seen == [[1]]  # 0 has the fifth block and is in the plan
    assert rig.said("preempted") == [("preempted", 1, "came first")]


def test_a_prompt_half_computed_gives_way_to_a_decode_that_came_before():
    rig = Rig(6, max_num_batched_tokens=4)
    rig.add(distinct(0, 4), max_tokens=20)
    rig.step()
    rig.add(distinct(1, 16), max_tokens=20)
    assert [rig.step() for _ in range(4)] == [{0: 1, 1: 3}] * 4
    assert rig.step() == {0: 1}  # of 6 blocks 0 has 2 and wants a third; 1 has 4 and wants 4 tokens
    assert rig.said("preempted") == [("preempted", 1, "came last")]


def test_a_prompt_half_computed_goes_on_while_a_decode_that_came_later_gives_way():
    rig = Rig(6, max_num_batched_tokens=4)
    rig.add(distinct(0, 4), max_tokens=20, arrival_s=5.0)
    rig.step()
    rig.add(distinct(1, 16), max_tokens=20, arrival_s=1.0)
    assert [rig.step() for _ in range(4)] == [{0: 1, 1: 3}] * 4
    assert rig.step() == {1: 4}
    assert [(e.seq_id, e.data["by"]) for e in rig.events if e.kind == "preempted"] == [(0, 0)]


def test_who_gives_way_itself_waits_with_nothing_though_its_hashes_are_gone():
    rig = Rig(5)
    first, second = (rig.add(distinct(i, 7), max_tokens=9) for i in range(2))
    rig.step()
    rig.step()
    rig.blocks.reset_prefix_cache()
    assert rig.step() == {0: 1}
    assert (second.status, second.block_table) == (Status.WAITING, [])
    assert (second.num_computed_tokens, second.num_hashed_blocks) == (0, 0)
    rig.run()
    assert [len(seq.output_token_ids) for seq in (first, second)] == [9, 9]


class OldestGoes(Policy):
    """Whoever came first gives way."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def victim(
        self, running: list[SequenceView], needy: SequenceView
    ) -> Decision[SequenceView | None]:
        if needy not in running:
            return Decision(None, "arrivals preempt nobody")
        self.seen.append([seq.seq_id for seq in running])
        return Decision(running[0], "came first")


class AdmitAll(Policy):
    def admit(self, seq: SequenceView, num_blocks: int, step: StepView) -> Decision[bool]:
        return Decision(True, "always")


def test_a_rash_policy_cannot_admit_what_does_not_fit():
    rig = Rig(4, policy=AdmitAll())
    rig.add(distinct(0, 8), max_tokens=2)
    rig.add(distinct(1, 9), max_tokens=1)
    assert [rig.step() for _ in range(3)] == [{0: 8}, {0: 1}, {1: 9}]
    assert rig.said("waiting") == [("waiting", 1, "no blocks")]


# Policies


def test_priority_admits_the_lowest_value_first_then_the_earliest():
    rig = Rig(policy="priority", max_num_seqs=1)
    for i, priority in enumerate([1, 0, 1, -1]):
        rig.add(distinct(i, 4), max_tokens=1, priority=priority)
    assert [rig.step() for _ in range(4)] == [{3: 4}, {1: 4}, {0: 4}, {2: 4}]


def test_priority_gives_an_urgent_arrival_the_place_of_a_strictly_lower_one():
    rig = Rig(policy="priority", max_num_seqs=2)
    rig.add(distinct(0, 4), priority=1)
    rig.add(distinct(1, 4), priority=2)
    rig.step()
    rig.add(distinct(2, 4), priority=2)
    assert rig.step() == {0: 1, 1: 1}
    rig.add(distinct(3, 4), priority=0)
    assert rig.step() == {0: 1, 3: 4}
    assert rig.said("preempted") == [("preempted", 1, "lowest priority, came last")]
    assert [seq.seq_id for _, seq in rig.scheduler.waiting] == [1, 2]


def test_priority_gives_an_urgent_arrival_the_blocks_of_as_many_as_it_takes():
    rig = Rig(6, policy="priority")
    for i in range(3):
        rig.add(distinct(i, 5), priority=1 + i)
    rig.step()
    rig.add(distinct(3, 14), max_tokens=1, priority=0)
    assert rig.step() == {0: 1, 3: 14}
    assert [seq_id for _, seq_id, _ in rig.said("preempted")] == [2, 1]


def test_an_urgent_prompt_takes_its_budget_before_a_running_one():
    rig = Rig(policy="priority", max_num_batched_tokens=8)
    rig.add(distinct(0, 20), priority=1)
    assert rig.step() == {0: 8}
    rig.add(distinct(1, 6), priority=0)
    assert rig.step() == {1: 6, 0: 2}


def test_fcfs_ignores_priorities():
    rig = Rig(max_num_seqs=1)
    rig.add(distinct(0, 4), max_tokens=1, priority=1)
    rig.add(distinct(1, 4), max_tokens=1, priority=0)
    assert [rig.step(), rig.step()] == [{0: 4}, {1: 4}]


class Shares(Priority):
    def __init__(self, decodes: int, prefills: int) -> None:
        self.shares, self.seen = (decodes, prefills), []

    def share_budget(self, step: StepView) -> Decision[tuple[int, int]]:
        self.seen.append(step)
        return Decision(self.shares, "fixed")


def test_share_budget_limits_prefills():
    policy = Shares(8, 3)
    rig = Rig(policy=policy, max_num_batched_tokens=8)
    rig.add(distinct(0, 2))
    rig.step()
    rig.add(distinct(1, 8))
    assert [rig.step() for _ in range(3)] == [{0: 1, 1: 3}, {0: 1, 1: 3}, {0: 1, 1: 2}]
    assert policy.seen[2] == StepView(
        now_s=0.0,
        token_budget=8,
        num_decodes=1,
        num_prefills=1,
        num_waiting=0,
        num_available_blocks=64 - 3,  # a block each, and the one that prompt 1 has yet to take
    )


def test_share_budget_limits_decodes_and_the_first_by_key_go():
    rig = Rig(policy=Shares(1, 8), max_num_batched_tokens=8)
    rig.add(distinct(0, 2), priority=1)
    rig.step()
    rig.add(distinct(1, 2), priority=0)
    assert [rig.step() for _ in range(3)] == [{0: 1, 1: 2}, {1: 1}, {1: 1}]


@pytest.mark.parametrize("shares", [(100, 100), (100, -100)])
def test_share_budget_cannot_give_out_more_than_the_budget(shares: tuple[int, int]):
    policy = Shares(2, 3)
    rig = Rig(policy=policy, max_num_batched_tokens=3)
    for i in range(4):
        rig.add(distinct(i, 1))
    assert [rig.step(), rig.step()] == [{0: 1, 1: 1, 2: 1}, {0: 1, 1: 1, 3: 1}]
    policy.shares = shares
    rig.add(distinct(4, 2))
    assert rig.step() == {0: 1, 1: 1, 2: 1}


def test_a_negative_share_is_none():
    policy = Shares(8, 8)
    rig = Rig(policy=policy, max_num_batched_tokens=8)
    for i in range(2):
        rig.add(distinct(i, 2))
    assert rig.step() == {0: 2, 1: 2}
    rig.add(distinct(2, 2))
    policy.shares = (-1, 8)
    assert rig.step() == {2: 2}
    policy.shares = (8, -1)
    assert rig.step() == {0: 1, 1: 1, 2: 1}


class EvictNewest(Policy):
    def evict(self, idle: Mapping[int, object]) -> int:
        return next(reversed(list(idle)))


def test_the_policy_chooses_the_cached_block_to_evict():
    rig = Rig(4, policy=EvictNewest())
    rig.add(distinct(0, 8), max_tokens=1)
    rig.run()
    assert (list(rig.blocks.idle), list(rig.blocks.free)) == ([1, 0], [2, 3])
    rig.add(distinct(1, 12), max_tokens=1)
    rig.step()
    assert rig.plan.new_block_ids == {1: [2, 3, 0]}


class ShortestWait(Policy):
    """The key falls with time for a request marked urgent: the queue turns around."""

    keys_change = True

    def key(self, seq: SequenceView, now_s: float) -> tuple[float, ...]:
        return (-now_s if seq.request_id == "urgent" else 0.0,)


def test_a_policy_whose_keys_change_sorts_the_queue_anew():
    rig = Rig(policy=ShortestWait(), max_num_seqs=1)
    for i, request_id in enumerate(["a", "b", "urgent"]):
        rig.add(distinct(i, 4), max_tokens=1, request_id=request_id)
    assert rig.step() == {0: 4}
    rig.now_s = 1.0
    assert [rig.step(), rig.step()] == [{2: 4}, {1: 4}]


# Ends


def test_a_stop_token_ends_a_sequence_and_frees_its_blocks():
    rig = Rig(sample=lambda tokens: len(tokens), eos_token_ids=(6,))
    seq = rig.add(distinct(0, 5))
    rig.run()
    assert (seq.finish_reason, seq.stop_reason) == ("stop", 6)
    assert seq.output_token_ids == [5, 6]
    assert (seq.status, seq.block_table) == (Status.FINISHED, [])
    assert rig.blocks.num_available == 64


def test_an_abort_while_waiting_takes_it_out_of_the_queue():
    rig = Rig(max_num_seqs=1)
    rig.add(distinct(0, 4), max_tokens=1)
    waiting = rig.add(distinct(1, 4))
    rig.step()
    rig.engine.abort([waiting])
    assert (waiting.finish_reason, rig.scheduler.waiting) == ("abort", [])
    assert not rig.engine.has_unfinished
    assert rig.scheduler.removed == [0]  # the worker never heard of 1


def test_an_abort_while_running_frees_the_blocks_and_the_worker_hears_of_it():
    rig = Rig()
    first, second = rig.add(distinct(0, 5)), rig.add(distinct(1, 5))
    rig.step()
    rig.engine.abort([first])
    assert (first.finish_reason, first.block_table) == ("abort", [])
    assert rig.blocks.num_available == 62
    assert rig.step() == {1: 1}
    assert rig.plan.removed == [0]
    assert list(rig.executor.tokens) == [1]
    rig.engine.abort([first, second])
    assert rig.said("aborted") == [("aborted", 0, "abort"), ("aborted", 1, "abort")]


def test_a_token_for_a_sequence_aborted_meanwhile_is_dropped():
    rig = Rig()
    first, second = rig.add(distinct(0, 5)), rig.add(distinct(1, 5))
    plan = rig.scheduler.schedule()
    result = rig.executor.execute(plan)
    rig.engine.abort([first])
    assert rig.scheduler.update(plan, result) == [second]
    assert (first.output_token_ids, second.output_token_ids) == ([], [7])


def test_a_failed_step_ends_its_sequences_and_unhashes_what_it_was_to_store():
    rig = Rig(max_num_batched_tokens=8)
    rig.add(distinct(0, 16))
    rig.step()
    rig.add(distinct(1, 4))
    plan = rig.scheduler.schedule()
    assert (plan.seq_ids, plan.num_scheduled_tokens) == ([0], [8])
    failed = rig.scheduler.fail("broken")
    assert [(seq.seq_id, seq.finish_reason, seq.stop_reason) for seq in failed] == [
        (0, "error", "broken")
    ]
    assert sorted(block.block_id for block in rig.blocks.cached.values()) == [0, 1]
    again = rig.add(distinct(0, 16))
    assert [block.block_id for block in rig.blocks.match(again)] == [0, 1]
    assert [seq.seq_id for _, seq in rig.scheduler.waiting] == [1, 2]


def test_a_failed_step_also_unhashes_what_a_twin_shared():
    rig = Rig()
    for _ in range(2):
        rig.add(distinct(0, 8))
    rig.scheduler.schedule()
    rig.scheduler.fail("broken")
    assert (rig.blocks.cached, rig.blocks.num_available) == ({}, 64)


def test_what_a_failed_plan_removed_is_removed_again():
    rig = Rig(max_num_seqs=1)
    rig.add(distinct(0, 4), max_tokens=1)
    rig.step()
    rig.add(distinct(1, 4))
    rig.executor.failures, rig.executor.deaf = [RuntimeError("link down")], True
    rig.step()
    assert (rig.plan.removed, list(rig.executor.tokens)) == ([0], [0])
    rig.add(distinct(2, 4))
    rig.step()
    assert sorted(rig.plan.removed) == [0, 1]
    assert list(rig.executor.tokens) == [2]


def test_a_row_whose_sampling_failed_ends_alone():
    rig = Rig()
    first, second = rig.add(distinct(0, 4)), rig.add(distinct(1, 4))
    rig.executor.bad_rows = {0}
    rig.step()
    assert (first.finish_reason, first.stop_reason) == ("error", "no distribution")
    assert (first.output_token_ids, second.output_token_ids) == ([], [7])
    assert rig.step() == {1: 1}


# Log probabilities


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs([token_id], [-1.0], 1)


def test_logprobs_are_kept_in_order_also_for_the_token_that_ends_it():
    rig = Rig()
    seq = rig.add(distinct(0, 3), max_tokens=2, logprobs=0)
    for token_id in (5, 6):
        plan = rig.scheduler.schedule()
        rig.scheduler.update(plan, StepResult([token_id], logprobs={0: entry(token_id)}))
    assert (seq.logprobs, seq.finish_reason) == ([entry(5), entry(6)], "length")


def test_prompt_logprobs_are_kept_though_the_same_step_ends_the_sequence():
    rig = Rig()
    seq = rig.add([1, 2, 3], max_tokens=1, prompt_logprobs=0)
    plan = rig.scheduler.schedule()
    rig.scheduler.update(plan, StepResult([7], prompt_logprobs={0: {1: entry(2), 2: entry(3)}}))
    assert (seq.finish_reason, seq.prompt_logprobs) == ("length", {1: entry(2), 2: entry(3)})


def test_prompt_logprobs_computed_anew_are_kept_once():
    rig = Rig(max_num_batched_tokens=2)
    seq = rig.add([1, 2, 3, 4], prompt_logprobs=0)

    def compute(*positions: int) -> None:
        found = {0: {position: entry(1 + position) for position in positions}}
        rig.scheduler.update(rig.scheduler.schedule(), StepResult([-1], prompt_logprobs=found))

    compute(1, 2)
    rig.scheduler._preempt(seq, seq, "as if blocks had run out")
    compute(1, 2)
    compute(3)
    assert seq.prompt_logprobs == {1: entry(2), 2: entry(3), 3: entry(4)}


# What crosses to the worker


def size_of(plan: StepPlan) -> int:
    return len(msgspec.msgpack.encode(plan))


def test_a_plan_says_a_prompt_once_and_then_only_what_changed():
    rig = Rig(4000, 16, max_num_batched_tokens=4096)
    for i, num_tokens in enumerate([10, 4000]):
        rig.add(distinct(i, num_tokens), max_tokens=None)
    rig.step()
    assert size_of(rig.plan) > 4000
    sizes = []
    for _ in range(5):
        rig.step()
        sizes.append((rig.plan.new_block_ids, rig.plan.new_sequences, rig.plan.removed))
    assert sizes == [({1: [251]}, [], []), *[({}, [], [])] * 4]
    assert size_of(rig.plan) < 120


def test_the_size_of_a_message_does_not_depend_on_how_long_the_prompts_are():
    sizes = set()
    for num_tokens in (17, 3000):
        rig = Rig(4000, 16, max_num_batched_tokens=20_000)
        for i in range(4):
            rig.add(distinct(i, num_tokens + i), max_tokens=None)
        rig.step()
        rig.step()
        sizes.add(size_of(StepPlan(rig.plan.step, rig.plan.seq_ids, rig.plan.num_scheduled_tokens)))
        assert rig.plan.new_sequences == []
    assert len(sizes) == 1


def test_a_plan_survives_msgpack():
    params = SamplingParams(
        seed=3,
        stop=["a", "b"],
        stop_token_ids=[5],
        bad_words=["c"],
        bad_words_token_ids=[[7, 8]],
        allowed_token_ids=[5, 6],
        logit_bias={3: -1.5},
    )
    new = NewSequence(4, [1, 2, 3], 2, 1, 2, params, [5, 6])
    plan = StepPlan(9, [4, 2], [2, 1], [new], {4: [0, 7], 2: [8]}, [1, 3])
    encoded = msgspec.msgpack.encode(plan)
    assert msgspec.msgpack.decode(encoded, type=StepPlan) == plan


def test_default_parameters_survive_msgpack_up_to_the_kind_of_an_empty_list():
    encoded = msgspec.msgpack.encode(SamplingParams())
    decoded = msgspec.msgpack.decode(encoded, type=SamplingParams)
    assert msgspec.msgpack.encode(decoded) == encoded
    assert [decoded.stop, decoded.bad_words, decoded.bad_words_token_ids] in (
        [[], [], []],
        [(), (), ()],
    )


def test_a_result_survives_msgpack():
    found = TokenLogprobs([5, 6], [-0.5, -1.5], 2)
    result = StepResult([5, -1], {4: found}, {2: {1: found, 2: found}}, {7: "no distribution"})
    encoded = msgspec.msgpack.encode(result)
    assert msgspec.msgpack.decode(encoded, type=StepResult) == result
