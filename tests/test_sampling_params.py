"""SamplingParams: what each field may hold, and what a wrong value says."""

import math
from dataclasses import FrozenInstanceError
from sys import float_info
from typing import Any

import pytest

from nanovllm.errors import InvalidRequestError, NanoVLLMError
from nanovllm.sampling_params import SamplingParams

HUGE = float_info.max
FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def refusal(**params: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as found:
        SamplingParams(**params)
    return found.value


def test_the_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.min_p, params.seed, params.max_tokens, params.min_tokens) == (0.0, None, 16, 0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert params.repetition_penalty == 1.0
    assert (params.logprobs, params.prompt_logprobs) == (None, None)
    assert (params.logit_bias, params.allowed_token_ids) == (None, None)
    assert not (params.stop or params.stop_token_ids or params.bad_words)
    assert (params.ignore_eos, params.include_stop_str_in_output) == (False, False)
    assert (params.detokenize, params.skip_special_tokens) == (True, True)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [1, 16_384]),
        ("temperature", [0, 0.0, 1e-9, 0.7, 2, HUGE]),
        ("top_p", [1e-9, 0.5, 1, 1.0]),
        ("top_k", [-1, 0, 1, 10**9]),
        ("min_p", [0, 0.0, 0.5, 1, 1.0]),
        ("seed", [None, 0, 42, 2**62, -(2**63)]),
        ("presence_penalty", [-2, -2.0, 0, 2.0]),
        ("frequency_penalty", [-2.0, 0, 2]),
        ("repetition_penalty", [1e-9, 1, 1.5, 100.0]),
        ("max_tokens", [None, 1, 10**9]),
        ("min_tokens", [0, 16]),
        ("logprobs", [None, -1, 0, 1, 20]),
        ("prompt_logprobs", [None, -1, 0, 1, 20]),
        *((flag, [True, False]) for flag in FLAGS),
    ],
)
def test_values_in_range_are_taken_as_they_are(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("n", 0, 1),
        ("n", -3, 1),
        ("n", 16_385, 16_384),
        ("temperature", -0.1, 0.0),
        ("temperature", -math.inf, 0.0),
        ("temperature", math.inf, HUGE),
        ("top_p", 0, 1e-30),
        ("top_p", -0.5, 1e-30),
        ("top_p", 1.01, 1.0),
        ("top_k", -2, -1),
        ("min_p", -0.01, 0.0),
        ("min_p", 1.01, 1.0),
        ("presence_penalty", -2.01, -2.0),
        ("presence_penalty", 2.01, 2.0),
        ("frequency_penalty", -3, -2.0),
        ("frequency_penalty", 3, 2.0),
        ("repetition_penalty", 0, 1e-30),
        ("repetition_penalty", -1.0, 1e-30),
        ("repetition_penalty", math.inf, HUGE),
        ("max_tokens", 0, 1),
        ("max_tokens", -1, 1),
        ("min_tokens", -1, 0),
        ("logprobs", -2, -1),
        ("prompt_logprobs", -2, -1),
        ("seed", 2**64, 2**63),
        ("seed", -(2**64), -(2**63)),
    ],
)
def test_a_value_out_of_range_names_field_value_and_nearest(
    field: str, value: Any, nearest: Any
) -> None:
    error = refusal(**{field: value})
    assert (error.field, error.value) == (field, value)
    assert str(error).startswith(f"{field}={value!r}: must be ")
    assert str(error).endswith(f"the nearest is {nearest}")


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_field_refuses_nan(field: str) -> None:
    assert str(refusal(**{field: math.nan})).startswith(f"{field}=nan: must be a number ")


@pytest.mark.parametrize("field", NUMBERS + INTEGERS)
@pytest.mark.parametrize("value", ["1", True, [1], 1j], ids=repr)
def test_a_number_field_refuses_other_kinds(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert error.field == field
    assert f"{field}={value!r}: must be a" in str(error)


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [1.0, 1.5, math.nan, math.inf], ids=repr)
def test_an_integer_field_refuses_fractions(field: str, value: float) -> None:
    assert f"{field}={value!r}: must be an integer " in str(refusal(**{field: value}))


@pytest.mark.parametrize("field", ["n", "temperature", "top_p", "top_k", "min_p", "min_tokens"])
def test_none_is_refused_where_it_is_not_the_default(field: str) -> None:
    assert str(refusal(**{field: None})).startswith(f"{field}=None: must be ")


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("value", ["yes", None, 2, []], ids=repr)
def test_a_flag_is_true_or_false(field: str, value: Any) -> None:
    assert str(refusal(**{field: value})).startswith(f"{field}={value!r}: can be True, False")


def test_a_long_value_is_shown_shortened() -> None:
    assert len(str(refusal(temperature="x" * 1000))) < 200


def test_more_min_tokens_than_max_tokens_are_refused() -> None:
    assert str(refusal(min_tokens=6, max_tokens=5)) == "min_tokens=6: must be at most max_tokens=5"
    assert refusal(min_tokens=17).field == "min_tokens"  # max_tokens is 16 unless said
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_one_stop_string_is_a_list_of_one() -> None:
    assert list(SamplingParams(stop="end").stop or ()) == ["end"]
    assert list(SamplingParams(stop=["a", "b"]).stop or ()) == ["a", "b"]


@pytest.mark.parametrize("field", ["stop", "stop_token_ids", "bad_words"])
def test_none_and_an_empty_list_both_mean_nothing(field: str) -> None:
    for value in (None, [], ()):
        assert not getattr(SamplingParams(**{field: value}), field)


@pytest.mark.parametrize(
    ("field", "value", "entry"),
    [
        ("stop", "", ""),
        ("stop", ["a", ""], ""),
        ("stop", ["a", 5], 5),
        ("bad_words", [""], ""),
        ("bad_words", [None], None),
        ("stop_token_ids", ["7"], "7"),
        ("stop_token_ids", [7, 1.5], 1.5),
        ("allowed_token_ids", [None], None),
        ("allowed_token_ids", "12", "1"),
        ("logit_bias", {"7": 1.0}, "7"),
    ],
)
def test_a_wrong_entry_of_a_list_is_named(field: str, value: Any, entry: Any) -> None:
    error = refusal(**{field: value})
    assert error.field == field
    assert error.value in (entry, value)
    assert str(error).startswith(f"{field}={error.value!r}: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", 5),
        ("stop_token_ids", 5),
        ("bad_words", 5),
        ("allowed_token_ids", 5),
        ("logit_bias", 5),
        ("logit_bias", [5]),
    ],
)
def test_what_is_no_list_is_refused(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert error.field == field
    assert str(error).startswith(f"{field}={value!r}: ")


def test_bad_words_as_one_string_are_not_taken_letter_by_letter() -> None:
    assert refusal(bad_words="word").field == "bad_words"


@pytest.mark.parametrize("bias", [math.nan, math.inf, "1", None], ids=repr)
def test_a_bias_is_a_finite_number(bias: Any) -> None:
    error = refusal(logit_bias={1: 0.5, 2: bias})
    assert error.field == "logit_bias"
    assert f"logit_bias={bias!r}: " in str(error)


def test_no_allowed_token_at_all_is_refused() -> None:
    assert str(refusal(allowed_token_ids=[])).startswith("allowed_token_ids=[]: ")


def test_an_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_the_error_is_a_value_error_and_one_of_ours() -> None:
    assert isinstance(refusal(n=0), ValueError)
    assert isinstance(refusal(n=0), NanoVLLMError)


def test_params_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.0  # type: ignore[misc]


def test_a_temperature_that_is_almost_nothing_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9.9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"min_tokens": 1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [0]},
        {"bad_words_token_ids": [[1]]},
    ],
    ids=str,
)
def test_whatever_changes_logits_is_not_plain(params: dict[str, Any]) -> None:
    assert not SamplingParams(**params).plain
    assert SamplingParams(temperature=0.5, top_k=-1, seed=1, logprobs=3, stop="x").plain


def test_each_sample_has_a_seed_of_its_own() -> None:
    params = SamplingParams(n=3, seed=42, temperature=0.5)
    samples = [params.for_sample(i, default_seed=7) for i in range(3)]
    assert [sample.seed for sample in samples] == [42, 43, 44]
    assert [sample.n for sample in samples] == [1, 1, 1]
    assert samples[0].temperature == 0.5
    assert SamplingParams(n=2).for_sample(1, default_seed=7).seed == 7
    assert SamplingParams(seed=0).for_sample(0, default_seed=7).seed == 0


@pytest.mark.parametrize("seed", [-2, -(2**63), 2**63])
def test_the_seed_of_a_sample_fits_in_63_bits(seed: int) -> None:
    found = SamplingParams(seed=seed, n=2).for_sample(1, default_seed=0).seed
    assert found is not None and 0 <= found < 2**63


def test_seed_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None
