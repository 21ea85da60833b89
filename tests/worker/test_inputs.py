"""SequenceTable: plans go in, exact tensors come out. Blocks of 4 tokens, 3 rows of 16."""

from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.core.plan import NewSequence, StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import SequenceTable, StepInputs


def new(
    seq_id: int, token_ids: list[int], num_computed: int = 0, num_stored: int | None = None
) -> NewSequence:
    stored = num_computed if num_stored is None else num_stored
    return NewSequence(
        seq_id, token_ids, len(token_ids), num_computed, stored, SamplingParams(), []
    )


def table(max_num_seqs: int = 3, max_model_len: int = 16, block_size: int = 4) -> SequenceTable:
    return SequenceTable(max_num_seqs, max_model_len, block_size)


def step(table: SequenceTable, rows: dict[int, int], **changes: Any) -> dict[str, list[Any]]:
    """One step: sequence -> tokens to compute. Returns what was prepared, as lists."""
    plan = StepPlan(1, list(rows), list(rows.values()), **changes)
    table.apply(plan)
    inputs = table.prepare(plan)
    parts = {**inputs._asdict(), **inputs.attention._asdict()}
    del parts["attention"]
    return {name: part.tolist() for name, part in parts.items()}


def append(table: SequenceTable, seq_ids: list[int], token_ids: list[int]) -> None:
    table.append(np.array([table.row_of[seq_id] for seq_id in seq_ids]), token_ids)


def test_a_prompt_of_one_step() -> None:
    found = step(
        table(), {7: 6}, new_sequences=[new(7, [50, 51, 52, 53, 54, 55])], new_block_ids={7: [9, 2]}
    )
    assert found["input_ids"] == [50, 51, 52, 53, 54, 55]
    assert found["positions"] == [0, 1, 2, 3, 4, 5]
    assert found["query_starts"] == [0, 6]
    assert found["context_lens"] == [6]
    assert found["block_tables"] == [[9, 2]]
    assert found["slots"] == [36, 37, 38, 39, 8, 9]
    assert found["starts"] == [0]
    assert found["sampled"] == [0]


def test_a_prompt_in_chunks_samples_in_the_last() -> None:
    rows = table()
    first = step(
        rows, {7: 3}, new_sequences=[new(7, [50, 51, 52, 53, 54, 55, 56])], new_block_ids={7: [9]}
    )
    assert (first["input_ids"], first["positions"]) == ([50, 51, 52], [0, 1, 2])
    assert (first["slots"], first["context_lens"]) == ([36, 37, 38], [3])
    assert (first["block_tables"], first["sampled"]) == ([[9]], [])
    second = step(rows, {7: 3}, new_block_ids={7: [2]})
    assert (second["input_ids"], second["positions"]) == ([53, 54, 55], [3, 4, 5])
    assert (second["slots"], second["context_lens"]) == ([39, 8, 9], [6])
    assert (second["block_tables"], second["starts"]) == ([[9, 2]], [3])
    assert second["sampled"] == []
    third = step(rows, {7: 1})
    assert (third["input_ids"], third["positions"], third["slots"]) == ([56], [6], [10])
    assert third["sampled"] == [0]


def test_a_decode_computes_the_token_that_was_appended() -> None:
    rows = table()
    step(rows, {7: 3}, new_sequences=[new(7, [50, 51, 52])], new_block_ids={7: [1]})
    append(rows, [7], [60])
    found = step(rows, {7: 1})
    assert (found["input_ids"], found["positions"], found["slots"]) == ([60], [3], [7])
    assert (found["context_lens"], found["sampled"]) == ([4], [0])
    append(rows, [7], [61])
    found = step(rows, {7: 1}, new_block_ids={7: [5]})
    assert (found["input_ids"], found["positions"], found["slots"]) == ([61], [4], [20])
    assert (found["block_tables"], found["context_lens"]) == ([[1, 5]], [5])


def test_prefills_and_decodes_share_a_batch_in_the_order_of_the_plan() -> None:
    rows = table()
    step(rows, {1: 5}, new_sequences=[new(1, [10, 11, 12, 13, 14])], new_block_ids={1: [3, 4]})
    append(rows, [1], [15])
    found = step(
        rows,
        {1: 1, 2: 2, 3: 3},
        new_sequences=[new(2, [20, 21, 22]), new(3, [30, 31, 32])],
        new_block_ids={2: [0], 3: [1]},
    )
    assert found["input_ids"] == [15, 20, 21, 30, 31, 32]
    assert found["positions"] == [5, 0, 1, 0, 1, 2]
    assert found["query_starts"] == [0, 1, 3, 6]
    assert found["context_lens"] == [6, 2, 3]
    assert found["slots"] == [17, 0, 1, 4, 5, 6]
    assert [tables[0] for tables in found["block_tables"]] == [3, 0, 1]
    assert found["block_tables"][0] == [3, 4]
    assert found["starts"] == [5, 0, 0]
    assert found["sampled"] == [0, 2]
    assert found["rows"] == [rows.row_of[1], rows.row_of[2], rows.row_of[3]]
    append(rows, [1], [16])
    other = step(rows, {2: 1, 1: 1})
    assert other["input_ids"] == [22, 16]
    assert other["positions"] == [2, 6]


def test_the_block_tables_are_as_wide_as_the_longest_needs() -> None:
    rows = table()
    found = step(
        rows,
        {1: 9, 2: 1},
        new_sequences=[new(1, list(range(9))), new(2, [5])],
        new_block_ids={1: [6, 7, 8], 2: [0]},
    )
    assert [len(blocks) for blocks in found["block_tables"]] == [3, 3]
    assert found["block_tables"][0] == [6, 7, 8]
    assert found["block_tables"][1][0] == 0


def test_a_cached_prefix_is_not_computed() -> None:
    found = step(
        table(),
        {1: 2},
        new_sequences=[new(1, list(range(50, 60)), 8)],
        new_block_ids={1: [6, 7, 8]},
    )
    assert (found["input_ids"], found["positions"]) == ([58, 59], [8, 9])
    assert (found["slots"], found["context_lens"]) == ([32, 33], [10])
    assert (found["block_tables"], found["starts"], found["sampled"]) == ([[6, 7, 8]], [8], [0])


def test_the_last_token_of_a_full_hit_is_computed_but_not_stored() -> None:
    rows = table()
    found = step(
        rows, {1: 1}, new_sequences=[new(1, list(range(50, 58)), 7, 8)], new_block_ids={1: [6, 7]}
    )
    assert (found["input_ids"], found["positions"], found["slots"]) == ([57], [7], [-1])
    assert (found["context_lens"], found["sampled"]) == ([8], [0])
    append(rows, [1], [60])
    found = step(rows, {1: 1}, new_block_ids={1: [2]})
    assert (found["positions"], found["slots"]) == ([8], [8])


def test_stored_and_new_positions_in_one_chunk() -> None:
    found = step(
        table(), {1: 6}, new_sequences=[new(1, list(range(6)), 0, 4)], new_block_ids={1: [3, 5]}
    )
    assert found["slots"] == [-1, -1, -1, -1, 20, 21]


def test_a_sequence_that_rests_keeps_its_place() -> None:
    rows = table()
    step(
        rows,
        {1: 3, 2: 3},
        new_sequences=[new(1, [10, 11, 12]), new(2, [20, 21, 22])],
        new_block_ids={1: [0], 2: [1]},
    )
    append(rows, [1, 2], [13, 23])
    assert step(rows, {2: 1})["input_ids"] == [23]
    append(rows, [2], [24])
    found = step(rows, {1: 1, 2: 1}, new_block_ids={2: [2]})
    assert (found["input_ids"], found["positions"]) == ([13, 24], [3, 4])
    assert found["slots"] == [3, 8]


def test_rows_are_used_again() -> None:
    rows = table(max_num_seqs=2)
    step(
        rows,
        {1: 9, 2: 3},
        new_sequences=[new(1, list(range(10, 19))), new(2, [20, 21, 22])],
        new_block_ids={1: [0, 1, 2], 2: [3]},
    )
    row = rows.row_of[1]
    append(rows, [1, 2], [19, 23])
    found = step(
        rows,
        {3: 2, 2: 1},
        removed=[1],
        new_sequences=[new(3, [30, 31])],
        new_block_ids={3: [4]},
    )
    assert rows.row_of == {2: 1 - row, 3: row}
    assert rows.sequences[row].seq_id == 3
    assert (found["input_ids"], found["positions"]) == ([30, 31, 23], [0, 1, 3])
    assert (found["slots"], found["context_lens"]) == ([16, 17, 15], [2, 4])
    assert found["block_tables"] == [[4], [3]]
    assert found["sampled"] == [0, 1]
    append(rows, [3], [32])
    assert step(rows, {3: 1})["input_ids"] == [32]


def test_a_sequence_comes_back_after_a_preemption_with_its_output() -> None:
    rows = table(max_num_seqs=1)
    step(rows, {1: 3}, new_sequences=[new(1, [10, 11, 12])], new_block_ids={1: [0]})
    append(rows, [1], [13])
    found = step(
        rows, {1: 4}, removed=[1], new_sequences=[new(1, [10, 11, 12, 13])], new_block_ids={1: [5]}
    )
    assert (found["input_ids"], found["positions"]) == ([10, 11, 12, 13], [0, 1, 2, 3])
    assert (found["slots"], found["sampled"]) == ([20, 21, 22, 23], [0])
    assert found["block_tables"] == [[5]]


def test_removing_what_is_not_there_is_no_error() -> None:
    rows = table(max_num_seqs=1)
    found = step(rows, {1: 1}, removed=[5, 6], new_sequences=[new(1, [9])], new_block_ids={1: [0]})
    assert found["input_ids"] == [9]
    rows.apply(StepPlan(2, removed=[1, 1, 5]))
    assert (rows.row_of, len(rows.free_rows)) == ({}, 1)


def test_a_sequence_may_fill_the_table_to_the_last_token() -> None:
    rows = table(max_num_seqs=1, max_model_len=6)
    step(rows, {1: 5}, new_sequences=[new(1, list(range(5)))], new_block_ids={1: [0, 1]})
    append(rows, [1], [5])
    found = step(rows, {1: 1})
    assert (found["input_ids"], found["positions"], found["slots"]) == ([5], [5], [5])
    assert found["block_tables"] == [[0, 1]]


def test_the_tensors_are_what_the_kernels_want() -> None:
    rows = table()
    plan = StepPlan(1, [1], [2], [new(1, [5, 6])], {1: [0]})
    rows.apply(plan)
    inputs = rows.prepare(plan)
    assert isinstance(inputs, StepInputs)
    for tensor in (inputs.input_ids, inputs.positions, *inputs.attention):
        assert (tensor.dtype, tensor.device.type) == (torch.int64, "cpu")


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_slots_follow_the_block_size(block_size: int) -> None:
    rows, blocks = table(block_size=block_size), [11, 4, 8, 2, 6]
    needed = blocks[: -(-5 // block_size)]
    found = step(rows, {1: 5}, new_sequences=[new(1, [0] * 5)], new_block_ids={1: needed})
    expected = {
        1: [11, 4, 8, 2, 6],
        3: [33, 34, 35, 12, 13],
        16: [176, 177, 178, 179, 180],
    }
    assert found["slots"] == expected[block_size]
