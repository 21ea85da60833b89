"""Checks that settings and sampling parameters share: a field says what it may hold, one function
holds all fields to it."""

from dataclasses import field, fields
from difflib import get_close_matches
from sys import float_info
from types import NoneType
from typing import Any, get_args

from nanovllm.errors import FieldError

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
