"""A recording in words: how it went on the whole, and why it went as it did for one request."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from nanovllm.core.events import Kind
from nanovllm.recording import Arrival, Choice, Finish, Header, Record, Rejected, Step

TURN = "its turn"  # nobody had looked at it yet: others stood before it, or a step ran


@dataclass(slots=True)
class Story:
    """What happened to one sequence.

    Attributes:
        choices: what was decided about it. chunks: step and tokens of each of its prefills.
        token_s: when each of its tokens came.
    """

    arrival: Arrival
    choices: list[Choice] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def waits(self, end_s: float) -> list[tuple[str, float, float]]:
        """(for what, from, to) of each time it stood in the queue; `end_s` is the recording's."""
        found = []
        since: float | None = self.arrival.arrival_s
        reason = TURN
        end_s = end_s if self.finish is None else self.finish.time_s
        for choice in self.choices:
            if choice.kind in (Kind.WAITING, Kind.ADMITTED) and since is not None:
                found.append((reason, since, choice.time_s))
                since, reason = choice.time_s, choice.reason
            if choice.kind is Kind.ADMITTED:
                since, reason = None, TURN
            elif choice.kind is Kind.PREEMPTED:
                since = choice.time_s
        if since is not None:
            found.append((reason, since, end_s))
        return found

    @property
    def num_cached(self) -> int:
        """Prompt tokens that the cache saved when it was first admitted."""
        kinds = (Kind.ADMITTED, Kind.CACHE_HIT, Kind.CACHE_MISS)
        first = [choice for choice in self.choices if choice.kind in kinds][:2]
        hits = [choice.data["tokens"] for choice in first if choice.kind is Kind.CACHE_HIT]
        return sum(hits)

    @property
    def num_recomputed(self) -> int:
        """Tokens whose keys and values were thrown away and computed again."""
        total = lost = 0
        for choice in self.choices:
            if choice.kind is Kind.PREEMPTED:
                lost = choice.data["computed_tokens"]
            elif choice.kind is Kind.ADMITTED:
                total += lost
            elif choice.kind is Kind.CACHE_HIT:
                total -= min(lost, choice.data["tokens"])
        return total


@dataclass(slots=True)
class History:
    """A recording, sorted by sequence; `num_rows` is the sum of its batch sizes, `end_s` the time
    of its last line."""

    header: Header
    stories: dict[int, Story] = field(default_factory=dict)
    num_steps: int = 0
    num_rows: int = 0
    busy_s: float = 0.0
    num_rejected: int = 0
    end_s: float = 0.0


def history(records: Iterable[Record]) -> History:
    """What a recording tells of each sequence."""
    lines = iter(records)
    header = next(lines)
    assert isinstance(header, Header)
    told = History(header, end_s=header.time_s)
    for line in lines:
        told.end_s = line.end_s if isinstance(line, Step) else line.time_s
        if isinstance(line, Arrival):
            told.stories[line.seq_id] = Story(line)
        elif isinstance(line, Finish) and line.seq_id in told.stories:
            told.stories[line.seq_id].finish = line
        elif isinstance(line, Step):
            add_step(told, line)
        else:
            told.num_rejected += isinstance(line, Rejected)
    return told


def add_step(told: History, step: Step) -> None:
    seq_ids = step.seq_ids or []
    told.num_steps += 1
    told.num_rows += len(seq_ids)
    told.busy_s += step.duration_s
    for choice in step.choices:
        if choice.seq_id in told.stories:
            told.stories[choice.seq_id].choices.append(choice)
    without = {*step.partial, *step.failed}
    for seq_id in seq_ids:
        if (story := told.stories.get(seq_id)) is None:
            continue
        if step.tokens.get(seq_id, 1) > 1 or not story.token_s:
            story.chunks.append((step.step, step.tokens.get(seq_id, 1)))
        if seq_id not in without:
            story.token_s.append(step.end_s)


def overview(told: History) -> list[str]:
    """A recording in lines: what ran, how long, what held it up."""
    header, stories = told.header, told.stories.values()
    ends = Counter(story.finish.reason for story in stories if story.finish)
    ends["unfinished"] = len(stories) - ends.total()
    waited = totals(wait for story in stories for wait in story.waits(told.end_s))
    preempted = sum(choice.kind is Kind.PREEMPTED for story in stories for choice in story.choices)
    prompts = sum(story.arrival.prompt_tokens for story in stories)
    cached = sum(story.num_cached for story in stories)
    again = sum(story.num_recomputed for story in stories)
    tokens = sum(len(story.token_s) for story in stories)
    seconds = told.end_s - header.time_s
    rows = told.num_rows / max(told.num_steps, 1)
    firsts = sorted(s.token_s[0] - s.arrival.arrival_s for s in stories if s.token_s)
    lines = [
        f"{header.model or 'An engine'} under {header.policy}: {header.num_blocks} blocks of "
        f"{header.block_size} tokens, at most {header.max_num_seqs} sequences and "
        f"{header.max_num_batched_tokens} tokens a step",
        f"Sequences: {len(stories)} ({', '.join(f'{n} {why}' for why, n in ends.items() if n)})"
        + f", {told.num_rejected} requests rejected" * bool(told.num_rejected),
        f"Steps: {told.num_steps} in {said(seconds)}, {said(told.busy_s)} of it in the executor; "
        f"{rows:.1f} sequences a step",
        f"Tokens: {prompts} of prompts, {tokens} of output",
        f"Prefix cache: {cached} of {prompts} prompt tokens",
        f"Preemptions: {preempted}; {again} tokens computed again",
    ]
    if firsts:
        middle, last = firsts[len(firsts) // 2], firsts[-1]
        lines.append(f"TTFT: median {said(middle)}, longest {said(last)}")
    lines.append(f"Waited, all together: {reasons(waited)}")
    limits = [why for why in waited if why != TURN]
    if limits:
        lines.append(f"What limited admission most: {limits[0]}")
    return lines


def request(told: History, request_id: str) -> list[str]:
    """What happened to each sequence of a request, and why; nothing if there is no such request."""
    found = [s for s in told.stories.values() if s.arrival.request_id == request_id]
    return [line for story in found for line in tell(told, story)]


def tell(told: History, story: Story) -> list[str]:
    arrival, end_s = story.arrival, told.end_s
    zero_s = arrival.arrival_s
    after = f"{said(zero_s - told.header.time_s)} into the recording"
    lines = [
        f"Request {arrival.request_id}, sequence {arrival.seq_id}: {arrival.prompt_tokens} prompt "
        f"tokens, at most {arrival.max_tokens} more; it came {after}",
        f"  waited: {reasons(totals(story.waits(end_s)))}",
    ]
    for choice in story.choices:
        text = DESCRIBE[choice.kind](told, choice) if choice.kind in DESCRIBE else ""
        if text:
            lines.append(f"  +{said(choice.time_s - zero_s)} step {choice.step}: {text}")
    if story.chunks:
        sizes = ", ".join(f"{n} in step {step}" for step, n in story.chunks)
        lines.append(f"  prefilled: {sizes}")
    if story.num_recomputed:
        lines.append(f"  tokens computed again after preemptions: {story.num_recomputed}")
    if story.token_s:
        lines.append(f"  TTFT {said(story.token_s[0] - zero_s)}{gaps(story.token_s)}")
    finish = story.finish
    if finish is None:
        lines.append(f"  had not ended when the recording did, with {len(story.token_s)} tokens")
    else:
        by = ", from outside the engine" if finish.outside and finish.reason != "abort" else ""
        lines.append(
            f"  +{said(finish.time_s - zero_s)} ended: {finish.reason}{by}, "
            f"{finish.output_tokens} tokens"
        )
    return lines


def admitted(told: History, choice: Choice) -> str:
    return f"admitted ({choice.reason}), {choice.data['tokens']} tokens to have"


def preempted(told: History, choice: Choice) -> str:
    by, lost = told.stories.get(choice.data["by"]), choice.data["computed_tokens"]
    whom = f"request {by.arrival.request_id}" if by else "another"
    if choice.data["by"] == choice.seq_id:
        whom = "the others, for want of a block of its own"
    return f"preempted for {whom} ({choice.reason}), {lost} computed tokens lost"


DESCRIBE = {
    Kind.WAITING: lambda told, choice: f"looked at and left waiting: {choice.reason}",
    Kind.ADMITTED: admitted,
    Kind.CHUNKED: lambda told, choice: (
        f"got {choice.data['tokens']} of {choice.data['wanted']} tokens ({choice.reason})"
    ),
    Kind.CACHE_HIT: lambda told, choice: (
        f"cache hit: {choice.data['tokens']} tokens ({choice.reason})"
    ),
    Kind.CACHE_MISS: lambda told, choice: f"cache miss: {choice.reason}",
    Kind.PREEMPTED: preempted,
}


def totals(waits: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds by what was waited for, the longest first."""
    total: dict[str, float] = {}
    for why, start_s, stop_s in waits:
        total[why] = total.get(why, 0.0) + max(0.0, stop_s - start_s)
    return dict(sorted(((why, s) for why, s in total.items() if s), key=lambda item: -item[1]))


def reasons(waited: dict[str, float]) -> str:
    return ", ".join(f"{said(s)} for {why}" for why, s in waited.items()) or "not at all"


def gaps(token_s: Sequence[float]) -> str:
    """The times between tokens."""
    between = [late - early for early, late in pairwise(token_s)]
    if not between:
        return ""
    mean, most = sum(between) / len(between), max(between)
    which = between.index(most) + 2
    return f", then {said(mean)} a token, the longest {said(most)} (before token {which})"


def said(seconds: float) -> str:
    """A time as one says it."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
