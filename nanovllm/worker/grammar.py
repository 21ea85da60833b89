"""Grammars: which tokens may come next in outputs that must have a form."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from nanovllm.core.plan import NewSequence
from nanovllm.errors import RequestFailedError
from nanovllm.grammar import compiled, one_line, start, vocabulary
from nanovllm.tokenizer import Tokenizer
from nanovllm.worker.inputs import Array


@lru_cache(maxsize=4)
def vocabulary_at(path: Path, vocab_size: int) -> LLTokenizer:
    """The tokens of the tokenizer there; see grammar.vocabulary."""
    return vocabulary(Tokenizer(path), vocab_size)


@dataclass(slots=True)
class Progress:
    """How far an output has come.

    Attributes:
        num_read: tokens of the sequence that the matcher has taken in, its prompt included.
        ended: one of them was an end; more follow only because it does not count.
    """

    seq: NewSequence
    matcher: LLMatcher
    num_read: int
    ended: bool = False


class Grammars:
    """A matcher for each sequence with structured_outputs that a rank holds.

    Args:
        path: of the tokenizer; see `vocabulary_at`.
        eos_token_ids: the model's own ends. They, and a sequence's stop_token_ids, may be sampled
            when the output is complete, and only then.
        vocab_size: of the model.

    Attributes:
        progress: seq_id -> how far it is.
    """

    def __init__(self, path: Path, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.progress: dict[int, Progress] = {}
        self.beginning = lru_cache(maxsize=16)(lambda spec: start(compiled(spec), self.vocabulary))

    @property
    def vocabulary(self) -> LLTokenizer:
        return vocabulary_at(self.path, self.vocab_size)

    def restrict(self, logits_V: Tensor, seq: NewSequence, token_ids: Array) -> None:
        """Rule out, in place, what the form does not allow next.

        Args:
            token_ids: of the sequence up to now, prompt and output.

        Raises:
            RequestFailedError: nothing is left, or it would take too long to find out.
        """
        at = self.progress.get(seq.seq_id)
        if at is None or at.seq is not seq:  # it is new, or back after a preemption
            matcher = self.beginning(seq.params.structured_outputs).deep_copy()
            at = self.progress[seq.seq_id] = Progress(seq, matcher, seq.num_prompt_tokens)
        ends = list(self.eos_token_ids.union(seq.stop_token_ids))
        for token_id in token_ids[at.num_read :].tolist():
            at.ended = at.ended or token_id in ends
            if not at.ended:
                at.matcher.consume_token(token_id)
        at.num_read = len(token_ids)
        allowed_V = self.allowed(at.matcher)
        if at.matcher.is_error():
            raise RequestFailedError(f"structured_outputs: {one_line(at.matcher.get_error())}")
        complete, num_output = at.matcher.is_accepting(), len(token_ids) - seq.num_prompt_tokens
        allowed_V &= not at.ended
        allowed_V[ends] = at.ended or complete
        if num_output < seq.params.min_tokens:
            going_on_V = allowed_V.copy()
            going_on_V[seq.stop_token_ids] = False
            if going_on_V.any():  # else it ends early: nothing may follow a complete output
                allowed_V = going_on_V
        if not allowed_V.any():
            why = "no token continues the output"
            if complete:
                why = f"the output is complete after {num_output} tokens, and the model has no end"
            raise RequestFailedError(f"structured_outputs: {why}")
        logits_V.masked_fill_(~torch.from_numpy(allowed_V).to(logits_V.device), -torch.inf)

    def allowed(self, matcher: LLMatcher) -> Array:
        """Which tokens [V] (bool) go on with the output; no end is among them."""
        bits, end = np.frombuffer(matcher.compute_bitmask(), np.uint8), self.vocabulary.eos_token
        mask_V: Array = np.unpackbits(bits, count=self.vocab_size, bitorder="little").view(bool)
        mask_V[end : end + 1] = False  # in a padded vocabulary it has a place
        return mask_V

    def forget(self, seq_ids: Iterable[int]) -> None:
        """These sequences are gone; ids that are not held are no error."""
        for seq_id in seq_ids:
            self.progress.pop(seq_id, None)
