"""From a model's text to tool calls, while the text is still arriving.

A parser is a generator that reads what has come and yields where it needs more. So it is written as
if the text were whole, looks at each character once, and finds the same in whatever pieces.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias, TypeVar

from nanovllm.server.tools import ToolChoice

T = TypeVar("T")
Reads: TypeAlias = Generator[None, None, T]  # yields where it needs more text, and returns T
Keep: TypeAlias = Callable[[str], None]

SPACE = re.compile(r"[ \t\r\n]+")
UNQUOTED = re.compile(r'[^"{}\[\]]+')
QUOTED = re.compile(r'[^"\\]+')
SCALAR = re.compile(r"[\w.+-]+")


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer: of its content, or of the arguments of one of its tool calls.

    Attributes:
        text: of call `index`, a piece of the JSON text that the model wrote for the arguments.
        index: which call, counted from 0; None for content.
        id, name: of the call, in its first piece.
    """

    text: str
    index: int | None = None
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; its arguments are JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


def collect(deltas: Iterable[Delta]) -> tuple[str | None, list[ToolCall]]:
    """What the deltas are pieces of: the content, None if there is none, and the calls."""
    pieces: dict[int | None, list[Delta]] = {}
    for delta in deltas:
        pieces.setdefault(delta.index, []).append(delta)
    texts = {index: "".join(delta.text for delta in pieces[index]) for index in pieces}
    content = texts.pop(None, None)
    return content, [ToolCall(pieces[i][0].id, pieces[i][0].name, texts[i]) for i in texts]


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbours made one."""
    whole = []
    for _, group in groupby(deltas, lambda delta: delta.index):
        first, *others = group
        whole.append(replace(first, text=first.text + "".join(delta.text for delta in others)))
    return whole


def new_call_id() -> str:
    """An id in OpenAI's form: call_ and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


def drop(text: str) -> None:
    """Keep nothing of a text that is passed over."""


class Scanner:
    """Takes tags and JSON from text that arrives in pieces.

    Attributes:
        raw: what was taken and neither given out nor dropped so far.
    """

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False
        self.raw: list[str] = []

    def peek(self) -> Reads[str]:
        """The next character, "" at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def take(self, count: int) -> str:
        """The next characters: as many, or all that there are."""
        taken = self.text[self.at : self.at + count]
        self.at += len(taken)
        self.raw.append(taken)
        return taken

    def run(self, pattern: re.Pattern[str], keep: Keep = drop) -> Reads[str]:
        """Pass on characters while they match; the first that does not, "" at the end."""
        while char := (yield from self.peek()):
            match = pattern.match(self.text, self.at)
            if not match:
                break
            keep(self.take(match.end() - self.at))
        return char

    def tag(self, tags: Sequence[str]) -> Reads[str]:
        """Take the tag that comes next, "" if none does. Waits only while one is possible; of a
        tag in which the text ends, its beginning counts."""
        while True:
            possible = False
            for tag in tags:
                come = self.text[self.at : self.at + len(tag)]
                if come == tag or (self.ended and tag.startswith(come)):
                    self.take(len(come))
                    return tag
                possible |= tag.startswith(come)
            if not possible:
                return ""
            yield

    def mark(self, char: str) -> Reads[bool]:
        """Take this character, and white space before it; False if another comes."""
        found = (yield from self.run(SPACE)) == char
        if found:
            self.take(1)
        return found

    def value(self, keep: Keep) -> Reads[None]:
        """Pass on a JSON value. What its brackets hold is not checked."""
        char = yield from self.run(SPACE)
        if char == '"':
            yield from self.string(keep)
        elif char in ("{", "["):
            yield from self.nested(keep)
        else:
            yield from self.run(SCALAR, keep)

    def string(self, keep: Keep) -> Reads[None]:
        """Pass on a JSON string, from quote to quote."""
        keep(self.take(1))
        while char := (yield from self.run(QUOTED, keep)):
            while char == "\\" and len(self.text) - self.at < 2 and not self.ended:
                yield
            keep(self.take(2 if char == "\\" else 1))
            if char == '"':
                return

    def nested(self, keep: Keep) -> Reads[None]:
        """Pass on a JSON object or array, from bracket to bracket."""
        depth = 0
        while char := (yield from self.run(UNQUOTED, keep)):
            if char == '"':
                yield from self.string(keep)
                continue
            keep(self.take(1))
            depth += 1 if char in "{[" else -1
            if depth == 0:
                return

    def word(self) -> Reads[str | None]:
        """Take a JSON string and decode it; None if something else comes."""
        pieces: list[str] = []
        if (yield from self.run(SPACE)) == '"':
            yield from self.string(pieces.append)
        try:
            return str(json.loads("".join(pieces)))
        except ValueError:
            return None

    def held_object(self) -> Reads[str | None]:
        """Take a JSON object, or a string that holds one: the object's text; None if it is none."""
        pieces: list[str] = []
        yield from self.value(pieces.append)
        text = "".join(pieces)
        try:
            value = json.loads(text)
            if isinstance(value, str):
                text, value = value, json.loads(value)
                text.encode()  # half a surrogate pair can be written as an escape, but not sent
        except (ValueError, RecursionError):
            return None
        return text if isinstance(value, dict) else None


class ToolParser(Scanner):
    """Finds the calls in a text. This one finds none: all is content.

    Nothing is lost. What begins like a call and is none, or calls a tool that there is not, is
    content, tags and all; if it breaks off when a piece of its arguments is out, what came of them
    stays. White space before the first call and after each call is dropped.

    Args:
        names: the tools that there are.
        new_id: makes the id of each call.
        parallel_tool_calls: False drops all calls but the first.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        new_id: Callable[[], str] = new_call_id,
        parallel_tool_calls: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.new_id, self.parallel_tool_calls = names, new_id, parallel_tool_calls
        self.num_calls = 0
        self.deltas: list[Delta] = []
        self.reading = self.read()

    def push(self, text: str) -> list[Delta]:
        """What these further characters of the text decide."""
        self.text, self.at = self.text[self.at :] + text, 0
        next(self.reading, None)
        deltas, self.deltas = self.deltas, []
        return deltas if len(deltas) < 2 else joined(deltas)

    def finish(self) -> list[Delta]:
        """What was held back, now that no more text comes."""
        self.ended = True
        return self.push("")

    def read(self) -> Reads[None]:
        """Read the text from start to end."""
        yield from self.rest()

    def rest(self) -> Reads[None]:
        """Give out all that follows as content."""
        self.say()
        while (yield from self.peek()):
            self.take(len(self.text))
            self.say()

    def say(self) -> None:
        """Give out what was taken as content."""
        if any(self.raw):
            self.deltas.append(Delta("".join(self.raw)))
        self.raw.clear()

    def begin(self, name: str, arguments: str) -> None:
        """Give out the first piece of a new call."""
        self.num_calls += 1
        self.part(arguments, self.new_id(), name)

    def part(self, arguments: str, id: str = "", name: str = "") -> None:
        """Give out a piece of the latest call."""
        if self.parallel_tool_calls or self.num_calls == 1:
            self.deltas.append(Delta(arguments, self.num_calls - 1, id, name))
        self.raw.clear()

    def call(self) -> Reads[bool]:
        """Read a call; False if it was none, and is given out as content."""
        num_calls = self.num_calls
        yield from self.call_object()
        if self.num_calls == num_calls:
            self.say()
        self.raw.clear()
        return self.num_calls > num_calls

    def call_object(self) -> Reads[None]:
        """Read {"name": ..., "arguments": {...}}, keys in any order, to its end or to where it
        cannot be one. Arguments that come before the name are held until it is known."""
        name: str | None = None
        held: str | None = None  # None: no arguments yet; "": they are out
        more = yield from self.mark("{")
        while more:
            key = yield from self.word()
            if key is None or not (yield from self.mark(":")):
                return
            if key == "name" and name is None:
                name = yield from self.word()
                if name is None or name not in self.names:
                    return
            elif key not in ("arguments", "parameters") or held is not None:
                yield from self.value(drop)
            elif name and (yield from self.run(SPACE)) == "{":
                held = ""
                self.begin(name, "")
                yield from self.nested(self.part)
            else:
                held = yield from self.held_object()
                if held is None:
                    return
            if name and held:
                self.begin(name, held)
                held = ""
            more = yield from self.mark(",")
        if (yield from self.mark("}")) and name and held is None:
            self.begin(name, "{}")


class HermesParser(ToolParser):
    """Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call> amid content."""

    def read(self) -> Reads[None]:
        """Read content and calls by turns."""
        opening, closing = "<tool_call>", "</tool_call>"
        tags = [opening]
        yield from self.run(SPACE)
        while tag := (yield from self.until(tags)):
            tags = [opening]
            if tag == opening:
                if not (yield from self.call()):
                    continue
                yield from self.run(SPACE)
                if not (yield from self.tag([closing])):
                    tags = [opening, closing]  # it may come later
            yield from self.run(SPACE)
            self.raw.clear()
        if self.num_calls == 0:
            self.say()

    def until(self, tags: Sequence[str]) -> Reads[str]:
        """Give out content up to one of the tags and take that; "" at the end."""
        while (yield from self.peek()):
            tag = yield from self.tag(tags)
            if tag:
                return tag
            end = self.text.find("<", self.at + 1)
            self.take((end if end > 0 else len(self.text)) - self.at)
            self.say()
        return ""


class CallsParser(ToolParser):
    """A text of nothing but calls, and from where it is something else, content. This one reads
    the array that `ToolChoice.schema` asks for if some call is required."""

    OPENING = "["
    BETWEEN = re.compile(r"[ \t\r\n,\]]+")

    def read(self) -> Reads[None]:
        """Read call after call, each with the opening before it or without."""
        yield from self.run(SPACE)
        while True:
            yield from self.tag([self.OPENING])
            if (yield from self.run(SPACE)) != "{" or not (yield from self.call()):
                break
            yield from self.run(self.BETWEEN)
            self.raw.clear()
        yield from self.rest()


class Llama3JsonParser(CallsParser):
    """Llama 3: {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>, and more after
    semicolons or new lines."""

    OPENING = "<|python_tag|>"
    BETWEEN = re.compile(r"[ \t\r\n;]+")


class NamedParser(ToolParser):
    """The whole text is the arguments of the one tool that there is."""

    def read(self) -> Reads[None]:
        """Pass everything on."""
        [name] = self.names
        while (yield from self.peek()):
            if self.num_calls == 0:
                self.begin(name, "")
            self.part(self.take(len(self.text)))


# By vLLM's names.
PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "llama4_json": Llama3JsonParser,
}


def detect_parser(chat_template: str | None) -> str:
    """The name of the parser for what a model's chat template teaches it to write."""
    template = chat_template or ""
    llama = "<|python_tag|>" in template or '"parameters"' in template
    return "llama3_json" if llama and "<tool_call>" not in template else "hermes"


def make_parser(
    choice: ToolChoice,
    name: str,
    *,
    parallel_tool_calls: bool = True,
    new_id: Callable[[], str] = new_call_id,
) -> ToolParser:
    """A parser for one answer.

    Args:
        choice: what the request allows; where it leaves the model free, its form is that of the
            parser `name`, one of PARSERS.
        parallel_tool_calls, new_id: see `ToolParser`.
    """
    forced = {"none": ToolParser, "required": CallsParser, "named": NamedParser}
    kind = forced.get(choice.mode) or PARSERS[name]
    return kind(choice.names, new_id=new_id, parallel_tool_calls=parallel_tool_calls)
