"""What a rank knows of the sequences it computes, and the tensors of a step made from it."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.plan import NewSequence, StepPlan
from nanovllm.kernels import AttentionBatch

Array = np.ndarray[Any, np.dtype[Any]]


class StepInputs(NamedTuple):
    """One step, ready for the model.

    Attributes:
        input_ids, positions: [T].
        rows: [B] row in the table of each sequence of the plan. starts: [B] its first position.
        sampled: which of the B sequences sample.
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    rows: Array
    starts: Array
    sampled: Array


class SequenceTable:
    """A row for each sequence that runs: its tokens, its block table, how far it is.

    Plans say only what changed; this is where the rest is kept. Rows are reused.

    Attributes:
        sequences: row -> the sequence as it arrived. row_of: seq_id -> row.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int64)
        self.block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int64)
        counts = np.zeros((4, max_num_seqs), np.int64)
        self.num_tokens, self.num_computed, self.num_stored, self.num_blocks = counts
        self.sequences: dict[int, NewSequence] = {}
        self.row_of: dict[int, int] = {}
        self.free_rows = list(range(max_num_seqs))

    def apply(self, plan: StepPlan) -> None:
        """Take in what the plan says has changed."""
        for seq_id in plan.removed:
            if seq_id in self.row_of:  # else it was preempted in the step that admitted it
                self.free_rows.append(self.row_of.pop(seq_id))
        for new in plan.new_sequences:
            row = self.row_of[new.seq_id] = self.free_rows.pop()
            self.sequences[row] = new
            self.token_ids[row, : len(new.token_ids)] = new.token_ids
            self.num_tokens[row], self.num_blocks[row] = len(new.token_ids), 0
            self.num_computed[row] = new.num_computed_tokens
            self.num_stored[row] = new.num_stored_tokens
        for seq_id, block_ids in plan.new_block_ids.items():
            row = self.row_of[seq_id]
            end = self.num_blocks[row] + len(block_ids)
            self.block_tables[row, self.num_blocks[row] : end] = block_ids
            self.num_blocks[row] = end

    def prepare(self, plan: StepPlan) -> StepInputs:
        """The tensors of the plan's sequences; their tokens count as computed from here on."""
        rows = np.array([self.row_of[seq_id] for seq_id in plan.seq_ids], np.int64)
        counts = np.array(plan.num_scheduled_tokens, np.int64)
        starts, ends = self.num_computed[rows], self.num_computed[rows] + counts
        query_starts = np.concatenate(([0], counts.cumsum()))
        token_rows = rows.repeat(counts)
        positions = np.arange(query_starts[-1]) - (query_starts[:-1] - starts).repeat(counts)
        blocks, offsets = divmod(positions, self.block_size)
        slots = self.block_tables[token_rows, blocks] * self.block_size + offsets
        slots[positions < self.num_stored[token_rows]] = -1
        self.num_computed[rows] = ends
        tables = self.block_tables[rows, : blocks.max() + 1]
        sampled = np.flatnonzero(ends == self.num_tokens[rows])
        arrays = self.token_ids[token_rows, positions], positions, query_starts, ends, tables, slots
        input_ids_T, positions_T, *batch = map(torch.from_numpy, arrays)
        return StepInputs(input_ids_T, positions_T, AttentionBatch(*batch), rows, starts, sampled)

    def append(self, rows: Array, token_ids: list[int]) -> None:
        """A new last token for each row."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1


def upload(values: Any, device: torch.device) -> Tensor:
    """A tensor on the device, which need not be done with what it was given before."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
