"""Shortest job first: by predicted output length, with aging."""

from collections import Counter
from typing import Protocol

from nanovllm.core.policies.ordered import Ordered
from nanovllm.core.views import SequenceView


class Predictor(Protocol):
    """Guesses how many tokens an output will have."""

    def predict(self, seq: SequenceView) -> float: ...

    def learn(self, seq: SequenceView) -> None:
        """`seq` came to its own end."""


class LengthMeans:
    """The mean output of finished requests whose prompts were about as long.

    Prompts from 2^k to 2^(k+1) - 1 tokens are one class. A class with few samples leans on the
    mean of all, and that on `prior`, each as if it were `weight` samples.
    """

    def __init__(self, prior: float = 128.0, weight: float = 4.0) -> None:
        self.prior, self.weight = prior, weight
        self.tokens: Counter[int] = Counter()  # by class; -1 is all
        self.requests: Counter[int] = Counter()

    def predict(self, seq: SequenceView) -> float:
        guess = self.prior
        for bucket in (-1, seq.num_prompt_tokens.bit_length()):
            samples = self.weight + self.requests[bucket]
            guess = (self.weight * guess + self.tokens[bucket]) / samples
        return guess

    def learn(self, seq: SequenceView) -> None:
        for bucket in (-1, seq.num_prompt_tokens.bit_length()):
            self.tokens[bucket] += seq.num_tokens - seq.num_prompt_tokens
            self.requests[bucket] += 1


class ShortestJobFirst(Ordered):
    """The shortest predicted output goes first, the longest gives way.

    A sequence's prediction is made when it arrives and stays. Each second of waiting counts like
    `aging` tokens less, so nobody starves: who came with a prediction of P tokens is not overtaken
    by anyone who comes P / aging seconds later.
    """

    last = "longest predicted output"

    def __init__(self, predictor: Predictor | None = None, aging: float = 10.0) -> None:
        self.predictor, self.aging = predictor or LengthMeans(), aging
        self.predicted: dict[int, float] = {}

    def added(self, seq: SequenceView) -> None:
        self.predicted[seq.seq_id] = self.predictor.predict(seq)

    def key(self, seq: SequenceView, now_s: float) -> tuple[float, ...]:
        # less aging * (now - arrival); that of now is the same for all
        return (self.predicted.get(seq.seq_id, 0.0) + self.aging * seq.arrival_s, seq.arrival_s)

    def finished(self, seq: SequenceView) -> None:
        self.predicted.pop(seq.seq_id, None)
        if seq.finish_reason in ("stop", "length"):
            self.predictor.learn(seq)
