"""Control tokens that a conversation only mentions stay text.

A template writes `<|im_end|>` and the like between the messages. Where a message itself holds those
characters, they must not end it: they are replaced by marks before the template is rendered, and
put back, as ordinary text, when it is tokenized.
"""

import re
from typing import Any
from uuid import uuid4

from nanovllm.tokenizer import Tokenizer


class ControlTokens:
    """The control tokens of a tokenizer, to be hidden in messages.

    Attributes:
        longest: characters of the longest token of all.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.longest = max(map(len, tokenizer.backend.get_vocab()))
        added = tokenizer.backend.get_added_tokens_decoder().values()
        names = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self.names = [name for name in names if name]
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")

    def hide(self, item: Any, mark: str) -> Any:
        """The same messages with `mark` and a number in place of each control token."""
        if isinstance(item, str):
            return self.pattern.sub(lambda m: f"{mark}{self.names.index(m[0])};", item)
        if isinstance(item, list):
            return [self.hide(one, mark) for one in item]
        if isinstance(item, dict):
            return {name: self.hide(value, mark) for name, value in item.items()}
        return item

    def show(self, text: str, mark: str) -> str:
        """A rendered prompt as it reads."""
        return re.sub(f"{mark}(\\d+);", lambda m: self.names[int(m[1])], text)

    def encode(self, text: str, mark: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a rendered prompt in which marks stand for text."""
        first, *rest = re.split(f"{mark}(\\d+);", text)
        token_ids = self.tokenizer.encode(first, add_special_tokens=add_special_tokens)
        for number, plain in zip(rest[::2], rest[1::2], strict=True):
            token_ids += self.encode_plain(self.names[int(number)])
            token_ids += self.tokenizer.encode(plain, add_special_tokens=False)
        return token_ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens are characters like all others."""
        backend = self.tokenizer.backend
        backend.encode_special_tokens = True
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False


def new_mark() -> str:
    """What no message holds by chance."""
    return f"\ue000{uuid4().hex}:"
