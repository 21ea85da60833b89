"""Tools in a request: what is refused, the schema that a choice forces, messages for templates."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from nanovllm.chat import render_chat
from nanovllm.errors import InvalidRequestError
from nanovllm.server.tool_parsers import HermesParser, ToolCall, collect
from nanovllm.server.tools import check_tools, decode_arguments, describe_tools, supports_tools

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: Any, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


WEATHER, TIME = tool("get_weather", parameters=CITY), tool("time.now", description="The time.")


def refusal(tools: Any, tool_choice: Any = None) -> str:
    with pytest.raises(InvalidRequestError) as found:
        check_tools(tools, tool_choice)
    return found.value.field


# What is refused


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ("f", "tools"),
        ({"type": "function"}, "tools"),
        ([tool(f"f{i}") for i in range(129)], "tools"),
        ([TIME, None], "tools[1]"),
        ([{"function": {"name": "f"}}], "tools[0].type"),
        ([TIME, {"type": "custom", "custom": {"name": "f"}}], "tools[1].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": "f"}], "tools[0].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([tool(5)], "tools[0].function.name"),
        ([tool("")], "tools[0].function.name"),
        ([tool("f g")], "tools[0].function.name"),
        ([tool("f\n")], "tools[0].function.name"),
        ([tool("é")], "tools[0].function.name"),
        ([tool("f" * 65)], "tools[0].function.name"),
        ([TIME, WEATHER, TIME], "tools[2].function.name"),
        ([tool("f", description=5)], "tools[0].function.description"),
        ([tool("f", strict="yes")], "tools[0].function.strict"),
        ([tool("f", parameters=[])], "tools[0].function.parameters"),
        ([tool("f", parameters={"maximum": float("inf")})], "tools[0].function.parameters"),
        ([tool("f", parameters={"type": "string"})], "tools[0].function.parameters.type"),
    ],
)
def test_tools_that_are_refused(tools: Any, field: str) -> None:
    assert refusal(tools) == field


def test_a_schema_too_deep_for_json_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"not": deep}
    assert refusal([tool("f", parameters=deep)]) == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("tools", "tool_choice", "field"),
    [
        (None, "auto", "tool_choice"),
        ([], "required", "tool_choice"),
        (None, tool("f"), "tool_choice"),
        ([TIME], "any", "tool_choice"),
        ([TIME], ["auto"], "tool_choice"),
        ([TIME], True, "tool_choice"),
        ([TIME], {}, "tool_choice.type"),
        ([TIME], {"type": "allowed_tools"}, "tool_choice.type"),
        ([TIME], {"type": "function", "name": "time.now"}, "tool_choice.function"),
        ([TIME], tool("time"), "tool_choice.function.name"),
    ],
)
def test_choices_that_are_refused(tools: Any, tool_choice: Any, field: str) -> None:
    assert refusal(tools, tool_choice) == field


@pytest.mark.parametrize(
    ("tools", "tool_choice", "mode", "names"),
    [
        (None, None, "none", []),
        ([], None, "none", []),
        (None, "none", "none", []),
        ([WEATHER, TIME], None, "auto", ["get_weather", "time.now"]),
        ([WEATHER, TIME], "auto", "auto", ["get_weather", "time.now"]),
        ([WEATHER, TIME], "none", "none", ["get_weather", "time.now"]),
        ([WEATHER, TIME], "required", "required", ["get_weather", "time.now"]),
        ([WEATHER, TIME], tool("time.now"), "named", ["time.now"]),
    ],
)
def test_choices(tools: Any, tool_choice: Any, mode: str, names: list[str]) -> None:
    choice = check_tools(tools, tool_choice)
    assert (choice.mode, choice.names, choice.tools) == (mode, names, tools or [])


def test_what_may_be_left_out_may_be_null() -> None:
    bare = tool("f" * 64, description=None, parameters=None, strict=None)
    many = [tool(f"f{i}", description="", parameters={}, strict=True) for i in range(127)]
    assert len(check_tools([bare, *many], "auto").names) == 128


# The schema


def accepts(schema: dict[str, Any] | None, text: str) -> bool:
    """True if the schema's grammar takes the text from start to end."""
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def test_a_required_call_is_an_array_of_calls() -> None:
    choice = check_tools([WEATHER, TIME], "required")
    assert choice.schema() == {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": "get_weather"}, "parameters": CITY},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"name": {"const": "time.now"}, "parameters": {"type": "object"}},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                },
            ]
        },
    }
    assert choice.schema(parallel_tool_calls=False) == {**(choice.schema() or {}), "maxItems": 1}


def test_a_named_call_is_its_arguments() -> None:
    tools = [WEATHER, TIME, tool("f", parameters={"properties": {}})]
    assert check_tools(tools, tool("get_weather")).schema() == CITY
    assert check_tools(tools, tool("time.now")).schema() == {"type": "object"}
    assert check_tools(tools, tool("f")).schema() == {"type": "object", "properties": {}}


def test_a_free_choice_has_no_schema() -> None:
    assert check_tools([WEATHER], "auto").schema() is None
    assert check_tools([WEATHER], "none").schema() is None


POINT = {
    "$id": "https://example.com/point",
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "at": {"$ref": "#/$defs/P"},
        "again": {"$ref": "#/properties/at"},
        "$ref": {"type": "integer"},
    },
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {"P": {"type": "array", "items": {"type": "integer"}, "minItems": 2}},
}
LIST = {
    "$ref": "#/$defs/P",
    "$defs": {
        "P": {
            "type": "object",
            "properties": {"v": {"type": "string"}, "next": {"$ref": "#/$defs/P"}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
    "additionalProperties": False,
}
NESTED = [tool("g"), tool("p", parameters=POINT), tool("l", parameters=LIST)]
NESTED += [tool("t", parameters=TREE)]


@pytest.mark.parametrize(
    ("name", "arguments", "good"),
    [
        ("p", '{"at": [1, 2], "again": [3, 4], "$ref": 5}', True),
        ("p", '{"at": [1]}', False),
        ("p", '{"at": [1, 2], "again": ["3", 4]}', False),
        ("p", "{}", False),
        ("l", '{"v": "a", "next": {"v": "b"}}', True),
        ("l", '{"v": "a", "next": {"v": 1}}', False),
        ("l", "[]", False),
        ("t", '{"children": [{"children": []}, {}]}', True),
        ("t", '{"children": [{"children": {}}]}', False),
        ("g", '{"any": []}', True),
        ("g", "[]", False),
        ("unknown", "{}", False),
    ],
)
def test_references_lead_where_they_led(name: str, arguments: str, good: bool) -> None:
    given = json.dumps(NESTED)
    required = check_tools(NESTED, "required").schema()
    call = f'{{"name": "{name}", "parameters": {arguments}}}'
    assert accepts(required, f"[{call}]") == good
    assert accepts(required, f'[{{"name": "g", "parameters": {{}}}}, {call}]') == good
    if name != "unknown":
        assert accepts(check_tools(NESTED, tool(name)).schema(), arguments) == good
    assert json.dumps(NESTED) == given


def test_how_many_calls() -> None:
    choice = check_tools([TIME], "required")
    call = '{"name": "time.now", "parameters": {}}'
    assert not accepts(choice.schema(), "[]")
    assert accepts(choice.schema(), f"[{call}, {call}]")
    assert accepts(choice.schema(parallel_tool_calls=False), f"[{call}]")
    assert not accepts(choice.schema(parallel_tool_calls=False), f"[{call}, {call}]")


# Messages for a template that knows tools

USER = {"role": "user", "content": "Weather in Zürich?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def asked(arguments: Any, content: str | None = None) -> dict[str, Any]:
    call = {"id": "call_1", **tool("get_weather", arguments=arguments)}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_1", "content": content}


@pytest.mark.parametrize(
    ("template", "known"),
    [
        (None, False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% if toolshed %}{% endif %}", False),
        ("{%- if tools %}{{ tools | tojson }}{% endif %}", True),
    ],
)
def test_whether_a_template_knows_tools(template: str | None, known: bool) -> None:
    assert supports_tools(template) == known


@pytest.mark.parametrize(
    ("arguments", "decoded"),
    [
        ('{"city": "Zürich"}', {"city": "Zürich"}),
        ({"city": "Zürich"}, {"city": "Zürich"}),
        ("", {}),
        (None, {}),
    ],
)
def test_arguments_are_dictionaries_for_a_template(arguments: Any, decoded: Any) -> None:
    messages = [USER, asked(arguments)]
    assert decode_arguments(messages) == [USER, asked(decoded)]
    assert messages == [USER, asked(arguments)]


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_left_out(calls: Any) -> None:
    message = {"role": "assistant", "content": "Hi"}
    assert decode_arguments([{**message, "tool_calls": calls}]) == [message]


FIELD = "messages[1].tool_calls"


@pytest.mark.parametrize(
    ("calls", "field"),
    [
        ("f", FIELD),
        ([None], f"{FIELD}[0]"),
        ([{"function": {"name": "f"}}], f"{FIELD}[0].type"),
        ([tool("f"), {"type": "function"}], f"{FIELD}[1].function"),
        ([tool(None)], f"{FIELD}[0].function.name"),
        ([tool("f", arguments="{}"), tool("f", arguments="{")], f"{FIELD}[1].function.arguments"),
        ([tool("f", arguments="[]")], f"{FIELD}[0].function.arguments"),
        ([tool("f", arguments=[1])], f"{FIELD}[0].function.arguments"),
        ([tool("f", arguments="[" * 100_000)], f"{FIELD}[0].function.arguments"),
    ],
)
def test_calls_in_messages_that_are_refused(calls: Any, field: str) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    for prepare in (decode_arguments, lambda messages: describe_tools(messages, [])):
        with pytest.raises(InvalidRequestError) as found:
            prepare(messages)
        assert found.value.field == field


# Messages for a template that does not

TOLD = """\
You can call functions. Here they are as JSON, each with the schema of its parameters:
<tools>
{"name": "time.now", "description": "The time."}
{"name": "größe {x}"}
</tools>
To call a function, write its name and its arguments as JSON between tags:
<tool_call>
{"name": "name of the function", "arguments": {"name of a parameter": "its value"}}
</tool_call>
For several calls, repeat this. The results come back between <tool_response> tags. \
If no function helps, answer in words."""


def test_the_system_message_says_which_tools_there_are() -> None:
    tools = [TIME, tool("größe {x}")]
    told = {"role": "system", "content": TOLD}
    assert describe_tools([USER], tools) == [told, USER]
    extended = {"role": "system", "content": f"Be brief.\n\n{TOLD}"}
    assert describe_tools([SYSTEM, USER], tools) == [extended, USER]
    assert describe_tools([SYSTEM, USER], []) == [SYSTEM, USER]
    assert SYSTEM == {"role": "system", "content": "Be brief."}


def test_calls_and_results_are_told_as_text() -> None:
    two = asked('{"city": "Zürich"}', "Let me see.")
    two["tool_calls"].append(tool("time.now", arguments=""))
    conversation = [USER, two, result("12 °C"), result("noon"), asked("{}"), result("none"), USER]
    assert describe_tools(conversation, []) == [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.\n"
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "time.now", "arguments": {}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\n12 °C\n</tool_response>\n"
            "<tool_response>\nnoon\n</tool_response>",
        },
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\nnone\n</tool_response>"},
        USER,
    ]


def test_what_is_told_can_be_read_back_and_rendered() -> None:
    told = describe_tools([SYSTEM, USER, asked('{"city": "Zürich"}')], [WEATHER])
    parser = HermesParser(["get_weather"], new_id=lambda: "call_1")
    content, calls = collect(parser.push(told[-1]["content"]) + parser.finish())
    assert (content, calls) == (None, [ToolCall("call_1", "get_weather", '{"city": "Zürich"}')])
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    shown = render_chat({"chat_template": template}, told)
    assert shown == "".join(f"{message['role']}: {message['content']}\n" for message in told)


@pytest.mark.parametrize("message", [SYSTEM, asked("{}"), result("")], ids=lambda m: m["role"])
def test_content_that_is_no_text_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as found:
        describe_tools([{**message, "content": [{"type": "text", "text": "Hi"}]}], [TIME])
    assert found.value.field == "messages[0].content"
