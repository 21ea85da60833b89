"""What a request comes back as. vLLM's names; `out["text"]` works too."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanovllm.core.sequence import Sequence

if TYPE_CHECKING:
    from nanovllm.text_engine import Request
    from nanovllm.tokenizer import Tokenizer


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
        cumulative_logprob: sum over the tokens; None unless logprobs were asked for, and in an
            output of what is new before its end.
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


# index of a sample -> how many of its characters and tokens were shown before
Since = Mapping[int, tuple[int, int]] | None


def request_output(
    request: "Request",
    tokenizer: "Tokenizer | None",
    eos_token_ids: Set[int],
    *,
    partial: bool,
    since: Since = None,
) -> RequestOutput:
    """A request as it stands.

    Args:
        tokenizer: shows the tokens of log probabilities; None leaves them out.
        eos_token_ids: ends that need no stop_reason.
        partial: leave out text that may be the start of a stop string, so that what is shown
            never has to be taken back.
        since: leave out what was shown before, and samples that have no news or are not in it; the
            log probabilities of the prompt come until each has begun.
    """
    first, params = request.sequences[0], request.params
    prompt_logprobs: list[Logprobs | None] | None = None
    if params.logprobs is not None or params.prompt_logprobs is not None:
        from nanovllm.logprobs import show_logprobs
    begins = since is None or (0, 0) in since.values()  # one sample at least
    if params.prompt_logprobs is not None and begins:
        known = [first.prompt_logprobs[i] for i in sorted(first.prompt_logprobs)]
        prompt_logprobs = [None, *show_logprobs(known, tokenizer)]
    outputs = []
    for seq, text in zip(request.sequences, request.texts, strict=True):
        nothing = 0, len(seq.token_ids)
        num_chars, num_ids = (0, 0) if since is None else since.get(seq.index, nothing)
        ids = seq.token_ids[seq.num_prompt_tokens + num_ids :]
        if since is not None and not ids and (seq.index not in since or not seq.finish_reason):
            continue
        logprobs, total = None, None
        if params.logprobs is not None:
            logprobs = show_logprobs(seq.logprobs[num_ids:], tokenizer)
            if since is None or seq.finish_reason:
                total = sum(entry.logprobs[0] for entry in seq.logprobs)
        shown = text.safe if partial and not seq.finish_reason else text.text
        own_end = seq.stop_reason in eos_token_ids and not params.ignore_eos
        end, why = seq.finish_reason, None if own_end else seq.stop_reason
        new = shown[num_chars:]
        outputs.append(CompletionOutput(seq.index, new, ids, total, logprobs, end, why))
    return RequestOutput(
        first.request_id,
        request.prompt,
        request.prompt_token_ids,
        prompt_logprobs,
        outputs,
        request.finished,
        first.num_cached_tokens,
        RequestTiming.of(first),
    )


def merged(first: RequestOutput, then: RequestOutput) -> RequestOutput:
    """Two outputs of a request, each with what was new in it, as one."""
    outputs = {sample.index: sample for sample in first.outputs}
    for new in then.outputs:
        if (old := outputs.get(new.index)) is not None:
            logprobs = None if new.logprobs is None else [*(old.logprobs or ()), *new.logprobs]
            text, token_ids = old.text + new.text, old.token_ids + new.token_ids
            new = replace(new, text=text, token_ids=token_ids, logprobs=logprobs)
        outputs[new.index] = new
    prompt_logprobs = then.prompt_logprobs or first.prompt_logprobs
    return replace(then, outputs=list(outputs.values()), prompt_logprobs=prompt_logprobs)
