"""What a request comes back as. vLLM's names; `out["text"]` works too."""

from dataclasses import dataclass
from typing import Any

from nanovllm.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one position. rank: 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None


Logprobs = dict[int, Logprob]  # token id -> its log probability, at one position


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample.

    Attributes:
        index: which of n. text, token_ids: so far, or all if finished.
        cumulative_logprob: sum over the tokens; None unless logprobs were asked for.
        finish_reason: "stop", "length", "abort", "error", or None while it goes on.
        stop_reason: the string or token id that stopped it (None: the model's own end), or the
            message of the error.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When things happened to the request's first sample, in seconds on the engine's clock."""

    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None

    @classmethod
    def of(cls, seq: Sequence) -> "RequestTiming":
        return cls(seq.arrival_s, seq.scheduled_s, seq.first_token_s, seq.last_token_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request.

    Attributes:
        prompt: its text, if it came as text. prompt_logprobs: a dictionary per prompt token;
            None for the first, which nothing comes before.
        num_cached_tokens: prompt tokens that the prefix cache saved.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    timing: RequestTiming

    def __getitem__(self, name: str) -> Any:
        """`out["text"]` and `out["token_ids"]`: of the first sample."""
        return getattr(self.outputs[0] if name in ("text", "token_ids") else self, name)
