"""SamplingParams: how one request's tokens are chosen. vLLM's names, defaults and meaning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from sys import float_info

from nanovllm.errors import InvalidRequestError

HUGE = float_info.max
TINY = float_info.min
# name -> (kind, smallest, largest) allowed; None is refused unless it is the default.
RANGES: dict[str, tuple[type, float, float]] = {
    "n": (int, 1, 16_384),
    "temperature": (float, 0, HUGE),
    "top_p": (float, TINY, 1),
    "top_k": (int, -1, HUGE),
    "min_p": (float, 0, 1),
    "seed": (int, -(2**63), 2**63 - 1),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "repetition_penalty": (float, TINY, HUGE),
    "max_tokens": (int, 1, HUGE),
    "min_tokens": (int, 0, HUGE),
    "logprobs": (int, -1, HUGE),
    "prompt_logprobs": (int, -1, HUGE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it stops.

    Args:
        n: samples to draw for the prompt; they share the prompt's blocks.
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        top_p, top_k, min_p: keep the likeliest tokens only: the smallest set with total
            probability top_p, the top_k first (0 or -1: all), those with at least min_p times
            the probability of the likeliest.
        seed: makes the samples repeatable, whatever they are batched with. Sample i of n uses
            seed + i. None: derived from the engine's seed and the order of requests.
        presence_penalty, frequency_penalty: taken from the logit of a generated token, once and
            per occurrence. repetition_penalty: divides a positive logit of a token that the
            prompt or the output holds (Keskar et al., CTRL, 2019), multiplies a negative one.
        stop: strings that end the output; the text is cut before them unless
            include_stop_str_in_output.
        stop_token_ids: tokens that end the output. ignore_eos: the model's own end is no end.
        max_tokens: None generates until max_model_len. min_tokens: no stop before so many.
        logprobs: report so many likeliest tokens at each position and the sampled one, from the
            model's own distribution (before penalties and temperature); -1: the whole
            vocabulary. prompt_logprobs: the same for the prompt.
        logit_bias: token id -> added to its logit, clipped to [-100, 100].
        allowed_token_ids: nothing else is sampled. bad_words: these are never completed.
        bad_words_token_ids: bad_words as token ids; the engine fills it in.
        detokenize, skip_special_tokens, spaces_between_special_tokens: how text is made.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, (kind, low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
                continue
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                word = "an integer" if kind is int else "a number"
                bound = f"at least {low:g}" if high >= 2**62 else f"from {low:g} to {high:g}"
                raise InvalidRequestError(name, value, f"must be {word} {bound}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                "min_tokens", self.min_tokens, f"must be at most max_tokens={self.max_tokens}"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, values, kind in (
            ("stop", stop, str),
            ("stop_token_ids", self.stop_token_ids, int),
            ("bad_words", self.bad_words, str),
            ("allowed_token_ids", self.allowed_token_ids, int),
            ("logit_bias", self.logit_bias, int),
        ):
            if any(not isinstance(v, kind) or v == "" for v in values or ()):
                word = "a non-empty string" if kind is str else "a token id"
                raise InvalidRequestError(name, values, f"each entry must be {word}")
            if name != "logit_bias" and not (values is None and name == "allowed_token_ids"):
                object.__setattr__(self, name, tuple(values or ()))
        if self.allowed_token_ids == ():
            raise InvalidRequestError("allowed_token_ids", (), "name at least one token, or None")
        for bias in (self.logit_bias or {}).values():
            if not isinstance(bias, (int, float)) or not -HUGE <= bias <= HUGE:
                raise InvalidRequestError("logit_bias", bias, "each bias must be a finite number")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken, without a draw."""
        return self.temperature < 1e-5

    def for_sample(self, index: int) -> "SamplingParams":
        """The parameters of sample `index` of `n`: one sample, with a seed of its own."""
        if self.n == 1:
            return self
        return replace(self, n=1, seed=None if self.seed is None else self.seed + index)
