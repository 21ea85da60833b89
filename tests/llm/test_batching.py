"""What the scheduler's decisions look like from outside: who shares a step, who goes first, who
gives way, and that none of it changes a token."""

from pathlib import Path

import pytest

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.text_engine import Request
from tests.llm.helpers import assert_idle, greedy, make_ids, tokens_of, watch


def submit(llm: LLM, prompt: list[int], params: SamplingParams, priority: int = 0) -> Request:
    return llm.engine.submit(llm.engine.prepare(prompt, params, priority))


def run(llm: LLM, max_steps: int = 1000) -> None:
    for _ in range(max_steps):
        if not llm.engine.core.has_unfinished:
            return
        llm.engine.step()
    raise AssertionError(f"not done after {max_steps} steps")


def alone(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """The tokens of each request when it is the only one."""
    found = []
    for pair in zip(prompts, params, strict=True):
        found += tokens_of(llm.generate(*pair, use_tqdm=False))
        llm.reset_prefix_cache()
    return found


def tokens(*requests: Request) -> list[list[int]]:
    return [seq.output_token_ids for request in requests for seq in request.sequences]


def reasons(*requests: Request) -> list[str | None]:
    return [seq.finish_reason for request in requests for seq in request.sequences]


def test_64_requests_run_as_one_batch(tiny: Path) -> None:
    prompts = [make_ids(i, 8) for i in range(64)]
    with LLM(tiny, max_num_seqs=64, max_model_len=64) as llm:
        with watch(llm) as watched:
            outputs = llm.generate(prompts, greedy(10), use_tqdm=False)
        assert [len(counts) for counts in watched.counts] == [64] * 10
        assert [sum(counts.values()) for counts in watched.counts] == [512] + [64] * 9
        assert tokens_of(outputs)[::9] == alone(llm, prompts[::9], [greedy(10)] * 8)


def test_a_finished_request_makes_room_at_once(tiny: Path) -> None:
    prompts = [make_ids(i, 8) for i in range(6)]
    lengths = [1, 2, 3, 4, 5, 6]
    with LLM(tiny, max_num_seqs=2, max_model_len=64) as llm, watch(llm) as watched:
        params = [greedy(length) for length in lengths]
        llm.generate(prompts, params, use_tqdm=False)
        rows = [sorted(counts) for counts in watched.counts]
    # request i runs for i + 1 steps: 0 | 1 1 | 2 2 2 | ... on two places
    assert rows == [
        [0, 1], [1, 2], [2, 3], [2, 3], [3, 4], [3, 4],
        [4, 5], [4, 5], [4, 5], [5], [5], [5],
    ]  # fmt: skip


def test_prefills_and_decodes_share_steps(llm: LLM) -> None:
    prompts, params = [make_ids(1, 20), make_ids(2, 50)], [greedy(6), greedy(4)]
    expected = alone(llm, prompts, params)
    with watch(llm) as watched:
        first = submit(llm, prompts[0], params[0])
        llm.engine.step()
        llm.engine.step()
        second = submit(llm, prompts[1], params[1])
        run(llm)
    counts = [list(step.values()) for step in watched.counts]
    assert counts == [[20], [1], [1, 50], [1, 1], [1, 1], [1, 1]]
    assert tokens(first, second) == expected


def test_every_step_that_prefills_decodes_too(tiny: Path) -> None:
    """Four requests decode while ten prompts of 4,096 tokens arrive."""
    prompts = [make_ids(i, 10) for i in range(4)] + [make_ids(10 + i, 4096) for i in range(10)]
    params = [greedy(60)] * 4 + [greedy(2)] * 10
    pairs = list(zip(prompts, params, strict=True))
    with LLM(tiny, max_model_len=4100, max_num_batched_tokens=1024, num_kv_blocks=2700) as llm:
        decoding = [submit(llm, *pair) for pair in pairs[:4]]
        llm.engine.step()
        ids = {seq.seq_id for request in decoding for seq in request.sequences}
        with watch(llm) as watched:
            arriving = [submit(llm, *pair) for pair in pairs[4:]]
            run(llm)
        prefilling = [step for step in watched.counts if max(step.values()) > 1]
        assert len(prefilling) == 41  # 40,960 tokens, at most 1,020 a step
        for step in prefilling:
            assert {seq_id: step.get(seq_id) for seq_id in ids} == dict.fromkeys(ids, 1)
            assert sum(step.values()) <= 1024
        assert tokens(*decoding, *arriving[:1]) == alone(llm, prompts[:5], params[:5])


def test_a_long_prompt_takes_several_steps_and_the_budget_is_kept(tiny: Path) -> None:
    prompt = make_ids(1, 200)
    with LLM(tiny, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64) as llm:
        with watch(llm) as watched:
            outputs = llm.generate([prompt], greedy(3), use_tqdm=False)
        assert [list(step.values()) for step in watched.counts] == [[64], [64], [64], [8], [1], [1]]
        assert outputs[0].outputs[0].finish_reason == "length"


def test_without_chunks_a_prompt_is_computed_in_one_step(tiny: Path) -> None:
    settings = {"max_model_len": 64, "max_num_batched_tokens": 64, "num_kv_blocks": 32}
    prompts = [make_ids(i, 40) for i in range(3)]
    with LLM(tiny, enable_chunked_prefill=False, **settings) as llm, watch(llm) as watched:
        llm.generate(prompts, greedy(2), use_tqdm=False)
        steps = [list(step.values()) for step in watched.counts]
    assert steps == [[40], [1, 40], [1, 40], [1]]


def test_fcfs_takes_requests_in_the_order_they_came(tiny: Path) -> None:
    prompts = [make_ids(i, 30 - 4 * i) for i in range(6)]
    with LLM(tiny, max_num_seqs=2, max_model_len=64, num_kv_blocks=32) as llm:
        priority = [5, 4, 3, 2, 1, 0]  # means nothing here
        outputs = llm.generate(prompts, greedy(5), priority=priority, use_tqdm=False)
        starts = [output.timing.scheduled_s or 0 for output in outputs]
        ends = [output.timing.last_token_s or 0 for output in outputs]
    assert starts == sorted(starts)
    assert ends == sorted(ends)


def test_fcfs_lets_no_short_request_overtake_one_that_waits_for_blocks(tiny: Path) -> None:
    with LLM(tiny, max_model_len=512, num_kv_blocks=8) as llm:
        prompts = [make_ids(1, 90), make_ids(2, 60), make_ids(3, 5)]
        outputs = llm.generate(prompts, greedy(5), use_tqdm=False)
        starts = [output.timing.scheduled_s or 0 for output in outputs]
        assert starts[1] > (outputs[0].timing.last_token_s or 0)
        assert starts == sorted(starts)


def test_a_running_request_gives_way_to_one_of_higher_priority(tiny: Path) -> None:
    settings = {"scheduling_policy": "priority", "max_num_seqs": 2, "max_model_len": 128}
    prompts = [make_ids(i, 20 + i) for i in range(3)]
    params = [greedy(12), greedy(12), greedy(5)]
    with LLM(tiny, num_kv_blocks=64, **settings) as llm:
        expected = alone(llm, prompts, params)
        middle = submit(llm, prompts[0], params[0], priority=3)
        low = submit(llm, prompts[1], params[1], priority=7)
        for _ in range(4):
            llm.engine.step()
        urgent = submit(llm, prompts[2], params[2], priority=1)
        with watch(llm) as watched:
            llm.engine.step()
            assert [len(found) for found in tokens(middle, low, urgent)] == [5, 4, 1]
            run(llm)
        ids = [request.sequences[0].seq_id for request in (middle, low, urgent)]
        rows = [set(counts) for counts in watched.counts]
        assert rows[:5] == [{ids[0], ids[2]}] * 5
        assert rows[5] == {ids[0], ids[1]}
        assert low.sequences[0].num_preemptions == 1
        assert llm.get_metrics()["num_preemptions_total"] == 1
        assert tokens(middle, low, urgent) == expected
        assert reasons(middle, low, urgent) == ["length"] * 3
        assert_idle(llm)


def test_an_arrival_of_equal_priority_waits(tiny: Path) -> None:
    settings = {"scheduling_policy": "priority", "max_num_seqs": 1, "max_model_len": 128}
    with LLM(tiny, num_kv_blocks=16, **settings) as llm:
        first = submit(llm, make_ids(1, 20), greedy(5), priority=3)
        llm.engine.step()
        submit(llm, make_ids(2, 20), greedy(5), priority=3)
        for _ in range(4):
            llm.engine.step()
        assert first.finished
        run(llm)
        assert llm.get_metrics()["num_preemptions_total"] == 0


def test_priority_decides_who_is_preempted_when_blocks_run_out(tiny: Path) -> None:
    settings = {"scheduling_policy": "priority", "max_model_len": 128, "block_size": 4}
    prompts = [make_ids(i, 16) for i in range(3)]
    with LLM(tiny, num_kv_blocks=20, **settings) as llm:
        expected = alone(llm, prompts, [greedy(24)] * 3)
        requests = [
            submit(llm, prompt, greedy(24), priority=priority)
            for prompt, priority in zip(prompts, (2, 9, 1), strict=True)
        ]
        run(llm)
        assert tokens(*requests) == expected
        preempted = [request.sequences[0].num_preemptions for request in requests]
        assert preempted[1] > 0
        assert preempted[2] == 0
        ends = [request.sequences[0].last_token_s or 0 for request in requests]
        assert max(ends) == ends[1]


def test_preemptions_under_fcfs_fall_on_the_last_to_come(tiny: Path) -> None:
    prompts = [make_ids(i, 16) for i in range(6)]
    with LLM(tiny, max_model_len=128, block_size=4, num_kv_blocks=30) as llm:
        expected = alone(llm, prompts, [greedy(24)] * 6)
        requests = [submit(llm, prompt, greedy(24)) for prompt in prompts]
        run(llm)
        preempted = [request.sequences[0].num_preemptions for request in requests]
        assert llm.get_metrics()["num_preemptions_total"] == sum(preempted) > 0
        assert preempted[0] == 0
        assert tokens(*requests) == expected
        assert_idle(llm)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "preempted", "finished"])
def test_a_request_can_be_aborted_wherever_it_is(tiny: Path, when: str) -> None:
    settings = {"max_model_len": 128, "max_num_batched_tokens": 16, "max_num_seqs": 2}
    prompts, params = [make_ids(1, 8), make_ids(2, 40)], [greedy(40), greedy(5)]
    with LLM(tiny, num_kv_blocks=16, scheduling_policy="priority", **settings) as llm:
        expected = alone(llm, prompts, params)[0]
        other = submit(llm, prompts[0], params[0])
        llm.engine.step()
        request = submit(llm, prompts[1], params[1], priority=5)
        num_steps = {"waiting": 0, "prefilling": 1, "finished": 10}.get(when, 5)
        for _ in range(num_steps):
            llm.engine.step()
        if when == "preempted":
            submit(llm, make_ids(3, 4), greedy(30), priority=1)
            llm.engine.step()
            assert request.sequences[0].num_preemptions == 1
        before = tokens(request)
        llm.engine.abort(request)
        llm.engine.abort(request)
        assert request.finished
        assert request.sequences[0].block_table == []
        assert reasons(request) == ["length" if when == "finished" else "abort"]
        assert tokens(request) == before
        run(llm)
        assert tokens(other) == [expected]
        assert_idle(llm)
