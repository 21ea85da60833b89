"""TextEngine: the engine as its users see it. Prompts go in, checked and tokenized; text comes out.

`LLM` and whatever else takes requests in are built on this.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.core.engine import EngineCore
from nanovllm.core.sequence import Sequence
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import CompletionOutput, Logprobs, RequestOutput, RequestTiming
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Detokenizer, Tokenizer

# text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, each with "cache_salt" if wanted
Prompt = str | Items[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was accepted; `prompt` is its text, if it came as text."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str


class TextEngine:
    """An EngineCore with a tokenizer on both sides.

        prepare ─▶ submit ─▶ [ step ─▶ Request.output ] until Request.finished

    Args:
        tokenizer: None refuses text and makes none.
        vocab_size: token ids are below it.
    """

    def __init__(self, core: EngineCore, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.core, self.tokenizer, self.vocab_size = core, tokenizer, vocab_size
        self.requests: dict[int, Request] = {}  # by the id of each sequence that has not ended

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Prepared:
        """Check a request; nothing is queued before this accepted it.

        Raises:
            InvalidRequestError: names the field that makes it impossible.
        """
        fields = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        text, salt = fields.get("prompt"), fields.get("cache_salt")
        given: Any = fields.get("prompt_token_ids", text)
        if not isinstance(given, Items):
            raise InvalidRequestError("prompt", given, "must be a text or a list of token ids")
        if not isinstance(salt, str | None):
            raise InvalidRequestError("cache_salt", salt, "must be a string")
        if self.tokenizer is None and (params.stop or params.bad_words or isinstance(given, str)):
            raise InvalidRequestError("prompt", given, "without a tokenizer, give token ids only")
        if params.stop and not params.detokenize:
            raise InvalidRequestError("stop", params.stop, "is looked for in text: detokenize")
        if self.tokenizer is not None:
            if isinstance(given, str):
                given = self.tokenizer.encode(given)
            bad = [ids for word in params.bad_words or () for ids in self.tokenizer.variants(word)]
            params = replace(params, bad_words_token_ids=bad) if bad else params
        self.core.check_length(len(given))
        self._check_ids("prompt_token_ids", given)
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                why = f"the vocabulary has {self.vocab_size} tokens; -1 reports all"
                raise InvalidRequestError(name, getattr(params, name), why)
        text = text if isinstance(text, str) else None
        return Prepared(text, list(given), params, salt or "")

    def submit(self, prepared: Prepared, *, request_id: str = "", priority: int = 0) -> "Request":
        """Queue a request in the engine."""
        sequences = self.core.add(
            prepared.prompt_token_ids, prepared.params, request_id=request_id,
            priority=priority, cache_salt=prepared.cache_salt,
        )  # fmt: skip
        request = Request(self.core, self.tokenizer, prepared, sequences)
        self.requests |= dict.fromkeys((seq.seq_id for seq in sequences), request)
        return request

    def step(self) -> list["Request"]:
        """One step of the engine.

        Returns:
            the requests that advanced, as often as they have sequences that did.
        """
        advanced = []
        for seq in self.core.step():
            advanced.append(self.requests[seq.seq_id])
            advanced[-1].advance(seq)
            if seq.finish_reason is not None:
                del self.requests[seq.seq_id]
        return advanced

    def abort(self, request: "Request") -> None:
        """End a request wherever it is; one that has ended stays as it is."""
        self.core.finish(request.sequences, "abort")
        for seq in request.sequences:
            self.requests.pop(seq.seq_id, None)

    def _check_ids(self, field: str, token_ids: Iterable[Any]) -> None:
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                why = f"token ids are integers from 0 to {self.vocab_size - 1}"
                raise InvalidRequestError(field, token_id, why)


class Request:
    """A request in the engine: its sequences, and their text as far as it is."""

    def __init__(
        self,
        core: EngineCore,
        tokenizer: Tokenizer | None,
        prepared: Prepared,
        sequences: list[Sequence],
    ) -> None:
        self.core, self.prepared, self.sequences = core, prepared, sequences
        self.tokenizer = tokenizer if prepared.params.detokenize else None
        self.texts = [Text(seq, self.tokenizer) for seq in sequences]

    @property
    def finished(self) -> bool:
        return all(seq.finish_reason for seq in self.sequences)

    def advance(self, seq: Sequence) -> None:
        """Take in the token that `seq` got, or its end. An error here ends only this sequence."""
        try:
            stop = self.texts[seq.index].advance()
        except Exception as error:
            self.core.finish([seq], "error", f"{type(error).__name__}: {error}")
        else:
            if stop is not None:
                self.core.finish([seq], "stop", stop)

    def output(self, *, partial: bool = False) -> RequestOutput:
        """The request as it stands. partial: leave out text that may be the start of a stop
        string, so that what is shown never has to be taken back."""
        first, prepared = self.sequences[0], self.prepared
        prompt_logprobs: list[Logprobs | None] | None = None
        if prepared.params.prompt_logprobs is not None:
            from nanovllm.logprobs import show_logprobs

            prompt_logprobs = [None, *show_logprobs(first.prompt_logprobs, self.tokenizer)]
        times = first.arrival_s, first.scheduled_s, first.first_token_s, first.last_token_s
        return RequestOutput(
            first.request_id,
            prepared.prompt,
            prepared.prompt_token_ids,
            prompt_logprobs,
            [self._completion(seq, partial) for seq in self.sequences],
            self.finished,
            first.num_cached_tokens,
            RequestTiming(*times),
        )

    def _completion(self, seq: Sequence, partial: bool) -> CompletionOutput:
        text, reason, logprobs, total = self.texts[seq.index], seq.stop_reason, None, None
        if seq.params.logprobs is not None:
            from nanovllm.logprobs import show_logprobs

            logprobs = show_logprobs(seq.logprobs, self.tokenizer)
            total = sum(entry.logprobs[0] for entry in seq.logprobs)
        shown = text.safe if partial and not seq.finish_reason else text.text
        reason = None if reason in self.core.eos_token_ids else reason
        ids = seq.output_token_ids
        return CompletionOutput(seq.index, shown, ids, total, logprobs, seq.finish_reason, reason)


class Text:
    """The text of one sequence, as it grows and until a stop string ends it."""

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        self.seq, self.text, self.num_read = seq, "", seq.num_prompt_tokens
        self.stops = [str(stop) for stop in seq.params.stop or ()]
        self.held = max(map(len, self.stops), default=1) - 1  # may turn out to begin a stop string
        self.detokenizer = None
        if tokenizer is not None:
            skip = seq.params.skip_special_tokens
            self.detokenizer = Detokenizer(tokenizer, seq.token_ids, skip_special_tokens=skip)

    @property
    def safe(self) -> str:
        """The text without an end that may become a stop string."""
        return self.text[: len(self.text) - self.held]

    def advance(self) -> str | None:
        """Read the new tokens of the sequence. Returns the stop string that the text ran into."""
        seq, params, detokenizer = self.seq, self.seq.params, self.detokenizer
        if detokenizer is None:
            return None
        begin, end = max(0, len(self.text) - self.held), seq.num_tokens
        if isinstance(seq.stop_reason, int) and not params.include_stop_str_in_output:
            end -= 1  # the token that stopped it is not part of the text
        for token_id in seq.token_ids[self.num_read : end]:
            self.text += detokenizer.push(token_id)
        self.num_read = seq.num_tokens
        if seq.finish_reason is not None:
            self.text += detokenizer.finish()
        found = [(self.text.find(stop, begin), stop) for stop in self.stops]
        hits = [hit for hit in found if hit[0] >= 0]
        if not hits or seq.num_tokens - seq.num_prompt_tokens <= params.min_tokens:
            return None
        at, stop = min(hits)
        self.text = self.text[: at + len(stop) if params.include_stop_str_in_output else at]
        return stop
