"""Log probabilities as users see them: by token id, with the token's text."""

from collections.abc import Iterable

from nanovllm.core.plan import TokenLogprobs
from nanovllm.outputs import Logprob, Logprobs
from nanovllm.tokenizer import Tokenizer


def show_logprobs(entries: Iterable[TokenLogprobs], tokenizer: Tokenizer | None) -> list[Logprobs]:
    """A dictionary per position: the token that is there first, then the likeliest."""
    shown: list[Logprobs] = []
    for entry in entries:
        ranks = [entry.rank, *range(1, len(entry.token_ids))]
        position: Logprobs = {}
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
            token = tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else None
            position.setdefault(token_id, Logprob(logprob, rank, token))
        shown.append(position)
    return shown
