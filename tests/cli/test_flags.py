"""Flags made from dataclass fields, and when torch is loaded."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from nanovllm.checks import one_of, ranged
from nanovllm.cli import COMMANDS
from nanovllm.cli.flags import Parser, add_flags, field_texts, given
from nanovllm.config import EngineConfig
from nanovllm.sampling_params import SamplingParams

FLAGS = """
--model --tokenizer --dtype --device --max-model-len --max-num-seqs --max-num-batched-tokens
--block-size --num-kv-blocks --kv-cache-memory-bytes --gpu-memory-utilization
--enable-prefix-caching --no-enable-prefix-caching --enable-chunked-prefill
--no-enable-chunked-prefill --scheduling-policy --seed --load-format --attention-backend
--enforce-eager -tp --tensor-parallel-size --quantization
-n --max-tokens --min-tokens --temperature --top-p --top-k --min-p --stop --stop-token-ids
--ignore-eos --presence-penalty --frequency-penalty --repetition-penalty --logprobs
--prompt-logprobs --bad-words --allowed-token-ids --skip-special-tokens
"""


@dataclass(kw_only=True)
class Settings:
    """An example.

    Args:
        size: how large; 100% is all. low, high: the range. Given
            on two lines.
        names: to be repeated.

    Raises:
        ValueError: never.
    """

    size: int = ranged(4, 1, 8)
    low: float = 0.5
    high: float | None = None
    names: str | Sequence[str] | None = ()
    ids: Sequence[int] = ()
    many: Sequence[str] = field(default=(), metadata={"several": True})
    kind: str = one_of("red", "green")
    limit_of_size: int | None = None
    fast: bool = True
    table: Mapping[int, float] | None = None
    nested: Sequence[Sequence[int]] = ()


def parse(line: str, **options: Any) -> dict[str, Any]:
    parser = Parser(prog="example")
    parser.add_argument("words", nargs="*")
    add_flags(parser, Settings, **options)
    return given(parser.parse(line.split())[0], Settings)


def test_only_the_fields_whose_flags_were_given_come_back():
    assert parse("") == {}
    assert parse("--size 3 --no-fast") == {"size": 3, "fast": False}


def test_each_type_is_read_as_its_field_has_it():
    line = "--size 3 --low 0.25 --high 2 --names a --names b --ids 7 --ids 8 --kind green --fast"
    assert parse(line) == {
        "size": 3,
        "low": 0.25,
        "high": 2.0,
        "names": ["a", "b"],
        "ids": [7, 8],
        "kind": "green",
        "fast": True,
    }


def test_a_list_may_take_several_words_at_once_where_its_field_says_so():
    assert parse("--many a b --names c d --many e") == {"many": ["a", "b", "e"], "names": ["c"]}


def test_none_is_a_value_only_where_the_field_may_be_none(capsys):
    assert parse("--high none --names none") == {"high": None, "names": ["none"]}
    with pytest.raises(SystemExit, match="2"):
        parse("--low none")
    assert capsys.readouterr().err == (
        "nanovllm: error: argument --low: invalid float value: 'none' (see example --help)\n"
    )


def test_a_negative_number_is_a_value():
    assert parse("--size -1 --low -0.5") == {"size": -1, "low": -0.5}


@pytest.mark.parametrize("name", ["table", "nested", "low"])
def test_what_a_word_cannot_say_and_what_is_skipped_has_no_flag(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(f"--{name} 1", skip=["low"])
    assert f"unrecognized arguments: --{name} (see" in capsys.readouterr().err


def test_a_default_of_the_command_counts_as_given():
    assert parse("", defaults={"size": 2}) == {"size": 2}
    assert parse("--size 5", defaults={"size": 2}) == {"size": 5}


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--siz 3")
    assert "unrecognized arguments: --siz (see" in capsys.readouterr().err


def test_words_may_stand_anywhere_and_all_are_words_after_a_double_dash():
    parser = Parser(prog="example")
    parser.add_argument("words", nargs="*")
    add_flags(parser, Settings)
    args, words = parser.parse(["a", "--size", "3", "b", "--", "--size", "-5"])
    assert given(args, Settings) == {"size": 3}
    assert words == ["a", "b", "--size", "-5"]


def test_help_texts_come_from_the_docstring():
    assert {name: field_texts(Settings)[name] for name in ("size", "low", "high", "names")} == {
        "size": "how large; 100% is all",
        "low": "the range. Given on two lines",
        "high": "see --low",
        "names": "to be repeated",
    }


def test_a_field_without_a_text_tells_its_choices_or_where_it_is_mentioned():
    texts = field_texts(Settings)
    assert texts["kind"] == "can be red, green"
    assert field_texts(EngineConfig)["kv_cache_memory_bytes"] == "see --num-kv-blocks"


def test_help_shows_texts_and_defaults(capsys):
    parser = Parser(prog="example")
    add_flags(parser, Settings, defaults={"low": 0.75})
    parser.print_help()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "--size N how large; 100% is all (default: 4)" in lines
    assert "--low X the range. Given on two lines (default: 0.75)" in lines
    assert "--high X see --low" in lines
    assert "--kind {red,green} can be red, green (default: red)" in lines


def test_the_flags_have_the_names_of_vllm():
    parser = Parser(prog="example")
    add_flags(parser, EngineConfig)
    add_flags(parser, SamplingParams, skip=["seed"])
    shown = parser.format_help().replace(",", " ").split()
    assert [name for name in FLAGS.split() if name not in shown] == []


@pytest.mark.parametrize("kind", [EngineConfig, SamplingParams])
def test_every_field_has_a_help_text(kind):
    empty = [entry.name for entry in fields(kind) if field_texts(kind)[entry.name] == "can be "]
    assert empty == []


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in COMMANDS),
        ["generate", "hi", "--dtype", "float33"],
        ["chat", "--top-p", "2"],
        ["generate"],
    ],
)
def test_help_and_bad_flags_load_no_torch(words):
    code = (
        "import sys, nanovllm.cli\n"
        "try: nanovllm.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('LOADED', {'torch', 'numpy', 'tokenizers', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.endswith("LOADED set()\n"), done.stderr
