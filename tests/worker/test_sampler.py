"""Sampler: which token comes of given logits, row by row; small vocabularies, exact values."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.worker.sampler import Samples, sample
from tests.worker.rows import Row, row

NAN, INF = math.nan, math.inf


def tokens(logits: list[list[float]] | Tensor, *rows: Row) -> list[int]:
    """The tokens chosen, none of the rows being in error."""
    samples = sample(torch.as_tensor(logits, dtype=torch.float32).clone(), list(rows))
    assert samples.errors == {}
    return samples.token_ids


def draws(logits: list[float], seeds: list[int], **params: Any) -> list[int]:
    """A token for each seed, all in one batch."""
    rows = [row(seed=seed, **params) for seed in seeds]
    return tokens(torch.tensor(logits).expand(len(seeds), -1), *rows)


def chi_square(found: list[int], probabilities: list[float]) -> float:
    counts, n = Counter(found), len(found)
    assert all(probabilities[token] > 0 for token in counts)
    return sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probabilities) if p > 0)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


# Greedy


def test_greedy_takes_the_likeliest_token_of_each_row() -> None:
    rows = [row(temperature=0) for _ in range(3)]
    assert tokens([[1, 3, 2], [5, -1, 4], [-3, -2, -1]], *rows) == [1, 0, 2]


def test_greedy_ignores_the_seed_and_truncation() -> None:
    found = [
        tokens([[1, 3, 2.999]], row(temperature=0, seed=seed, top_p=0.9, top_k=2, min_p=0.1))
        for seed in range(20)
    ]
    assert found == [[1]] * 20


# Temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_over_many_seeds_follow_the_softmax(temperature: float) -> None:
    logits = [0.0, 1.0, 2.0, -1.0, 0.5, 1.5]
    found = draws(logits, list(range(5000)), temperature=temperature)
    assert chi_square(found, softmax(logits, temperature)) < 20.5  # 5 degrees of freedom: p > 0.001


def test_draws_along_one_sequence_follow_the_softmax() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    rows = [row(output=[1] * length, seed=7) for length in range(4000)]
    found = tokens(torch.tensor(logits).expand(4000, -1), *rows)
    assert chi_square(found, softmax(logits)) < 16.3  # 3 degrees of freedom: p > 0.001


@pytest.mark.parametrize(
    ("seed_step", "length_step"), [(1, 0), (0, 1), (1, 1), (1, -1), (2**32, 0)]
)
def test_draws_of_neighbouring_seeds_and_positions_are_independent(
    seed_step: int, length_step: int
) -> None:
    rows = []
    for i in range(3000):
        seed, length = 10_000 + 3 * (i % 60), 10 + 3 * (i // 60)
        rows.append(row(output=[0] * length, seed=seed))
        rows.append(row(output=[0] * (length + length_step), seed=seed + seed_step))
    found = tokens(torch.zeros(len(rows), 4), *rows)
    pairs = [4 * found[i] + found[i + 1] for i in range(0, len(found), 2)]
    assert chi_square(pairs, [1 / 16] * 16) < 37.7  # 15 degrees of freedom: p > 0.001


def test_a_token_without_probability_is_never_drawn() -> None:
    assert set(draws([-INF, 0.0, -INF, 0.0, -INF], list(range(500)))) == {1, 3}


def test_temperatures_at_the_ends_of_the_range() -> None:
    cold = draws([1.0, 1.001, 0.5], list(range(200)), temperature=1e-5)
    assert set(cold) == {1}
    hot = draws([30.0, 0.0], list(range(2000)), temperature=1e300)
    assert chi_square(hot, [0.5, 0.5]) < 10.8  # 1 degree of freedom: p > 0.001


def test_each_row_has_its_own_temperature() -> None:
    rows = [row(seed=i, temperature=t) for i in range(2000) for t in (0.5, 2.0)]
    found = tokens(torch.tensor([0.0, 1.0, 2.0]).expand(4000, -1), *rows)
    for kind, temperature in enumerate((0.5, 2.0)):
        expected = softmax([0.0, 1.0, 2.0], temperature)
        assert chi_square(found[kind::2], expected) < 13.8  # 2 degrees of freedom: p > 0.001


# Seeds


def test_the_same_seed_and_position_give_the_same_token_and_others_another() -> None:
    flat = [0.0] * 1000
    assert draws(flat, [5, 5, 5]) == draws(flat, [5]) * 3
    assert len(set(draws(flat, list(range(50))))) > 40
    assert draws(flat, [0]) != draws(flat, [2**62])
    later = tokens([flat], row(output=[1], seed=5))
    assert later != draws(flat, [5])


def test_a_draw_depends_on_the_length_so_far_and_not_on_what_the_tokens_are() -> None:
    flat = torch.zeros(1, 1000)
    first = tokens(flat, row(prompt=[1, 2, 3], seed=3))
    assert tokens(flat, row(prompt=[9], output=[8, 7], seed=3)) == first


PARAMS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63 - 1), "temperature": st.sampled_from([0.0, 0.3, 1.0, 3.0])},
    optional={
        "top_k": st.integers(1, 8),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 0.9),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 7), st.floats(-5, 5), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True),
        "logprobs": st.integers(-1, 8),
    },
)
ROWS = st.lists(
    st.tuples(
        st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8),
        st.lists(st.integers(0, 7), max_size=4),
        PARAMS,
    ),
    min_size=1,
    max_size=6,
)


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_row_gives_the_same_alone_and_at_any_place_of_any_batch(
    cases: list[tuple[list[float], list[int], dict[str, Any]]], random: Any
) -> None:
    def outcome(samples: Samples, i: int) -> tuple[object, ...]:
        return samples.token_ids[i], samples.logprobs.get(i), samples.errors.get(i)

    def run(batch: list[int]) -> Samples:
        rows = [row(output=cases[i][1], **cases[i][2]) for i in batch]
        return sample(torch.tensor([cases[i][0] for i in batch]), rows)

    order = list(range(len(cases)))
    random.shuffle(order)
    together = run(order)
    for place, i in enumerate(order):
        assert outcome(together, place) == outcome(run([i]), 0)


# Rows that cannot be sampled


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits", [[0.0, NAN, 1.0], [NAN] * 3, [-INF] * 3, [0.0, INF, 0.0], [INF, -INF, NAN]], ids=str
)
def test_a_row_without_a_distribution_fails_alone(temperature: float, logits: list[float]) -> None:
    rows = [row(temperature=temperature, seed=1) for _ in range(3)]
    samples = sample(torch.tensor([[0.0, 0.0, 9e9], logits, [9e9, 0.0, 0.0]]), rows)
    assert samples.token_ids == [2, -1, 0]
    assert list(samples.errors) == [1]
    assert samples.errors[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_which_nothing_may_be_sampled_fails_alone(temperature: float) -> None:
    rows = [
        row(temperature=0),
        row(temperature=temperature, allowed_token_ids=[2], min_tokens=1, stop_token_ids=[2]),
        row(temperature=temperature, allowed_token_ids=[1], bad_words_token_ids=[[1]]),
        row(temperature=temperature, allowed_token_ids=[1], top_k=2),
    ]
    samples = sample(torch.tensor([[1.0, 3.0, 2.0]] * 4), rows)
    assert samples.token_ids == [1, -1, -1, 1]
    assert list(samples.errors) == [1, 2]


def test_an_exception_in_one_row_ends_that_row_with_its_message() -> None:
    rows = [
        row(temperature=0, logit_bias={0: 9.0}),
        row(temperature=0, allowed_token_ids=[99]),
        row(temperature=0, logit_bias={-99: 1.0}),
        row(temperature=0, allowed_token_ids=[2]),
    ]
    samples = sample(torch.tensor([[1.0, 3.0, 2.0]] * 4), rows)
    assert samples.token_ids == [0, -1, -1, 2]
    assert list(samples.errors) == [1, 2]
    assert "99" in samples.errors[1] and "99" in samples.errors[2]


def test_a_failed_row_has_no_log_probabilities_and_the_others_do() -> None:
    rows = [row(temperature=0, logprobs=1), row(temperature=0, logprobs=1)]
    samples = sample(torch.tensor([[NAN, 0.0], [0.0, 1.0]]), rows)
    assert samples.token_ids == [-1, 1]
    assert list(samples.logprobs) == [1]


# Log probabilities


def test_logprobs_are_of_the_sampled_token_and_the_likeliest() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    samples = sample(torch.tensor([logits]), [row(allowed_token_ids=[2], logprobs=2)])
    found = samples.logprobs[0]
    assert found.token_ids == [2, 1, 3]
    assert found.logprobs == pytest.approx([math.log(0.2), math.log(0.4), math.log(0.3)], abs=1e-6)
    assert found.rank == 3


def test_logprobs_0_is_the_sampled_token_alone() -> None:
    samples = sample(torch.tensor([[0.0, 1.0, 0.0]]), [row(temperature=0, logprobs=0)])
    found = samples.logprobs[0]
    assert (found.token_ids, found.rank) == ([1], 1)
    assert found.logprobs == pytest.approx([math.log(softmax([0.0, 1.0, 0.0])[1])], abs=1e-6)


def test_logprobs_minus_1_is_the_whole_vocabulary_in_order() -> None:
    logits = [0.5, 2.0, -1.0, 1.0]
    samples = sample(torch.tensor([logits]), [row(temperature=0, logprobs=-1)])
    found = samples.logprobs[0]
    assert found.token_ids == [1, 1, 3, 0, 2]
    assert sum(map(math.exp, found.logprobs[1:])) == pytest.approx(1.0, abs=1e-6)


def test_rows_that_do_not_ask_get_no_logprobs() -> None:
    samples = sample(torch.zeros(3, 4), [row(seed=1), row(seed=1, logprobs=1), row(seed=1)])
    assert list(samples.logprobs) == [1]


def test_logprobs_are_the_models_own_before_everything_else() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    changes: list[dict[str, Any]] = [
        {"temperature": 0.1},
        {"top_k": 1},
        {"repetition_penalty": 5.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logit_bias": {1: 100.0}},
        {"allowed_token_ids": [3]},
        {"bad_words_token_ids": [[0]]},
        {"min_tokens": 9},
    ]
    rows = [row(output=[0], stop_token_ids=[0], seed=1, logprobs=4, **kind) for kind in changes]
    samples = sample(logits.repeat(len(rows), 1), rows)
    expected = [math.log(p) for p in softmax([2.0, 1.0, 0.0, -1.0])]
    for i, token_id in enumerate(samples.token_ids):
        found = samples.logprobs[i]
        assert found.token_ids == [token_id, 0, 1, 2, 3]
        assert found.logprobs == pytest.approx([expected[token_id], *expected], abs=1e-6)
        assert found.rank == token_id + 1
    assert samples.token_ids[4:6] == [1, 3]
