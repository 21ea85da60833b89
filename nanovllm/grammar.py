"""Whether there is an output of a form, at a bearable cost, and which tokens lead there. What
follows from a form, llguidance knows."""

import json
import re
import subprocess
import sys
from functools import lru_cache
from time import thread_time
from typing import TYPE_CHECKING, Any, Protocol

from nanovllm.errors import InvalidRequestError, MissingDependencyError
from nanovllm.structured_outputs import StructuredOutputsParams, refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GBNF_SIZE = 2**14  # characters
# of llguidance; for one sequence at worst some 40 MB, and 0.3 s a token
LIMITS: dict[str, Any] = {
    "max_lexer_states": 20_000,
    "step_max_items": 10_000,
    "verbose_errors": False,
}
COMPILE_S, COMPILE_BYTES, DEADLINE_S = 1, 200 * 2**20, 5  # of CPU time, of memory, on the clock
NUM_TRIED, TRIED_S = 32, 1.0  # tokens, and CPU time for all of them

# Some forms take llguidance minutes or gigabytes, and nothing stops a thread that is at it. So a
# process tries first, with single bytes for tokens.
COMPILE_APART = """
import json, sys
seconds, size, limits = json.loads(sys.argv[1])
try:
    import resource
    for name, limit in (("CPU", seconds), ("DATA", size), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
except (ImportError, OSError, ValueError):
    pass  # the deadline remains
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
class Bytes:
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]
    bos_token_id, eos_token_id, special_token_ids = None, 256, [256]
    def __call__(self, text): return list(text)
grammar, tokens = sys.stdin.buffer.read().decode(), LLTokenizer(TokenizerWrapper(Bytes()))
matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**limits))
matcher.compute_bitmask()
sys.stdout.buffer.write(matcher.get_error().encode())
"""


class Tokenizer(Protocol):
    """What of a tokenizer is looked at: `backend`, a tokenizer of the package tokenizers."""

    backend: Any

    def __hash__(self) -> int: ...


def check_grammar(
    spec: StructuredOutputsParams, tokenizer: Tokenizer | None, vocab_size: int
) -> None:
    """Refuse a form that nothing has, or that costs too much. May be called by several threads.

    Args:
        vocab_size: of the model.

    Raises:
        InvalidRequestError: says why, mostly in llguidance's words.
        MissingDependencyError: llguidance is not installed.
    """
    if not isinstance(spec, StructuredOutputsParams):
        why = "must be StructuredOutputsParams"
        raise InvalidRequestError("structured_outputs", spec, why)
    if tokenizer is None:
        raise InvalidRequestError("structured_outputs", spec.form, "needs a tokenizer")
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("llguidance", "server", "structured output") from error
    try:
        why = fault(spec, tokenizer, vocab_size)
    except subprocess.TimeoutExpired:  # perhaps only this time, so it is not kept
        why = f"took more than {DEADLINE_S} s to compile; simplify it, or try again later"
    if why:
        raise refusal(spec.form, getattr(spec, spec.form), why)


@lru_cache(maxsize=64)
def fault(spec: StructuredOutputsParams, tokenizer: Tokenizer, vocab_size: int) -> str:
    """What is wrong with a form, in a line; empty if nothing is."""
    try:
        grammar = compiled(spec)
    except Exception as error:  # of a kind of llguidance's own, or Exception itself
        return one_line(error)
    command = [sys.executable, "-c", COMPILE_APART]
    command.append(json.dumps([COMPILE_S, COMPILE_BYTES, LIMITS]))
    text = grammar.encode()
    found = subprocess.run(command, input=text, capture_output=True, timeout=DEADLINE_S)
    if found.returncode:
        size = COMPILE_BYTES // 2**20
        return f"takes more than {COMPILE_S} s or {size} MiB to compile; simplify it"
    return one_line(found.stdout.decode()) or attempt(grammar, tokenizer, vocab_size)


def attempt(grammar: str, tokenizer: Tokenizer, vocab_size: int) -> str:
    """Follow arbitrary tokens that a grammar allows. Returns what was wrong."""
    tokens = shared_vocabulary(tokenizer, vocab_size)
    matcher, begin_s = start(grammar, tokens), thread_time()
    for i in range(NUM_TRIED):
        mask = bytearray(matcher.compute_bitmask())  # a bit for each token
        mask[tokens.eos_token // 8] &= ~(1 << tokens.eos_token % 8)
        at = (i + 1) * 7919 % len(mask)
        turned = mask[at:] + mask[:at]
        byte = turned.lstrip(b"\0")[:1]
        if not byte:
            break
        at = (at + turned.index(byte)) % len(mask)
        matcher.consume_token(8 * at + byte[0].bit_length() - 1)
        if thread_time() - begin_s > TRIED_S:
            return f"{i + 1} tokens took more than {TRIED_S} s; simplify it"
    return one_line(matcher.get_error())


def compiled(spec: StructuredOutputsParams) -> str:
    """The form in llguidance's own language.

    Raises:
        Exception: it is not of the syntax.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if spec.regex:
        return LLMatcher.grammar_from_regex(spec.regex)
    if spec.choice:  # one terminal: an automaton, where a rule would try all
        return LLMatcher.grammar_from_lark(
            f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, spec.choice))}"
        )
    if spec.grammar:
        if not re.search(r"(?m)^\s*[\w-]+\s*::=", spec.grammar):
            return LLMatcher.grammar_from_lark(spec.grammar)
        if len(spec.grammar) > MAX_GBNF_SIZE:
            raise ValueError(f"GBNF has at most {MAX_GBNF_SIZE} characters; Lark may have more")
        return LLMatcher.grammar_from_lark(gbnf_to_lark(spec.grammar))
    options: dict[str, Any] = {"whitespace_flexible": not spec.disable_any_whitespace}
    if spec.whitespace_pattern is not None:
        options["whitespace_pattern"] = spec.whitespace_pattern
    schema = str(spec.json or '{"type": "object"}')
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> "LLTokenizer":
    """The tokens as llguidance sees them, with an end that is no token of the model. Equal
    tokenizers share them: they take 40 MB, and half a second in which no other thread runs."""
    return vocabulary_of(tokenizer.backend.to_str(), vocab_size)


@lru_cache(maxsize=4)
def vocabulary_of(text: str, vocab_size: int) -> "LLTokenizer":
    """See `vocabulary`; of a tokenizer as JSON."""
    import tokenizers
    from llguidance import LLTokenizer

    backend = tokenizers.Tokenizer.from_str(text)
    backend.add_special_tokens(["<|the form ends here|>"])
    size = max(vocab_size, 1 + max(backend.get_vocab().values()))
    end = backend.token_to_id("<|the form ends here|>")
    return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=end)


shared_vocabulary = lru_cache(maxsize=4)(vocabulary)


def start(grammar: str, tokens: "LLTokenizer") -> "LLMatcher":
    """A matcher at the beginning of an output."""
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))


def one_line(error: object) -> str:
    """An error of llguidance's, short."""
    text = str(error).removesuffix("<non-verbose/>")
    if text.startswith("NoExtension"):
        return "nothing has this form"
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
