"""Text to tokens and back, whole or token by token."""

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import tokenizers

from nanovllm.core.sequence import Sequence
from nanovllm.errors import InvalidRequestError, ModelLoadError
from nanovllm.models.config import read_json

HALF = "\ufffd"  # what a decoder shows for bytes that are no whole character (yet)


class Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: a folder with tokenizer.json and, for chat, tokenizer_config.json; or a .gguf.

    Raises:
        ModelLoadError: there is no tokenizer, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = {}
        if path.suffix == ".gguf":
            from nanovllm.models.gguf_tokenizer import gguf_tokenizer

            self.backend, self.config = gguf_tokenizer(path)
        else:
            file = path / "tokenizer.json"
            if not file.is_file():
                raise ModelLoadError(f"{file}: missing; the engine needs it to read prompts")
            if (path / "tokenizer_config.json").exists():
                self.config = read_json(path / "tokenizer_config.json")
            try:
                self.backend = tokenizers.Tokenizer.from_file(str(file))
                file = path / "chat_template.jinja"
                if file.exists():
                    self.config["chat_template"] = file.read_text(encoding="utf-8")
            except Exception as error:  # the library raises Exception itself
                raise ModelLoadError(f"{file}: damaged ({error})") from error
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(
        self, text: str, *, add_special_tokens: bool = True, field: str = "prompt"
    ) -> list[int]:
        """Token ids of a text.

        Raises:
            InvalidRequestError: it holds half a surrogate pair.
        """
        try:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:  # which one depends on the version
            raise InvalidRequestError(field, text, f"is not valid Unicode ({error})") from error
        return list(encoding.ids)

    def decode(self, token_ids: Items[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


class Detokenizer:
    """Text that grows with its tokens, and never shows half a character.

    A token's text can depend on the ones before it (spaces, characters split over tokens), so a
    window of tokens is decoded: from `start`, the last place where text was whole, on.

        tokens   a  b  c | d  e  f | g          [start, read): shown already, kept as context
                           start     read       text of [start, end) past `shown` is new

    Args:
        context: tokens before the first, of the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Items[int], *, skip_special_tokens: bool = True
    ) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        tails = [list(context[-size:]) for size in (5, 6, 7, 8)]  # a character has 4 bytes at most
        self.window = min(tails, key=lambda tail: self._decode(tail).count(HALF))
        self.read, self.shown = len(self.window), len(self._decode(self.window).rstrip(HALF))

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self.window.append(token_id)
        text = self._decode(self.window)
        whole = text.rstrip(HALF)
        new = whole[self.shown :]
        self.shown = max(self.shown, len(whole))
        if new and len(whole) == len(text):
            self.window = self.window[self.read :]
            self.read = len(self.window)
            self.shown = len(self._decode(self.window))
        return new

    def finish(self) -> str:
        """What is left at the end: bytes that never became a character."""
        rest = self._decode(self.window)[self.shown :]
        self.shown += len(rest)
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)


class Text:
    """The text of one sequence, as it grows and until a stop string ends it.

    Args:
        tokenizer: None makes no text.
    """

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        self.seq, self.text, self.num_read = seq, "", seq.num_prompt_tokens
        self.stops = list(seq.params.stop or ())
        self.held = max(map(len, self.stops), default=1) - 1  # may turn out to begin a stop string
        self.detokenizer = None
        if tokenizer is not None:
            skip = seq.params.skip_special_tokens
            self.detokenizer = Detokenizer(tokenizer, seq.token_ids, skip_special_tokens=skip)

    @property
    def safe(self) -> str:
        """The text without an end that may become a stop string."""
        return self.text[: max(0, len(self.text) - self.held)]

    def advance(self) -> str | None:
        """Read the new tokens of the sequence. Returns the stop string that the text ran into."""
        seq, params, detokenizer = self.seq, self.seq.params, self.detokenizer
        if detokenizer is None:
            return None
        known, end = len(self.text), len(seq.token_ids)
        if isinstance(seq.stop_reason, int) and not params.include_stop_str_in_output:
            end -= 1  # the token that stopped it is not part of the text
        for token_id in seq.token_ids[self.num_read : end]:
            self.text += detokenizer.push(token_id)
        self.num_read = len(seq.token_ids)
        if seq.finish_reason is not None:
            self.text += detokenizer.finish()
        found = [(self.text.find(s, max(0, known - len(s) + 1)), s) for s in self.stops]
        at, stop = min((hit for hit in found if hit[0] >= 0), default=(-1, None))
        if stop is None or self.num_read - seq.num_prompt_tokens <= params.min_tokens:
            return None
        self.text = self.text[: at + len(stop) if params.include_stop_str_in_output else at]
        return stop
