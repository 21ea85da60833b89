"""From logits to tokens: each row by its own parameters, all rows in one batch.

A draw is inverse transform sampling with one number per token that is a function of the seed and
the position alone, so a request gets the same tokens whatever it is batched with, and again after
a preemption.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.core.plan import TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import Array


@dataclass(frozen=True, slots=True)
class SampledRow:
    """What a row's next token depends on besides its logits."""

    params: SamplingParams
    token_ids: Array  # prompt and output
    num_prompt_tokens: int
    stop_token_ids: list[int]  # not before params.min_tokens


@dataclass(frozen=True, slots=True)
class Samples:
    """Per row: the token (-1 after an error), its log probabilities if wanted, its error."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    errors: dict[int, str]


def sample(logits_RV: Tensor, rows: list[SampledRow]) -> Samples:
    """Choose the next token of each row. Overwrites the logits (float32)."""
    raw = {
        i: logits_RV[i].log_softmax(-1)
        for i, row in enumerate(rows)
        if row.params.logprobs is not None
    }
    errors = {}
    for i, row in enumerate(rows):
        try:
            adjust(logits_RV[i], row)
        except Exception as error:  # of this row only
            errors[i] = f"{type(error).__name__}: {error}"
    largest, greedy = logits_RV.max(-1)
    token_ids = greedy.tolist()
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        drawn_ids = draw(logits_RV[drawn], [rows[i] for i in drawn]).tolist()
        for i, token_id in zip(drawn, drawn_ids, strict=True):
            token_ids[i] = token_id
    for i in largest.isnan().nonzero().flatten().tolist():
        errors.setdefault(i, "the model's logits are not numbers")
    for i in errors:
        token_ids[i] = -1
    logprobs = {
        i: token_logprobs(values_V, token_ids[i], rows[i].params.logprobs or 0)
        for i, values_V in raw.items()
        if i not in errors
    }
    return Samples(token_ids, logprobs, errors)


def adjust(logits_V: Tensor, row: SampledRow) -> None:
    """Masks, biases and penalties, in vLLM's order, in place."""
    params, output = row.params, row.token_ids[row.num_prompt_tokens :]
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        kept = logits_V[allowed]
        logits_V.fill_(-torch.inf)
        logits_V[allowed] = kept
    for *start, last in params.bad_words_token_ids:
        if start == output[len(output) - len(start) :].tolist():
            logits_V[last] = -torch.inf
    if len(output) < params.min_tokens:
        logits_V[row.stop_token_ids] = -torch.inf
    for token_id, bias in (params.logit_bias or {}).items():
        logits_V[token_id] += max(-100.0, min(100.0, bias))
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(row.token_ids).unique().to(logits_V.device)
        logits, factor = logits_V[seen], params.repetition_penalty
        logits_V[seen] = torch.where(logits > 0, logits / factor, logits * factor)
    if params.frequency_penalty or params.presence_penalty:
        seen, counts = torch.from_numpy(output).to(logits_V.device).unique(return_counts=True)
        logits_V[seen] -= params.frequency_penalty * counts + params.presence_penalty


def draw(logits_RV: Tensor, rows: list[SampledRow]) -> Tensor:
    """A token [R] for each row, from its distribution after temperature, min_p, top_k, top_p."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    params = [row.params for row in rows]
    logits_RV = logits_RV / column([p.temperature for p in params]).float()
    if any(p.min_p for p in params):
        min_p = column([p.min_p for p in params]).float()
        floor = logits_RV.amax(-1, keepdim=True) + min_p.log()
        logits_RV = logits_RV.masked_fill(logits_RV < floor, -torch.inf)
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        top_k = column([p.top_k if p.top_k > 0 else logits_RV.shape[1] for p in params])
        floor = truncation(logits_RV, top_k, column([p.top_p for p in params]))
        logits_RV = logits_RV.masked_fill(logits_RV < floor, -torch.inf)
    cumulative = logits_RV.softmax(-1, dtype=torch.float64).cumsum_(-1)
    numbers = column(
        [uniform(p.seed or 0, len(row.token_ids)) for p, row in zip(params, rows, strict=True)]
    )
    return torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0]


def truncation(logits_RV: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit [R, 1] that top_k and then top_p keep. Equal logits stay together.

    Looks at the likeliest 256 tokens first, and at more of them only if some row needs it.
    """
    vocab_size = logits_RV.shape[1]
    top_k = top_k.clamp(max=vocab_size)
    total = logits_RV.logsumexp(-1, keepdim=True).double()
    for size in (256, 4096, vocab_size):
        top = logits_RV.topk(min(size, vocab_size)).values.double()
        rank = torch.arange(top.shape[1], device=top.device)
        inside = top.masked_fill(rank >= top_k, -torch.inf)
        whole = torch.where(top_k < vocab_size, inside.logsumexp(-1, keepdim=True), total)
        reached = (inside - whole).exp().cumsum(-1)
        done = (top_k <= top.shape[1]) | ((reached[:, -1:] >= top_p) & (top_k == vocab_size))
        if size == vocab_size or bool(done.all()):
            break
    before = reached - (inside - whole).exp()  # the likeliest token is always kept
    num_kept = ((before < top_p) & (rank < top_k)).sum(-1, keepdim=True).clamp(min=1)
    return top.gather(-1, num_kept - 1).float()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this seed and position (SplitMix64, Steele et al., 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + position) & (2**64 - 1)
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        x ^= x >> 31
    return (x >> 11) / 2**53


def token_logprobs(logprobs_V: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """The log probability of a token, its rank, and the `num_top` likeliest (-1: all)."""
    top = logprobs_V.topk(len(logprobs_V) if num_top < 0 else num_top)
    own = logprobs_V[token_id]
    return TokenLogprobs(
        [token_id, *top.indices.tolist()],
        [own.item(), *top.values.tolist()],
        int((logprobs_V >= own).sum()),
    )
