"""GPURunner: carries out plans on a device that goes on computing while the host does other things.

    submit 1 ─▶ submit 2 ─▶ read 1 ─▶ submit 3 ─▶ read 2 ─▶ ...

A step is submitted while the one before it may still be under way. Ids that were sampled there stay
on the device and go from one step into the next; the host reads them when it asks for the result.
Batches of decodes are replayed from CUDA graphs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.core.plan import NewSequence, StepPlan, StepResult
from nanovllm.worker.cuda_graphs import CudaRecorder, DecodeGraphs, batch_sizes, obstacle
from nanovllm.worker.inputs import Array, StepInputs, upload
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.sampler import IMPOSSIBLE, choose


class Awaited(NamedTuple):
    """The tokens that a step samples, until the host has read them.

    Attributes:
        sampled: [R] rows of the plan. rows: [R] rows in the table. positions: [R] of the tokens.
        sequences: those in the table's rows when the step began.
        token_ids_R: on the device; -1 where none was possible.
        host_R: a copy, there when `ready` has come (None: at once).
    """

    sampled: Array
    rows: Array
    positions: Array
    sequences: list[NewSequence]
    token_ids_R: Tensor
    host_R: Tensor
    ready: torch.cuda.Event | None


class GPURunner(ModelRunner):
    """See ModelRunner. Steps whose rows all take the likeliest token, or draw one, from the model's
    own logits are not waited for; the others are, as the host has a part in their sampling.

    Attributes:
        graphs: of decodes; None runs all batches eagerly.
        awaited: of the last step, unless the host has read it. before: of the one before it.
    """

    graphs: DecodeGraphs | None = None
    awaited: Awaited | None = None
    before: Awaited | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        return self.submit(plan)()

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        self.before, self.awaited = self.awaited, None
        result = super().execute(plan)
        return partial(self.finish, plan, result, self.awaited)

    def finish(self, plan: StepPlan, result: StepResult, awaited: Awaited | None) -> StepResult:
        """Complete a result with the tokens that were awaited."""
        if awaited is None:
            return result
        for i, token_id in zip(awaited.sampled, self.read(awaited), strict=True):
            result.token_ids[i] = token_id
            if token_id < 0:
                result.errors[plan.seq_ids[i]] = IMPOSSIBLE
        return result

    def read(self, awaited: Awaited) -> list[int]:
        """Wait for tokens, and let the table have those of the sequences that are still in it."""
        if awaited.ready is not None:
            awaited.ready.synchronize()
        here = self.still_here(awaited)
        rows, positions = awaited.rows[here], awaited.positions[here]
        self.table.token_ids[rows, positions] = awaited.host_R.numpy()[here]
        if self.awaited is awaited:
            self.awaited = None
        return awaited.host_R.tolist()

    def still_here(self, awaited: Awaited) -> list[int]:
        """Which of the R rows have no other sequence in them by now."""
        pairs = zip(awaited.rows.tolist(), awaited.sequences, strict=True)
        return [i for i, (row, seq) in enumerate(pairs) if self.table.sequences[row] is seq]

    def input_ids(self, inputs: StepInputs) -> Tensor:
        """[T]; ids that the host has not read come from where they were sampled."""
        ids_T = super().input_ids(inputs)
        if self.before is None:
            return ids_T
        source = np.full(len(self.table.num_tokens), -1)
        here = self.still_here(self.before)
        source[self.before.rows[here]] = here
        found = source[inputs.rows]
        goes_on = np.flatnonzero(found >= 0)
        last = inputs.attention.query_starts.numpy()[goes_on + 1] - 1
        last_R, from_R = (upload(index, self.device) for index in (last, found[goes_on]))
        return ids_T.index_copy(0, last_R, self.before.token_ids_R[from_R].clamp(min=0))

    def forward(self, inputs: StepInputs, rows_R: Tensor | None = None) -> Tensor:
        if rows_R is None or self.graphs is None or not self.graphs.cover(inputs.attention):
            return super().forward(inputs, rows_R)
        positions_T = upload(inputs.positions, self.device)
        hidden_TH = self.graphs.run(self.input_ids(inputs), positions_T, inputs.attention)
        return hidden_TH if len(rows_R) == len(hidden_TH) else hidden_TH[rows_R]

    def sample(
        self, plan: StepPlan, inputs: StepInputs, hidden_RH: Tensor, result: StepResult
    ) -> None:
        table, rows = self.table, inputs.rows[inputs.sampled]
        sequences = [table.sequences[row] for row in rows.tolist()]
        if not all(seq.params.plain and seq.params.logprobs is None for seq in sequences):
            super().sample(plan, inputs, hidden_RH, result)
            return
        logits_RV, positions = self.model.logits(hidden_RH).float(), table.num_tokens[rows]
        if self.ranks is not None and self.ranks.rank:
            ids_R = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        else:
            known = [table.token_ids[row, :n] for row, n in zip(rows, positions, strict=True)]
            ids_R = choose(logits_RV, list(zip(sequences, known, strict=True)))
        if self.ranks is not None:
            ids_R = self.ranks.broadcast(ids_R)
        host_R, ready = ids_R, None
        if ids_R.is_cuda:
            host_R = torch.empty(ids_R.shape, dtype=ids_R.dtype, pin_memory=True)
            host_R.copy_(ids_R, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        table.num_tokens[rows] += 1
        self.awaited = Awaited(inputs.sampled, rows, positions, sequences, ids_R, host_R, ready)


def make_runner(config: EngineConfig, *parts: Any) -> GPURunner:
    """A GPURunner of ModelRunner's arguments, warmed up; on a GPU, with graphs if they can be."""
    runner = GPURunner(*parts)
    assert config.max_num_seqs and config.max_num_batched_tokens
    if runner.device.type != "cuda":
        runner.warm_up()
        return runner
    runner.warm_up(config.max_num_batched_tokens)
    if not config.enforce_eager and not obstacle(runner.model, runner.backend, runner.ranks):
        width = runner.table.block_tables.shape[1]
        sizes, record = batch_sizes(config.max_num_seqs), CudaRecorder()
        runner.graphs = DecodeGraphs(
            runner.model, runner.backend, runner.caches, sizes, width, record
        )
    return runner
