"""The `openai` package of Python: structured outputs and tools."""

import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from tests.clients.conftest import KEY
from tests.server.servers import LIMIT_S, Served

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    area: Literal[105, 1285]


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]


WEATHER = openai.pydantic_function_tool(GetWeather, name="get_weather")
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}
ARGUMENTS = re.compile(r'\{\s*"city"\s*:\s*"(Paris|Rome)"\s*\}')
# What a model that calls tools by itself would write. The one of these tests is too small to.
CALL = (
    r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "(Paris|Rome)"\}\}\n</tool_call>'
)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=LIMIT_S) as client:
        yield client


def asked(**fields: Any) -> dict[str, Any]:
    """The arguments of a greedy request."""
    settings = {"model": "smollm2-135m", "temperature": 0, "max_completion_tokens": 64}
    return {**settings, "messages": QUESTION, **fields}


def chat(client: OpenAI, **fields: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(**asked(**fields))
    return answer


# Structured outputs


def test_a_complete_form_ends_the_answer_before_min_tokens(client: OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ["Paris"]}, "min_tokens": 9}
    [choice] = chat(client, extra_body=extra).choices
    assert (choice.message.content, choice.finish_reason) == ("Paris", "stop")


def test_a_pydantic_model_is_parsed(client: OpenAI) -> None:
    answer = client.chat.completions.parse(**asked(response_format=City))
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(**asked(response_format=City)) as stream:
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, City)


def test_a_json_object(client: OpenAI, served: Served) -> None:
    [empty] = served.post("/tokenize", prompt="{}").json()["tokens"]
    preferred: dict[str, Any] = {"logit_bias": {str(empty): 100}, "max_completion_tokens": 8}
    choice = chat(client, **preferred, response_format={"type": "text"}).choices[0]
    assert choice.message.content == "{}" * 8
    choice = chat(client, **preferred, response_format={"type": "json_object"}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("{}", "stop")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"json": City.model_json_schema() | {"additionalProperties": False}}, r"\{[^{}]*\}"),
        ({"regex": r"(Rome|Paris): [1-4]{3}"}, r"(Rome|Paris): [1-4]{3}"),
        ({"choice": ["Rome", "Paris"]}, "Rome|Paris"),
        ({"grammar": 'root ::= ("Rome" | "Paris") "!"'}, "(Rome|Paris)!"),
        ({"grammar": 'start: ("Rome" | "Paris") "!"'}, "(Rome|Paris)!"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_structured_outputs_of_vllm(client: OpenAI, form: dict[str, Any], pattern: str) -> None:
    choice = chat(client, extra_body={"structured_outputs": form}).choices[0]
    assert re.fullmatch(pattern, choice.message.content or "", re.DOTALL)
    assert choice.finish_reason == "stop"


def test_a_completion_may_have_a_form_too(client: OpenAI) -> None:
    form = {"structured_outputs": {"choice": [" Rome", " Paris"]}}
    prompt = "The capital of France is"
    answer = client.completions.create(model="smollm2-135m", prompt=prompt, extra_body=form)
    assert answer.choices[0].text in (" Rome", " Paris")


def test_a_form_that_is_none_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"structured_outputs": {"regex": "("}})
    assert caught.value.param == "structured_outputs.regex"


# Tools


@pytest.mark.parametrize(
    ("fields", "finish_reason"),
    [
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_calls"),
        ({"tools": [TIME, WEATHER], "tool_choice": NAMED}, "stop"),
        ({"tools": [TIME, WEATHER], "extra_body": {"structured_outputs": {"regex": CALL}}},
         "tool_calls"),
    ],
    ids=["required", "named", "auto"],
)  # fmt: skip
def test_a_tool_call(client: OpenAI, fields: dict[str, Any], finish_reason: str) -> None:
    choice = chat(client, **fields, parallel_tool_calls=False).choices[0]
    assert (choice.message.content, choice.finish_reason) == (None, finish_reason)
    [call] = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert ARGUMENTS.fullmatch(call.function.arguments)
    streamed = client.chat.completions.create(
        **asked(**fields, parallel_tool_calls=False, stream=True)
    )
    pieces: list[Any] = []
    for chunk in streamed:
        [piece] = chunk.choices
        pieces += piece.delta.tool_calls or []
        assert not piece.delta.content
    assert piece.finish_reason == finish_reason
    assert {piece.index for piece in pieces} == {0}
    assert [piece.function.name for piece in pieces if piece.function.name] == ["get_weather"]
    assert [piece.id for piece in pieces if piece.id] == [pieces[0].id]
    assert len(pieces) > 2
    assert ARGUMENTS.fullmatch("".join(piece.function.arguments for piece in pieces))


def test_a_streamed_call_after_content_with_the_helper(client: OpenAI) -> None:
    extra = {"structured_outputs": {"regex": f"I ask\\.\n{CALL}"}}
    with client.chat.completions.stream(**asked(tools=[WEATHER], extra_body=extra)) as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert isinstance(done.parsed_arguments, GetWeather)
    assert (message.content or "").strip() == "I ask."
    assert message.tool_calls and message.tool_calls[0].function.name == "get_weather"


@pytest.mark.parametrize(("parallel", "count"), [(True, 2), (False, 1)])
def test_several_calls_or_one(client: OpenAI, parallel: bool, count: int) -> None:
    extra = {"structured_outputs": {"regex": rf"{CALL}\n{CALL}"}}
    fields: dict[str, Any] = {"tools": [WEATHER], "extra_body": extra}
    with client.chat.completions.stream(**asked(**fields, parallel_tool_calls=parallel)) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls or []
    assert all(ARGUMENTS.fullmatch(call.function.arguments) for call in calls)
    assert len({call.id for call in calls}) == len(calls) == count


def test_a_loop_with_a_tool(client: OpenAI) -> None:
    fields = asked(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    first = client.chat.completions.parse(**fields).choices[0].message
    [call] = first.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."}
    short: dict[str, Any] = {"tools": [WEATHER], "max_completion_tokens": 8}
    answers = [
        chat(client, messages=[*QUESTION, message, result], **short)
        for message in (first, first.model_dump(), first.model_dump(exclude_unset=True))
    ]
    assert all(answer.choices[0].message.content for answer in answers)
    usages = [answer.usage for answer in (chat(client, **short), *answers)]
    alone, *others = [usage.prompt_tokens for usage in usages if usage]
    assert others == [others[0]] * 3 and others[0] > alone  # it read the call and its result


def test_no_call_where_none_is_wanted(client: OpenAI) -> None:
    message = chat(client, tools=[WEATHER], tool_choice="none").choices[0].message
    assert message.content and not message.tool_calls


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_what_is_impossible_is_named(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert caught.value.param == param
