"""Priority: as the requests' own numbers say."""

from collections.abc import Sequence

from nanovllm.core.policy import Decision, Policy
from nanovllm.core.views import SequenceView


class Priority(Policy):
    """The lowest `priority` value goes first, then the earliest arrival. Preempts the running
    sequence with the highest value, also for an arrival whose value is lower."""

    def key(self, seq: SequenceView, now_s: float) -> tuple[float, ...]:
        return (seq.priority, seq.arrival_s)

    def victim(
        self, running: Sequence[SequenceView], needy: SequenceView
    ) -> Decision[SequenceView | None]:
        worst = max(running, key=lambda seq: (seq.priority, seq.arrival_s, seq.seq_id))
        if needy not in running and worst.priority <= needy.priority:
            return Decision(None, "nobody runs with a lower priority")
        return Decision(worst, "lowest priority, came last")
