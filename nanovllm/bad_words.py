"""Words that an output may not have, as the tokens that they can be."""

from collections.abc import Iterable

from nanovllm.tokenizer import Tokenizer


def bad_token_ids(words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each word as it begins a text and as it follows a space. Spaces before it do
    not count, unless it is nothing else.

    Raises:
        InvalidRequestError: a word holds half a surrogate pair.
    """
    found: list[list[int]] = []
    for word in words:
        bare = word.lstrip()
        for form in (bare, " " + bare) if bare else (word,):
            ids = tokenizer.encode(form, add_special_tokens=False, field="bad_words")
            if ids and ids not in found:
                found.append(ids)
    return found
