"""What sampling parameters do to logits before a token is chosen, in vLLM's order."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.core.plan import NewSequence
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import Array

if TYPE_CHECKING:
    from nanovllm.worker.grammar import Grammars


def process(
    logits_RV: Tensor,
    rows: list[tuple[NewSequence, Array]],
    errors: dict[int, str],
    grammars: "Grammars | None" = None,
) -> Tensor:
    """Forms, masks, biases, penalties, then min_p, top_k and top_p. Overwrites the logits.

    Args:
        rows, grammars: see sampler.sample. errors: row -> what went wrong there, filled in.

    Returns:
        logits [R, V]; what must not be sampled is -inf.
    """
    for i, (seq, token_ids) in enumerate(rows):
        try:
            if seq.params.structured_outputs is not None:
                assert grammars is not None
                grammars.restrict(logits_RV[i], seq, token_ids)
            adjust(logits_RV[i], seq, token_ids)
        except Exception as error:  # of this row only
            errors[i] = f"{type(error).__name__}: {error}"
    cut = [i for i, (seq, _) in enumerate(rows) if seq.params.truncates and not seq.params.greedy]
    if cut:
        logits_RV[cut] = truncate(logits_RV[cut], [rows[i][0].params for i in cut])
    return logits_RV


def adjust(logits_V: Tensor, seq: NewSequence, token_ids: Array) -> None:
    """Masks, biases and penalties of one row, in place."""
    params, output = seq.params, token_ids[seq.num_prompt_tokens :]
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        kept = logits_V[allowed]
        logits_V.fill_(-torch.inf)
        logits_V[allowed] = kept
    for *start, last in params.bad_words_token_ids:
        if len(start) <= len(output) and start == output[len(output) - len(start) :].tolist():
            logits_V[last] = -torch.inf
    if len(output) < params.min_tokens and params.structured_outputs is None:  # a form knows itself
        logits_V[seq.stop_token_ids] = -torch.inf
    for token_id, bias in (params.logit_bias or {}).items():
        logits_V[token_id] += max(-100.0, min(100.0, bias))
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(token_ids).unique().to(logits_V.device)
        logits, factor = logits_V[seen], params.repetition_penalty
        logits_V[seen] = torch.where(logits > 0, logits / factor, logits * factor)
    if params.frequency_penalty or params.presence_penalty:
        seen, counts = torch.from_numpy(output).to(logits_V.device).unique(return_counts=True)
        logits_V[seen] -= params.frequency_penalty * counts + params.presence_penalty


def truncate(logits_RV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Rows without the tokens that min_p, then top_k, then top_p rule out, all judged after
    temperature. Equal logits stay or go together, so nothing depends on how they are sorted.

    top_k and top_p look at the likeliest 256 tokens first, and at more only if a row needs it.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    temperature = column([p.temperature for p in params])
    if any(p.min_p for p in params):
        least = temperature * column([p.min_p for p in params]).log()  # below the likeliest
        too_low = logits_RV < logits_RV.amax(-1, keepdim=True) + least
        logits_RV = logits_RV.masked_fill(too_low, -torch.inf)
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        vocab_size = logits_RV.shape[1]
        top_k = column([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params])
        top_p = column([p.top_p for p in params])
        floor = smallest_kept(logits_RV, temperature, top_k, top_p)
        logits_RV = logits_RV.masked_fill(logits_RV < floor, -torch.inf)
    return logits_RV


def smallest_kept(logits_RV: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit [R, 1] among the top_k likeliest [R, 1] that are needed to reach
    probability top_p [R, 1] of theirs; the likeliest token is always kept."""
    vocab_size = logits_RV.shape[1]
    total = (logits_RV / temperature).logsumexp(-1, keepdim=True)
    for size in (256, 4096, vocab_size):
        top = logits_RV.topk(min(size, vocab_size)).values
        rank = torch.arange(top.shape[1], device=top.device)
        inside = (top / temperature).masked_fill(rank >= top_k, -torch.inf)
        whole = torch.where(top_k < vocab_size, inside.logsumexp(-1, keepdim=True), total)
        reached = (inside - whole).exp().cumsum(-1)
        complete = (top_k <= size) | ((top_k == vocab_size) & (reached[:, -1:] >= top_p))
        if complete.all():
            break
    before = torch.cat((torch.zeros_like(top_p), reached[:, :-1]), -1)
    num_kept = ((before < top_p) & (rank < top_k)).sum(-1, keepdim=True).clamp(min=1)
    return top.gather(-1, num_kept - 1)
