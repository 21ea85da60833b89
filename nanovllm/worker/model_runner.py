"""ModelRunner: carries out plans on one device."""

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.plan import StepPlan, StepResult, TokenLogprobs
from nanovllm.kernels import AttentionBackend, KVCache
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.worker.inputs import SequenceTable, StepInputs
from nanovllm.worker.sampler import SampledRow, Samples, sample, token_logprobs


class ModelRunner:
    """A model, its KV cache and the sequences it is computing.

    Args:
        caches: one for each layer.
        table: sequences, empty.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        backend: AttentionBackend,
        caches: list[KVCache],
        table: SequenceTable,
        device: torch.device,
    ) -> None:
        self.model, self.backend, self.caches = model, backend, caches
        self.table, self.device = table, device

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the tokens that the plan schedules; sample where a row got to its end."""
        table = self.table
        table.apply(plan)
        inputs = table.prepare(plan)
        hidden_TH = self.forward(inputs)
        prompt_logprobs = self.prompt_logprobs(plan, inputs, hidden_TH)
        token_ids = [-1] * len(plan.seq_ids)
        sampled = inputs.sampled.tolist()
        if not sampled:
            return StepResult(token_ids, prompt_logprobs=prompt_logprobs)
        logits_RV = self.model.logits(hidden_TH[inputs.last_tokens.to(self.device)]).float()
        rows = inputs.rows[inputs.sampled]
        samples = self.sample(logits_RV, rows.tolist())
        for i, token_id in zip(sampled, samples.token_ids, strict=True):
            token_ids[i] = token_id
        table.append(rows, np.array(samples.token_ids))
        seq_ids = [plan.seq_ids[i] for i in sampled]
        return StepResult(
            token_ids,
            {seq_ids[i]: entry for i, entry in samples.logprobs.items()},
            prompt_logprobs,
            {seq_ids[i]: message for i, message in samples.errors.items()},
        )

    def forward(self, inputs: StepInputs) -> Tensor:
        """Hidden states [T, H] of all tokens of the step."""
        attention = self.backend.plan(inputs.attention, self.table.block_size, self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            return attention(q, k, v, self.caches[layer], window)

        return self.model(
            inputs.input_ids.to(self.device), inputs.positions.to(self.device), attend
        )

    def sample(self, logits_RV: Tensor, rows: list[int]) -> Samples:
        table, sampled = self.table, []
        for row in rows:
            params = table.params[row]
            assert params is not None
            tokens = table.token_ids[row, : table.num_tokens[row]]
            stops = table.stop_token_ids[row]
            sampled.append(SampledRow(params, tokens, int(table.num_prompt[row]), stops))
        return sample(logits_RV, sampled)

    def prompt_logprobs(
        self, plan: StepPlan, inputs: StepInputs, hidden_TH: Tensor
    ) -> dict[int, tuple[int, list[TokenLogprobs]]]:
        """For rows that ask: the log probability of each prompt token after the computed ones."""
        found = {}
        offsets = inputs.attention.query_starts.tolist()
        for i, (row, start) in enumerate(zip(inputs.rows, inputs.starts, strict=True)):
            params = self.table.params[row]
            assert params is not None
            num_top, prompt = params.prompt_logprobs, int(self.table.num_prompt[row])
            count = min(offsets[i + 1] - offsets[i], prompt - 1 - int(start))
            if num_top is not None and count > 0:
                logits = self.model.logits(hidden_TH[offsets[i] : offsets[i] + count])
                values_LV = logits.float().log_softmax(-1)
                actual = self.table.token_ids[row, start + 1 : start + 1 + count].tolist()
                entries = [
                    token_logprobs(v, t, num_top) for v, t in zip(values_LV, actual, strict=True)
                ]
                found[plan.seq_ids[i]] = (int(start) + 1, entries)
        return found
