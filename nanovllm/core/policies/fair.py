"""Fair share over tenants: the virtual token counter (Sheng et al., OSDI 2024)."""

from collections import Counter
from collections.abc import Iterable

from nanovllm.core.policies.ordered import Ordered
from nanovllm.core.views import SequenceView


class FairShare(Ordered):
    """The tenant that was served least goes first; who was served most gives way.

    A tenant's counter grows by what is computed for it: 1 for each token, and `output_weight`
    instead for one that samples. A tenant that comes back after a time without requests starts
    level with the least served of those that are here, so idleness saves up nothing. So one that
    has left is forgotten as soon as the least served of those here has been served as much.
    """

    keys_change = True
    last = "of the most served tenant, came last"

    def __init__(self, output_weight: float = 2.0) -> None:
        self.output_weight = output_weight
        self.served_tokens: dict[str, float] = {}  # of tenants that are here
        self.left: dict[str, float] = {}  # of those that are not, if above one who is
        self.floor = 0.0  # where a tenant starts when nobody is here
        self.num_here: Counter[str] = Counter()  # requests that have not ended
        self.ahead: dict[int, int] = {}  # prompt tokens of a tenant up to this request
        self.queued: Counter[str] = Counter()  # prompt tokens that ever came
        self.started: Counter[str] = Counter()  # of them those no longer in the queue
        self.waiting: set[int] = set()

    def added(self, seq: SequenceView) -> None:
        tenant = seq.terms.tenant
        if not self.num_here[tenant]:
            level = min(self.served_tokens.values(), default=self.floor)
            self.served_tokens[tenant] = max(self.left.pop(tenant, 0.0), level)
        self.num_here[tenant] += 1
        self.ahead[seq.seq_id] = self.queued[tenant]
        self.queued[tenant] += seq.num_prompt_tokens
        self.waiting.add(seq.seq_id)

    def key(self, seq: SequenceView, now_s: float) -> tuple[float, ...]:
        # what its tenant will have been served once those of it that came before have started
        tenant = seq.terms.tenant
        ahead = max(0, self.ahead.get(seq.seq_id, 0) - self.started[tenant])
        return (self.served_tokens.get(tenant, 0.0) + ahead, seq.arrival_s)

    def served(self, rows: Iterable[tuple[SequenceView, int]]) -> None:
        for seq, num_tokens in rows:
            self._start(seq)
            samples = seq.num_awaited > 0
            cost = num_tokens + (self.output_weight - 1 if samples else 0)
            self.served_tokens[seq.terms.tenant] += cost

    def finished(self, seq: SequenceView) -> None:
        self._start(seq)
        self.ahead.pop(seq.seq_id, None)
        tenant = seq.terms.tenant
        self.num_here[tenant] -= 1
        if not self.num_here[tenant]:
            self._leave(tenant)

    def _start(self, seq: SequenceView) -> None:
        if seq.seq_id in self.waiting:
            self.waiting.remove(seq.seq_id)
            self.started[seq.terms.tenant] += seq.num_prompt_tokens

    def _leave(self, tenant: str) -> None:
        for counts in (self.num_here, self.queued, self.started):
            del counts[tenant]
        self.left[tenant] = self.served_tokens.pop(tenant)
        if self.served_tokens:
            level = min(self.served_tokens.values())
            self.left = {name: served for name, served in self.left.items() if served > level}
        else:
            self.floor = max(self.left.values())
            self.left.clear()
