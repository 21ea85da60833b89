"""Command-line flags made from the fields of EngineConfig and SamplingParams: names, types and
defaults are the fields', help texts are their docstrings'."""

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin

SHORT = {
    "model": "-m",
    "tensor_parallel_size": "-tp",
    "data_parallel_size": "-dp",
    "quantization": "-q",
    "n": "-n",
}
METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others of the command."""

    def __init__(self, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nanovllm: error: {message} (see {self.prog} --help)\n")

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and all words that are none, wherever they stand; after `--` all are words.

        Needs a positional `words` with nargs="*".
        """
        at = argv.index("--") if "--" in argv else len(argv)
        args = self.parse_intermixed_args(argv[:at])
        return args, [*args.words, *argv[at + 1 :]]


def add_flags(
    parser: Parser, kind: type, *, skip: Collection[str] = (), defaults: Mapping[str, Any] = {}
) -> None:
    """Add a flag for each field of a dataclass that a command line can give.

    Args:
        skip: fields without a flag. defaults: instead of the dataclass's own.
    """
    group = parser.add_argument_group(f"{kind.__name__}")
    texts = field_texts(kind)
    for entry in fields(kind):
        options = {} if entry.name in skip else flag_type(entry)
        if not options:
            continue
        default = defaults.get(entry.name, entry.default)
        shown = "" if default in (None, (), MISSING) else f" (default: {default})"
        short = [SHORT[entry.name]] if entry.name in SHORT else []
        group.add_argument(
            *short,
            flag(entry.name),
            dest=f"{kind.__name__}.{entry.name}",
            default=defaults.get(entry.name, argparse.SUPPRESS),
            help=(texts[entry.name] + shown).replace("%", "%%"),
            **options,
        )


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of a dataclass whose flags were given or have a default of the command's own."""
    names = {f"{kind.__name__}.{entry.name}": entry.name for entry in fields(kind)}
    return {names[dest]: value for dest, value in vars(args).items() if dest in names}


def flag_type(entry: "Field[Any]") -> dict[str, Any]:
    """How argparse reads a field: a truth value as --x and --no-x, a list as a flag to repeat (with
    several words each, if the field's metadata say so), and None, where the field may be that, as
    "none". Empty if a flag cannot say it."""
    kinds = get_args(entry.type) if isinstance(entry.type, UnionType) else (entry.type,)
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    lists = [get_args(kind)[0] for kind in kinds if get_origin(kind) is Sequence]
    kind, optional = (*lists, kinds[0])[0], type(None) in kinds and not lists
    if kind not in METAVARS:
        return {}
    choices = [str(choice) for choice in entry.metadata.get("choices", ())]
    metavar = f"{{{','.join(choices)}}}" if len(choices) > 1 else METAVARS[kind]
    options = {"type": reader(kind, optional), "metavar": metavar}
    if "several" in entry.metadata:
        return options | {"nargs": "+", "action": "extend"}
    return options | {"action": "append"} if lists else options


def reader(kind: type, optional: bool) -> Callable[[str], Any]:
    """A function from a word to a value; argparse shows its name when it fails."""

    def read(word: str) -> Any:
        return None if optional and word.lower() == "none" else kind(word)

    read.__name__ = kind.__name__
    return read


def field_texts(kind: type) -> dict[str, str]:
    """What the Args section of a dataclass's docstring says of each field.

    A text that several fields share goes to the first of them, and the others point to it; a
    field without a text points to one that mentions it, or else tells its choices.
    """
    section = (kind.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    name = "|".join(entry.name for entry in fields(kind))
    pattern = rf"(?:^|(?<=\. ))((?:{name})(?:, (?:{name}))*): "
    _, *parts = re.split(pattern, " ".join(section.split()))
    texts: dict[str, str] = {}
    for names, text in zip(parts[::2], parts[1::2], strict=True):
        first, *others = names.split(", ")
        texts[first] = text.strip().removesuffix(".")
        texts |= dict.fromkeys(others, f"see {flag(first)}")
    for entry in fields(kind):
        pointers = (f"see {flag(other)}" for other, text in texts.items() if entry.name in text)
        choices = f"can be {', '.join(map(str, entry.metadata.get('choices', ())))}"
        texts.setdefault(entry.name, next(pointers, choices))
    return texts


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")
