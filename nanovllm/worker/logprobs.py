"""Log probabilities, from the model's own distribution: before penalties and temperature."""

from torch import Tensor

from nanovllm.core.plan import TokenLogprobs
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import SequenceTable, StepInputs

PromptLogprobs = dict[int, dict[int, TokenLogprobs]]


def token_logprobs(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """The log probability of a token, its rank, and the `num_top` likeliest (-1: all)."""
    logprobs_V = logits_V.float().log_softmax(-1)
    top = logprobs_V.topk(len(logprobs_V) if num_top < 0 else num_top)
    own = logprobs_V[token_id]
    return TokenLogprobs(
        [token_id, *top.indices.tolist()],
        [own.item(), *top.values.tolist()],
        int((logprobs_V > own).sum()) + 1,
    )


def sampled_logprobs(
    logits_RV: Tensor, params: list[SamplingParams], token_ids: list[int]
) -> dict[int, TokenLogprobs]:
    """Of the sampled token of each row that asks for it and has one."""
    return {
        i: token_logprobs(logits_RV[i], token_id, p.logprobs)
        for i, (p, token_id) in enumerate(zip(params, token_ids, strict=True))
        if p.logprobs is not None and token_id >= 0
    }


def prompt_logprobs(
    model: LlamaForCausalLM,
    table: SequenceTable,
    inputs: StepInputs,
    hidden_TH: Tensor,
    *,
    follows: bool,
) -> PromptLogprobs:
    """Of each prompt token that follows one computed in this step, for sequences that ask:
    seq_id -> its position -> log probability.

    Args:
        follows: this rank has a part of the logits only, and another one gathers them.
    """
    found: PromptLogprobs = {}
    offsets = inputs.attention.query_starts.tolist()
    for i, (row, start) in enumerate(
        zip(inputs.rows.tolist(), inputs.starts.tolist(), strict=True)
    ):
        seq = table.sequences[row]
        count = min(offsets[i + 1] - offsets[i], seq.num_prompt_tokens - 1 - start)
        if seq.params.prompt_logprobs is not None and count > 0:
            logits_LV = model.logits(hidden_TH[offsets[i] : offsets[i] + count])
            if follows:
                continue
            found[seq.seq_id] = {
                position: token_logprobs(
                    logits_V, int(table.token_ids[row, position]), seq.params.prompt_logprobs
                )
                for position, logits_V in enumerate(logits_LV, start + 1)
            }
    return found
