"""Sequence: one stream of tokens, from its prompt to its end."""

from enum import Enum, auto

from nanovllm.core.plan import TokenLogprobs
from nanovllm.sampling_params import SamplingParams


class Status(Enum):
    WAITING = auto()  # holds no blocks; new, or preempted
    RUNNING = auto()  # holds blocks; part of each step that has budget for it
    FINISHED = auto()  # holds no blocks; finish_reason is set


class Sequence:
    """One stream of tokens. A request with n samples is n sequences with the same request_id.

        token_ids      p p p p p p p p p p p o o o      prompt, then output
        computed       ^^^^^^^^^^^^^^^^^^^^^^^^^^       their keys and values are in the cache
        block_table    [  7  ][  3  ][  9  ][  4        position i is in block i // block_size

    The scheduler brings num_computed_tokens up to num_tokens, many at a time (prefill) or one
    (decode); the step in which it gets there samples the next token.

    Attributes:
        seq_id: unique in the engine, in order of arrival.
        num_slots: positions that the block table has room for.
        block_hashes: chain hash of each full block known so far.
        num_hashed_blocks: how many blocks of the table have been offered to the prefix cache.
        num_cached_tokens: prompt tokens that the prefix cache saved when first admitted.
        stop_token_ids: tokens that end it. max_num_tokens: length that ends it.
        finish_reason: "stop", "length", "abort" or "error". stop_reason: the token id or string
            that stopped it (None: the model's own end), or the error's message.
        arrival_s, scheduled_s, first_token_s, last_token_s: on the engine's clock.
    """

    __slots__ = (
        "arrival_s", "block_hashes", "block_table", "cache_salt", "finish_reason",
        "first_token_s", "index", "last_token_s", "logprobs", "max_num_tokens",
        "num_cached_tokens", "num_computed_tokens", "num_hashed_blocks", "num_preemptions",
        "num_prompt_tokens", "num_slots", "num_tokens", "params", "priority", "prompt_logprobs",
        "request_id", "scheduled_s", "seq_id", "status", "stop_reason", "stop_token_ids",
        "token_ids", "waiting_reason",
    )  # fmt: skip

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str = "",
        index: int = 0,
        priority: int = 0,
        cache_salt: str = "",
        arrival_s: float = 0.0,
        stop_token_ids: frozenset[int] = frozenset(),
        max_num_tokens: int = 2**62,
    ) -> None:
        self.seq_id, self.request_id, self.index = seq_id, request_id, index
        self.params, self.priority, self.cache_salt = params, priority, cache_salt
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = self.num_tokens = len(prompt_token_ids)
        self.stop_token_ids, self.max_num_tokens = stop_token_ids, max_num_tokens
        self.num_computed_tokens = self.num_cached_tokens = self.num_preemptions = 0
        self.num_slots = self.num_hashed_blocks = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.status = Status.WAITING
        self.waiting_reason = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.arrival_s = arrival_s
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.num_computed_tokens}/{self.num_tokens} computed)"
