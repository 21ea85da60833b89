"""Recordings: what is written, that it can be read and replayed, and that nothing it meets stops
the engine."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.core.engine import Executor
from nanovllm.core.events import Event
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.policy import make_policy
from nanovllm.core.sequence import Sequence, Terms
from nanovllm.errors import ConfigError, InvalidRequestError
from nanovllm.recording import (
    Arrival,
    Choice,
    End,
    Finish,
    Header,
    Record,
    Recorder,
    Rejected,
    Reset,
    Step,
    read_recording,
)
from nanovllm.replay import replay
from nanovllm.sampling_params import SamplingParams
from nanovllm.timeline import timeline
from tests.core.fakes import Rig

BASE = {"num_blocks": 7, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 8}


class Slow:
    """Makes each step of a rig take time on its clock."""

    def __init__(self, rig: Rig, seconds: Callable[[], float]) -> None:
        self.rig, self.inner, self.seconds = rig, rig.executor, seconds

    def execute(self, plan: StepPlan) -> StepResult:
        self.rig.now_s += self.seconds()
        return self.inner.execute(plan)

    def close(self) -> None:
        self.inner.close()


def recorded(
    path: Path, rig: Rig, seconds: Callable[[], float] = lambda: 0.5, **more: int
) -> Executor:
    """Record a rig, from now on; returns what is to be closed."""
    rig.engine.executor = Slow(rig, seconds)
    return Recorder(rig.engine, str(path), key=b"k", **more)


def read(path: Path) -> list[Record]:
    return list(read_recording(str(path)))


def short(path: Path, prompt: int = 5) -> Rig:
    """A recorded rig with one request that is done."""
    rig = Rig(**BASE)
    recorder = recorded(path, rig)
    rig.add([prompt] * 5, max_tokens=2)
    rig.run()
    recorder.close()
    return rig


# What is written


def test_every_line_of_a_short_recording(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rig = Rig(**BASE)
    recorder = recorded(path, rig)
    rig.now_s = 1.0
    rig.add([5] * 9, max_tokens=2, request_id="a", priority=3)
    with pytest.raises(InvalidRequestError):
        rig.add([])
    rig.run()
    recorder.close()
    assert rig.executor.closed
    header, arrival, rejected, *steps, end = read(path)
    assert isinstance(header, Header) and isinstance(arrival, Arrival)
    assert (header.num_blocks, header.block_size, header.max_num_tokens) == (7, 4, 28)
    assert (header.policy, header.format) == ("nanovllm.core.policy:Policy", 1)
    assert (arrival.time_s, arrival.seq_id, arrival.request_id) == (1.0, 0, "a")
    assert (arrival.prompt_tokens, arrival.max_tokens, arrival.priority) == (9, 2, 3)
    assert (len(arrival.blocks), arrival.salt, arrival.terms) == (2, "", None)
    assert arrival.blocks[0] != arrival.blocks[1]
    assert isinstance(rejected, Rejected) and "at least one token" in rejected.reason
    counts = {"running": 1, "waiting": 0, "blocks": 3}
    assert steps == [
        Step(
            step=1,
            start_s=1.0,
            end_s=1.5,
            seq_ids=[0],
            tokens={0: 8},
            partial=[0],
            choices=[
                Choice(1.0, 1, "admitted", 0, "fits", {"tokens": 9}),
                Choice(1.0, 1, "cache_miss", 0, "first block not cached", {}),
                Choice(1.0, 1, "chunked", 0, "budget", {"tokens": 8, "wanted": 9}),
            ],
            **counts,
        ),
        Step(step=2, start_s=1.5, end_s=2.0, seq_ids=[0], **counts),
        Step(step=3, start_s=2.0, end_s=2.5, seq_ids=[0], **counts),
        Finish(time_s=2.5, step=3, seq_id=0, reason="length", output_tokens=2),
    ]
    assert steps[1].duration_s == 0.5
    assert end == End(time_s=2.5, reason="the engine was closed")


def test_a_reset_of_the_prefix_cache_is_written_and_done(tmp_path: Path) -> None:
    rig = Rig(**BASE)
    recorder = recorded(tmp_path / "r", rig)
    for _ in range(2):
        rig.add([5] * 5, max_tokens=1)
        rig.run()
    rig.blocks.reset_prefix_cache()
    rig.add([5] * 5, max_tokens=1)
    rig.run()
    recorder.close()
    assert [why for kind, _, why in rig.said() if kind.startswith("cache")] == [
        "first block not cached",
        "prefix",
        "first block not cached",
    ]
    records = read(tmp_path / "r")
    assert [line for line in records if isinstance(line, Reset)] == [Reset(time_s=1.0, step=2)]
    events: list[Event] = []
    assert len(list(replay(records, sink=events.append))) == 3
    assert events == rig.events


def test_a_batch_that_stays_the_same_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    short(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["seq_ids" in line for line in lines if line["type"] == "step"] == [True, False]


def test_equal_prompts_have_equal_hashes_unless_their_salts_differ(tmp_path: Path) -> None:
    rig = Rig(**BASE)
    recorder = recorded(tmp_path / "r", rig)
    for salt in ("", "", "secret"):
        rig.add([5] * 4, cache_salt=salt)
    rig.engine.add([5] * 4, SamplingParams(), terms=Terms(tenant="t"))
    recorder.close()
    _, one, two, salted, paid, _ = read(tmp_path / "r")
    assert isinstance(one, Arrival) and isinstance(two, Arrival)
    assert isinstance(salted, Arrival) and isinstance(paid, Arrival)
    assert one.blocks == two.blocks != salted.blocks
    assert "secret" not in (tmp_path / "r").read_text() and salted.salt
    assert paid.terms == Terms(tenant="t")


def test_what_json_cannot_hold_is_written_as_nearly_as_it_can(tmp_path: Path) -> None:
    rig = Rig(**BASE)
    recorder = recorded(tmp_path / "r", rig)
    terms = Terms(tenant="t\ud800")
    who = {"request_id": "r\ud800", "cache_salt": "s\ud800", "priority": 2**70, "terms": terms}
    rig.engine.add([5], SamplingParams(max_tokens=1), **who)
    recorder.close()
    _, arrival, _ = read(tmp_path / "r")
    assert isinstance(arrival, Arrival)
    assert (arrival.request_id, arrival.priority, arrival.terms) == ("r?", 2**63 - 1, Terms("t?"))


def test_the_sink_that_was_there_still_hears_of_everything(tmp_path: Path) -> None:
    rig = short(tmp_path / "r")
    assert [kind for kind, _, _ in rig.said()] == ["added", "admitted", "cache_miss", "finished"]


# What it meets


def test_it_ends_at_its_bound_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "r"
    rig = Rig(num_blocks=64)
    recorder = recorded(path, rig, max_bytes=4096)
    rig.add([5] * 5, max_tokens=100)
    rig.run()
    recorder.close()
    assert 3500 < path.stat().st_size <= 4096
    *_, end = read(path)
    assert isinstance(end, End) and end.reason == "it reached record_max_bytes=4096"
    assert rig.executor.closed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_ends_the_recording_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(**BASE)
    recorder = recorded(Path("/dev/full"), rig, lambda: 2.0)
    seq = rig.add([5] * 5, max_tokens=9)
    with caplog.at_level(logging.WARNING):
        rig.run()
        recorder.close()
    assert seq.finish_reason == "length"
    [message] = caplog.messages
    assert message.startswith("/dev/full: the recording ends here: ") and "space" in message


def test_a_disk_that_fails_later_leaves_what_was_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Filling:
        """A file that takes `left` bytes, some at a time."""

        left = 2000

        def write(self, data: memoryview) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            taken = data[: min(self.left, 300)]
            self.left -= len(taken)
            inner.write(taken)
            return len(taken)

        def close(self) -> None:
            inner.close()

    rig = Rig(num_blocks=64)
    recorder = Recorder(rig.engine, str(tmp_path / "r"))
    inner = recorder.file
    recorder.file = Filling()  # type: ignore[assignment]
    seq = rig.add([5] * 5, max_tokens=50)
    rig.run()
    recorder.close()
    assert (seq.finish_reason, len(caplog.messages)) == ("length", 1)
    header, arrival, *rest = read(tmp_path / "r")  # without the line that was cut off
    assert isinstance(header, Header) and isinstance(arrival, Arrival)
    assert {type(line) for line in rest} == {Step}


def test_a_file_that_cannot_be_opened_is_refused() -> None:
    rig = Rig()
    with pytest.raises(ConfigError, match=r"record='/nowhere/r': cannot be written: No such"):
        Recorder(rig.engine, "/nowhere/r")
    assert rig.engine.executor is rig.executor


def test_a_step_that_raises_is_recorded_and_raised(tmp_path: Path) -> None:
    rig = Rig(**BASE)
    recorder = recorded(tmp_path / "r", rig)
    rig.executor.failures = [RuntimeError("broken")]
    rig.add([5] * 5)
    rig.engine.step()
    recorder.close()
    *_, step, finish, _ = read(tmp_path / "r")
    assert isinstance(step, Step) and (step.error, step.partial) == ("RuntimeError: broken", [0])
    assert finish == Finish(time_s=0.5, step=1, seq_id=0, reason="error", output_tokens=0)


# Reading


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r"
    short(path)
    whole = read(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert read(path) == whole[:-1]


@pytest.mark.parametrize(
    ("number", "line", "why"),
    [
        (0, "", "line 1: "),
        (0, '{"type":"end","time_s":1.0,"reason":""}', "is no header"),
        (2, "{}", "line 3: "),
        (2, '{"type":"step","step":"x"}', "line 3: "),
        (2, "\x00", "line 3: "),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, number: int, line: str, why: str) -> None:
    path = tmp_path / "r"
    short(path)
    lines = path.read_text().splitlines()
    lines[number] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=why) as found:
        read(path)
    assert found.value.field == "recording"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(path)
    path.touch()
    with pytest.raises(ConfigError, match="is empty"):
        read(path)
    short(path)
    text = path.read_text()
    path.write_text(text + text)
    with pytest.raises(ConfigError, match="line 7: a second header"):
        read(path)
    path.write_text(text.replace('"format":1', '"format":2'))
    with pytest.raises(ConfigError, match="is of format 2; this version reads 1"):
        read(path)


# Replay


def outline(plan: StepPlan) -> tuple[object, ...]:
    """A plan without its tokens: they are not recorded."""
    new = [
        (
            n.seq_id,
            len(n.token_ids),
            n.num_prompt_tokens,
            n.num_computed_tokens,
            n.num_stored_tokens,
        )
        for n in plan.new_sequences
    ]
    rows = plan.seq_ids, plan.num_scheduled_tokens
    return plan.step, *rows, new, plan.new_block_ids, plan.removed


def eventful(path: Path, policy: str, seed: int, **settings: int | bool) -> Rig:
    """A live engine in which much happens: shared prefixes, preemptions, stops, aborts, errors."""
    rng = random.Random(seed)
    rig = Rig(
        policy=policy,
        sample=lambda tokens: 99 if sum(tokens) % 11 == 0 else len(tokens) % 3,
        eos_token_ids=(99,),
        **{"num_blocks": 16, "block_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": 12}
        | settings,
    )
    recorder = recorded(path, rig, lambda: rng.uniform(0.001, 1.0))
    live: list[Sequence] = []
    for _ in range(120):
        for _ in range(rng.choice((0, 0, 1, 2))):
            earlier = rng.choice(live).token_ids if live and rng.random() < 0.6 else []
            prompt = [*earlier, *(rng.randrange(3) for _ in range(rng.randint(1, 12)))][:30]
            rig.now_s += rng.uniform(0.0, 0.3)
            salt = rig.salts[rig.engine.num_added] = rng.choice(("", "", "", "s"))
            params = SamplingParams(
                max_tokens=rng.randint(1, 24), prompt_logprobs=rng.choice((None, None, None, 1))
            )
            live += rig.engine.add(
                prompt,
                params,
                priority=rng.randrange(3),
                cache_salt=salt,
                arrival_s=rig.now_s - rng.choice((0.0, 0.5)),
                terms=Terms(rng.choice("ab"), rng.choice((None, 0.5)), 0.1),
            )
        if live and rng.random() < 0.06:
            rig.engine.abort([rng.choice(live)])
        if live and rng.random() < 0.06:
            rig.engine.finish([rng.choice(live)], "stop", "###")
        if rng.random() < 0.03:
            rig.executor.failures = [RuntimeError("broken")]
        if rng.random() < 0.04:
            rig.blocks.reset_prefix_cache()
        if live and rng.random() < 0.06:
            rig.executor.bad_rows = {rng.choice(live).seq_id}
        rig.engine.step()
    rig.run()
    recorder.close()
    return rig


@pytest.mark.parametrize(
    "policy", ["fcfs", "priority", "sjf", "lpm", "edf", "fair", "prefill-first", "sarathi"]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_replay_makes_the_same_plans_and_events(tmp_path: Path, policy: str, seed: int) -> None:
    live = eventful(tmp_path / "r", policy, seed)
    kinds = {"preempted", "aborted", "finished", "cache_hit", "chunked", "waiting"}
    assert kinds <= {event.kind for event in live.events}
    events: list[Event] = []
    plans = list(replay(read(tmp_path / "r"), sink=events.append))
    assert list(map(outline, plans)) == list(map(outline, live.executor.plans))
    assert events == live.events


@pytest.mark.parametrize("setting", ["enable_prefix_caching", "enable_chunked_prefill"])
def test_a_replay_keeps_the_settings(tmp_path: Path, setting: str) -> None:
    more = {"max_num_batched_tokens": 64, "max_num_seqs": 3}
    live = eventful(tmp_path / "r", "fcfs", 1, **{setting: False}, **more)
    events: list[Event] = []
    plans = list(replay(read(tmp_path / "r"), make_policy("fcfs"), events.append))
    assert list(map(outline, plans)) == list(map(outline, live.executor.plans))
    assert events == live.events


# The timeline


def test_a_timeline_holds_steps_phases_and_counters(tmp_path: Path) -> None:
    eventful(tmp_path / "r", "fcfs", 0)
    records = read(tmp_path / "r")
    trace = json.loads(json.dumps(timeline(records)))
    events = trace["traceEvents"]
    times = [event["ts"] for event in events]
    assert times == sorted(times) and times[0] >= 0
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and (event["pid"], event["tid"]) in named for event in slices)
    steps = [event for event in slices if event["pid"] == 1]
    assert len(steps) == sum(isinstance(record, Step) for record in records)
    assert {e["name"] for e in slices if e["pid"] == 2} == {
        *("queued", "prefill", "decode", "preempted")
    }
    counters = [event for event in events if event["ph"] == "C"]
    assert len(counters) == 3 * len(steps)
    assert all(value >= 0 for event in counters for value in event["args"].values())
    ends: dict[tuple[int, int], float] = {}
    for event in slices:  # on one track, one after the other
        track = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(track, 0.0) - 1e-3
        ends[track] = event["ts"] + event["dur"]
