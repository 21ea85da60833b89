"""CUDA graphs of decodes: a model's launches, recorded once for each of some batch sizes.

A step is hundreds of launches of a few microseconds each; for a small batch the GPU is faster than
they are. A graph is one launch. It always reads and writes the same memory, so a batch is copied to
where its graph reads. One of n sequences goes through the next larger graph: rows that are left
over see a context of no tokens and are stored nowhere.

        n = 11 ─▶ size 16:   x x x x x x x x x x x . . . . .      hidden states of the first 11
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from nanovllm.kernels import AttentionBatch, KVCache, Ops
from nanovllm.models.llama import LlamaForCausalLM

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class StaticOps(Ops, Protocol):
    """Operations on batches of up to so many sequences with one token each, whose fields lie in
    one place."""

    def fill(self, batch: AttentionBatch) -> None:
        """Let the next replay be of this batch."""


class StaticBackend(Protocol):
    """A Backend whose launches can be recorded."""

    def plan_decodes(self, size: int, width: int, caches: list[KVCache]) -> StaticOps:
        """Operations for batches of up to `size` sequences, block tables of up to `width`."""


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes to record, up to max_num_seqs itself: powers of two up to 8, then steps of 8, and of
    an eighth of a power of two beyond 64, so that few rows are computed for nothing."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else max(8, 2 ** (size.bit_length() - 1) // 8)
    return [*sizes, max_num_seqs]


def obstacle(model: LlamaForCausalLM, backend: object, ranks: object) -> str:
    """Why steps cannot be recorded, or nothing."""
    if not model.recordable:
        return "the host takes part in this model's steps"
    if not hasattr(backend, "plan_decodes"):
        return "the attention backend plans each batch anew"
    return "ranks exchange parts within a step" if ranks is not None else ""


class CudaRecorder:
    """Records what a function launches, into a graph; all graphs share a pool of memory, as no two
    run at once."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()  # compile first
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        return graph.replay, out


class DecodeGraphs:
    """Graphs of a model for batches in which each sequence computes one token.

    Args:
        sizes: of batches, ascending. width: blocks of the longest block table.
        record: runs a function once and returns what runs it again, and where its result will be.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        backend: Any,
        caches: list[KVCache],
        sizes: list[int],
        width: int,
        record: Record,
    ) -> None:
        self.sizes, device = sizes, caches[0].k.device
        self.input_ids, self.positions = torch.zeros(
            (2, sizes[-1]), dtype=torch.int64, device=device
        )
        self.graphs: dict[int, tuple[StaticOps, Callable[[], None], Tensor]] = {}
        for size in reversed(sizes):  # the smaller ones find room in the largest one's memory
            ops = backend.plan_decodes(size, width, caches)
            self.graphs[size] = ops, *record(self._step(model, ops, size))

    def _step(self, model: LlamaForCausalLM, ops: Ops, size: int) -> Callable[[], Tensor]:
        def step() -> Tensor:
            hidden_SH: Tensor = model(self.input_ids[:size], self.positions[:size], ops)
            return hidden_SH

        return torch.inference_mode()(step)

    def cover(self, batch: AttentionBatch) -> bool:
        """Whether there is a graph for this batch."""
        num_seqs = len(batch.context_lens)
        return len(batch.slots) == num_seqs <= self.sizes[-1]

    def run(self, input_ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch) -> Tensor:
        """Hidden states [T, H] of a batch that is covered; overwritten by the next run."""
        num_seqs = len(input_ids_T)
        size = next(size for size in self.sizes if size >= num_seqs)
        ops, replay, hidden_SH = self.graphs[size]
        self.input_ids[:num_seqs] = input_ids_T
        self.positions[:num_seqs] = positions_T
        ops.fill(batch)
        replay()
        return hidden_SH[:num_seqs]
