"""StructuredOutputsParams: the form that an output must have, under vLLM's names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nanovllm.errors import InvalidRequestError

FORMS = ("json", "regex", "choice", "grammar", "json_object")
MAX_SIZE = 2**16  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an output must have: one of the first five.

    Args:
        json: it is JSON of this schema, given as a dictionary or as text (and kept as text).
        regex: all of it matches this, in the syntax of Rust's regex without \\b and the like.
        choice: it is one of these.
        grammar: it is a `start` of this grammar in Lark's syntax, as llguidance has it, or a
            `root` of one in GBNF (`root ::= ...`).
        json_object: it is any JSON object.
        whitespace_pattern: a regex of what may stand between the parts of JSON; None allows any
            white space. disable_any_whitespace: nothing may.

    Raises:
        InvalidRequestError: none of the five is given, or several, or one is of a wrong kind.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False

    @classmethod
    def make(cls, fields_given: Mapping[str, Any]) -> "StructuredOutputsParams":
        """From fields whose names are not known to be right.

        Raises:
            InvalidRequestError: a name is unknown.
        """
        names = [entry.name for entry in fields(cls)]
        for name, value in fields_given.items():
            if name not in names:
                raise refusal(name, value, f"is not supported; there are {', '.join(names)}")
        return cls(**fields_given)

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (None, False, True):
                raise refusal(name, getattr(self, name), "must be True or False")
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            why = f"give exactly one of {', '.join(FORMS)}"
            raise InvalidRequestError("structured_outputs", given, why)
        if self.json is not None:
            object.__setattr__(self, "json", schema_text(self.json))
        if self.choice is not None:
            if isinstance(self.choice, str) or not isinstance(self.choice, Sequence):
                raise refusal("choice", self.choice, "must be a list of strings")
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("json", "regex", "choice", "grammar", "whitespace_pattern"):
            if (value := getattr(self, name)) is not None:
                check_texts(name, value if name == "choice" else (value,))
        spaces = self.whitespace_pattern is not None, self.disable_any_whitespace
        if any(spaces) and (all(spaces) or "json" not in given[0]):
            name = "whitespace_pattern" if spaces[0] else "disable_any_whitespace"
            raise refusal(name, getattr(self, name), "goes with JSON only, one such at a time")

    @property
    def form(self) -> str:
        """Which of the five is given."""
        return next(name for name in FORMS if getattr(self, name))


def refusal(name: str, value: object, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"structured_outputs.{name}", value, why)


def schema_text(schema: object) -> str:
    """A JSON schema as text."""
    if isinstance(schema, str) and len(schema) > MAX_SIZE:
        return schema  # refused as all long texts are
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(parsed, Mapping):
            return json.dumps(dict(parsed), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise refusal("json", "{...}", "is nested too deeply") from None
    except (ValueError, TypeError) as error:
        shown = schema if isinstance(schema, str) else "{...}"
        raise refusal("json", shown, f"is no JSON ({error})") from None
    raise refusal("json", schema, "must be a JSON schema: a dictionary, or text that holds one")


def check_texts(name: str, texts: Sequence[object]) -> None:
    """Hold what one form consists of to Unicode and to a size that can be borne."""
    for text in texts:
        if not isinstance(text, str):
            raise refusal(name, text, "must be a string")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise refusal(name, text, "is not valid Unicode")
    if not any(texts):
        raise refusal(name, list(texts), "must not be empty")
    if (size := sum(len(str(text)) for text in texts)) > MAX_SIZE:
        raise refusal(name, texts[0], f"has {size} characters; at most {MAX_SIZE} are compiled")
