"""ModelRunner: carries out plans on one device."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.kernels import AttentionBatch, Backend, KVCache
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.worker.inputs import SequenceTable, StepInputs, upload
from nanovllm.worker.sampler import sample

if TYPE_CHECKING:
    from nanovllm.worker.grammar import Grammars
    from nanovllm.worker.ranks import Ranks


class ModelRunner:
    """A model, its KV cache (one for each layer) and the sequences it is computing.

    Args:
        path: of the tokenizer; read when the first sequence with structured_outputs comes.
        ranks: those that run the same plans with other parts of the model; None: this has all.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        backend: Backend,
        caches: list[KVCache],
        table: SequenceTable,
        config: ModelConfig,
        path: Path,
        ranks: "Ranks | None" = None,
    ) -> None:
        self.ranks, self.choose = ranks, sample if ranks is None else ranks.sample
        self.model, self.backend, self.caches, self.table = model, backend, caches, table
        self.device, self.config, self.path = caches[0].k.device, config, path
        self.grammars: Grammars | None = None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the tokens that the plan schedules; sample where a sequence got to its end."""
        table = self.table
        table.apply(plan)
        if self.grammars is not None:
            self.grammars.forget(plan.removed)
        elif any(new.params.structured_outputs is not None for new in plan.new_sequences):
            from nanovllm.worker.grammar import Grammars

            config = self.config
            self.grammars = Grammars(self.path, config.eos_token_ids, config.vocab_size)
        inputs = table.prepare(plan)
        last_R = upload(inputs.attention.query_starts[inputs.sampled + 1] - 1, self.device)
        result = StepResult([-1] * len(plan.seq_ids))
        of_prompt = any(table.sequences[r].params.prompt_logprobs is not None for r in inputs.rows)
        hidden = self.forward(inputs, None if of_prompt else last_R)
        if of_prompt:
            from nanovllm.worker.logprobs import prompt_logprobs

            follows = self.ranks is not None and self.ranks.rank > 0
            found = prompt_logprobs(self.model, table, inputs, hidden, follows=follows)
            result.prompt_logprobs.update(found)
            hidden = hidden[last_R]
        if len(inputs.sampled):
            self.sample(plan, inputs, hidden, result)
        return result

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step; what is returned waits for its result."""
        result = self.execute(plan)
        return lambda: result

    @torch.inference_mode()
    def warm_up(self, num_tokens: int = 1) -> None:
        """Compile what is compiled when first used, so that no request waits for it: tokens that
        are stored nowhere go through the model."""
        zero, zeros = torch.zeros(1, dtype=torch.int64), torch.zeros(num_tokens, dtype=torch.int64)
        tables = torch.zeros(1, -(-num_tokens // self.table.block_size), dtype=torch.int64)
        batch = AttentionBatch(torch.tensor([0, num_tokens]), zero + num_tokens, tables, zeros - 1)
        self.forward(StepInputs(zeros, zeros, batch, *[zero.numpy()] * 3))

    def forward(self, inputs: StepInputs, rows_R: Tensor | None = None) -> Tensor:
        """Hidden states [T, H] of all tokens of the step, or [R, H] of the rows."""
        ops = self.backend.plan(inputs.attention, self.caches)
        positions = upload(inputs.positions, self.device)
        return self.model(self.input_ids(inputs), positions, ops, rows_R)

    def input_ids(self, inputs: StepInputs) -> Tensor:
        """[T], on the device."""
        return upload(inputs.input_ids, self.device)

    def sample(
        self, plan: StepPlan, inputs: StepInputs, hidden_RH: Tensor, result: StepResult
    ) -> None:
        """A token for each sequence whose last token was computed, into the result."""
        table, rows = self.table, inputs.rows[inputs.sampled]
        logits_RV = self.model.logits(hidden_RH).float()
        known = [(table.sequences[r], table.token_ids[r, : table.num_tokens[r]]) for r in rows]
        samples = self.choose(logits_RV, known, self.grammars)
        table.append(rows, samples.token_ids)
        for i, token_id in zip(inputs.sampled, samples.token_ids, strict=True):
            result.token_ids[i] = token_id
        seq_ids = [seq.seq_id for seq, _ in known]
        result.logprobs.update((seq_ids[i], entry) for i, entry in samples.logprobs.items())
        result.errors.update((seq_ids[i], message) for i, message in samples.errors.items())
