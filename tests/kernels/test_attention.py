"""The reference equals a dense softmax written out here, and the CPU kernel equals the reference,
over batches that mix decodes and prefill chunks."""

import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.errors import MissingDependencyError
from nanovllm.kernels import AttentionBackend, AttentionBatch, KVCache, attention_backend, reference

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch.

    Attributes:
        sequences: (positions computed before, tokens of this step) of each.
        num_cached: leading tokens of each chunk whose keys are in the cache already: slot -1.
    """

    sequences: list[tuple[int, int]]
    num_cached: int = 0
    block_size: int = 16
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0


CASES = st.builds(
    Case,
    sequences=st.lists(
        st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))),
        min_size=1,
        max_size=5,
    ),
    num_cached=st.integers(0, 2),
    block_size=st.sampled_from([1, 3, 16]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.sampled_from([16, 64, 80]),
    window=st.one_of(st.none(), st.integers(1, 50)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)


class Batch:
    """Random values for a case: keys and values of every position, and where they are kept."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.dtype)

        self.case, size = case, case.block_size
        lengths = [start + count for start, count in case.sequences]
        heads = case.num_kv_heads
        self.queries = [random(n, heads * case.group, case.head_dim) for _, n in case.sequences]
        self.keys = [random(length, heads, case.head_dim) for length in lengths]
        self.values = [random(length, heads, case.head_dim) for length in lengths]
        longest = -(-max(lengths) // size)
        ids = torch.randperm(len(lengths) * longest + 2, generator=generator)
        self.tables = ids[: len(lengths) * longest].view(len(lengths), longest)
        places = [self.slots(i, torch.arange(length)) for i, length in enumerate(lengths)]
        slots = []
        for (start, count), place in zip(case.sequences, places, strict=True):
            new = place[start:].clone()
            new[: min(case.num_cached, count)] = -1
            slots.append(new)
        self.plan = AttentionBatch(
            torch.tensor([0, *(n for _, n in case.sequences)]).cumsum(0),
            torch.tensor(lengths),
            self.tables,
            torch.cat(slots),
        )
        # What no sequence may see is large, so that a mistake shows.
        shape = (len(ids), heads, size, case.head_dim)
        self.cache = KVCache(*(torch.full(shape, 100.0).to(case.dtype) for _ in range(2)))
        for i, (start, count) in enumerate(case.sequences):
            known = places[i][: start + min(case.num_cached, count)]
            self.cache.k[known // size, :, known % size] = self.keys[i][: len(known)]
            self.cache.v[known // size, :, known % size] = self.values[i][: len(known)]

    def slots(self, i: int, positions: Tensor) -> Tensor:
        size = self.case.block_size
        return self.tables[i][positions // size] * size + positions % size

    def run(self, backend: AttentionBackend) -> tuple[Tensor, KVCache]:
        """The attended values [T, N, D], and the cache afterwards."""
        starts = [start for start, _ in self.case.sequences]
        cache = KVCache(self.cache.k.clone(), self.cache.v.clone())
        new_keys, new_values = (
            torch.cat([part[start:] for part, start in zip(parts, starts, strict=True)])
            for parts in (self.keys, self.values)
        )
        skipped = self.plan.slots < 0  # must come from the cache
        new_keys[skipped], new_values[skipped] = 77.0, 77.0
        attention = backend.plan(self.plan, self.case.block_size, CPU)
        out = attention(torch.cat(self.queries), new_keys, new_values, cache, self.case.window)
        return out, cache

    def expected(self) -> Tensor:
        """Softmax over what each token sees, one token and one head at a time, in float64."""
        case = self.case
        rows = []
        for i, (start, count) in enumerate(case.sequences):
            for t in range(count):
                position = start + t
                first = 0 if case.window is None else max(0, position + 1 - case.window)
                for n in range(case.num_kv_heads * case.group):
                    keys = self.keys[i][first : position + 1, n // case.group].double()
                    values = self.values[i][first : position + 1, n // case.group].double()
                    scores = keys @ self.queries[i][t, n].double() / case.head_dim**0.5
                    rows.append(scores.softmax(0) @ values)
        return torch.stack(rows).view(-1, case.num_kv_heads * case.group, case.head_dim)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=TOLERANCE[actual.dtype], rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(case=CASES)
@example(case=Case(sequences=[(0, 1)], block_size=1, window=1))
@example(case=Case(sequences=[(31, 1), (0, 16), (15, 17)], num_cached=1))
def test_the_reference_is_a_softmax_over_what_each_token_sees(case: Case) -> None:
    batch = Batch(case)
    actual, _ = batch.run(reference)
    assert_near(actual, batch.expected())


@settings(max_examples=60, deadline=None)
@given(case=CASES)
@example(case=Case(sequences=[(300, 1), (0, 1), (17, 1)], head_dim=64, group=3))
@example(case=Case(sequences=[(300, 1), (5, 9)], window=33, dtype=torch.bfloat16, num_cached=1))
def test_the_cpu_kernel_is_the_reference(case: Case) -> None:
    batch = Batch(case)
    actual, cache = batch.run(attention_backend("cpu", CPU, case.dtype))
    expected, expected_cache = batch.run(reference)
    assert_near(actual, expected)
    assert torch.equal(cache.k, expected_cache.k)
    assert torch.equal(cache.v, expected_cache.v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_cpu_kernel_on_a_cpu(dtype: torch.dtype) -> None:
    assert attention_backend("auto", CPU, dtype).__name__ == "nanovllm.kernels.cpu"  # type: ignore[attr-defined]


def test_auto_is_the_reference_for_what_the_cpu_kernel_cannot_do() -> None:
    assert attention_backend("auto", CPU, torch.float16) is reference
    assert attention_backend("auto", torch.device("cuda"), torch.bfloat16) is reference


def test_without_numba_auto_is_the_reference_and_cpu_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "nanovllm.kernels.cpu", raising=False)
    assert attention_backend("auto", CPU, torch.float32) is reference
    with pytest.raises(MissingDependencyError, match=r"attention_backend='cpu' needs .* numba"):
        attention_backend("cpu", CPU, torch.float32)
