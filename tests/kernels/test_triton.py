"""The Triton kernels, interpreted on the CPU, equal the reference over batches of many shapes."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed")

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ConfigError, MissingDependencyError
from nanovllm.kernels import Angles, AttentionBatch, Form, KVCache, choose_backend, reference
from nanovllm.kernels.triton import MIN_SPLIT, Triton, split
from tests.kernels.test_attention import Batch, Case

CPU = torch.device("cpu")
DTYPES = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
CASES = st.builds(
    Case,
    sequences=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 30), st.integers(1, 40)),
            st.tuples(st.integers(0, 700), st.sampled_from([1, 1, 3])),
        ),
        min_size=1,
        max_size=3,
    ),
    num_cached=st.integers(0, 2),
    block_size=st.sampled_from([1, 5, 16, 48]),
    num_kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3, 4, 7, 17]),
    head_dim=st.sampled_from([16, 24, 64, 80, 96, 256]),
    window=st.one_of(st.none(), st.integers(1, 50), st.integers(100, 400)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[actual.dtype]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[actual.dtype], rtol=rtol)


@settings(max_examples=20, deadline=None)
@given(case=CASES, num_programs=st.sampled_from([1, 8, 64]))
@example(case=Case(sequences=[(0, 1)], block_size=1, window=1), num_programs=1)
@example(case=Case(sequences=[(1100, 1), (3, 1), (0, 1)], group=3), num_programs=64)
@example(case=Case(sequences=[(600, 3), (31, 1), (15, 17)], num_cached=1), num_programs=64)
@example(case=Case(sequences=[(600, 1), (9, 34)], window=33, group=5), num_programs=64)
def test_attention_is_the_reference(case: Case, num_programs: int) -> None:
    batch = Batch(case, turn=6)
    actual, cache = batch.run(Triton(num_programs))
    expected, expected_cache = batch.run(reference)
    assert_near(actual, expected)
    assert_near(cache.k, expected_cache.k)
    assert torch.equal(cache.v, expected_cache.v)


@pytest.mark.parametrize("num_programs", [1, 64])
def test_a_padded_row_stores_nothing_and_gets_zeros(num_programs: int) -> None:
    batch = Batch(Case(sequences=[(600, 1), (4, 1)]))
    _, _, tables, slots = batch.plan
    padded = AttentionBatch(
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([601, 5, 0]),
        torch.cat((tables, tables[:1])),
        torch.cat((slots, torch.tensor([-1]))),
    )
    before = batch.cache.k.clone()
    ops = Triton(num_programs).plan(padded, [batch.cache])
    q, k, v = torch.randn(3, 4, 16), torch.full((3, 2, 16), 5.0), torch.full((3, 2, 16), 6.0)
    out = ops.attend(0, q, k, v, (torch.ones(3, 16), torch.zeros(3, 16)), None)
    assert torch.equal(out[2], torch.zeros(4, 16))
    assert not out[:2].isnan().any()
    changed = (batch.cache.k != before).any(-1).any(1).nonzero().tolist()
    assert sorted(changed) == sorted([slot // 16, slot % 16] for slot in slots.tolist())


class FourRows:
    """A backend of DecodeOps for four sequences, whatever a batch has; the rows beyond it are
    checked and cut off."""

    def __init__(self, num_programs: int, caches: list[KVCache]) -> None:
        self.ops = Triton(num_programs).plan_decodes(4, 60, caches)

    def plan(self, batch: AttentionBatch, caches: list[KVCache]) -> "FourRows":
        self.ops.fill(batch)
        self.ops.caches = caches
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, angles: Angles, *rest) -> Tensor:
        def padded(x: Tensor) -> Tensor:
            return torch.cat((x, torch.ones(4 - len(x), *x.shape[1:])))

        heads = padded(torch.cat((q, k, v), dim=1)).split([q.shape[1], k.shape[1], v.shape[1]], 1)
        out = self.ops.attend(layer, *heads, (padded(angles[0]), padded(angles[1])), *rest)
        assert torch.equal(out[len(q) :], torch.zeros_like(out[len(q) :]))
        return out[: len(q)]


@settings(max_examples=12, deadline=None)
@given(
    contexts=st.lists(st.sampled_from([0, 3, 17, 300, 700]), min_size=1, max_size=4),
    num_programs=st.sampled_from([1, 16, 64]),
    window=st.sampled_from([None, 40]),
    seed=st.integers(0, 2**16),
)
def test_decodes_in_fields_that_stay_are_the_reference(
    contexts: list[int], num_programs: int, window: int | None, seed: int
) -> None:
    """One batch after another: the first leaves nothing behind."""
    before = Batch(Case(sequences=[(900, 1)] * 4))
    backend = FourRows(num_programs, [before.cache])
    before.run(backend)
    batch = Batch(Case(sequences=[(n, 1) for n in contexts], window=window, seed=seed), turn=3)
    expected, expected_cache = batch.run(reference)
    found, cache = batch.run(backend)
    assert_near(found, expected)
    for part, expected_part in zip(cache, expected_cache, strict=True):
        assert_near(part, expected_part)


def test_what_no_sequence_may_see_may_be_no_number() -> None:
    batch = Batch(Case(sequences=[(300, 1), (0, 3), (4, 1)]))
    expected, _ = batch.run(Triton(64))
    for part in batch.cache:
        part[part == 100] = torch.nan
    actual, _ = batch.run(Triton(64))
    assert torch.equal(actual, expected)


def test_few_long_contexts_are_split_and_many_are_not() -> None:
    assert split(torch.tensor([4096, 0]), wanted=16, step=64) == (16, 256)
    assert split(torch.tensor([4096] + 63 * [64]), wanted=16, step=64) == (16, 256)
    assert split(torch.full((64,), 1000), wanted=16, step=64) == (1, 1024)
    assert split(torch.tensor([MIN_SPLIT]), wanted=16, step=64) == (1, 256)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    heads=st.sampled_from([1, 3]),
    size=st.sampled_from([16, 48, 80, 300]),
    dtype=st.sampled_from(DTYPES),
)
def test_the_other_operations_are_the_reference(
    rows: int, heads: int, size: int, dtype: torch.dtype
) -> None:
    batch = Batch(Case(sequences=[(0, 1)]))
    ops, expected = (backend.plan(batch.plan, [batch.cache]) for backend in (Triton(1), reference))
    generator = torch.Generator().manual_seed(rows * size)
    wide = torch.randn((rows, heads + 1, size), generator=generator).to(dtype)
    x, weight = wide[:, :heads], torch.rand(size, generator=generator).to(dtype)
    assert_near(ops.norm(x, weight, 1e-5), expected.norm(x, weight, 1e-5))
    x, residual = wide[:, 0].contiguous(), wide[:, 1].contiguous()
    streams = residual.clone(), residual.clone()
    assert_near(
        ops.add_norm(x, streams[0], weight, 1e-5),
        expected.add_norm(x, streams[1], weight, 1e-5),
    )
    assert_near(*streams)  # the interpreter cuts a bfloat16 off where others round it
    matrix, bias = torch.randn((2 * rows, size)).to(dtype) / size, torch.randn(2 * rows).to(dtype)
    for gated in (False, True):
        for result in (dtype, torch.float32):
            form = Form(dtype, result, gated=gated)
            product, like = (b.pack(matrix, bias, form) for b in (Triton(1), reference))
            torch.testing.assert_close(product(x), like(x), atol=TOLERANCE[dtype], rtol=2**-7)


def test_a_product_of_no_rows_is_empty() -> None:
    product = Triton(1).pack(torch.ones(8, 4), None, Form(torch.float32, torch.float32, gated=True))
    assert product(torch.ones(0, 4)).shape == (0, 4)


def test_a_model_says_the_same_with_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 8]]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 64}
    settings |= {"dtype": "float32", "num_kv_blocks": 16, "block_size": 4, "device": "cpu"}
    said = {}
    for name in ("triton", "reference"):
        with LLM(tmp_path, attention_backend=name, max_num_batched_tokens=6, **settings) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            said[name] = [output.outputs[0].token_ids for output in outputs]
    assert said["triton"] == said["reference"]
    assert [len(ids) for ids in said["triton"]] == [4, 4]


def test_what_it_cannot_do_and_its_absence_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_backend("triton", CPU, torch.float16, 24, 5), Triton)
    with pytest.raises(ConfigError, match=r"triton.*even heads up to 256, not .*float64 and 64"):
        choose_backend("triton", CPU, torch.float64, 64, 16)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"needs a GPU .*, not cpu; the nearest is auto"):
        choose_backend("triton", CPU, torch.float32, 64, 16)
    monkeypatch.setitem(sys.modules, "nanovllm.kernels.triton", None)
    with pytest.raises(MissingDependencyError, match=r"attention_backend='triton' needs .* triton"):
        choose_backend("triton", CPU, torch.float32, 64, 16)
    assert choose_backend("auto", torch.device("cuda"), torch.float16, 64, 16) is reference
