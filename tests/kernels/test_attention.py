"""The reference equals a dense softmax written out here, and the fast kernels equal the reference,
over batches that mix decodes and prefill chunks."""

import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.errors import ConfigError, MissingDependencyError
from nanovllm.kernels import AttentionBatch, Backend, KVCache, choose_backend, native, reference

CPU = torch.device("cpu")
BF16 = torch.bfloat16
OBSTACLE = native.obstacle(CPU, BF16, 64, 16)
needs_native = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "none")
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


SEQUENCES = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))),
    min_size=1,
    max_size=5,
)
CASES = st.builds(
    Case,
    sequences=SEQUENCES,
    num_cached=st.integers(0, 2),
    block_size=st.sampled_from([1, 3, 16]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.sampled_from([16, 64, 80]),
    window=st.one_of(st.none(), st.integers(1, 50)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)


# What the native kernel can do; contexts of more than one of its chunks and segments too.
NATIVE_CASES = st.builds(
    Case,
    sequences=st.one_of(
        SEQUENCES,
        st.lists(
            st.tuples(st.integers(0, 600), st.sampled_from([1, 1, 2, 50])), min_size=1, max_size=3
        ),
    ),
    num_cached=st.integers(0, 2),
    block_size=st.sampled_from([16, 32, 48]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 7, 50]),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    window=st.one_of(st.none(), st.integers(1, 50), st.integers(100, 400)),
    dtype=st.just(BF16),
    seed=st.integers(0, 2**16),
)


class Batch:
    """Random values for a case: keys and values of every position, and where they are kept.

    Args:
        turn: the largest angle that queries and keys are turned by, in radians.
    """

    def __init__(self, case: Case, turn: float = 0) -> None:
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
        half_TD = (
            torch.rand((len(torch.cat(slots)), case.head_dim // 2), generator=generator) * turn
        )
        angles_TD = half_TD.repeat(1, 2)
        self.angles = angles_TD.cos().to(case.dtype), angles_TD.sin().to(case.dtype)
        self.cache = KVCache(*(torch.full(shape, 100.0).to(case.dtype) for _ in range(2)))
        for i, (start, count) in enumerate(case.sequences):
            known = places[i][: start + min(case.num_cached, count)]
            self.cache.k[known // size, :, known % size] = self.keys[i][: len(known)]
            self.cache.v[known // size, :, known % size] = self.values[i][: len(known)]

    def slots(self, i: int, positions: Tensor) -> Tensor:
        size = self.case.block_size
        return self.tables[i][positions // size] * size + positions % size

    def run(self, backend: Backend, cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """The attended values [T, N, D], and the cache afterwards."""
        starts = [start for start, _ in self.case.sequences]
        cache = cache or KVCache(self.cache.k.clone(), self.cache.v.clone())
        new_keys, new_values = (
            torch.cat([part[start:] for part, start in zip(parts, starts, strict=True)])
            for parts in (self.keys, self.values)
        )
        skipped = self.plan.slots < 0  # must come from the cache
        new_keys[skipped], new_values[skipped] = 77.0, 77.0
        # Side by side, as a merged product leaves them.
        counts = [part.shape[1] for part in (self.queries[0], new_keys, new_values)]
        heads = torch.cat((torch.cat(self.queries), new_keys, new_values), dim=1).split(counts, 1)
        out = backend.plan(self.plan, [cache]).attend(0, *heads, self.angles, self.case.window)
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
    rtol = 0 if actual.dtype == torch.float32 else 2**-7  # a step of bfloat16
    atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


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
    batch = Batch(case, turn=6)
    actual, cache = batch.run(choose("cpu", case.dtype))
    expected, expected_cache = batch.run(reference)
    assert_near(actual, expected)
    assert torch.equal(cache.k, expected_cache.k)
    assert torch.equal(cache.v, expected_cache.v)


@needs_native
@settings(max_examples=80, deadline=None)
@given(case=NATIVE_CASES)
@example(case=Case(sequences=[(0, 1)], head_dim=32, dtype=BF16, window=1))
@example(case=Case(sequences=[(700, 1), (300, 60), (0, 1)], head_dim=64, group=3, dtype=BF16))
@example(case=Case(sequences=[(16, 1), (15, 2)], head_dim=64, dtype=BF16, num_cached=1))
def test_the_native_kernel_is_the_reference(case: Case) -> None:
    batch = Batch(case, turn=6)
    actual, cache = batch.run(native, to_units(batch.cache))
    expected, expected_cache = batch.run(reference)
    assert_near(actual, expected)
    found = from_units(cache)
    slots = batch.plan.slots[batch.plan.slots >= 0]
    block, offset = slots // case.block_size, slots % case.block_size
    assert_near(found.k[block, :, offset], expected_cache.k[block, :, offset])
    assert torch.equal(found.v[block, :, offset], expected_cache.v[block, :, offset])
    untouched = torch.ones(batch.cache.k.shape[0] * case.block_size, dtype=torch.bool)
    untouched[slots], untouched[slots[slots % 2 == 0] + 1] = False, False
    for after, before in zip(found, batch.cache, strict=True):
        after, before = (part.transpose(1, 2).flatten(0, 1) for part in (after, before))
        assert torch.equal(after[untouched], before[untouched])


def to_units(cache: KVCache) -> KVCache:
    """The native arrangement: 16 positions together, keys in pairs of D, values in pairs of
    positions for 32 of D at a time."""
    k, v = (part.unflatten(2, (-1, 16)) for part in cache)  # [blocks, K, units, 16, D]
    keys = k.unflatten(4, (-1, 2)).transpose(3, 4)
    values = v.unflatten(3, (8, 2)).unflatten(5, (-1, 32)).permute(0, 1, 2, 5, 3, 6, 4)
    return KVCache(*(part.reshape(cache.k.shape).contiguous() for part in (keys, values)))


def from_units(cache: KVCache) -> KVCache:
    size, units = cache.k.shape[3], cache.k.shape[2] // 16
    keys = cache.k.reshape(*cache.k.shape[:2], units, size // 2, 16, 2).transpose(3, 4)
    values = cache.v.reshape(*cache.k.shape[:2], units, size // 32, 8, 32, 2)
    values = values.permute(0, 1, 2, 4, 6, 3, 5)
    return KVCache(keys.reshape(cache.k.shape), values.reshape(cache.k.shape))


@needs_native
def test_leftovers_that_are_no_numbers_do_not_reach_another_sequence() -> None:
    batch = Batch(Case(sequences=[(20, 1), (0, 3), (4, 1)], head_dim=64, dtype=BF16))
    expected, _ = batch.run(native, to_units(batch.cache))
    cache = KVCache(batch.cache.k.clone(), batch.cache.v.clone())
    seen = torch.zeros(len(cache.k) * 16, dtype=torch.bool)
    for i, (start, count) in enumerate(batch.case.sequences):
        seen[batch.slots(i, torch.arange(start + count))] = True
    block, offset = (~seen).nonzero()[:, 0] // 16, (~seen).nonzero()[:, 0] % 16
    cache.k[block, :, offset], cache.v[block, :, offset] = torch.nan, torch.nan
    actual, _ = batch.run(native, to_units(cache))
    assert torch.equal(actual, expected)


def choose(name: str, dtype: torch.dtype, device: str = "cpu", *shape: int) -> Backend:
    return choose_backend(name, torch.device(device), dtype, *(shape or (64, 16)))


@needs_native
def test_auto_is_the_native_kernels_for_bfloat16() -> None:
    assert choose("auto", BF16) is native


@pytest.mark.parametrize("shape", [(80, 16), (64, 8)])
def test_auto_is_the_cpu_kernel_for_what_the_native_ones_cannot_do(shape: tuple[int, int]) -> None:
    assert choose("auto", BF16, "cpu", *shape).__name__ == "nanovllm.kernels.cpu"  # type: ignore[attr-defined]
    assert choose("auto", torch.float32).__name__ == "nanovllm.kernels.cpu"  # type: ignore[attr-defined]


def test_naming_the_native_kernels_for_what_they_cannot_do_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"native.*: needs heads of 32·n and blocks of 16·n, not 80 and 16"
    ):
        choose("native", BF16, "cpu", 80, 16)
    with pytest.raises(ConfigError, match=r"computes in bfloat16 on a CPU, not in torch.float32"):
        choose("native", torch.float32)


def test_naming_the_cpu_kernel_for_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cpu.*: computes in float32 or bfloat16 on a CPU, not"):
        choose("cpu", torch.float16)


def test_a_cpu_without_the_instructions_gets_the_next_best(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    assert choose("auto", BF16).__name__ == "nanovllm.kernels.cpu"  # type: ignore[attr-defined]
    assert caplog.text == ""  # nothing that its user could do about it
    with pytest.raises(ConfigError, match=r"this CPU lacks avx512_bf16, avx512_vnni"):
        choose("native", BF16)


def test_a_cpu_that_could_but_has_no_compiler_gets_the_next_best_and_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(native.NEEDED_FLAGS))
    monkeypatch.setattr(native, "functions", native.functions.__wrapped__)
    monkeypatch.setattr(native.build, "compiler", lambda: None)
    assert choose("auto", BF16).__name__ == "nanovllm.kernels.cpu"  # type: ignore[attr-defined]
    assert "no native kernels: needs a C++ compiler: install g++, or set CXX" in caplog.text


def test_auto_is_the_reference_for_what_the_cpu_kernel_cannot_do() -> None:
    assert choose("auto", torch.float16) is reference
    assert choose("auto", BF16, "cuda") is reference


def test_without_numba_auto_is_the_reference_and_cpu_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "nanovllm.kernels.cpu", raising=False)
    assert choose("auto", torch.float32) is reference
    with pytest.raises(MissingDependencyError, match=r"attention_backend='cpu' needs .* numba"):
        choose("cpu", torch.float32)
