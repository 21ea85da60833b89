"""Ordered: who comes last in a policy's own order also gives way first."""

from collections.abc import Sequence

from nanovllm.core.policy import Decision, Policy
from nanovllm.core.views import SequenceView


class Ordered(Policy):
    """For policies whose `key` does not depend on the time: the running sequence with the largest
    key is preempted, never for an arrival."""

    last = "last in the policy's order"  # the reason

    def victim(
        self, running: Sequence[SequenceView], needy: SequenceView
    ) -> Decision[SequenceView | None]:
        if needy not in running:
            return Decision(None, "arrivals preempt nobody")
        last = max(running, key=lambda seq: (self.key(seq, 0.0), seq.seq_id))
        return Decision(last, self.last)
