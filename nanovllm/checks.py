"""What is refused. A setting or sampling parameter says what it may hold, and one function holds
all of them to it; another holds a request to its model."""

from collections.abc import Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from sys import float_info
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from nanovllm.errors import FieldError, InvalidRequestError

if TYPE_CHECKING:
    from nanovllm.sampling_params import SamplingParams

T = TypeVar("T")
HUGE = float_info.max


def ranged(default: Any, low: float, high: float) -> Any:
    """A field that holds a number from low to high, an integer if low is one; and None, if its
    type says so."""
    return field(default=default, metadata={"range": (low, high)})


def one_of(*choices: str | int | None) -> Any:
    """A field that holds one of these; the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


def check_fields(item: Any, error: type[FieldError]) -> None:
    """Hold each field of a dataclass to its range, its choices, or, if its default is a truth
    value, to True and False.

    Raises:
        error: names the field, the value, and the nearest one that is possible.
    """
    for entry in fields(item):
        value = getattr(item, entry.name)
        if "range" in entry.metadata and not (value is None and NoneType in get_args(entry.type)):
            low, high = entry.metadata["range"]
            kind = int if isinstance(low, int) else (int, float)
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                nearest = high if number and value > high else low
                word = "an integer" if kind is int else "a number"
                bound = f"at least {low}" if high >= 2**62 else f"from {low} to {high}"
                raise error(entry.name, value, f"must be {word} {bound}; the nearest is {nearest}")
        flag = isinstance(entry.default, bool)
        choices = entry.metadata.get("choices", (True, False) if flag else (value,))
        if value not in choices:
            names = [str(choice) for choice in choices]
            nearest = get_close_matches(str(value), names, 1, 0)[0]
            raise error(entry.name, value, f"can be {', '.join(names)}; the nearest is {nearest}")


def check_kinds(
    prompt: Any, params: Any, priority: Any, cache_salt: Any, *, has_tokenizer: bool
) -> None:
    """Hold the parts of a request to their kinds, and to what can be done without a tokenizer.

    Raises:
        InvalidRequestError: names the field.
    """
    if not hasattr(params, "for_sample"):
        raise InvalidRequestError("sampling_params", params, "must be SamplingParams")
    if not isinstance(prompt, Sequence) or (isinstance(prompt, str) and not has_tokenizer):
        raise InvalidRequestError("prompt", prompt, "must be token ids, or text to tokenize")
    if not isinstance(cache_salt, str | None):
        raise InvalidRequestError("cache_salt", cache_salt, "must be a string")
    if not isinstance(priority, int):
        raise InvalidRequestError("priority", priority, "must be an integer")
    if params.stop and not (has_tokenizer and params.detokenize):
        raise InvalidRequestError("stop", params.stop, "is looked for in text; needs detokenize")
    if params.bad_words and not has_tokenizer:
        raise InvalidRequestError("bad_words", params.bad_words, "needs a tokenizer")


def check_ids(prompt_token_ids: Sequence[Any], params: "SamplingParams", vocab_size: int) -> None:
    """Hold token ids, and the numbers of log probabilities, to the vocabulary.

    Raises:
        InvalidRequestError: names the field.
    """
    listed = ("stop_token_ids", "allowed_token_ids", "logit_bias")
    given = {name: getattr(params, name) or () for name in listed}
    for name, token_ids in {"prompt_token_ids": prompt_token_ids, **given}.items():
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                why = f"token ids are integers from 0 to {vocab_size - 1}"
                raise InvalidRequestError(name, token_id, why)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            why = f"the vocabulary has {vocab_size} tokens; -1 reports all"
            raise InvalidRequestError(name, getattr(params, name), why)


def spread(field: str, value: T | Sequence[T], count: int) -> list[T]:
    """One value for each of `count` prompts, from one for all or one for each.

    Raises:
        InvalidRequestError: there are several, and not as many as prompts.
    """
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(field, value, f"give one, or one for each of {count} prompts")
    return list(value)
