"""What a rank knows of the sequences it computes, and the tensors of a step made from it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.plan import NewSequence, StepPlan
from nanovllm.kernels import AttentionBatch
from nanovllm.sampling_params import SamplingParams

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, ready for the model.

    Attributes:
        input_ids, positions: [T].
        rows: [B] row of the table of each sequence of the plan. starts: [B] its first position.
        sampled: which of the B rows sample. last_tokens: where in T the last token of each is.
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    rows: Array
    starts: Array
    sampled: Array
    last_tokens: Tensor


class SequenceTable:
    """A row for each sequence that runs: its tokens, its block table, how far it is.

    Plans say only what changed; this is where the rest is kept. Rows are reused.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int64)
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int64)
        self.num_tokens, self.num_prompt, self.num_computed, self.num_stored, self.num_blocks = (
            np.zeros((5, max_num_seqs), np.int64)
        )
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.stop_token_ids: list[list[int]] = [[]] * max_num_seqs
        self.row_of: dict[int, int] = {}
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))

    def apply(self, plan: StepPlan) -> None:
        """Take in what the plan says has changed."""
        for seq_id in plan.removed:
            row = self.row_of.pop(seq_id, None)
            if row is not None:
                self.free_rows.append(row)
        for new in plan.new_sequences:
            self._add(new)
        for seq_id, block_ids in plan.new_block_ids.items():
            row = self.row_of[seq_id]
            start, end = self.num_blocks[row], self.num_blocks[row] + len(block_ids)
            self.block_tables[row, start:end] = block_ids
            self.num_blocks[row] = end

    def _add(self, new: NewSequence) -> None:
        row = self.row_of[new.seq_id] = self.free_rows.pop()
        self.token_ids[row, : len(new.token_ids)] = new.token_ids
        self.num_tokens[row], self.num_prompt[row] = len(new.token_ids), new.num_prompt_tokens
        self.num_computed[row], self.num_stored[row] = (
            new.num_computed_tokens,
            new.num_stored_tokens,
        )
        self.num_blocks[row] = 0
        self.params[row], self.stop_token_ids[row] = new.params, new.stop_token_ids

    def prepare(self, plan: StepPlan) -> StepInputs:
        """The tensors of the plan's rows; these count as computed from here on."""
        rows = np.array([self.row_of[seq_id] for seq_id in plan.seq_ids], np.int64)
        counts = np.array(plan.num_scheduled_tokens, np.int64)
        starts = self.num_computed[rows]
        ends = starts + counts
        query_starts = np.concatenate(([0], counts.cumsum()))
        token_rows = rows.repeat(counts)
        positions = np.arange(query_starts[-1]) - (query_starts[:-1] - starts).repeat(counts)
        block_ids = self.block_tables[token_rows, positions // self.block_size]
        slots = block_ids * self.block_size + positions % self.block_size
        slots[positions < self.num_stored[token_rows]] = -1
        self.num_computed[rows] = ends
        tables = self.block_tables[rows, : -(-ends.max() // self.block_size)]
        sampled = np.flatnonzero(ends == self.num_tokens[rows])
        return StepInputs(
            torch.from_numpy(self.token_ids[token_rows, positions]),
            torch.from_numpy(positions),
            AttentionBatch(*map(torch.from_numpy, (query_starts, ends, tables, slots))),
            rows,
            starts,
            sampled,
            torch.from_numpy(query_starts[sampled + 1] - 1),
        )

    def append(self, rows: Array, token_ids: Array) -> None:
        """A new last token for each row."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1
