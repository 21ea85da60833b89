"""Steps planned ahead give the same tokens as steps one after the other."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.async_llm import AsyncLLM
from nanovllm.core.ahead import AheadEngine
from nanovllm.errors import ConfigError
from nanovllm.worker.gpu_runner import GPURunner
from tests.llm.helpers import assert_idle, greedy, make_ids

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 24}
PARAMS = [
    greedy(20),
    SamplingParams(temperature=0.8, seed=3, max_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, seed=4, max_tokens=18),
    greedy(22, repetition_penalty=1.3, logprobs=2),
    greedy(17, min_tokens=4, stop_token_ids=[17, 23, 99]),
    greedy(1),
    greedy(9, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=12),
]
PROMPTS = [make_ids(i // 2, 5 + 9 * i) for i in range(len(PARAMS))]


def shown(llm: LLM) -> list[Any]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [
        (
            sample.token_ids,
            sample.text,
            sample.finish_reason,
            sample.stop_reason,
            len(sample.logprobs or ()),
        )
        for output in outputs
        for sample in output.outputs
    ]


@pytest.mark.parametrize("num_kv_blocks", [64, 14])
def test_the_same_is_generated_ahead(tiny: Path, num_kv_blocks: int) -> None:
    settings = SETTINGS | {"num_kv_blocks": num_kv_blocks, "max_num_seqs": 8}
    with LLM(tiny, **settings) as llm:
        expected, again = shown(llm), shown(llm)  # the second time from the prefix cache
        num_preempted = llm.get_metrics()["num_preemptions_total"]
        assert (num_preempted > 0) == (num_kv_blocks == 14)
    with LLM(tiny, async_scheduling=True, **settings) as llm:
        assert shown(llm) == expected
        assert shown(llm) == again
        while llm.engine.core.has_unfinished:  # a row that nobody waits for
            llm.engine.step()
        assert_idle(llm)


def test_tokens_stay_on_the_device_until_the_step_after_is_begun(tiny: Path) -> None:
    with LLM(tiny, async_scheduling=True, num_kv_blocks=16, **SETTINGS) as llm:
        runner, engine = llm.engine.core.executor.runner, llm.engine  # type: ignore[attr-defined]
        assert isinstance(runner, GPURunner)
        request = engine.submit(engine.prepare(make_ids(1, 6), greedy(3)))
        assert engine.step() == []
        assert runner.awaited is not None
        first = runner.awaited.host_R.tolist()
        row = runner.awaited.rows[0]
        assert runner.table.token_ids[row, 6] == 0  # the host does not know it
        engine.step()
        assert request.sequences[0].output_token_ids == first
        assert runner.table.token_ids[row, 6] == first[0]
        while engine.core.has_unfinished:
            engine.step()


def test_a_row_that_changed_hands_is_not_written_to(tiny: Path) -> None:
    """One sequence ends for a stop string while its next token is under way; another gets its row
    at once."""
    settings = SETTINGS | {"max_num_seqs": 1, "num_kv_blocks": 16, "max_num_batched_tokens": 64}
    with LLM(tiny, async_scheduling=True, **settings) as llm:
        prompts = [make_ids(1, 6), make_ids(2, 20)]
        [expected] = llm.generate([prompts[1]], greedy(8), use_tqdm=False)
        llm.reset_prefix_cache()
        [whole] = llm.generate([prompts[0]], greedy(4), use_tqdm=False)
        stop = whole.outputs[0].token_ids[1]
        llm.reset_prefix_cache()
        outputs = llm.generate(
            prompts, [greedy(8, stop_token_ids=[stop]), greedy(8)], use_tqdm=False
        )
        assert outputs[0].outputs[0].stop_reason == stop
        assert outputs[1].outputs[0].token_ids == expected.outputs[0].token_ids


def test_ranks_go_ahead_too(tiny: Path) -> None:
    settings = SETTINGS | {"num_kv_blocks": 14, "max_num_seqs": 8}
    with LLM(tiny, **settings) as llm:
        expected = shown(llm)
    with LLM(tiny, async_scheduling=True, tensor_parallel_size=2, **settings) as llm:
        found = shown(llm)
    assert [entry[0] for entry in found] == [entry[0] for entry in expected]


@pytest.mark.parametrize("more", [{"record": "x.jsonl"}, {"distributed_executor_backend": "ray"}])
def test_what_does_not_go_ahead_is_refused(more: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="async_scheduling"):
        LLM("nowhere", async_scheduling=True, **more)


def test_streams_are_the_same_ahead_and_one_may_leave(tiny: Path) -> None:
    settings = SETTINGS | {"num_kv_blocks": 24, "async_scheduling": True}

    async def stream(llm: AsyncLLM, number: int) -> list[int]:
        shown: list[int] = []
        async for output in llm.generate(PROMPTS[number], greedy(12), str(number)):
            shown = output.outputs[0].token_ids
            if number == 2:
                break
        return shown

    async def streams() -> list[list[int]]:
        with AsyncLLM(tiny, **settings) as llm:
            found = await asyncio.gather(*[stream(llm, number) for number in range(4)])
            assert isinstance(llm.engine.core, AheadEngine)
            return list(found)

    found = asyncio.run(streams())
    with LLM(tiny, **SETTINGS, num_kv_blocks=24) as llm:
        expected = [
            output.outputs[0].token_ids
            for output in llm.generate(PROMPTS[:4], greedy(12), use_tqdm=False)
        ]
    assert found[2] == expected[2][: len(found[2])]
    assert [found[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
