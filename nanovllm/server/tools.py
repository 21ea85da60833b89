"""Tools in a request: what is refused, the form that a choice forces on the output, and messages
with tool calls as a chat template wants them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError

Messages = Sequence[Mapping[str, Any]]
MAX_NUM_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
INSTRUCTION = """\
You can call functions. Here they are as JSON, each with the schema of its parameters:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON between tags:
<tool_call>
{{"name": "name of the function", "arguments": {{"name of a parameter": "its value"}}}}
</tool_call>
For several calls, repeat this. The results come back between <tool_response> tags. \
If no function helps, answer in words."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools of a request and which of them the model may or must call.

    Attributes:
        mode: "auto" (as the model likes), "none", "required" (at least one) or "named" (one that
            the request names).
        tools: in OpenAI's form, checked.
        names: those that may be called.
    """

    mode: str
    tools: Sequence[Mapping[str, Any]] = ()
    names: Sequence[str] = ()

    def schema(self, *, parallel_tool_calls: bool = True) -> dict[str, Any] | None:
        """The JSON schema that the output must follow, as in vLLM: of the named tool's arguments,
        or of an array of {"name": ..., "parameters": {...}}. None: the output is free."""
        functions = [tool["function"] for tool in self.tools]
        if self.mode == "named":
            return next(
                parameters_of(function) for function in functions if function["name"] in self.names
            )
        if self.mode != "required":
            return None
        calls = []
        for index, function in enumerate(functions):
            place = f"#/items/anyOf/{index}/properties/parameters"
            parts = {
                "name": {"const": function["name"]},
                "parameters": moved(parameters_of(function), place),
            }
            calls.append(closed_object(parts))
        array = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        return array if parallel_tool_calls else {**array, "maxItems": 1}


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, an object even if that is not said. Beside a reference
    it stays so: llguidance refuses a circular one that has neighbours."""
    schema = dict(function.get("parameters") or {})
    return schema if "$ref" in schema else {"type": "object", **schema}


def closed_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def moved(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A schema that was a document, as a part of another one, at `place`: its references lead to
    where their targets are now."""

    def point(entry: dict[str, Any]) -> dict[str, Any]:
        reference = entry.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            entry["$ref"] = place + reference[1:]
        return entry

    # With an $id of its own, its references would still start from itself.
    part = {key: value for key, value in schema.items() if key not in ("$id", "$schema")}
    copy: dict[str, Any] = json.loads(json.dumps(part), object_hook=point)
    return copy


def check_tools(tools: Any, tool_choice: Any) -> ToolChoice:
    """Hold `tools` and `tool_choice` of a request to OpenAI's form.

    Args:
        tools: None or a list of {"type": "function", "function": {"name": ..., "description": ...,
            "parameters": JSON schema, "strict": ...}}; only the name must be there.
        tool_choice: "auto", "none", "required", {"type": "function", "function": {"name": ...}};
            None is "auto" if there are tools.

    Raises:
        InvalidRequestError: names the field, such as tools[2].function.name.
    """
    if not isinstance(tools, list | None):
        raise InvalidRequestError("tools", tools, "must be a list")
    tools = tools or []
    if len(tools) > MAX_NUM_TOOLS:
        raise InvalidRequestError("tools", len(tools), f"at most {MAX_NUM_TOOLS} tools")
    names: list[str] = []
    for index, tool in enumerate(tools):
        name = check_function(tool, f"tools[{index}]")
        if name in names:
            field = f"tools[{index}].function.name"
            raise InvalidRequestError(field, name, "an earlier tool has this name")
        names.append(name)
    if tool_choice is None:
        tool_choice = "auto" if tools else "none"
    if tool_choice != "none" and not tools:
        raise InvalidRequestError("tool_choice", tool_choice, "there are no tools; give some")
    if isinstance(tool_choice, Mapping):
        name = named_function(tool_choice, "tool_choice")["name"]
        if name not in names:
            known = ", ".join(names)
            raise InvalidRequestError("tool_choice.function.name", name, f"can be {known}")
        return ToolChoice("named", tools, [name])
    if tool_choice not in ("auto", "none", "required"):
        remedy = "can be auto, none, required or a function"
        raise InvalidRequestError("tool_choice", tool_choice, remedy)
    return ToolChoice(tool_choice, tools, names)


def check_function(tool: Any, path: str) -> str:
    """The name of a tool that can be used."""
    function = named_function(tool, path)
    kinds = {"description": (str, "a string"), "strict": (bool, "true or false")}
    kinds["parameters"] = (Mapping, "a JSON schema")
    for key, (kind, word) in kinds.items():
        value = function.get(key)
        if value is not None and not isinstance(value, kind):
            raise InvalidRequestError(f"{path}.function.{key}", value, f"must be {word}")
    parameters = function.get("parameters") or {}
    field = f"{path}.function.parameters"
    if parameters.get("type", "object") != "object":
        raise InvalidRequestError(f"{field}.type", parameters["type"], "must be object")
    try:
        json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        shown = f"the schema of {function['name']}"  # itself it may be too deep to show
        raise InvalidRequestError(field, shown, f"must be JSON: {error}") from error
    return str(function["name"])


def named_function(item: Any, path: str) -> Mapping[str, Any]:
    """The function of {"type": "function", "function": {"name": ...}}, if the name is possible."""
    if not isinstance(item, Mapping):
        raise InvalidRequestError(path, item, 'must be {"type": "function", "function": {...}}')
    if item.get("type") != "function":
        raise InvalidRequestError(f"{path}.type", item.get("type"), "must be function")
    function = item.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"{path}.function", function, 'must be {"name": ...}')
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        remedy = "must be 1 to 64 of: letters, digits, _ . -"
        raise InvalidRequestError(f"{path}.function.name", name, remedy)
    return function


def supports_tools(chat_template: str | None) -> bool:
    """True if the template does something with tools."""
    return re.search(r"\btools\b", chat_template or "") is not None


def decode_arguments(messages: Messages) -> list[dict[str, Any]]:
    """The messages for a template that knows tools: the arguments of earlier calls, which clients
    send as JSON text, are dictionaries. The messages given stay as they are.

    Raises:
        InvalidRequestError: names the field, such as messages[1].tool_calls[0].function.arguments.
    """
    decoded = []
    for index, message in enumerate(messages):
        copy, path = dict(message), f"messages[{index}].tool_calls"
        calls = copy.pop("tool_calls", None)
        if not isinstance(calls, list | None):
            raise InvalidRequestError(path, calls, "must be a list")
        if calls:
            copy["tool_calls"] = [
                decoded_call(call, f"{path}[{position}]") for position, call in enumerate(calls)
            ]
        decoded.append(copy)
    return decoded


def decoded_call(call: Any, path: str) -> dict[str, Any]:
    """A call of a message with its arguments as a dictionary; no text is no arguments."""
    function = dict(named_function(call, path))
    given = function.get("arguments") or {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{path}.function.arguments", given, "must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def describe_tools(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages for a template that knows no tools, only system, user and assistant. The system
    message says which functions there are and how to call them, in the form that the parser
    "hermes" reads; earlier calls and their results are in that form too.

    Args:
        messages: their content is text, or None.
        tools: checked; none adds nothing to the system message.

    Raises:
        InvalidRequestError: names the field, as in `decode_arguments`.
    """
    told: list[dict[str, Any]] = []
    previous = None
    for index, message in enumerate(decode_arguments(messages)):
        role, calls = message.get("role"), message.get("tool_calls")
        if role == "tool":
            result = f"<tool_response>\n{text_of(message, index)}\n</tool_response>"
            if previous == "tool":
                told[-1]["content"] += f"\n{result}"
            else:
                told.append({"role": "user", "content": result})
        elif calls:
            text = text_of(message, index)
            lines = [text] if text else []
            for call in calls:
                function = {key: call["function"][key] for key in ("name", "arguments")}
                lines.append(f"<tool_call>\n{as_json(function)}\n</tool_call>")
            told.append({"role": role, "content": "\n".join(lines)})
        else:
            told.append(message)
        previous = role
    if tools:
        listed = "\n".join(as_json(tool["function"]) for tool in tools)
        text = INSTRUCTION.format(tools=listed)
        if told and told[0].get("role") == "system":
            text = f"{text_of(told.pop(0), 0)}\n\n{text}"
        told.insert(0, {"role": "system", "content": text})
    return told


def text_of(message: Mapping[str, Any], index: int) -> str:
    """The content of a message, "" if it has none."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise InvalidRequestError(f"messages[{index}].content", content, "must be text")
    return content


def as_json(value: Any) -> str:
    """JSON on one line, in the letters of its language."""
    return json.dumps(value, ensure_ascii=False)
