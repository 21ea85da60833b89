"""From logits to tokens: each row by its own parameters, all rows in one batch.

A draw is inverse transform sampling with one number per token that is a function of the seed and
the position alone, so a request gets the same tokens whatever it is batched with, and again after
a preemption.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.core.plan import NewSequence, TokenLogprobs
from nanovllm.worker.inputs import Array, upload

if TYPE_CHECKING:
    from nanovllm.worker.grammar import Grammars


IMPOSSIBLE = "no token is possible: all are ruled out, or not numbers"


@dataclass(frozen=True, slots=True)
class Samples:
    """Per row: the token (-1 after an error), its log probabilities if wanted, its error."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def sample(
    logits_RV: Tensor, rows: list[tuple[NewSequence, Array]], grammars: "Grammars | None" = None
) -> Samples:
    """Choose the next token of each row.

    Args:
        logits_RV: float32; may be overwritten.
        rows: the sequence of each row, and its tokens up to now.
        grammars: knows the forms of outputs; None if no row must have one.
    """
    params = [seq.params for seq, _ in rows]
    samples, raw_RV = Samples([]), logits_RV
    if not all(p.plain for p in params):
        from nanovllm.worker.logits import process  # masks, penalties, top_k and the like

        logits_RV = process(logits_RV.clone(), rows, samples.errors, grammars)
    samples.token_ids.extend(choose(logits_RV, rows).tolist())
    for i, token_id in enumerate(samples.token_ids):
        if token_id < 0:
            samples.errors.setdefault(i, IMPOSSIBLE)
    for i in samples.errors:
        samples.token_ids[i] = -1
    if any(p.logprobs is not None for p in params):
        from nanovllm.worker.logprobs import sampled_logprobs

        samples.logprobs.update(sampled_logprobs(raw_RV, params, samples.token_ids))
    return samples


def choose(logits_RV: Tensor, rows: list[tuple[NewSequence, Array]]) -> Tensor:
    """The likeliest token of each row, or one that is drawn: [R], where the logits are. -1 if none
    is possible."""
    chosen_R = argmax(logits_RV)
    possible_R = logits_RV.gather(1, chosen_R[:, None])[:, 0].isfinite()
    drawn = [i for i, (seq, _) in enumerate(rows) if not seq.params.greedy]
    if drawn:
        numbers = [uniform(rows[i][0].params.seed or 0, len(rows[i][1])) for i in drawn]
        temperatures = [rows[i][0].params.temperature for i in drawn]
        if len(drawn) == len(rows):
            chosen_R = draw(logits_RV, temperatures, numbers)
        else:
            found_R = draw(logits_RV[drawn], temperatures, numbers)
            chosen_R = chosen_R.index_copy(0, upload(drawn, found_R.device), found_R)
    return chosen_R.where(possible_R, -1)


def argmax(logits_RV: Tensor) -> Tensor:
    """The likeliest token of each row; on a CPU by NumPy, which takes a tenth of torch's time."""
    on_gpu = logits_RV.is_cuda
    return logits_RV.argmax(-1) if on_gpu else torch.from_numpy(logits_RV.numpy().argmax(-1))


def draw(logits_RV: Tensor, temperatures: list[float], numbers: list[float]) -> Tensor:
    """A token for each row: the first whose cumulative probability exceeds the row's number."""
    temperature_R1, number_R1 = upload([temperatures, numbers], logits_RV.device)[..., None]
    cumulative_RV = (logits_RV / temperature_R1).softmax(-1).cumsum(-1, dtype=torch.float64)
    targets_R1 = number_R1 * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, targets_R1, right=True)[:, 0]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this seed and position (SplitMix64, Steele et al., 2014)."""
    x = seed * 0x9E3779B97F4A7C15 + position
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        x ^= x >> 31
    return (x >> 11) / 2**53
