"""TextEngine: the engine as its users see it. Prompts go in, checked and tokenized; text comes out.

`LLM` and whatever else takes requests in are built on this.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.checks import check_ids, check_kinds
from nanovllm.core.engine import EngineCore
from nanovllm.core.sequence import Sequence, Terms
from nanovllm.outputs import RequestOutput, Since, request_output
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Text, Tokenizer

# text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; the last two with "cache_salt",
# "tenant", "ttft_target_ms" and "tpot_target_ms" (core.sequence.Terms) if wanted
Prompt = str | Items[int] | Mapping[str, Any]


@dataclass(eq=False, slots=True)
class Request:
    """A request that was accepted and, once submitted, its sequences and their texts.

    Attributes:
        prompt: its text, if it came as text.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str
    priority: int
    terms: Terms | None = None
    sequences: list[Sequence] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(seq.finish_reason for seq in self.sequences)


class TextEngine:
    """An EngineCore with a tokenizer on both sides.

        prepare ─▶ submit ─▶ [ step ─▶ output ] until Request.finished

    Args:
        tokenizer: None refuses text and makes none.
        vocab_size: token ids are below it.
    """

    def __init__(self, core: EngineCore, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.core, self.tokenizer, self.vocab_size = core, tokenizer, vocab_size
        self.requests: dict[int, Request] = {}  # by the id of each sequence that has not ended

    def prepare(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> Request:
        """Check a request; nothing is queued before this accepted it.

        Args:
            priority: lower goes first under the priority policy.

        Raises:
            InvalidRequestError: names the field that makes it impossible.
        """
        fields: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        text, salt = fields.get("prompt"), fields.get("cache_salt")
        token_ids = fields.get("prompt_token_ids", text)
        check_kinds(token_ids, params, priority, salt, has_tokenizer=self.tokenizer is not None)
        if self.tokenizer is not None:
            if isinstance(token_ids, str):
                token_ids = self.tokenizer.encode(token_ids)
            if params.bad_words:
                from nanovllm.bad_words import bad_token_ids

                ids = bad_token_ids(params.bad_words, self.tokenizer)
                params = replace(params, bad_words_token_ids=ids)
        if params.structured_outputs is not None:
            from nanovllm.grammar import check_grammar

            check_grammar(params.structured_outputs, self.tokenizer, self.vocab_size)
        self.core.check_length(len(token_ids))
        check_ids(token_ids, params, self.vocab_size)
        text, terms = text if isinstance(text, str) else None, None
        if isinstance(prompt, Mapping):
            from nanovllm.terms import terms_of

            terms = terms_of(prompt)
        return Request(text, list(token_ids), params, salt or "", priority, terms)

    def submit(self, request: Request, request_id: str = "") -> Request:
        """Queue a request in the engine."""
        what = request.prompt_token_ids, request.params, request_id, request.priority
        request.sequences = self.core.add(*what, request.cache_salt, None, request.terms)
        tokenizer = self.tokenizer if request.params.detokenize else None
        request.texts = [Text(seq, tokenizer) for seq in request.sequences]
        self.requests |= dict.fromkeys((seq.seq_id for seq in request.sequences), request)
        return request

    def step(self) -> list[tuple[Request, Sequence]]:
        """One step of the engine.

        Returns:
            the sequences that got a token or ended, each with its request.
        """
        advanced = []
        try:
            stepped = self.core.step()
        except BaseException:  # Ctrl-C ended the requests in the step
            self.requests = {i: r for i, r in self.requests.items() if not r.finished}
            raise
        for seq in stepped:
            request = self.requests[seq.seq_id]
            advanced.append((request, seq))
            try:
                reason, why = "stop", request.texts[seq.index].advance()
            except Exception as error:  # of this sequence only
                reason, why = "error", f"{type(error).__name__}: {error}"
            if why is not None:
                self.core.finish([seq], reason, why)
                seq.finish_reason, seq.stop_reason = reason, why  # even if it also got too long
            if seq.finish_reason is not None:
                del self.requests[seq.seq_id]
        return advanced

    def abort(self, request: Request) -> None:
        """End a request wherever it is; one that has ended stays as it is."""
        self.core.finish(request.sequences, "abort")
        for seq in request.sequences:
            self.requests.pop(seq.seq_id, None)

    def output(
        self, request: Request, *, partial: bool = False, since: Since = None
    ) -> RequestOutput:
        """A request as it stands; see `request_output`."""
        tokenizer = self.tokenizer if request.params.detokenize else None
        return request_output(
            request, tokenizer, self.core.eos_token_ids, partial=partial, since=since
        )
