"""Bodies: what is taken over into SamplingParams, what is ignored, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from nanovllm.core.sequence import Terms
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.server.protocol import ChatCompletionRequest, CompletionRequest
from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.terms import terms_of


def params(**body: Any) -> SamplingParams:
    request = CompletionRequest(prompt="Hi", **body)
    return request.sampling_params({}, max_tokens=request.max_tokens, logprobs=request.logprobs)


def test_what_is_not_given_is_as_sampling_params_have_it() -> None:
    assert params() == SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)
    assert params(stream=True).output_kind is RequestOutputKind.DELTA


def test_fields_are_taken_over() -> None:
    given: dict[str, Any] = {
        "n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 4,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1,
        "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": True, "max_tokens": 9,
        "min_tokens": 2, "logprobs": 3, "prompt_logprobs": 1, "allowed_token_ids": [1, 2],
        "bad_words": ["c"], "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    expected = SamplingParams(
        **given, logit_bias={17: -3.0}, output_kind=RequestOutputKind.FINAL_ONLY
    )
    assert params(**given, logit_bias={"17": -3.0}) == expected


def test_null_is_not_given_and_the_models_defaults_stand_in() -> None:
    body = CompletionRequest(prompt="Hi", temperature=None, top_k=3)
    found = body.sampling_params({"temperature": 0.6, "top_k": 20}, max_tokens=1, logprobs=None)
    assert (found.temperature, found.top_k) == (0.6, 3)


def test_what_nobody_knows_is_ignored() -> None:
    assert params(store=True, service_tier="auto", nonsense={"a": 1}) == params()


@pytest.mark.parametrize(
    ("body", "terms"),
    [
        ({}, None),
        ({"user": None, "ttft_target_ms": None}, None),
        ({"user": "me"}, Terms("me")),
        ({"user": "me", "safety_identifier": "i"}, Terms("i")),
        ({"ttft_target_ms": 250, "tpot_target_ms": 62.5}, Terms("", 0.25, 0.0625)),
    ],
)
def test_terms_are_taken_over(body: dict[str, Any], terms: Terms | None) -> None:
    for request in (
        CompletionRequest(prompt="Hi", **body),
        ChatCompletionRequest(messages=[{}], **body),
    ):
        assert terms_of(request.prompt_fields()) == terms


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "x"), ("best_of", 2), ("use_beam_search", True), ("guided_json", {})],
)
def test_a_known_field_that_is_not_supported_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"{field}=.*is not supported"):
        CompletionRequest(prompt="Hi", **{field: value})


def test_its_absence_is_no_reason_to_refuse() -> None:
    CompletionRequest(prompt="Hi", suffix=None, use_beam_search=False)
    ChatCompletionRequest(messages=[{}], functions=None, echo=False)


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": "0.5"},
        {"temperature": float("nan")},
        {"max_tokens": 1.5},
        {"n": True},
        {"n": 129},
        {"stop": ["x"] * 65},
        {"stop": "x" * 257},
        {"cache_salt": ""},
        {"cache_salt": "x" * 257},
        {"cache_salt": 5},
        {"priority": 2**31},
        {"user": 5},
        {"user": "x" * 257},
        {"safety_identifier": "x" * 257},
        {"ttft_target_ms": 0},
        {"ttft_target_ms": "5"},
        {"tpot_target_ms": -1.0},
        {"tpot_target_ms": 2e9},
        {"tpot_target_ms": float("inf")},
        {"logit_bias": {"1": "a"}},
        {"stream": "yes"},
        {"prompt": 5},
        {"prompt": [["a"]]},
        {"prompt": ["a", 1]},
        {"prompt": ["a"] * 1025},
    ],
)
def test_types_and_limits(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest(**{"prompt": "Hi", **body})


@pytest.mark.parametrize("key", ["a", "-1", "1.0", "", "\u0661"])
def test_a_bias_is_for_a_token_id(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        params(logit_bias={key: 1.0})


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}},
            StructuredOutputsParams(json={"a": 1}),
        ),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutputsParams(regex="a+")),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"choice": ["a"]}},
            StructuredOutputsParams(choice=["a"]),
        ),
    ],
)
def test_forms(body: dict[str, Any], form: StructuredOutputsParams | None) -> None:
    assert params(**body).structured_outputs == form


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "not both",
        ),
    ],
)
def test_impossible_forms(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        params(**body)
