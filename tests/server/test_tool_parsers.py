"""Tool calls in a model's text: the same in any pieces, and nothing lost."""

import json
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.server.tool_parsers import (
    PARSERS,
    CallsParser,
    Delta,
    HermesParser,
    Llama3JsonParser,
    NamedParser,
    ToolCall,
    ToolParser,
    collect,
    detect_parser,
    make_parser,
    new_call_id,
)
from nanovllm.server.tools import ToolChoice, check_tools

NAMES = ["f", "get_weather"]
PYTHON = "<|python_tag|>"
Kind = type[ToolParser]
Answer = tuple[str | None, list[tuple[str, str]]]


def ids() -> Callable[[], str]:
    numbers = count()
    return lambda: f"id{next(numbers)}"


def deltas(kind: Kind, pieces: Iterable[str], **options: Any) -> list[list[Delta]]:
    """What each piece decides, and in the last place what the end does."""
    parser = kind(NAMES[:1] if kind is NamedParser else NAMES, new_id=ids(), **options)
    return [*(parser.push(piece) for piece in pieces), parser.finish()]


def answer(kind: Kind, *pieces: str, **options: Any) -> Answer:
    """Content and calls, which are numbered as they come."""
    found = [delta for part in deltas(kind, pieces, **options) for delta in part]
    content, calls = collect(found)
    assert [call.id for call in calls] == [f"id{i}" for i in range(len(calls))]
    return content, [(call.name, call.arguments) for call in calls]


def hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


F = '{"name": "f", "arguments": {"x": 1}}'
G = '{"name": "get_weather", "arguments": {"city": "Zürich"}}'
CALL_F, CALL_G = ("f", '{"x": 1}'), ("get_weather", '{"city": "Zürich"}')

GOOD: list[tuple[Kind, str, Answer]] = [
    (ToolParser, hermes(F), (hermes(F), [])),
    (ToolParser, "", (None, [])),
    (HermesParser, "", (None, [])),
    (HermesParser, " \n", (" \n", [])),
    (HermesParser, "Hello <b> <tool_box> 1 < 2\n", ("Hello <b> <tool_box> 1 < 2\n", [])),
    (HermesParser, "no call: </tool_call>", ("no call: </tool_call>", [])),
    (HermesParser, hermes(F), (None, [CALL_F])),
    (HermesParser, f"<tool_call>{F}</tool_call>", (None, [CALL_F])),
    (HermesParser, f"\n\n{hermes(F)}\n{hermes(G)}\n", (None, [CALL_F, CALL_G])),
    (HermesParser, hermes(F) + hermes(G), (None, [CALL_F, CALL_G])),
    (HermesParser, f"A.\n{hermes(F)}\nB <i>{hermes(G)} C ", ("A.\nB <i>C ", [CALL_F, CALL_G])),
    (HermesParser, f"<tool_call>{F}<tool_call>{G}", (None, [CALL_F, CALL_G])),
    (HermesParser, hermes(F + "}") + "B", ("}\nB", [CALL_F])),
    (HermesParser, hermes(F[:-1]), (None, [CALL_F])),
    (HermesParser, hermes('{"name": "f"}'), (None, [("f", "{}")])),
    (HermesParser, hermes('{"name": "f", "parameters": {}}'), (None, [("f", "{}")])),
    (HermesParser, hermes('{"arguments": {"x": 1}, "name": "f"}'), (None, [CALL_F])),
    (HermesParser, hermes('{"arguments": "{\\"x\\": 1}", "name": "f"}'), (None, [CALL_F])),
    (HermesParser, hermes('{"name": "f", "arguments": "{\\"x\\": 1}"}'), (None, [CALL_F])),
    (
        HermesParser,
        hermes('{"id": -1.5e+3, "n\\u0061me": "f", "y": ["}"], "arguments": {"x": 1}, "z": null}'),
        (None, [CALL_F]),
    ),
    (
        HermesParser,
        hermes('{"name": "f", "arguments": {"x": 1}, "parameters": {"y": 2}, "name": "g"}'),
        (None, [CALL_F]),
    ),
    (
        HermesParser,
        hermes('{"name":"f","arguments":{ "a\\\\" : "}]\\"</tool_call>\\u00e9é😀" ,"b":[{}]} }'),
        (None, [("f", '{ "a\\\\" : "}]\\"</tool_call>\\u00e9é😀" ,"b":[{}]}')]),
    ),
    (Llama3JsonParser, "Hello {1}", ("Hello {1}", [])),
    (Llama3JsonParser, "  <|py", ("  <|py", [])),
    (Llama3JsonParser, F, (None, [CALL_F])),
    (Llama3JsonParser, f"\n{PYTHON}{F} \n", (None, [CALL_F])),
    (Llama3JsonParser, f"{F}; {G};", (None, [CALL_F, CALL_G])),
    (Llama3JsonParser, f"{F}\n{PYTHON} {G}{F}", (None, [CALL_F, CALL_G, CALL_F])),
    (Llama3JsonParser, f"{F} then {G}", (f"then {G}", [CALL_F])),
    (CallsParser, f"[{F}]", (None, [CALL_F])),
    (CallsParser, f" [ {F} ,\n{G} ] ", (None, [CALL_F, CALL_G])),
    (NamedParser, '{"x": "<tool_call>', (None, [("f", '{"x": "<tool_call>')])),
    (NamedParser, "", (None, [])),
]
MALFORMED: list[tuple[Kind, str]] = [
    *((HermesParser, f"A\n <tool_call>{F}"[:end]) for end in range(2, 41)),
    *((Llama3JsonParser, f"\n{PYTHON}{F}"[:end]) for end in range(2, 42)),
    *((CallsParser, f" [{F}]"[:end]) for end in range(1, 29)),
    (HermesParser, hermes('{"name": "unknown", "arguments": {}}')),
    (HermesParser, hermes('{"name": 1, "arguments": {}}')),
    (HermesParser, hermes('{"arguments": {}}')),
    (HermesParser, hermes('{"arguments": {"x": tru}, "name": "f"}')),
    (HermesParser, hermes('{"arguments": %s}' % ("[" * 100_000))),
    (HermesParser, hermes('{"name": "f", "arguments": [1]}')),
    (HermesParser, hermes('{"name": "f", "arguments": "no JSON"}')),
    (HermesParser, hermes('{"name": "f", "arguments": "{\\"x\\": \\"\\ud83d\\"}"}')),
    (HermesParser, hermes('{"name": "f", "arguments": null}')),
    (HermesParser, hermes('{"name" "f"}')),
    (HermesParser, hermes("{'name': 'f'}")),
    (HermesParser, hermes("[]")),
    (HermesParser, "<tool_call></tool_call>"),
    (HermesParser, "<tool_call><tool_call>"),
    (Llama3JsonParser, '{"city": {"name": "f", "parameters": {}}} {}'),
    (Llama3JsonParser, f"{PYTHON}import math"),
    (CallsParser, "[]"),
    (CallsParser, f"Sure: [{F}]"),
]


@pytest.mark.parametrize(("kind", "text", "expected"), GOOD)
def test_the_calls_of_a_text(kind: Kind, text: str, expected: Answer) -> None:
    assert answer(kind, text) == expected
    assert answer(kind, *text) == expected


@pytest.mark.parametrize(("kind", "text"), MALFORMED, ids=lambda value: str(value)[:60])
def test_what_is_no_call_is_content_whole(kind: Kind, text: str) -> None:
    assert answer(kind, text) == (text, [])
    assert answer(kind, *text) == (text, [])


TEXTS = [(kind, text) for kind, text, _ in GOOD] + [
    case for case in MALFORMED if len(case[1]) < 999
]


@given(st.sampled_from(TEXTS), st.data())
def test_pieces_do_not_matter_wherever_the_text_ends(
    case: tuple[Kind, str], data: st.DataObject
) -> None:
    kind, text = case
    text = text[: data.draw(st.integers(0, len(text)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert answer(kind, *pieces) == answer(kind, text)


TOKENS = ["<tool_call>", "</tool_call>", PYTHON, F, '"name": "f"', '"arguments"', "tool", "f", "1"]
TOKENS += ['{"name": "f", "arguments": ', '{"arguments": {}, "name": ', *'<>{}[]"\\,:; \né']
JUNK = st.lists(st.sampled_from(TOKENS)).map("".join)


@given(st.sampled_from([HermesParser, Llama3JsonParser, CallsParser, NamedParser]), JUNK)
def test_of_any_text_the_pieces_do_not_matter_and_what_is_kept_is_in_order(
    kind: Kind, text: str
) -> None:
    whole = answer(kind, text)
    assert answer(kind, *text) == whole
    content, calls = whole
    if not calls:
        assert (content or "") == text
    letters = iter(text)
    assert all(letter in letters for letter in content or "")


ARGUMENTS = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=4,
    ),
    max_size=3,
)


@given(st.lists(ARGUMENTS, min_size=1, max_size=3), st.booleans(), st.booleans(), st.booleans())
def test_arguments_come_out_as_they_were_written(
    values: list[Any], ascii_only: bool, first: bool, wrapped: bool
) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    shown = [json.dumps(text) if wrapped else text for text in texts]
    name = '"name": "f"'
    bodies = [
        f'{{"arguments": {text}, {name}}}' if first else f'{{{name}, "arguments": {text}}}'
        for text in shown
    ]
    expected = (None, [("f", text) for text in texts])
    for kind, text in (
        (HermesParser, "\n".join(map(hermes, bodies))),
        (Llama3JsonParser, "; ".join(bodies)),
        (CallsParser, f"[{', '.join(bodies)}]"),
    ):
        assert answer(kind, text) == expected
        assert answer(kind, *text) == expected


# While the text arrives


def test_a_call_arrives_in_parts() -> None:
    pieces = [
        "Hi <to",
        "ol",
        "_call>",
        '{"name": "f", "argu',
        'ments": ',
        '{"x',
        '": [1',
        "]}}",
        "\n",
    ]
    assert deltas(HermesParser, pieces) == [
        [Delta("Hi ")],
        [],
        [],
        [],
        [],
        [Delta('{"x', index=0, id="id0", name="f")],
        [Delta('": [1', index=0)],
        [Delta("]}", index=0)],
        [],
        [],
    ]


def test_several_calls_in_one_piece() -> None:
    text = f"A{hermes(F)}\n{hermes(G)}B"
    assert deltas(HermesParser, [text]) == [
        [
            Delta("A"),
            Delta(CALL_F[1], index=0, id="id0", name="f"),
            Delta(CALL_G[1], index=1, id="id1", name="get_weather"),
            Delta("B"),
        ],
        [],
    ]


def test_what_only_looks_like_a_tag_is_held_until_it_does_not() -> None:
    assert deltas(HermesParser, ["1 <", "tool", "_", "box>"]) == [
        [Delta("1 ")],
        [],
        [],
        [Delta("<tool_box>")],
        [],
    ]


def test_arguments_before_the_name_wait_for_it() -> None:
    pieces = ['<tool_call>{"arguments": {"x"', ': 1}, "name": "', 'f"', "}</tool_call>"]
    assert deltas(HermesParser, pieces) == [[], [], [Delta('{"x": 1}', 0, "id0", "f")], [], []]


def test_named_passes_everything_on() -> None:
    assert deltas(NamedParser, ['{"x', "", '": 1}']) == [
        [Delta('{"x', index=0, id="id0", name="f")],
        [],
        [Delta('": 1}', index=0)],
        [],
    ]


# Where the text is cut off


@pytest.mark.parametrize("end", range(1, 9))
def test_a_call_whose_arguments_are_cut_off_keeps_what_came(end: int) -> None:
    arguments = '{"x": 1}'[:end]
    expected = (None, [("f", arguments)])
    assert answer(HermesParser, f'<tool_call>{{"name": "f", "arguments": {arguments}') == expected
    assert answer(Llama3JsonParser, f'{{"name": "f", "parameters": {arguments}') == expected
    assert answer(CallsParser, f'[{{"name": "f", "parameters": {arguments}') == expected


@pytest.mark.parametrize("tail", ["", *(hermes("")[11:][:end] for end in range(1, 13))])
def test_a_closing_tag_that_is_cut_off_is_no_content(tail: str) -> None:
    assert answer(HermesParser, f"<tool_call>{F}{tail}") == (None, [CALL_F])


def test_a_call_after_one_that_is_none_counts() -> None:
    bad = hermes('{"name": "unknown", "arguments": {}}')
    assert answer(HermesParser, f"{bad}\n{hermes(F)}") == (f"{bad}\n", [CALL_F])
    assert answer(HermesParser, f'<tool_call>{{"name": {hermes(F)}') == (
        '<tool_call>{"name": ',
        [CALL_F],
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HermesParser, hermes(F) + "\n" + hermes(G)),
        (Llama3JsonParser, f"{F}; {G}"),
        (CallsParser, f"[{F}, {G}]"),
    ],
)
def test_without_parallel_calls_only_the_first_is_kept(kind: Kind, text: str) -> None:
    assert answer(kind, text, parallel_tool_calls=False) == (None, [CALL_F])
    assert answer(kind, *text, parallel_tool_calls=False) == (None, [CALL_F])


# Which parser


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "hermes"),
        ("{{ messages }}", "hermes"),
        ('{{ "<tool_call>" }} {"parameters": 1}', "hermes"),
        ('Respond with {"name": function name, "parameters": {}}', "llama3_json"),
        ("{{- '<|python_tag|>' }}", "llama3_json"),
    ],
)
def test_the_template_tells_the_parser(template: str | None, expected: str) -> None:
    assert detect_parser(template) == expected
    assert expected in PARSERS


@pytest.mark.parametrize(
    ("tool_choice", "kind"),
    [
        ("none", ToolParser),
        ("auto", Llama3JsonParser),
        ("required", CallsParser),
        ({"type": "function", "function": {"name": "f"}}, NamedParser),
    ],
)
def test_the_choice_tells_the_parser(tool_choice: Any, kind: Kind) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("g", "f")]
    choice = check_tools(tools, tool_choice)
    parser = make_parser(choice, "llama3_json", parallel_tool_calls=False, new_id=ids())
    assert type(parser) is kind
    text = {CallsParser: f"[{F}, {F}]", NamedParser: '{"x": 1}', ToolParser: "Hi"}.get(kind, F)
    found = collect(parser.push(text) + parser.finish())
    assert found == (("Hi", []) if kind is ToolParser else (None, [ToolCall("id0", *CALL_F)]))


def test_ids_are_new_each_time() -> None:
    parser = make_parser(ToolChoice("auto", names=["f"]), "hermes")
    _, calls = collect(parser.push(hermes(F) + hermes(F)))
    assert all(len(call.id) == 29 and call.id.startswith("call_") for call in calls)
    assert len({call.id for call in calls} | {new_call_id()}) == 3
