"""A recording as a timeline: the Chrome trace event format, which ui.perfetto.dev opens.

The format is described in "Trace Event Format" (Duca and Sinclair, 2016): slices are complete
events (`X`), counters `C`, names `M`; times are microseconds.
"""

from typing import Any

from nanovllm.core.events import Kind
from nanovllm.explain import Story, history
from nanovllm.recording import Record, Step

ENGINE, REQUESTS = 1, 2  # the two "processes" whose "threads" are the tracks


def timeline(records: list[Record]) -> dict[str, Any]:
    """The trace: a track of steps with counters, and a track for each sequence.

    Args:
        records: of one recording, whole.

    Returns:
        the object to write as JSON; its events are in order of time, from 0.
    """
    told = history(records)
    arrivals = [story.arrival.arrival_s for story in told.stories.values()]
    zero_s = min([told.header.time_s, *arrivals])
    events = [named(ENGINE, 0, "steps"), naming("process_name", ENGINE, 0, "engine")]
    events.append(naming("process_name", REQUESTS, 0, "requests"))
    slices = []
    for record in records:
        if isinstance(record, Step):
            slices += step_events(record)
    for seq_id, story in told.stories.items():
        events.append(named(REQUESTS, seq_id, f"request {story.arrival.request_id} ({seq_id})"))
        slices += [
            slice_of(REQUESTS, seq_id, name, start_s, stop_s, {})
            for name, start_s, stop_s in phases(story, told.end_s)
        ]
    slices.sort(key=lambda event: event["ts"])
    for event in slices:
        event["ts"] = 1e6 * (event["ts"] - zero_s)
    return {"traceEvents": events + slices, "displayTimeUnit": "ms"}


def step_events(step: Step) -> list[dict[str, Any]]:
    seq_ids = step.seq_ids or []
    tokens = len(seq_ids) - len(step.tokens) + sum(step.tokens.values())
    args = {"step": step.step, "sequences": len(seq_ids), "tokens": tokens}
    name = f"{len(seq_ids)} sequences, {tokens} tokens"
    counts = {"running": step.running, "waiting": step.waiting, "KV blocks used": step.blocks}
    counters = [
        {"ph": "C", "pid": ENGINE, "name": name, "ts": step.start_s, "args": {name: value}}
        for name, value in counts.items()
    ]
    return [slice_of(ENGINE, 0, name, step.start_s, step.end_s, args), *counters]


def phases(story: Story, end_s: float) -> list[tuple[str, float, float]]:
    """(queued, prefill, decode or preempted; from; to) of a sequence, end to end."""
    changes = [(story.arrival.arrival_s, "queued")]
    last_s = story.finish.time_s if story.finish else end_s
    for choice in story.choices:
        if choice.kind is Kind.ADMITTED:
            changes.append((choice.time_s, "prefill"))
            changes += [(s, "decode") for s in story.token_s if s > choice.time_s][:1]
        elif choice.kind is Kind.PREEMPTED:
            while changes[-1][0] > choice.time_s:  # a decode that never came
                changes.pop()
            changes.append((choice.time_s, "preempted"))
    ends = [*(time_s for time_s, _ in changes[1:]), max(last_s, changes[-1][0])]
    found = zip(changes, ends, strict=True)
    return [(name, start_s, stop_s) for (start_s, name), stop_s in found if stop_s > start_s]


def slice_of(
    pid: int, tid: int, name: str, start_s: float, stop_s: float, args: dict[str, Any]
) -> dict[str, Any]:
    duration = 1e6 * max(0.0, stop_s - start_s)
    who = {"pid": pid, "tid": tid, "name": name}
    return {"ph": "X", **who, "ts": start_s, "dur": duration, "args": args}


def named(pid: int, tid: int, name: str) -> dict[str, Any]:
    return naming("thread_name", pid, tid, name)


def naming(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": what, "args": {"name": name}}
