"""The plain data that cross to a worker and back."""

from dataclasses import dataclass, field

from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the ranks do not hold: new, or back after a preemption. Sent whole.

    Attributes:
        num_computed_tokens: where to go on; the tokens before it are in the cache.
        num_stored_tokens: positions below it are in shared blocks and must not be written. One
            more than num_computed_tokens when the cache holds even the last token, which still
            has to be computed (its logits are wanted) but is already stored.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    num_stored_tokens: int
    params: SamplingParams
    stop_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Says only what changed since the last plan.

    Attributes:
        seq_ids: the rows of the batch.
        num_scheduled_tokens: per row, how many of its next tokens to compute. A row that
            reaches its last known token samples the one after it.
        new_sequences: rows seen for the first time.
        new_block_ids: seq_id -> block ids to append to its block table.
        removed: sequences to forget (finished, aborted, preempted) before anything else; an id
            that a rank does not hold is no error.
    """

    step: int
    seq_ids: list[int] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    new_sequences: list[NewSequence] = field(default_factory=list)
    new_block_ids: dict[int, list[int]] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: the token that is there, then the likeliest.

    Attributes:
        token_ids, logprobs: the actual token first, then the top k in order.
        rank: of the actual token; 1 is the likeliest.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step found.

    Attributes:
        token_ids: per row of the plan, the sampled token, or -1 where none was.
        logprobs: seq_id -> of the sampled token, for those that asked.
        prompt_logprobs: seq_id -> position -> of the prompt token there.
        errors: seq_id -> message, for rows whose sampling failed.
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, dict[int, TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
