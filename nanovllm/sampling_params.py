"""SamplingParams: how one request's tokens are chosen. vLLM's names, defaults and meaning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from nanovllm.checks import HUGE, check_fields, ranged
from nanovllm.errors import InvalidRequestError
from nanovllm.structured_outputs import StructuredOutputsParams

TINY = 1e-30


class RequestOutputKind(Enum):
    """What each output of a request that is followed holds: all so far, what is new since the
    last one, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it stops.

    Args:
        n: samples to draw for the prompt; they share the prompt's blocks.
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        top_p, top_k, min_p: keep the likeliest tokens only: the smallest set with total
            probability top_p, the top_k first (0 or -1: all), those with at least min_p times
            the probability of the likeliest.
        seed: makes the samples repeatable, whatever they are batched with, but for the rounding
            of the model's logits. Sample i of n uses seed + i. None or -1: derived from the
            engine's seed and the order of requests.
        presence_penalty, frequency_penalty: taken from the logit of a generated token, once and
            per occurrence. repetition_penalty: divides a positive logit of a token that the
            prompt or the output holds (Keskar et al., CTRL, 2019), multiplies a negative one.
        stop: strings that end the output; the text is cut before them unless
            include_stop_str_in_output.
        stop_token_ids: tokens that end the output. ignore_eos: the model's own end is no end.
        max_tokens: None generates until max_model_len. min_tokens: no stop before so many, but
            for structured_outputs that are complete.
        logprobs: report so many likeliest tokens at each position and the sampled one, from the
            model's own distribution (before penalties and temperature); -1: the whole
            vocabulary. prompt_logprobs: the same for the prompt.
        logit_bias: token id -> added to its logit, clipped to [-100, 100].
        allowed_token_ids: nothing else is sampled. bad_words: these are never completed.
        bad_words_token_ids: bad_words as token ids; the engine fills it in.
        detokenize: False makes no text. skip_special_tokens: leave them out of it.
        structured_outputs: the form that the output must have.
        output_kind: what AsyncLLM yields while the request runs.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    n: int = ranged(1, 1, 16_384)
    temperature: float = ranged(1.0, 0.0, HUGE)
    top_p: float = ranged(1.0, TINY, 1.0)
    top_k: int = ranged(0, -1, 2**62)
    min_p: float = ranged(0.0, 0.0, 1.0)
    seed: int | None = ranged(None, -(2**63), 2**63)
    presence_penalty: float = ranged(0.0, -2.0, 2.0)
    frequency_penalty: float = ranged(0.0, -2.0, 2.0)
    repetition_penalty: float = ranged(1.0, TINY, HUGE)
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = ranged(16, 1, 2**62)
    min_tokens: int = ranged(0, 0, 2**62)
    logprobs: int | None = ranged(None, -1, 2**62)
    prompt_logprobs: int | None = ranged(None, -1, 2**62)
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.seed == -1:  # as in vLLM
            object.__setattr__(self, "seed", None)
        check_fields(self, InvalidRequestError)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            why = f"must be at most max_tokens={self.max_tokens}"
            raise InvalidRequestError("min_tokens", self.min_tokens, why)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        lists = ("stop", "bad_words", "stop_token_ids", "allowed_token_ids", "logit_bias")
        for name in lists:
            entries, kind = getattr(self, name), str if name in ("stop", "bad_words") else int
            shape, word = (Mapping, "dictionary") if name == "logit_bias" else (Sequence, "list")
            if isinstance(entries, str) or not isinstance(entries, shape | None):
                raise InvalidRequestError(name, entries, f"must be a {word}")
            for entry in entries or ():
                if not isinstance(entry, kind) or entry == "":
                    word = "a non-empty string" if kind is str else "a token id"
                    raise InvalidRequestError(name, entry, f"each entry must be {word}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids", [], "name at least one token, or None")
        for bias in (self.logit_bias or {}).values():
            if not isinstance(bias, (int, float)) or not -HUGE <= bias <= HUGE:
                raise InvalidRequestError("logit_bias", bias, "each bias must be a finite number")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken, without a draw."""
        return self.temperature < 1e-5

    @property
    def truncates(self) -> bool:
        """True if unlikely tokens are ruled out before a draw."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def plain(self) -> bool:
        """True if the model's logits decide alone, up to temperature."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        masks = (self.min_tokens, self.logit_bias, self.allowed_token_ids, self.bad_words_token_ids)
        formed = self.structured_outputs is not None
        return not (formed or self.truncates or any(penalties) or any(masks))

    def for_sample(self, index: int, default_seed: int) -> "SamplingParams":
        """The parameters of sample `index` of `n`: one sample, with a seed of its own."""
        seed = default_seed if self.seed is None else self.seed + index
        return replace(self, n=1, seed=seed % 2**63)
