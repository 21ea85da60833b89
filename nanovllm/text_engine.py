"""TextEngine: the engine as its users see it. Prompts go in, checked and tokenized; text comes out.

`LLM` and whatever else takes requests in are built on this.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.core.engine import EngineCore
from nanovllm.core.plan import TokenLogprobs
from nanovllm.core.sequence import Sequence
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput, RequestTiming
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Detokenizer, Tokenizer

# text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, each with "cache_salt" if wanted
Prompt = str | Items[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was accepted."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str = ""


class TextEngine:
    """An EngineCore with a tokenizer on both sides.

        prepare ─▶ submit ─▶ [ step ─▶ Request.output ] until Request.finished

    Args:
        tokenizer: None refuses text and makes none.
        vocab_size: token ids are below it.
    """

    def __init__(self, engine: EngineCore, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.engine, self.tokenizer, self.vocab_size = engine, tokenizer, vocab_size
        self.requests: dict[int, Request] = {}  # by the id of each sequence that has not ended

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Prepared:
        """Check a request; nothing is queued before this accepted it.

        Raises:
            InvalidRequestError: names the field that makes it impossible.
        """
        salt = ""
        if isinstance(prompt, Mapping):
            salt = prompt.get("cache_salt") or ""
            if not isinstance(salt, str):
                raise InvalidRequestError("cache_salt", salt, "must be a string")
            given = prompt.get("prompt_token_ids", prompt.get("prompt"))
        else:
            given = prompt
        text = given if isinstance(given, str) else None
        if text is not None:
            token_ids = self._tokenizer("prompt").encode(text)
        elif isinstance(given, Items):
            token_ids = list(given)
        else:
            raise InvalidRequestError("prompt", prompt, "must be a text or a list of token ids")
        self.engine.check_length(len(token_ids))
        self._check_ids("prompt_token_ids", token_ids)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_ids(name, getattr(params, name) or ())
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                limit = f"the vocabulary has {self.vocab_size} tokens (-1 reports all)"
                raise InvalidRequestError(name, getattr(params, name), limit)
        if params.stop and not params.detokenize:
            raise InvalidRequestError("stop", params.stop, "needs detokenize=True")
        if params.stop:
            self._tokenizer("stop")
        if params.bad_words:
            params = replace(params, bad_words_token_ids=self._bad_words(params.bad_words))
        return Prepared(text, token_ids, params, salt)

    def submit(self, prepared: Prepared, *, request_id: str = "", priority: int = 0) -> "Request":
        """Queue a request in the engine."""
        sequences = self.engine.add(
            prepared.prompt_token_ids,
            prepared.params,
            request_id=request_id,
            priority=priority,
            cache_salt=prepared.cache_salt,
        )
        request = Request(self.engine, self.tokenizer, prepared, sequences)
        self.requests |= dict.fromkeys((seq.seq_id for seq in sequences), request)
        return request

    def step(self) -> list["Request"]:
        """One step of the engine.

        Returns:
            the requests that advanced, as often as they have sequences that did.
        """
        advanced = []
        for seq in self.engine.step():
            request = self.requests[seq.seq_id]
            request.advance(seq)
            advanced.append(request)
            if seq.finish_reason is not None:
                del self.requests[seq.seq_id]
        return advanced

    def abort(self, request: "Request") -> None:
        """End a request wherever it is; one that has ended stays as it is."""
        self.engine.abort(request.sequences)
        for seq in request.sequences:
            self.requests.pop(seq.seq_id, None)

    def _tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(field, "text", "there is no tokenizer; give token ids")
        return self.tokenizer

    def _check_ids(self, field: str, token_ids: Iterable[Any]) -> None:
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                limit = f"token ids are integers from 0 to {self.vocab_size - 1}"
                raise InvalidRequestError(field, token_id, limit)

    def _bad_words(self, words: Iterable[str]) -> list[list[int]]:
        """Token ids of each word, as at the beginning of a text and after a space."""
        encode, found = self._tokenizer("bad_words").encode, []
        for word in words:
            for form in (word, " " + word.lstrip()):
                token_ids = encode(form, add_special_tokens=False)
                if token_ids and token_ids not in found:
                    found.append(token_ids)
        return found


class Request:
    """A request in the engine: its sequences, and their text as far as it is."""

    def __init__(
        self,
        engine: EngineCore,
        tokenizer: Tokenizer | None,
        prepared: Prepared,
        sequences: list[Sequence],
    ) -> None:
        self.engine, self.prepared, self.sequences = engine, prepared, sequences
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
            self.engine.finish([seq], "error", f"{type(error).__name__}: {error}")
            return
        if stop is not None:
            self.engine.finish([seq], "stop", stop)
            seq.finish_reason, seq.stop_reason = "stop", stop  # also if it just ended by length

    def output(self, *, partial: bool = False) -> RequestOutput:
        """The request as it stands. partial: leave out text that may be the start of a stop
        string, so that what is shown never has to be taken back."""
        first, prepared = self.sequences[0], self.prepared
        prompt_logprobs: list[Logprobs | None] | None = None
        if prepared.params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._shown(entry) for entry in first.prompt_logprobs)]
        return RequestOutput(
            first.request_id,
            prepared.prompt,
            prepared.prompt_token_ids,
            prompt_logprobs,
            [self._completion(seq, partial) for seq in self.sequences],
            self.finished,
            first.num_cached_tokens,
            RequestTiming(
                first.arrival_s, first.scheduled_s, first.first_token_s, first.last_token_s
            ),
        )

    def _completion(self, seq: Sequence, partial: bool) -> CompletionOutput:
        text, logprobs, cumulative = self.texts[seq.index], None, None
        if seq.params.logprobs is not None:
            logprobs = [self._shown(entry) for entry in seq.logprobs]
            cumulative = sum(entry.logprobs[0] for entry in seq.logprobs)
        return CompletionOutput(
            seq.index,
            text.safe if partial and seq.finish_reason is None else text.text,
            seq.output_token_ids,
            cumulative,
            logprobs,
            seq.finish_reason,
            None if seq.stop_reason in self.engine.eos_token_ids else seq.stop_reason,
        )

    def _shown(self, entry: TokenLogprobs) -> Logprobs:
        ranks = [entry.rank, *range(1, len(entry.token_ids))]
        shown: Logprobs = {}
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
            token = self.tokenizer.token(token_id) if self.tokenizer else None
            shown.setdefault(token_id, Logprob(logprob, rank, token))
        return shown


class Text:
    """The text of one sequence, as it grows and until a stop string ends it."""

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        self.seq, self.text, self.num_read = seq, "", seq.num_prompt_tokens
        self.stops = [str(stop) for stop in seq.params.stop or ()]
        self.detokenizer = None
        if tokenizer is not None:
            skip = seq.params.skip_special_tokens
            self.detokenizer = Detokenizer(tokenizer, seq.token_ids, skip_special_tokens=skip)

    @property
    def safe(self) -> str:
        """The text without an end that may become a stop string."""
        held = max(map(len, self.stops), default=1) - 1
        return self.text[: len(self.text) - held]

    def advance(self) -> str | None:
        """Read the new tokens of the sequence.

        Returns:
            the stop string that the text has run into.
        """
        seq, params, detokenizer = self.seq, self.seq.params, self.detokenizer
        if detokenizer is None:
            return None
        seen, ends = len(self.text), seq.num_tokens
        if isinstance(seq.stop_reason, int) and not params.include_stop_str_in_output:
            ends -= 1  # the token that stopped it is not part of the text
        for token_id in seq.token_ids[self.num_read : ends]:
            self.text += detokenizer.push(token_id)
        self.num_read = max(self.num_read, ends)
        if seq.finish_reason is not None:
            self.text += detokenizer.finish()
        if seq.num_tokens - seq.num_prompt_tokens <= params.min_tokens:
            return None
        longest = max(map(len, self.stops), default=0)
        found = [(self.text.find(stop, max(0, seen - longest + 1)), stop) for stop in self.stops]
        hits = [(at, stop) for at, stop in found if at >= 0]
        if not hits:
            return None
        at, stop = min(hits)
        self.text = self.text[: at + len(stop) if params.include_stop_str_in_output else at]
        return stop
