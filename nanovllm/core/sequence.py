"""Sequence: one stream of tokens, from its prompt to its end."""

from dataclasses import dataclass, field
from enum import Enum, auto

from nanovllm.core.plan import NewSequence, TokenLogprobs
from nanovllm.sampling_params import SamplingParams


class Status(Enum):
    WAITING = auto()  # holds no blocks; new, or preempted
    RUNNING = auto()  # holds blocks; part of each step that has budget for it
    FINISHED = auto()  # holds no blocks; finish_reason is set


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a request is served; policies may look at them.

    Attributes:
        tenant: whose it is, for shares among tenants.
        ttft_target_s, tpot_target_s: wanted time to the first token, and for each one after it.
    """

    tenant: str = ""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens. A request with n samples is n sequences with the same request_id.

        token_ids      p p p p p p p p p p p o o o      prompt, then output
        computed       ^^^^^^^^^^^^^^^^^^^^^^^^^^       their keys and values are in the cache
        block_table    [  7  ][  3  ][  9  ][  4        position i is in block i // block_size

    The scheduler brings num_computed_tokens up to num_tokens, many at a time (prefill) or one
    (decode); the step in which it gets there samples the next token.

    Attributes:
        seq_id: unique in the engine, in order of arrival.
        num_tokens: those known, and the one that a step under way will sample.
        num_computed_tokens: by all steps planned.
        max_num_tokens: the length that ends it. stop_token_ids: tokens that end it.
        num_slots: positions that the block table has room for.
        block_hashes: chain hash of each full block known so far.
        num_hashed_blocks: how many blocks of the table have been offered to the prefix cache.
        num_matched_tokens: those at its beginning that the prefix cache had at the last look; only
            for policies that want it, while waiting.
        num_cached_tokens: prompt tokens that the prefix cache saved when first admitted.
        prompt_logprobs: by position. logprobs: one per output token.
        finish_reason: "stop", "length", "abort" or "error". stop_reason: the token id or string
            that stopped it, or the error's message.
        arrival_s, scheduled_s, first_token_s, last_token_s: on the engine's clock.
    """

    seq_id: int
    token_ids: list[int]
    params: SamplingParams
    request_id: str = ""
    index: int = 0
    priority: int = 0
    cache_salt: str = ""
    arrival_s: float = 0.0
    stop_token_ids: frozenset[int] = frozenset()
    max_num_tokens: int = 2**62
    terms: Terms = Terms()
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_matched_tokens: int = 0
    num_preemptions: int = 0
    num_slots: int = 0
    num_hashed_blocks: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    status: Status = Status.WAITING
    waiting_reason: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)
        self.num_tokens = self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_awaited(self) -> int:
        """Tokens that steps under way will sample."""
        return self.num_tokens - len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def whole(self, num_stored: int) -> NewSequence:
        """All that a rank needs to know of it; see NewSequence."""
        known = self.seq_id, list(self.token_ids), self.num_prompt_tokens, self.num_computed_tokens
        return NewSequence(*known, num_stored, self.params, sorted(self.stop_token_ids))
