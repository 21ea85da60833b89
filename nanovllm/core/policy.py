"""Policy: the hooks through which a scheduling idea enters.

`Policy` itself is "fcfs": first come, first served. Subclass it, override what the idea is about,
and name it as `module:Class` (core/policies/ has the built-in ones). Hooks see read-only views and
the engine's clock, never how long an output will be, and touch nothing but their own memory. Those
that return a Decision say why, and where it decides something, the event log says it too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from nanovllm.core.views import SequenceView

T = TypeVar("T")


class Decision(NamedTuple, Generic[T]):
    """What a hook decided, and why."""

    value: T
    reason: str


@dataclass(frozen=True, slots=True)
class StepView:
    """The engine at the beginning of a step, or as one sequence is being admitted to it.

    Attributes:
        now_s: the engine's clock.
        token_budget: tokens that the step may still compute.
        num_decodes: running sequences that want one token.
        num_prefills: running sequences that want more.
        num_waiting: sequences in the waiting queue.
        num_available_blocks: blocks that can be allocated.
    """

    now_s: float
    token_budget: int
    num_decodes: int
    num_prefills: int
    num_waiting: int
    num_available_blocks: int


class Policy:
    """First come, first served; decodes before prefills; the last to come is preempted first."""

    keys_change = False  # True: keys of waiting sequences may change; they are sorted each step
    wants_matches = False  # True: num_matched_tokens of waiting sequences is updated each step

    def key(self, seq: "SequenceView", now_s: float) -> tuple[float, ...]:
        """Place in the queue for prefill tokens: the smallest goes first. Waiting sequences and
        running ones with prompt tokens left stand in one queue; ties go by arrival."""
        return (seq.arrival_s,)

    def admit(self, seq: "SequenceView", num_blocks: int, step: StepView) -> Decision[bool]:
        """Whether to let `seq` run: all its tokens would take `num_blocks` of those available.

        A sequence that was preempted comes back when there is also a spare block for each
        running one, or the next steps would throw it out again.
        """
        spare = step.num_decodes + step.num_prefills if seq.num_preemptions else 0
        if num_blocks + spare <= step.num_available_blocks:
            return Decision(True, "fits")
        return Decision(False, "no blocks")

    def share_budget(self, step: StepView) -> Decision[tuple[int, int]]:
        """The largest numbers of decode and prefill tokens in this step. What decodes leave of
        step.token_budget goes to prefills, up to their share. Shares by which nobody could go
        are not kept."""
        return Decision((step.token_budget, step.token_budget), "decodes first")

    def victim(
        self, running: Sequence["SequenceView"], needy: "SequenceView"
    ) -> "Decision[SequenceView | None]":
        """Whom to preempt so that `needy` gets blocks or a place. A running `needy` is among
        `running` (never empty) and may be the victim itself, as it is when None is returned; a
        waiting one then goes on waiting. `running` is in order of admission."""
        if needy not in running:
            return Decision(None, "arrivals preempt nobody")
        return Decision(max(running, key=lambda seq: (seq.arrival_s, seq.seq_id)), "came last")

    def evict(self, idle: Mapping[int, object]) -> int:
        """Which cached block that nobody holds to give up. `idle` is ordered, the least recently
        used first and of one sequence its tail before its head."""
        return next(iter(idle))

    # What a policy may learn from; by default it does not.

    def added(self, seq: "SequenceView") -> None:
        """`seq` arrived and is about to be queued."""

    def served(self, rows: Iterable[tuple["SequenceView", int]]) -> None:
        """A step was planned: each sequence in it and how many tokens it computes."""

    def finished(self, seq: "SequenceView") -> None:
        """`seq` ended; its finish_reason says how."""


def make_policy(name: str) -> Policy:
    """The policy that `name` stands for: a built-in one, or "module:Class".

    Raises:
        ConfigError: there is none.
    """
    if name == "fcfs":
        return Policy()
    from nanovllm.core.policies import load_policy

    return load_policy(name)
