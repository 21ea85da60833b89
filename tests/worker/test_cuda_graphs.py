"""Which graph a batch is replayed from, what is padded, and that nothing of it shows: with a
recorder that runs the step again in place of a GPU's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import Angles, AttentionBatch, KVCache
from nanovllm.kernels.reference import ReferenceOps
from nanovllm.worker.cuda_graphs import DecodeGraphs, batch_sizes, obstacle
from nanovllm.worker.gpu_runner import GPURunner
from tests.kernels.test_triton import TINY


class StaticOps(ReferenceOps):
    """The reference on fields that stay where they are."""

    def __init__(self, size: int, width: int, caches: list[KVCache]) -> None:
        self.all_caches = caches
        self.batch = AttentionBatch(
            torch.arange(size + 1),
            torch.zeros(size, dtype=torch.int64),
            torch.zeros(size, width, dtype=torch.int64),
            torch.full((size,), -1),
        )

    def fill(self, batch: AttentionBatch) -> None:
        num_seqs, width = batch.block_tables.shape
        self.batch.context_lens.zero_()[:num_seqs] = batch.context_lens
        self.batch.block_tables[:num_seqs, :width] = batch.block_tables
        self.batch.slots.fill_(-1)[:num_seqs] = batch.slots

    def attend(
        self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, angles: Angles,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        super().__init__(self.batch, self.all_caches)
        return super().attend(layer, q_TND, k_TKD, v_TKD, angles, window)

    def attend_one(
        self, b: int, q_TND: Tensor, cache: KVCache, window: int | None, out_TND: Tensor
    ) -> None:
        if self.lengths[b]:
            super().attend_one(b, q_TND, cache, window, out_TND)
        else:
            out_TND[b] = 0


class StaticBackend:
    def plan_decodes(self, size: int, width: int, caches: list[KVCache]) -> StaticOps:
        return StaticOps(size, width, caches)


class FakeRecorder:
    """Remembers which of the recorded steps are run again."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = run()
        self.recorded.append(len(out))

        def replay() -> None:
            self.replayed.append(len(out))
            out.copy_(run())

        return replay, out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    settings = {"load_format": "dummy", "dtype": "float32", "attention_backend": "reference"}
    with LLM(
        folder, **settings, skip_tokenizer_init=True, async_scheduling=True, num_kv_blocks=64,
        block_size=4, max_num_seqs=12, max_num_batched_tokens=16,
    ) as llm:  # fmt: skip
        yield llm


def runner_of(llm: LLM) -> GPURunner:
    runner = llm.engine.core.executor.runner  # type: ignore[attr-defined]
    assert isinstance(runner, GPURunner)
    return runner


def with_graphs(llm: LLM, sizes: list[int]) -> FakeRecorder:
    runner, recorder = runner_of(llm), FakeRecorder()
    width = runner.table.block_tables.shape[1]
    runner.graphs = DecodeGraphs(
        runner.model, StaticBackend(), runner.caches, sizes, width, recorder
    )
    return recorder


def test_the_sizes_that_are_recorded() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(12) == [1, 2, 4, 8, 12]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(100) == [1, 2, 4, 8, *range(16, 100, 8), 100]
    assert batch_sizes(512) == [
        1, 2, 4, 8, *range(16, 128, 8), *range(128, 256, 16), *range(256, 512, 32), 512,
    ]  # fmt: skip


@pytest.mark.parametrize("max_num_seqs", [1, 12, 20, 100, 512])
def test_every_batch_has_a_graph_that_is_not_much_larger(max_num_seqs: int) -> None:
    sizes = batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    for num_seqs in range(1, max_num_seqs + 1):
        size = next(size for size in sizes if size >= num_seqs)
        assert size <= max(8, num_seqs + 8, num_seqs * 9 / 8 + 1)


@pytest.mark.parametrize("num_seqs", [1, 3, 8, 11, 12])
def test_a_batch_goes_through_the_next_larger_graph(llm: LLM, num_seqs: int) -> None:
    recorder = with_graphs(llm, batch_sizes(12))
    assert recorder.recorded == [12, 8, 4, 2, 1]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    llm.generate([[i + 1] for i in range(num_seqs)], params, use_tqdm=False)
    assert recorder.replayed == [min(s for s in (1, 2, 4, 8, 12) if s >= num_seqs)] * 3


def test_rows_that_are_left_over_are_stored_nowhere(llm: LLM) -> None:
    with_graphs(llm, [12])
    caches = runner_of(llm).caches
    for cache in caches:
        cache.k.fill_(7.0)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate([[5], [9]], params, use_tqdm=False)  # two sequences, positions 0 and 1
    for cache in caches:
        written = (cache.k != 7.0).any(dim=-1).any(dim=1)  # [blocks, block_size]
        assert written.sum() == 4
        assert written[:2, :2].all()


def test_tokens_are_the_same_with_graphs_and_without(llm: LLM) -> None:
    """Chunks and decodes mixed run eagerly, decodes alone from graphs; drawn tokens too."""
    prompts = [[(7 * i + j) % 100 + 1 for j in range(3 + 5 * i)] for i in range(9)]
    params = [
        SamplingParams(temperature=0.9 * (i % 2), max_tokens=16 + i, ignore_eos=True, seed=i)
        for i in range(9)
    ]
    expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    llm.reset_prefix_cache()
    recorder = with_graphs(llm, batch_sizes(12))
    found = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    assert found == expected
    assert set(recorder.replayed) == {1, 2, 4, 8}


def test_what_is_not_recorded_and_why(llm: LLM) -> None:
    runner = runner_of(llm)
    plans_anew = obstacle(runner.model, runner.backend, None)
    assert plans_anew == "the attention backend plans each batch anew"
    assert obstacle(runner.model, StaticBackend(), None) == ""
    assert obstacle(runner.model, StaticBackend(), object()) == (
        "ranks exchange parts within a step"
    )
    assert not with_graphs(llm, [4]).replayed
    assert runner.graphs is not None
    five = AttentionBatch(*[torch.zeros(5, dtype=torch.int64)] * 4)
    assert not runner.graphs.cover(five)  # larger than any
    two_tokens = AttentionBatch(*[torch.zeros(1, dtype=torch.int64)] * 3, torch.zeros(2))
    assert not runner.graphs.cover(two_tokens)
