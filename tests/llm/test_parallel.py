"""Engines whose model is divided over processes: the same tokens, and what happens when one of the
processes is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nanovllm.core.plan import NewSequence, StepPlan
from nanovllm.errors import ConfigError, EngineDeadError
from nanovllm.executor.parallel import ParallelExecutor
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from tests.llm.helpers import assert_idle, greedy, make_ids, save_tiny, tokens_of
from tests.llm.prompts import PROMPTS

LIMIT_S = 30.0
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, smollm2)
    return folder


@pytest.fixture
def pair(tiny: Path) -> Iterator[LLM]:
    """An engine of two processes; a step that takes 3 s counts as hung."""
    settings = {**SETTINGS, "num_kv_blocks": 64, "distributed_timeout_seconds": 3}
    with LLM(tiny, tensor_parallel_size=2, **settings) as llm:
        yield llm


def followers(llm: LLM) -> list[subprocess.Popen[bytes]]:
    executor = llm.engine.core.executor
    assert isinstance(executor, ParallelExecutor)
    return executor.processes


def run_to_end(llm: LLM) -> None:
    while llm.engine.core.has_unfinished:
        llm.engine.step()


def wait_until(condition: Any) -> None:
    limit_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.01)


def exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_smollm2_on_three_ranks_has_the_tokens_of_one(smollm2: Path) -> None:
    """Chunked, preempted, and with cache hits; logits are gathered from a third of each."""
    prompts = PROMPTS[::4]
    params: list[SamplingParams] = [
        greedy(24),
        greedy(24, logprobs=2, prompt_logprobs=1),
        greedy(24, repetition_penalty=1.2),
        SamplingParams(seed=1, top_k=8, max_tokens=24, ignore_eos=True),
        SamplingParams(
            temperature=0, structured_outputs=StructuredOutputsParams(regex="[a-z ]{9}")
        ),
    ]
    each = [params[i % len(params)] for i in range(len(prompts))]
    with LLM(smollm2, num_kv_blocks=256, **SETTINGS) as one:
        expected = one.generate(prompts, each, use_tqdm=False)
    scarce = {"num_kv_blocks": 20, "max_num_batched_tokens": 64}
    with LLM(smollm2, tensor_parallel_size=3, **SETTINGS, **scarce) as three:
        for _ in range(2):
            found = three.generate(prompts, each, use_tqdm=False)
            assert tokens_of(found) == tokens_of(expected)
        metrics = three.get_metrics()
        assert metrics["num_preemptions_total"] > 0
        assert metrics["prefix_cache_hits_total"] > 0
        assert_idle(three)
    for own, whole in zip(
        found[1].prompt_logprobs[1:], expected[1].prompt_logprobs[1:], strict=True
    ):
        assert {i: p.logprob for i, p in own.items()} == pytest.approx(
            {i: p.logprob for i, p in whole.items()}, abs=1e-4
        )


def test_experts_on_two_ranks(smollm2: Path, tmp_path: Path) -> None:
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    save_tiny(tmp_path, smollm2, "qwen3_moe", head_dim=24, **experts)
    prompts = [make_ids(seed, 20) for seed in range(4)]
    with LLM(tmp_path, num_kv_blocks=64, **SETTINGS) as one:
        expected = tokens_of(one.generate(prompts, greedy(8), use_tqdm=False))
    with LLM(tmp_path, num_kv_blocks=64, tensor_parallel_size=2, **SETTINGS) as two:
        assert tokens_of(two.generate(prompts, greedy(8), use_tqdm=False)) == expected


def test_two_engines_at_once_and_nothing_left(tiny: Path) -> None:
    settings = {**SETTINGS, "num_kv_blocks": 64, "tensor_parallel_size": 2}
    prompt = make_ids(1, 20)
    with LLM(tiny, **settings) as first, LLM(tiny, **settings) as second:
        [a], [b] = (llm.generate([prompt], greedy(4), use_tqdm=False) for llm in (first, second))
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        processes = followers(first) + followers(second)
        assert all(process.poll() is None for process in processes)
    assert [process.returncode for process in processes] == [0, 0]  # they ended by themselves


def test_a_model_that_cannot_be_divided_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=3"):
        LLM(tiny, tensor_parallel_size=3, **SETTINGS)


def test_a_follower_that_is_killed_ends_the_engine(pair: LLM) -> None:
    requests = pair._submit([make_ids(1, 20)], greedy(400), None)
    pair.engine.step()
    [process] = followers(pair)
    process.kill()
    with pytest.raises(EngineDeadError, match="make a new engine"):
        run_to_end(pair)
    assert requests[0].sequences[0].finish_reason == "error"
    with pytest.raises(EngineDeadError):
        pair.generate([make_ids(2, 5)], greedy(1), use_tqdm=False)


def test_a_follower_that_dies_while_nothing_runs_is_noticed(pair: LLM) -> None:
    executor = pair.engine.core.executor
    assert isinstance(executor, ParallelExecutor)
    executor.processes[0].kill()
    wait_until(lambda: executor.dead is not None)
    assert "rank 1 died (status -9)" in str(executor.dead)


def test_a_follower_that_hangs_is_killed_after_a_time(pair: LLM) -> None:
    [process] = followers(pair)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(EngineDeadError):
        pair.generate([make_ids(1, 20)], greedy(4), use_tqdm=False)
    wait_until(lambda: process.poll() is not None)
    assert process.returncode == -signal.SIGKILL


def test_followers_end_with_their_leader(tiny: Path) -> None:
    code = (
        "import sys; from nanovllm import LLM\n"
        f"llm = LLM({str(tiny)!r}, tensor_parallel_size=2, max_model_len=64, num_kv_blocks=8)\n"
        "print(llm.engine.core.executor.processes[0].pid, flush=True)\n"
        "sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as leader:
        assert leader.stdout is not None
        pid = int(leader.stdout.readline())
        assert exists(pid)
        os.kill(leader.pid, signal.SIGKILL)
    wait_until(lambda: not exists(pid))


def test_a_plan_of_200_prompts_of_8000_tokens_passes_the_ring() -> None:
    from multiprocessing import Pipe
    from threading import Thread

    from nanovllm.executor.ring import RingReader, RingWriter, Shape, shared_memory

    params, ids = SamplingParams(), list(range(40_000, 48_000))
    new = [NewSequence(i, ids, 8000, 0, 0, params, [2]) for i in range(200)]
    plan = StepPlan(1, list(range(200)), [8000] * 200, new)
    ours, theirs = Pipe()
    shape = Shape(1)
    fd = shared_memory(shape.size)
    reader = RingReader(fd, shape, 0, theirs)
    found: list[bytes] = []
    thread = Thread(target=lambda: found.append(reader.read()))
    thread.start()
    RingWriter(fd, shape, [ours]).write(msgspec.msgpack.encode(plan), time.sleep)
    thread.join(LIMIT_S)
    os.close(fd)
    assert msgspec.msgpack.decode(found[0], type=StepPlan).new_sequences[199].token_ids == ids
