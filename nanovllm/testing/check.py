"""check_policy: whether a scheduling policy keeps the rules that hold for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from random import Random

from nanovllm.core.events import Event, Kind
from nanovllm.core.policy import Policy
from nanovllm.core.sequence import Terms
from nanovllm.errors import PolicyError
from nanovllm.testing.trial import Arrival, Setting, Trial
from nanovllm.testing.watch import Watched

MAX_TRIES = 80  # trials that shrinking may take
STREAM = Setting(64, 4, max_num_seqs=4, max_num_batched_tokens=32, step_s=0.5, token_s=0.0)


@dataclass(frozen=True, slots=True)
class Report:
    """What a policy went through without breaking a rule."""

    policy: str
    num_trials: int
    num_requests: int
    num_steps: int
    num_preemptions: int
    max_bypass: int

    def __str__(self) -> str:
        return (
            f"{self.policy} holds: {self.num_trials} trials, {self.num_requests} requests, "
            f"{self.num_steps} steps, {self.num_preemptions} preemptions; "
            f"at most {self.max_bypass} overtook one"
        )


def check_policy(
    make: Callable[[], Policy], *, num_trials: int = 20, max_bypass: int | None = 32
) -> Report:
    """Run a policy over seeded random workloads, with few blocks and in all kinds of order.

    Rules: some sequence advances in each step (progress); nobody is overtaken for ever
    (starvation); nobody is thrown out again and again (preemptions); no block or request is lost
    (conservation); the same arrivals give the same events, however strings hash (determinism);
    hooks read views and the engine's clock, and change nothing but their own (purity); they
    return what they are to return (contract).

    Args:
        make: the class, or whatever else makes a new policy.
        num_trials: small workloads, besides a long stream with more work than the engine can do.
        max_bypass: how many that came later may be admitted before one in that stream, where a
            step takes half a second and one request comes in 0.6 s. None: any number, for
            policies that let requests starve by design, as "priority" does.

    Raises:
        PolicyError: says in words which rule was broken, with the shortest trace found.
    """
    workloads = [random_workload(seed) for seed in range(num_trials)]
    stream = STREAM, overload(seed=0)
    bypasses = [None] * num_trials + [max_bypass]
    trials: list[Examined] = []
    for (setting, arrivals), bypass in zip([*workloads, stream], bypasses, strict=True):
        trials.append(examined(make, arrivals, setting, bypass))
        same_again(make, arrivals, setting, suffix=f"~{len(trials)}")
    return Report(
        trials[0].name,
        len(trials),
        sum(len(each.trial.sequences) for each in trials),
        sum(each.trial.executor.num_steps for each in trials),
        sum(seq.num_preemptions for each in trials for seq in each.trial.sequences),
        max(trials[-1].bypassed.values(), default=0),
    )


def random_workload(seed: int) -> tuple[Setting, list[Arrival]]:
    """A few requests with shared beginnings, and an engine that is too small for them."""
    random = Random(seed)
    setting = Setting(
        num_kv_blocks=random.choice([8, 10, 14]),
        block_size=4,
        max_num_seqs=random.choice([2, 3, 5]),
        max_num_batched_tokens=random.choice([5, 8, 32]),
        enable_chunked_prefill=random.random() < 0.8,
    )
    if not setting.enable_chunked_prefill:  # so that any sequence fits in a step
        setting = replace(setting, max_num_batched_tokens=32)
    now_s, arrivals = 0.0, []
    for _ in range(random.randint(4, 12)):
        now_s += random.choice([0.0, 0.005, 0.05])
        arrivals.append(random_arrival(random, now_s, 20, 12))
    return setting, arrivals


def overload(seed: int, num_requests: int = 120) -> list[Arrival]:
    """A long stream with about a third more work than STREAM can do."""
    random = Random(seed)
    return [random_arrival(random, 0.6 * i, 16, 12) for i in range(num_requests)]


def random_arrival(random: Random, now_s: float, longest: int, most_tokens: int) -> Arrival:
    start = random.choice([(), (0,) * 4, (0,) * 8, (1, 2) * 6])
    prompt = (*start, *(random.randrange(4) for _ in range(random.randint(1, longest))))
    terms = Terms(
        tenant=random.choice(["ann", "bob", "eve"]),
        ttft_target_s=random.choice([None, 0.5, 2.0, 8.0]),
        tpot_target_s=random.choice([None, 0.05, 0.5]),
    )
    num_output = random.randint(1, most_tokens)
    return Arrival(now_s, prompt[:longest], num_output, random.randrange(3), terms)


# One trial


class Examined:
    """A trial that is looked at after each step.

    Attributes:
        bypassed: seq_id -> how many that came later were admitted before it.
    """

    def __init__(self, policy: Policy, arrivals: Sequence[Arrival], setting: Setting) -> None:
        self.name, self.trial = type(policy).__name__, Trial(arrivals, Watched(policy), setting)
        self.bypassed: dict[int, int] = {}  # of those that were never admitted, or were last
        self.never_admitted: list[int] = []
        self.advanced: dict[int, tuple[object, int]] = {}  # where each was, since which step
        self.activity: dict[int, int] = {}  # at arrival; see preemptions
        self.num_seen = 0

    def run(self, max_bypass: int | None) -> None:
        trial = self.trial
        while not trial.done:
            if not trial.step():
                self.nobody_advances()
            self.conservation()
            self.preemptions()
            self.starvation(max_bypass)
        for seq, num_ends in zip(trial.sequences, self.ends(), strict=True):
            if num_ends != 1 or seq.num_tokens != seq.max_num_tokens:
                self.fail("conservation", f"request {seq.seq_id} ended {num_ends} times")

    def fail(self, rule: str, why: str) -> None:
        raise PolicyError(self.name, rule, why)

    def nobody_advances(self) -> None:
        waiting = [seq for _, seq in self.trial.scheduler.waiting]
        first, running = waiting[0], len(self.trial.scheduler.running)
        self.fail(
            "progress",
            f"nobody advances in step {self.trial.scheduler.events.step}: {running} run and "
            f"{len(waiting)} wait, the first of them, request {first.seq_id}, because of "
            f'"{first.waiting_reason}"',
        )

    def conservation(self) -> None:
        blocks, held = self.trial.blocks, [0] * self.trial.blocks.num_blocks
        for seq in self.trial.scheduler.running.values():
            for block_id in seq.block_table:
                held[block_id] += 1
        places = sorted([*blocks.free, *blocks.idle, *(i for i, num in enumerate(held) if num)])
        if places != list(range(blocks.num_blocks)) or held != [b.ref_count for b in blocks.blocks]:
            self.fail("conservation", "free, cached and held blocks are no longer all blocks")

    def ends(self) -> list[int]:
        ended = [event.seq_id for event in self.trial.events if event.kind is Kind.FINISHED]
        return [ended.count(seq.seq_id) for seq in self.trial.sequences]

    def preemptions(self) -> None:
        """A preempted sequence comes back with a block to spare for each that runs. So between
        two preemptions somebody arrives, ends, or fills a block."""
        trial, counts = self.trial, self.trial.scheduler.events.counts
        events = counts[Kind.ADDED] + counts[Kind.FINISHED]
        activity = events + counts["generation_tokens"] // trial.blocks.block_size
        for seq in trial.sequences:
            past = self.activity.setdefault(seq.seq_id, activity)
            if seq.num_preemptions > activity - past + 3:
                why = f"request {seq.seq_id} was preempted {seq.num_preemptions} times in "
                why += f"{trial.executor.num_steps} steps; at most {activity - past + 3} are of use"
                self.fail("preemptions", why)

    def starvation(self, max_bypass: int | None) -> None:
        trial, most = self.trial, float("inf") if max_bypass is None else max_bypass
        new, self.num_seen = trial.events[self.num_seen :], len(trial.events)
        for event in new:
            if event.kind is Kind.ADDED:
                self.bypassed[event.seq_id] = 0
                self.never_admitted.append(event.seq_id)
            elif event.kind is Kind.ADMITTED and event.seq_id in self.never_admitted:
                self.never_admitted.remove(event.seq_id)
                for seq_id in self.never_admitted:
                    self.bypassed[seq_id] += seq_id < event.seq_id
        for seq_id in self.never_admitted:
            if self.bypassed[seq_id] > most:
                why = f"request {seq_id} waits while {self.bypassed[seq_id]} that came later were "
                self.fail("starvation", f"{why}admitted; at most {max_bypass} may be")
        step = trial.executor.num_steps
        for seq_id, seq in trial.scheduler.running.items():
            state = seq.num_computed_tokens, seq.num_preemptions
            before, since = self.advanced.get(seq_id, (None, step))
            self.advanced[seq_id] = state, step if state != before else since
            if step - since > 4 * most and state == before:
                why = f"request {seq_id} runs and got no token for {step - since} steps"
                self.fail("starvation", why)


def examined(
    make: Callable[[], Policy],
    arrivals: Sequence[Arrival],
    setting: Setting,
    max_bypass: int | None,
) -> Examined:
    """One trial from its beginning to its end.

    Raises:
        PolicyError: a rule was broken; the trace is of the fewest requests found.
    """
    one = Examined(make(), arrivals, setting)
    error = breach(one, max_bypass)
    if error is None:
        return one

    def breaks_it_too(some: Sequence[Arrival]) -> bool:
        found = breach(Examined(make(), some, setting), max_bypass)
        return found is not None and found.rule == error.rule

    arrivals = arrivals[: len(one.trial.sequences) + 1]  # the last may be about to be added
    fewest = shrunk(arrivals, breaks_it_too)
    last = Examined(make(), fewest, setting)
    if (short := breach(last, max_bypass)) is None:  # it does not do the same twice
        last, short, fewest = one, error, list(arrivals)
    raise PolicyError(one.name, short.rule, short.why, trace(last, fewest, setting))


def breach(one: Examined, max_bypass: int | None) -> PolicyError | None:
    """What the trial breaks, if anything."""
    try:
        one.run(max_bypass)
    except PolicyError as error:
        return error
    return None


def same_again(
    make: Callable[[], Policy], arrivals: Sequence[Arrival], setting: Setting, suffix: str
) -> None:
    """Two trials of the same arrivals, the second with tenants whose names have the same order
    and other hashes.

    Raises:
        PolicyError: the policy did not decide the same.
    """

    parted: list[tuple[Examined, Examined]] = []

    def differ(some: Sequence[Arrival]) -> bool:
        terms = [replace(each.terms, tenant=each.terms.tenant + suffix) for each in some]
        others = [replace(a, terms=t) for a, t in zip(some, terms, strict=True)]
        one, other = (examined(make, each, setting, None) for each in (some, others))
        if one.trial.events != other.trial.events:
            parted.append((one, other))
        return one.trial.events != other.trial.events

    if differ(arrivals):
        fewest = shrunk(arrivals, differ)
        one, other = parted[-1]
        pairs = zip_longest(one.trial.events, other.trial.events)
        here, there = next(((a, b) for a, b in pairs if a != b), (None, None))
        why = f"the same arrivals twice, and once [{say(here)}], once [{say(there)}]"
        raise PolicyError(one.name, "determinism", why, trace(one, fewest, setting))


def shrunk(
    arrivals: Sequence[Arrival], broken: Callable[[Sequence[Arrival]], bool]
) -> list[Arrival]:
    """Fewer requests that break the same rule: drops ever smaller parts while it stays broken."""
    fewest, size, tries = list(arrivals), max(1, len(arrivals) // 2), MAX_TRIES
    while tries > 0:
        start, dropped = 0, False
        while start < len(fewest) and tries > 0:
            rest, tries = fewest[:start] + fewest[start + size :], tries - 1
            if rest and broken(rest):
                fewest, dropped = rest, True
            else:
                start += size
        if size == 1 and not dropped:
            break
        size = max(1, size // 2)
    return fewest


# In words


def trace(one: Examined, arrivals: Sequence[Arrival], setting: Setting) -> list[str]:
    """The requests and what happened to them; long stories lose their middle."""
    lines = [
        f"request {i} at {a.arrival_s:.3f} s: {len(a.prompt)} tokens, {a.num_output_tokens} to "
        f"come, priority {a.priority}, of {a.terms.tenant}"
        for i, a in enumerate(arrivals)
    ]
    events = [say(event) for event in one.trial.events if event.kind is not Kind.ADDED]
    blocks = f"{setting.num_kv_blocks} blocks of {setting.block_size}"
    seqs, tokens = setting.max_num_seqs, setting.max_num_batched_tokens
    head = f"with {blocks}, max_num_seqs={seqs}, max_num_batched_tokens={tokens}:"
    return [head, *clipped(lines), *clipped(events)]


def clipped(lines: list[str], most: int = 16) -> list[str]:
    if len(lines) <= most:
        return lines
    half = most // 2
    return [*lines[:half], f"... {len(lines) - most} more ...", *lines[-half:]]


def say(event: Event | None) -> str:
    if event is None:
        return "nothing more"
    numbers = " ".join(f"{name}={number}" for name, number in event.data.items())
    who = f"request {event.seq_id}" if event.seq_id >= 0 else "running"
    return f"step {event.step}: {who} {event.kind}: {event.reason} {numbers}".rstrip()
