"""AsyncLLM: what its streams show, how they end, and that nobody is harmed by another's end."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanovllm.async_llm import AsyncLLM, Stream
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.sequence import Sequence
from nanovllm.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadError,
    QueueFullError,
)
from nanovllm.grammar import vocabulary_of
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput, RequestTiming
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.text_engine import Request
from nanovllm.worker.grammar import vocabulary_at
from tests.llm.helpers import assert_idle, greedy, make_ids, tokens_of

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
PROMPT = make_ids(1, 20)
SMALL: dict[str, Any] = {"max_model_len": 512, "num_kv_blocks": 64}
LIMIT_S = 60.0  # for anything that is waited for


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Iterator[AsyncLLM]:
    with AsyncLLM(tiny, **SMALL) as engine:
        yield engine


@pytest.fixture
def engine(shared: AsyncLLM) -> Iterator[AsyncLLM]:
    """An idle engine. A test that leaves a request behind fails."""
    shared.reset_prefix_cache()
    yield shared
    asyncio.run(until(lambda: at_rest(shared)))
    assert_idle(shared)
    assert not shared._streams and not shared._ids


@pytest.fixture
def mortal(tiny: Path, caplog: pytest.LogCaptureFixture) -> Iterator[AsyncLLM]:
    """An engine for two sequences at once, which may be killed."""
    caplog.set_level("CRITICAL")  # its death is logged
    with AsyncLLM(tiny, max_num_seqs=2, **SMALL) as engine:
        yield engine


def at_rest(engine: AsyncLLM) -> bool:
    metrics = engine.get_metrics()
    names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
    return engine.num_queued == 0 and not any(metrics[name] for name in names)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def read(engine: AsyncLLM, *request: Any, **options: Any) -> list[RequestOutput]:
    async with asyncio.timeout(LIMIT_S):
        return [output async for output in engine.generate(*request, **options)]


async def read_late(engine: AsyncLLM, *request: Any) -> list[RequestOutput]:
    """The outputs when only the first is read in time."""
    stream = engine.generate(*request)
    with gated(engine) as gate:
        gate.permits.release()
        outputs = [await anext(stream)]
    await until(lambda: at_rest(engine))
    await read(engine, [7], greedy(1))  # what was sent before has arrived before
    return outputs + [output async for output in stream]


def endless(kind: RequestOutputKind = DELTA) -> SamplingParams:
    return greedy(400, output_kind=kind)


def told(outputs: list[RequestOutput], kind: RequestOutputKind) -> dict[int, tuple[Any, ...]]:
    """Of each sample all that the outputs tell, put together."""
    samples: dict[int, tuple[Any, ...]] = {}
    for new in (sample for output in outputs for sample in output.outputs):
        text, ids, logprobs = "", list[int](), list[Any]()
        if kind is DELTA and new.index in samples:
            text, ids, logprobs, _, ended, _ = samples[new.index]
            assert ended is None, "news of a sample after its end"
        parts = text + new.text, ids + new.token_ids, logprobs + (new.logprobs or [])
        samples[new.index] = *parts, new.cumulative_logprob, new.finish_reason, new.stop_reason
    return samples


class Gate:
    """Stands before an engine's executor and holds each step up until it may pass.

    Attributes:
        num_begun: steps that came to it. failure: raised instead of the steps to come.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self.execute = engine.engine.core.executor.execute
        self.permits, self.open, self.num_begun = threading.Semaphore(0), False, 0
        self.failure: BaseException | None = None

    def __call__(self, plan: StepPlan) -> StepResult:
        self.num_begun += 1
        if not self.open:
            assert self.permits.acquire(timeout=LIMIT_S)
        if self.failure is not None:
            raise self.failure
        return self.execute(plan)

    def release(self) -> None:
        self.open = True
        self.permits.release()


@contextmanager
def gated(engine: AsyncLLM) -> Iterator[Gate]:
    gate, executor = Gate(engine), engine.engine.core.executor
    executor.execute = gate  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.release()
        del executor.execute


# What a stream shows


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "three samples": {"n": 3, "temperature": 1.0, "seed": 5},
    "log probabilities": {"logprobs": 3, "prompt_logprobs": 2},
    "samples with log probabilities": {"n": 3, "temperature": 1.0, "seed": 5, "logprobs": 0},
    "three samples that end apart": {
        "n": 3,
        "temperature": 1.0,
        "seed": 5,
        "stop": ["e"],
        "min_tokens": 2,
    },
    "characters of several tokens": {"allowed_token_ids": "日本🎉 é"},
    "no text": {"detokenize": False},
}


def make_params(llm: LLM, kind: RequestOutputKind, case: dict[str, Any]) -> SamplingParams:
    if isinstance(text := case.get("allowed_token_ids"), str):
        case = case | {"allowed_token_ids": llm.get_tokenizer().encode(text)}
    return greedy(12, output_kind=kind, **case)


@pytest.mark.parametrize(
    ("kind", "reading"),
    [
        (CUMULATIVE, read),
        (CUMULATIVE, read_late),
        (DELTA, read),
        (DELTA, read_late),
        (FINAL_ONLY, read),
    ],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_kind_comes_to_what_generate_gives(
    llm: LLM,
    engine: AsyncLLM,
    case: dict[str, Any],
    kind: RequestOutputKind,
    reading: Callable[..., Any],
) -> None:
    params = make_params(llm, kind, case)
    [expected] = llm.generate([PROMPT], params, use_tqdm=False)
    outputs = asyncio.run(reading(engine, PROMPT, params))
    assert told(outputs, kind) == told([expected], FINAL_ONLY)
    shown = [out.prompt_logprobs for out in outputs if out.prompt_logprobs is not None]
    assert shown[-1:] == ([] if expected.prompt_logprobs is None else [expected.prompt_logprobs])
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    if reading is read_late:
        assert len(outputs) == 2
    elif kind is FINAL_ONLY:
        assert len(outputs) == 1


def test_nothing_is_shown_that_a_stop_string_takes_back(llm: LLM, engine: AsyncLLM) -> None:
    [whole] = llm.generate([PROMPT], greedy(24), use_tqdm=False)
    text = whole["text"]
    never, stop = text[8:18] + "\0", text[40:60]
    params = greedy(24, stop=[never, stop], output_kind=DELTA)
    shown = ""
    for output in asyncio.run(read(engine, PROMPT, params)):
        shown += output["text"]
        assert text[:40].startswith(shown)
    assert (shown, output.outputs[0].stop_reason) == (text[:40], stop)
    first, _ = asyncio.run(read_late(engine, PROMPT, params))
    assert (first["text"], len(first["token_ids"])) == ("", 1)
    params = greedy(24, stop=[never], output_kind=DELTA)
    assert "".join(o["text"] for o in asyncio.run(read(engine, PROMPT, params))) == text


def test_cumulative_outputs_only_grow(engine: AsyncLLM) -> None:
    params = greedy(12, n=2, temperature=1.0, seed=3, output_kind=CUMULATIVE)
    outputs = asyncio.run(read(engine, PROMPT, params))
    for index in range(2):
        texts = [output.outputs[index].text for output in outputs]
        assert all(then.startswith(before) for before, then in pairwise(texts))
        counts = [len(output.outputs[index].token_ids) for output in outputs]
        assert counts == sorted(counts) and counts[-1] == 12


def piece(text: str, *ids: int, end: str | None = None, index: int = 0) -> CompletionOutput:
    logprobs = [{i: Logprob(-i / 8, 1, str(i))} for i in ids]
    return CompletionOutput(index, text, list(ids), -float(len(ids)), logprobs, end)


def news(*pieces: CompletionOutput, finished: bool = False) -> RequestOutput:
    timing = RequestTiming(0.0, None, None, None)
    return RequestOutput("r", None, [1], None, list(pieces), finished, 0, timing)


def make_stream(kind: RequestOutputKind) -> Stream:
    request = Request(None, [1], SamplingParams(output_kind=kind), "", 0)
    return Stream(request, asyncio.get_running_loop())


def test_what_is_not_read_in_time_is_merged() -> None:
    async def main() -> None:
        stream = make_stream(DELTA)
        stream.put(news(piece("a", 1), piece("x", 8, index=2)))
        stream.put(news(piece("b", 2, 3, end="stop")))
        stream.put(news(piece("y", 9, end="length", index=2), finished=True))
        output = await stream.get()
        assert output.finished
        first, second = output.outputs
        assert first.logprobs == piece("", 1, 2, 3).logprobs
        assert (first.index, first.text, first.token_ids) == (0, "ab", [1, 2, 3])
        assert (first.finish_reason, first.cumulative_logprob) == ("stop", -2.0)
        assert second.logprobs == piece("", 8, 9).logprobs
        assert (second.index, second.text, second.token_ids) == (2, "xy", [8, 9])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.get(), 0)

    asyncio.run(main())


@pytest.mark.parametrize("kind", [CUMULATIVE, FINAL_ONLY])
def test_of_whole_outputs_the_last_is_read(kind: RequestOutputKind) -> None:
    async def main() -> None:
        stream = make_stream(kind)
        stream.put(news(piece("a", 1)))
        stream.put(news(piece("ab", 1, 2)))
        assert (await stream.get())["text"] == "ab"
        stream.put(news(piece("abc", 1, 2, 3)))
        assert (await stream.get())["text"] == "abc"

    asyncio.run(main())


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_an_error_comes_before_what_was_not_read(kind: RequestOutputKind) -> None:
    async def main() -> None:
        stream = make_stream(kind)
        stream.put(news(piece("a", 1)))
        stream.put(EngineDeadError("gone"))
        with pytest.raises(EngineDeadError, match="gone"):
            await stream.get()

    asyncio.run(main())


# Ends


def test_abort_ends_the_request_of_that_name(engine: AsyncLLM) -> None:
    async def main() -> None:
        begun = {name: asyncio.Event() for name in "abc"}

        async def follow(name: str) -> list[RequestOutput]:
            params, outputs = greedy(400 if name == "b" else 30, output_kind=DELTA), []
            async for output in engine.generate(make_ids(ord(name), 9), params, name):
                begun[name].set()
                outputs.append(output)
            return outputs

        tasks = [asyncio.create_task(follow(name)) for name in "abc"]
        await begun["b"].wait()
        engine.abort("nobody")
        engine.abort("b")
        engine.abort("b")
        a, b, c = [told(outputs, DELTA)[0] for outputs in await asyncio.gather(*tasks)]
        assert (len(a[1]), a[4], len(c[1]), c[4]) == (30, "length", 30, "length")
        assert 0 < len(b[1]) < 400 and b[4] == "abort"
        engine.abort("a")

    counts = engine.engine.core.events.counts
    before = counts["aborted"]
    asyncio.run(main())
    asyncio.run(read(engine, PROMPT, greedy(1)))
    assert counts["aborted"] == before + 1


def test_abort_of_a_request_that_waits(mortal: AsyncLLM) -> None:
    async def main(gate: Gate) -> None:
        first = asyncio.create_task(read(mortal, PROMPT, greedy(4), "0"))
        await until(lambda: gate.num_begun == 1)
        others = [asyncio.create_task(read(mortal, PROMPT, greedy(4), name)) for name in "12"]
        await until(lambda: mortal.num_queued == 2)
        gate.permits.release()
        await until(lambda: gate.num_begun == 2)
        assert mortal.get_metrics()["num_requests_waiting"] == 1
        mortal.abort("2")
        gate.release()
        [aborted] = await others[1]
        assert (aborted.finished, aborted["token_ids"]) == (True, [])
        assert aborted.outputs[0].finish_reason == "abort"
        assert [len((await task)[-1]["token_ids"]) for task in (first, others[0])] == [4, 4]

    with gated(mortal) as gate:
        asyncio.run(main(gate))


Wait = Callable[[], Awaitable[None]]


async def leave_by_break(stream: AsyncGenerator[RequestOutput], ready: Wait) -> None:
    async for _ in stream:
        await ready()
        break


async def leave_by_close(stream: AsyncGenerator[RequestOutput], ready: Wait) -> None:
    await anext(stream)
    await ready()
    await stream.aclose()


async def leave_by_cancelling(stream: AsyncGenerator[RequestOutput], ready: Wait) -> None:
    task = asyncio.create_task(anext(stream))
    await task
    await ready()
    task = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)  # it waits now
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_close, leave_by_cancelling])
@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_leaving_aborts_before_the_next_step(
    engine: AsyncLLM, kind: RequestOutputKind, leave: Callable[..., Any]
) -> None:
    async def main(gate: Gate) -> None:
        gate.permits.release()
        ready = partial(until, lambda: gate.num_begun == 2)
        await leave(engine.generate(PROMPT, endless(kind)), ready)
        await until(lambda: engine._commands.qsize() == 1)
        gate.release()
        await until(lambda: at_rest(engine))
        assert gate.num_begun == 2

    with gated(engine) as gate:
        asyncio.run(main(gate))


def test_leaving_before_the_first_output(engine: AsyncLLM) -> None:
    async def main(gate: Gate) -> None:
        task = asyncio.create_task(read(engine, PROMPT, endless(FINAL_ONLY)))
        await until(lambda: gate.num_begun == 1)
        task.cancel()
        await asyncio.wait([task])
        gate.release()
        await until(lambda: at_rest(engine))
        assert gate.num_begun == 1

    with gated(engine) as gate:
        asyncio.run(main(gate))


def test_a_name_is_free_again_once_its_request_is_closed(engine: AsyncLLM) -> None:
    async def main() -> None:
        stream = engine.generate(PROMPT, endless(), "a")
        await anext(stream)
        with pytest.raises(InvalidRequestError) as refused:
            await read(engine, PROMPT, greedy(1), "a")
        assert refused.value.field == "request_id"
        await anext(stream)  # unharmed
        await stream.aclose()
        assert not engine._ids  # at once, not when the collector comes
        for _ in range(2):
            [*_, last] = await read(engine, PROMPT, greedy(2), "a")
            assert len(last["token_ids"]) == 2

    asyncio.run(main())


def test_a_full_queue_refuses(tiny: Path) -> None:
    async def main() -> None:
        with gated(engine) as gate:
            running = asyncio.create_task(read(engine, PROMPT, greedy(2)))
            await until(lambda: gate.num_begun == 1)
            waiting = [asyncio.create_task(read(engine, PROMPT, greedy(2))) for _ in range(2)]
            await until(lambda: engine.num_queued == 2)
            with pytest.raises(QueueFullError, match="2 of at most 2 requests wait"):
                await read(engine, PROMPT, greedy(2))
        outputs = [task[-1] for task in await asyncio.gather(running, *waiting)]
        assert [len(ids) for ids in tokens_of(outputs)] == [2, 2, 2]
        await read(engine, PROMPT, greedy(2, n=2, temperature=1.0))
        with pytest.raises(QueueFullError):
            await read(engine, PROMPT, greedy(2, n=3, temperature=1.0))

    with AsyncLLM(tiny, max_num_seqs=1, max_num_queued_reqs=2, **SMALL) as engine:
        asyncio.run(main())


# The end of the engine


def close(engine: AsyncLLM) -> None:
    engine.close()


def break_executor(engine: AsyncLLM) -> None:
    def execute(plan: StepPlan) -> StepResult:
        raise SystemExit("no workers")

    engine.engine.core.executor.execute = execute  # type: ignore[method-assign]


def break_scheduler(engine: AsyncLLM) -> None:
    def schedule() -> StepPlan:
        raise RuntimeError("no plan")

    engine.engine.core.scheduler.schedule = schedule  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (close, "the engine is closed"),
        (break_executor, "the engine died: SystemExit: no workers"),
        (break_scheduler, "the engine died: RuntimeError: no plan"),
    ],
)
def test_all_hear_of_the_end(mortal: AsyncLLM, end: Callable[[AsyncLLM], None], why: str) -> None:
    async def main() -> None:
        running = mortal.generate(PROMPT, endless())
        await anext(running)
        tasks = [
            asyncio.create_task(read(mortal, PROMPT, endless(kind))) for kind in RequestOutputKind
        ]
        prepared = await mortal.prepare(PROMPT, greedy(1))
        await until(lambda: len(mortal._streams) == 4)
        end(mortal)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and why in str(result)
        with pytest.raises(EngineDeadError, match=why):
            async for _ in running:
                pass
        assert why in str(mortal.ended.result(LIMIT_S))
        for later in (mortal.prepare(PROMPT), anext(mortal.run(prepared)), read(mortal, PROMPT)):
            with pytest.raises(EngineDeadError, match=why):
                await later
        mortal.abort("nobody")

    asyncio.run(main())
    mortal.close()


def test_a_request_that_comes_as_the_engine_dies(mortal: AsyncLLM) -> None:
    async def main(gate: Gate) -> None:
        first = asyncio.create_task(read(mortal, PROMPT, endless()))
        await until(lambda: gate.num_begun == 1)
        second = asyncio.create_task(read(mortal, PROMPT, endless()))
        await until(lambda: mortal.num_queued == 1)
        gate.failure = SystemExit("now")
        gate.release()
        for result in await asyncio.gather(first, second, return_exceptions=True):
            assert isinstance(result, EngineDeadError)

    with gated(mortal) as gate:
        asyncio.run(main(gate))


def test_a_step_that_fails_ends_only_its_own_requests(mortal: AsyncLLM) -> None:
    async def main(gate: Gate) -> None:
        tasks = [asyncio.create_task(read(mortal, PROMPT, greedy(3)))]
        await until(lambda: gate.num_begun == 1)
        tasks += [asyncio.create_task(read(mortal, PROMPT, greedy(3))) for _ in range(2)]
        await until(lambda: mortal.num_queued == 2)
        gate.failure = ValueError("bad step")
        gate.permits.release()
        await until(lambda: gate.num_begun == 2)
        gate.failure = None
        gate.release()
        ends = [(await task)[-1].outputs[0] for task in tasks]
        assert [sample.finish_reason for sample in ends] == ["error", "length", "length"]
        assert [len(sample.token_ids) for sample in ends] == [0, 3, 3]
        assert ends[0].stop_reason == "ValueError: bad step"

    with gated(mortal) as gate:
        asyncio.run(main(gate))


def test_a_dead_engines_error_does_not_grow(mortal: AsyncLLM) -> None:
    def num_frames() -> int:
        with pytest.raises(EngineDeadError) as raised:
            mortal.check_health()
        return len(raised.traceback)

    mortal.close()
    assert [num_frames() for _ in range(3)] == [num_frames()] * 3


# Several event loops


def test_two_event_loops_share_an_engine(llm: LLM, engine: AsyncLLM) -> None:
    prompts = [make_ids(i, 8 + i) for i in range(16)]
    expected = tokens_of(llm.generate(prompts, greedy(20), use_tqdm=False))
    found: dict[int, list[list[int]]] = {}

    async def main(half: int) -> None:
        outputs = await asyncio.gather(
            *(read(engine, prompt, greedy(20)) for prompt in prompts[half::2])
        )
        found[half] = tokens_of([output[-1] for output in outputs])

    def begin(half: int) -> threading.Thread:
        thread = threading.Thread(target=lambda: asyncio.run(main(half)))
        thread.start()
        return thread

    for thread in [begin(0), begin(1)]:
        thread.join(LIMIT_S)
    assert (found[0], found[1]) == (expected[0::2], expected[1::2])


def leave_a_request(engine: AsyncLLM, gate: Gate) -> AsyncGenerator[RequestOutput]:
    """Begin a request in an event loop that is closed during the second step."""

    async def begin() -> None:
        gate.permits.release()
        await anext(stream)
        await until(lambda: gate.num_begun == 2)

    loop, stream = asyncio.new_event_loop(), engine.generate(PROMPT, endless())
    loop.run_until_complete(begin())
    loop.close()
    return stream


def test_requests_of_a_closed_event_loop_are_aborted(engine: AsyncLLM) -> None:
    counts = engine.engine.core.events.counts
    before = counts["aborted"]
    with gated(engine) as gate:
        left = leave_a_request(engine, gate)
        gate.release()
        [*_, last] = asyncio.run(read(engine, make_ids(2, 9), greedy(5)))
        assert len(last["token_ids"]) == 5
    assert counts["aborted"] == before + 1
    del left


def test_others_hear_of_the_end_in_spite_of_a_closed_event_loop(mortal: AsyncLLM) -> None:
    async def main(gate: Gate) -> None:
        task = asyncio.create_task(read(mortal, PROMPT, endless()))
        await until(lambda: mortal.num_queued == 1)
        gate.failure = SystemExit("now")
        gate.release()
        with pytest.raises(EngineDeadError):
            await task

    with gated(mortal) as gate:
        left = leave_a_request(mortal, gate)
        asyncio.run(main(gate))
    assert isinstance(mortal.ended.result(LIMIT_S), EngineDeadError)
    del left


# Observers


class Heard:
    """Writes down what it hears: of each step the sequences, with what ended them."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, str | None]]] = []
        self.ends: list[int] = []
        self.threads: set[str] = set()

    def stepped(self, sequences: list[Sequence]) -> None:
        self.threads.add(threading.current_thread().name)
        self.steps.append([(seq.seq_id, seq.finish_reason) for seq in sequences])

    def aborted(self, sequences: list[Sequence]) -> None:
        self.threads.add(threading.current_thread().name)
        assert {seq.finish_reason for seq in sequences} == {"abort"}
        self.ends += [seq.seq_id for seq in sequences]


def test_an_observer_hears_of_each_step_and_abort(tiny: Path) -> None:
    settings = SMALL | {"max_num_batched_tokens": 8, "max_num_seqs": 4}
    heard = Heard()
    with AsyncLLM(tiny, observe=lambda engine: heard, **settings) as engine:
        assert engine.observer is heard
        asyncio.run(read(engine, PROMPT, greedy(2)))  # 20 tokens in chunks of 8
        assert heard.steps == [[], [], [(0, None)], [(0, "length")]]

        async def leave() -> None:
            stream = engine.generate(PROMPT, endless())
            await anext(stream)
            await stream.aclose()
            await until(lambda: at_rest(engine))

        asyncio.run(leave())
        with gated(engine) as gate:
            left = leave_a_request(engine, gate)
        asyncio.run(until(lambda: at_rest(engine)))
        asyncio.run(read(engine, PROMPT, greedy(1)))
        assert heard.ends == [1, 2]
        assert heard.threads == {"engine"}
        del left


# Forms


def form(choice: str) -> SamplingParams:
    return greedy(4, structured_outputs=StructuredOutputsParams(choice=[choice]), ignore_eos=False)


def test_a_form_is_checked_beside_the_tokenizer(engine: AsyncLLM) -> None:
    async def main() -> None:
        checked = asyncio.create_task(engine.prepare("a", form("checked beside")))
        await asyncio.sleep(0)  # it begins: a process is started for it
        await engine.prepare("a")
        assert not checked.done()
        await checked

    asyncio.run(main())


def test_what_forms_need_is_there_before_the_first_comes(engine: AsyncLLM) -> None:
    async def main() -> list[RequestOutput]:
        before = vocabulary_of.cache_info().misses, vocabulary_at.cache_info().misses
        outputs = await read(engine, "a", form("no"))
        assert (vocabulary_of.cache_info().misses, vocabulary_at.cache_info().misses) == before
        return outputs

    engine._vocabulary.result(LIMIT_S)
    assert asyncio.run(main())[-1].outputs[0].text == "no"


# What is refused before anything begins


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], greedy(1), "prompt"),
        ([50_000], greedy(1), "prompt_token_ids"),
        (make_ids(1, 512), greedy(1), "prompt"),
        ("half a pair \ud800", greedy(1), "prompt"),
        (PROMPT, greedy(1, stop_token_ids=[50_000]), "stop_token_ids"),
        ({"prompt": "a", "cache_salt": 5}, greedy(1), "cache_salt"),
    ],
)
def test_an_impossible_request_is_not_queued(
    engine: AsyncLLM, prompt: Any, params: SamplingParams, field: str
) -> None:
    num_added = engine.engine.core.num_added
    with pytest.raises(InvalidRequestError) as refused:
        asyncio.run(read(engine, prompt, params))
    assert refused.value.field == field
    asyncio.run(until(lambda: at_rest(engine)))
    assert engine.engine.core.num_added == num_added


def refuse(engine: object) -> Any:
    raise LookupError("no observer")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "no/such/folder/here"}, ModelLoadError),
        ({"modell": "smollm2-135m"}, ConfigError),
        ({"max_model_len": 10**6}, ConfigError),
        ({"observe": refuse}, LookupError),
    ],
)
def test_loading_errors_come_from_the_constructor(
    tiny: Path, settings: dict[str, Any], error: type[Exception]
) -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "engine"}
    with pytest.raises(error):
        AsyncLLM(**{"model": tiny} | SMALL | settings)
    deadline = time.monotonic() + LIMIT_S
    while {t for t in threading.enumerate() if t.name == "engine"} - before:
        assert time.monotonic() < deadline
