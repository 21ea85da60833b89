"""EngineCore: requests in, steps, ends, and what is left when something breaks."""

import pytest

from nanovllm.core.sequence import Status
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from tests.core.fakes import Rig


def counting(tokens: list[int]) -> int:
    return len(tokens)


def test_a_request_is_generated_to_its_length():
    rig = Rig(sample=counting)
    [seq] = rig.engine.add([5, 5, 5], SamplingParams(max_tokens=3))
    assert (seq.seq_id, seq.request_id, seq.index, seq.status) == (0, "0", 0, Status.WAITING)
    assert [rig.engine.step() for _ in range(3)] == [[seq]] * 3
    assert (seq.output_token_ids, seq.finish_reason) == ([3, 4, 5], "length")
    assert not rig.engine.has_unfinished
    assert rig.engine.step() == []


def test_max_tokens_none_generates_to_max_model_len():
    rig = Rig(max_model_len=9)
    [seq] = rig.engine.add([5] * 4, SamplingParams(max_tokens=None))
    rig.run()
    assert (seq.num_tokens, seq.finish_reason) == (9, "length")


def test_times_are_those_of_the_injected_clock():
    rig = Rig(max_num_batched_tokens=4)
    seq = rig.add([5] * 6, max_tokens=2)
    later = rig.add([6] * 2, max_tokens=1, arrival_s=-1.0)
    assert (seq.arrival_s, later.arrival_s) == (0.0, -1.0)
    for now_s in (1.0, 2.0, 3.0):
        rig.now_s = now_s
        rig.step()
    assert rig.executor.plans[0].seq_ids == [1, 0]
    assert (seq.scheduled_s, seq.first_token_s, seq.last_token_s) == (1.0, 2.0, 3.0)


def test_the_models_end_stops_unless_it_is_ignored():
    rig = Rig(sample=counting, eos_token_ids=(4, 99))
    plain = rig.add([5] * 3)
    deaf = rig.add([6] * 3, max_tokens=4, ignore_eos=True)
    own = rig.add([7] * 3, ignore_eos=True, stop_token_ids=[5])
    rig.run()
    assert (plain.output_token_ids, plain.finish_reason, plain.stop_reason) == ([3, 4], "stop", 4)
    assert (deaf.output_token_ids, deaf.finish_reason) == ([3, 4, 5, 6], "length")
    assert (own.output_token_ids, own.finish_reason, own.stop_reason) == ([3, 4, 5], "stop", 5)


def test_finish_ends_a_sequence_for_a_reason_found_outside():
    rig = Rig()
    seq = rig.add([5] * 3)
    rig.step()
    rig.engine.finish([seq], "stop", "###")
    assert (seq.finish_reason, seq.stop_reason) == ("stop", "###")
    rig.engine.abort([seq])
    assert seq.finish_reason == "stop"
    assert rig.said("finished", "aborted") == [("finished", 0, "stop")]
    assert (rig.step(), rig.scheduler.removed) == ({}, [0])


def test_abort_ends_all_samples_of_a_request_running_or_waiting():
    rig = Rig(max_num_seqs=2)
    samples = rig.engine.add([5] * 3, SamplingParams(n=3))
    rig.step()
    assert [seq.status for seq in samples] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    rig.engine.abort(samples)
    assert {seq.finish_reason for seq in samples} == {"abort"}
    assert (rig.engine.has_unfinished, rig.blocks.num_available) == (False, 64)


# Samples


def test_samples_of_a_prompt_share_its_blocks():
    rig = Rig()
    samples = rig.engine.add([5] * 10, SamplingParams(n=3), request_id="r")
    assert [(seq.seq_id, seq.request_id, seq.index) for seq in samples] == [
        (0, "r", 0),
        (1, "r", 1),
        (2, "r", 2),
    ]
    assert rig.step() == {0: 10, 1: 2, 2: 2}
    assert [seq.block_table for seq in samples] == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]


def test_each_sample_has_a_seed_of_its_own():
    rig = Rig(seed=100)
    given = rig.engine.add([5], SamplingParams(n=2, seed=7))
    derived = rig.engine.add([5], SamplingParams(n=2))
    [single] = rig.engine.add([5], SamplingParams(seed=7))
    assert [seq.params.seed for seq in given] == [7, 8]
    assert [seq.params.seed for seq in derived] == [102, 103]
    assert single.params.seed == 7
    assert {seq.params.n for seq in [*given, *derived, single]} == {1}


# Refused requests


def test_a_prompt_is_refused_if_it_leaves_no_room_for_output():
    rig = Rig(4, 4)
    assert rig.engine.max_num_tokens == 16
    with pytest.raises(InvalidRequestError, match=r"prompt='16 tokens': must be shorter than 16"):
        rig.engine.add([5] * 16, SamplingParams())
    with pytest.raises(InvalidRequestError, match="prompt='0 tokens': must hold at least one"):
        rig.engine.add([], SamplingParams())
    assert not rig.engine.has_unfinished
    assert [(event.kind, event.seq_id) for event in rig.events] == [("rejected", -1)] * 2
    assert rig.add([5] * 15).seq_id == 0


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({"max_model_len": 10}, 10),
        ({"max_model_len": 1000}, 256),
        ({"max_model_len": 1000, "max_num_batched_tokens": 20}, 256),
        (
            {
                "max_model_len": 1000,
                "max_num_batched_tokens": 20,
                "enable_chunked_prefill": False,
            },
            20,
        ),
    ],
)
def test_no_sequence_becomes_longer_than_it_could_be_computed_alone(settings, longest):
    rig = Rig(64, 4, **settings)
    seq = rig.add([5], max_tokens=500)
    rig.run()
    assert (seq.num_tokens, seq.finish_reason) == (longest, "length")


def test_a_sequence_preempted_without_chunked_prefill_can_come_back():
    rig = Rig(6, 4, max_num_batched_tokens=16, enable_chunked_prefill=False)
    seqs = [rig.add([i] * 7, max_tokens=500) for i in range(2)]
    rig.run()
    assert [(seq.num_tokens, seq.num_preemptions) for seq in seqs] == [(16, 0), (16, 1)]


def test_the_seeds_of_samples_wrap_around_at_the_end_of_their_range():
    samples = Rig().engine.add([5], SamplingParams(n=3, seed=2**63 - 2))
    assert [seq.params.seed for seq in samples] == [2**63 - 2, 2**63 - 1, 0]


# Failures


def test_an_exception_ends_the_sequences_of_its_step_and_the_engine_goes_on():
    rig = Rig(max_num_seqs=2)
    hit = [rig.add([i] * 9) for i in range(2)]
    spared = rig.add([9] * 9, max_tokens=2)
    rig.executor.failures = [RuntimeError("out of memory")]
    assert rig.engine.step() == hit
    assert {(seq.finish_reason, seq.stop_reason) for seq in hit} == {
        ("error", "RuntimeError: out of memory")
    }
    assert (spared.finish_reason, rig.blocks.num_available) == (None, 64)
    rig.run()
    assert (spared.finish_reason, spared.output_token_ids) == ("length", [7, 7])


def test_nothing_that_a_failed_step_was_to_store_is_shared_later():
    rig = Rig()
    rig.add([1] * 9)
    rig.executor.failures = [RuntimeError("broken")]
    rig.step()
    again = rig.add([1] * 9, max_tokens=1)
    assert rig.step() == {1: 9}  # the fake executor checks what it reads
    assert again.num_cached_tokens == 0


def test_what_earlier_steps_stored_is_still_shared_after_a_failure():
    rig = Rig(max_num_batched_tokens=8)
    rig.add([1] * 12)
    rig.executor.failures = [None, RuntimeError("broken")]
    rig.step()
    rig.step()
    again = rig.add([1] * 12, max_tokens=1)
    assert rig.step() == {1: 4}
    assert again.num_cached_tokens == 8


def test_ctrl_c_in_the_executor_leaves_a_consistent_engine():
    rig = Rig(max_num_seqs=1)
    stopped, waiting = rig.add([1] * 9), rig.add([2] * 9, max_tokens=2)
    rig.executor.failures = [None, KeyboardInterrupt()]
    rig.step()
    with pytest.raises(KeyboardInterrupt):
        rig.engine.step()
    assert (stopped.finish_reason, stopped.stop_reason) == ("error", "interrupted")
    assert rig.blocks.num_available == 64
    rig.run()
    assert (waiting.finish_reason, waiting.output_token_ids) == ("length", [7, 7])


# Metrics


def test_metrics_have_vllms_names():
    rig = Rig(4, sample=counting)
    assert rig.engine.get_metrics() == {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "num_preemptions_total": 0,
        "prefix_cache_queries_total": 0,
        "prefix_cache_hits_total": 0,
        "prompt_tokens_total": 0,
        "generation_tokens_total": 0,
        "request_success_total": 0,
    }
    rig.add([1] * 7, max_tokens=4)
    rig.add([2] * 7, max_tokens=4)
    for _ in range(3):
        rig.step()  # in the third, request 1 is preempted
    assert rig.engine.get_metrics() == {
        "num_requests_running": 1,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 0.75,
        "num_preemptions_total": 1,
        "prefix_cache_queries_total": 14,
        "prefix_cache_hits_total": 0,
        "prompt_tokens_total": 14,
        "generation_tokens_total": 5,
        "request_success_total": 0,
    }
    rig.run()
    rig.add([1] * 7, max_tokens=1)
    rig.run()
    assert rig.engine.get_metrics() == {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "num_preemptions_total": 1,
        "prefix_cache_queries_total": 21,
        "prefix_cache_hits_total": 4,
        "prompt_tokens_total": 21,
        "generation_tokens_total": 9,
        "request_success_total": 3,
    }


def test_every_decision_is_an_event_of_the_step_in_which_it_was_made():
    rig = Rig(4, sample=counting)
    rig.now_s = 1.5
    rig.add([1] * 5, max_tokens=2)
    rig.run()
    assert [(e.time_s, e.step, e.kind.value, e.reason, e.data) for e in rig.events] == [
        (1.5, 0, "added", "", {"prompt_tokens": 5}),
        (1.5, 1, "admitted", "fits", {"tokens": 5}),
        (1.5, 1, "cache_miss", "first block not cached", {}),
        (1.5, 2, "finished", "length", {"output_tokens": 2}),
    ]
    assert [plan.step for plan in rig.executor.plans] == [1, 2]


# A step ahead of the results


def test_ahead_a_step_is_planned_before_the_last_one_is_known():
    rig = Rig(ahead=True)
    seq = rig.add([1, 2, 3], max_tokens=3)
    seen = []
    while rig.engine.has_unfinished:
        seen.append((rig.step(), len(rig.engine.under_way), seq.output_token_ids))
    assert seen == [
        ({0: 3}, 1, []),
        ({0: 1}, 1, [7]),
        ({0: 1}, 1, [7, 7]),
        ({}, 0, [7, 7, 7]),  # its length is known: no row is wasted
    ]


def test_ahead_a_stop_found_late_wastes_one_row_and_shows_nothing_of_it():
    tokens = [5, 6, 4, 8, 9]
    rig = Rig(ahead=True, sample=lambda known: tokens[len(known) - 2], eos_token_ids=(4,))
    seq = rig.add([1, 2], max_tokens=9)
    rig.run()
    assert (seq.output_token_ids, seq.finish_reason) == ([5, 6, 4], "stop")
    assert [plan.num_scheduled_tokens for plan in rig.executor.plans] == [[2], [1], [1], [1]]
    assert rig.engine.get_metrics()["generation_tokens_total"] == 3
    assert rig.blocks.num_available == 64


def test_ahead_who_is_preempted_while_its_token_is_under_way_keeps_that_token():
    rig = Rig(5, 2, ahead=True, sample=lambda known: len(known))
    first, second = rig.add([1, 2, 3], max_tokens=6), rig.add([1, 2], max_tokens=6)
    rig.run()
    assert second.num_preemptions > 0
    assert (first.output_token_ids, second.output_token_ids) == (
        [3, 4, 5, 6, 7, 8],
        [2, 3, 4, 5, 6, 7],
    )


def test_ahead_a_failure_ends_the_sequences_of_all_steps_under_way(caplog):
    rig = Rig(ahead=True)
    first = rig.add([1, 2, 3, 4])
    rig.executor.failures = [RuntimeError("out of luck")]
    rig.step()
    second = rig.add([5, 6])
    rig.step()
    assert [(seq.finish_reason, seq.stop_reason) for seq in (first, second)] == [
        ("error", "RuntimeError: out of luck")
    ] * 2
    assert (rig.blocks.cached, rig.blocks.num_available) == ({}, 64)
    assert not rig.engine.has_unfinished
    third = rig.add([1, 2, 3, 4], max_tokens=2)
    rig.run()
    assert third.output_token_ids == [7, 7]
