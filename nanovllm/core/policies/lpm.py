"""Longest prefix match: who has most in the prefix cache goes first, while it is there."""

from nanovllm.core.policy import Policy
from nanovllm.core.views import SequenceView


class LongestPrefixMatch(Policy):
    """The sequence of whose tokens the cache has most goes first (as in SGLang; Zheng et al.,
    2024). Each second of waiting counts like `aging` cached tokens more, so nobody starves.

    The cache is asked about each waiting sequence in each step: a look-up per cached block of it.
    """

    keys_change = wants_matches = True

    def __init__(self, aging: float = 100.0) -> None:
        self.aging = aging

    def key(self, seq: SequenceView, now_s: float) -> tuple[float, ...]:
        return (self.aging * seq.arrival_s - seq.num_matched_tokens, seq.arrival_s)
