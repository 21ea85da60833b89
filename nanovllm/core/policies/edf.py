"""Earliest deadline first (Liu and Layland, 1973), from the requests' own targets."""

from nanovllm.core.policies.ordered import Ordered
from nanovllm.core.views import SequenceView


class EarliestDeadline(Ordered):
    """Whose next token is due first goes first; whose is due last gives way.

    The first token is due ttft_target_s after arrival, each one after it tpot_target_s later. A
    request without targets is due too, by `ttft_s` and `tpot_s`, so it does not starve.
    """

    last = "latest deadline"

    def __init__(self, ttft_s: float = 10.0, tpot_s: float = 0.2) -> None:
        self.ttft_s, self.tpot_s = ttft_s, tpot_s

    def key(self, seq: SequenceView, now_s: float) -> tuple[float, ...]:
        ttft_s, tpot_s = seq.terms.ttft_target_s, seq.terms.tpot_target_s
        due_s = seq.arrival_s + (self.ttft_s if ttft_s is None else ttft_s)
        num_output = seq.num_tokens - seq.num_prompt_tokens
        return (due_s + num_output * (self.tpot_s if tpot_s is None else tpot_s), seq.arrival_s)
