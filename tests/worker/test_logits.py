"""What sampling parameters do to logits: exact values, and truncation against a naive version."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanovllm.worker.logits import process
from tests.worker.rows import Row, row

INF = math.inf


def processed(logits: list[list[float]], *rows: Row) -> list[list[float]]:
    """The logits that each row samples from, none being in error."""
    errors: dict[int, str] = {}
    result = process(torch.tensor(logits), list(rows), errors)
    assert errors == {}
    return result.tolist()


def one(logits: list[float], **params: Any) -> list[float]:
    [result] = processed([logits], row(**params))
    return result


def kept(probabilities: list[float], **params: Any) -> set[int]:
    """The tokens that may be sampled."""
    result = one([math.log(p) for p in probabilities], **params)
    return {i for i, logit in enumerate(result) if logit > -INF}


# Penalties


def test_the_repetition_penalty_is_on_tokens_of_prompt_and_output() -> None:
    logits = [2.0, -2.0, 3.0, -1.0, 0.5, 0.0]
    result = one(logits, prompt=[0, 5], output=[1, 1, 4], repetition_penalty=2.0)
    assert result == [1.0, -4.0, 3.0, -1.0, 0.25, 0.0]


def test_a_repetition_penalty_below_1_makes_repeating_likelier() -> None:
    assert one([2.0, -2.0, 3.0], prompt=[0, 1], repetition_penalty=0.5) == [4.0, -1.0, 3.0]


def test_the_frequency_penalty_counts_tokens_of_the_output_only() -> None:
    result = one([5.0, 5.0, 5.0], prompt=[0, 0], output=[1, 2, 1], frequency_penalty=0.5)
    assert result == [5.0, 4.0, 4.5]


def test_the_presence_penalty_is_taken_once_from_tokens_of_the_output_only() -> None:
    result = one([5.0, 5.0, 5.0], prompt=[0, 0], output=[1, 2, 1], presence_penalty=0.5)
    assert result == [5.0, 4.5, 4.5]


def test_negative_penalties_encourage() -> None:
    result = one([0.0, 0.0], output=[1, 1], presence_penalty=-1.0, frequency_penalty=-0.25)
    assert result == [0.0, 1.5]


def test_all_penalties_together_in_vllms_order() -> None:
    result = one(
        [4.0, 4.0, -4.0, 4.0],
        prompt=[0],
        output=[1, 1, 2],
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    assert result == [2.0, 2.0 - 1.0 - 0.25, -8.0 - 0.5 - 0.25, 4.0]


def test_penalties_before_the_first_output_token() -> None:
    result = one([1.0, 2.0], prompt=[1], frequency_penalty=1.0, presence_penalty=1.0)
    assert result == [1.0, 2.0]


# Biases and masks


def test_a_bias_is_added_and_clipped_to_100() -> None:
    result = one([1.0, 1.0, 1.0, 1.0], logit_bias={0: 0.5, 1: 1e6, 2: -1e6})
    assert result == [1.5, 101.0, -99.0, 1.0]


def test_a_bias_comes_before_the_repetition_penalty() -> None:
    assert one([1.0, 1.0], prompt=[0], logit_bias={0: 3.0}, repetition_penalty=2.0) == [2.0, 1.0]


def test_only_allowed_tokens_keep_their_logits() -> None:
    assert one([1.0, 2.0, 3.0, 4.0], allowed_token_ids=[2, 0, 2]) == [1.0, -INF, 3.0, -INF]


def test_a_bias_allows_nothing_that_is_not_allowed() -> None:
    assert one([1.0, 2.0], allowed_token_ids=[0], logit_bias={1: 100.0}) == [1.0, -INF]


def test_a_bad_word_of_one_token_is_never_sampled() -> None:
    assert one([1.0, 2.0, 3.0], bad_words_token_ids=[[1]]) == [1.0, -INF, 3.0]
    assert one([1.0, 2.0, 3.0], bad_words_token_ids=[[1], [2]]) == [1.0, -INF, -INF]


@pytest.mark.parametrize(
    ("prompt", "output", "banned"),
    [
        ([0], [], False),
        ([0], [3], False),
        ([0], [3, 4], True),
        ([0], [9, 3, 4], True),
        ([0], [3, 4, 0], False),
        ([0], [3, 0, 4], False),
        ([0], [4], False),  # shorter than what comes before the last token
        ([3, 4], [], False),  # the prompt may hold it
        ([0, 3], [4], False),
    ],
)
def test_a_bad_word_of_several_tokens_is_not_completed(
    prompt: list[int], output: list[int], banned: bool
) -> None:
    logits = [0.0] * 10
    result = one(logits, prompt=prompt, output=output, bad_words_token_ids=[[3, 4, 5]])
    assert [i for i, logit in enumerate(result) if logit == -INF] == ([5] if banned else [])


def test_bad_words_that_begin_alike_are_told_apart() -> None:
    words = [[3, 4], [3, 5, 6], [7]]
    result = one([0.0] * 10, output=[3], bad_words_token_ids=words)
    assert [i for i, logit in enumerate(result) if logit == -INF] == [4, 7]
    result = one([0.0] * 10, output=[3, 5], bad_words_token_ids=words)
    assert [i for i, logit in enumerate(result) if logit == -INF] == [6, 7]


@pytest.mark.parametrize(("length", "masked"), [(0, True), (1, True), (2, False), (3, False)])
def test_stop_tokens_wait_for_min_tokens(length: int, masked: bool) -> None:
    result = one([1.0] * 4, output=[0] * length, stop_token_ids=[2, 3], min_tokens=2)
    assert result == ([1.0, 1.0, -INF, -INF] if masked else [1.0] * 4)


def test_a_prompt_does_not_count_towards_min_tokens() -> None:
    result = one([1.0, 1.0], prompt=[0] * 5, stop_token_ids=[1], min_tokens=2)
    assert result == [1.0, -INF]


# Truncation


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=1) == {1}
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=3) == {1, 2, 3}


@pytest.mark.parametrize("top_k", [-1, 0, 4, 5, 10**12])
def test_top_k_that_is_off_or_not_below_the_vocabulary_keeps_all(top_k: int) -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=top_k, min_p=1e-9) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = [0.1, 0.4, 0.2, 0.3]
    assert kept(probabilities, top_p=0.39) == {1}
    assert kept(probabilities, top_p=0.41) == {1, 3}
    assert kept(probabilities, top_p=0.69) == {1, 3}
    assert kept(probabilities, top_p=0.71) == {1, 3, 2}
    assert kept(probabilities, top_p=0.91) == {0, 1, 2, 3}


def test_a_tiny_top_p_keeps_the_likeliest() -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=1e-30) == {1}


def test_min_p_is_a_share_of_the_likeliest() -> None:
    probabilities = [0.1, 0.4, 0.2, 0.3]
    assert kept(probabilities, min_p=0.24) == {0, 1, 2, 3}
    assert kept(probabilities, min_p=0.26) == {1, 2, 3}
    assert kept(probabilities, min_p=0.76) == {1}
    assert kept(probabilities, min_p=1.0) == {1}


def test_what_is_kept_keeps_its_logit() -> None:
    assert one([1.0, 4.0, 2.0, 3.0], top_k=2, temperature=0.5) == [-INF, 4.0, -INF, 3.0]


def test_top_p_is_of_what_top_k_left() -> None:
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5) == {0, 1}
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5, top_k=2) == {0}  # 0.4 of 0.7 is more than half


def test_top_p_is_of_what_min_p_left() -> None:
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.75) == {0, 1, 2}
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.75, min_p=0.4) == {0, 1}  # 0.7 of 0.9


def test_truncation_comes_after_temperature() -> None:
    assert kept([0.64, 0.32, 0.04], top_p=0.7) == {0, 1}
    assert kept([0.64, 0.32, 0.04], top_p=0.7, temperature=0.5) == {0}  # 0.64^2 : 0.32^2 : 0.04^2
    assert kept([0.64, 0.32, 0.04], min_p=0.2) == {0, 1}
    assert kept([0.64, 0.32, 0.04], min_p=0.2, temperature=2.0) == {0, 1, 2}  # 0.8 : 0.57 : 0.2


def test_truncation_comes_after_penalties_and_masks() -> None:
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=1, bad_words_token_ids=[[0]]) == {1}
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=1, output=[0], presence_penalty=2.0) == {1}
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5, allowed_token_ids=[2, 3]) == {2}
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=3, allowed_token_ids=[2, 3]) == {2, 3}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}])
def test_equal_logits_stay_together(params: dict[str, Any]) -> None:
    assert kept([0.3, 0.05, 0.3, 0.05, 0.3], **params) == {0, 2, 4}
    assert kept([0.2] * 5, **params) == {0, 1, 2, 3, 4}


def test_each_row_is_truncated_by_its_own_parameters() -> None:
    logits = [[4.0, 3.0, 2.0, 1.0]] * 5
    rows = [row(top_k=1), row(), row(min_p=0.3), row(temperature=0, top_k=1), row(top_k=3)]
    assert processed(logits, *rows) == [
        [4.0, -INF, -INF, -INF],
        [4.0, 3.0, 2.0, 1.0],
        [4.0, 3.0, -INF, -INF],
        [4.0, 3.0, 2.0, 1.0],  # the likeliest is taken anyway
        [4.0, 3.0, 2.0, -INF],
    ]


def naively_kept(
    logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> set[int] | None:
    """The same from the definitions. None if rounding would decide."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    if min_p > 0 and np.isclose(weights, min_p, rtol=1e-9, atol=0).any():
        return None
    left = [i for i in np.argsort(-scaled, kind="stable") if weights[i] >= min_p]
    if top_k > 0:
        left = left[:top_k]
    before = (np.cumsum(weights[left]) - weights[left]) / weights[left].sum()
    if top_p < 1:
        if np.isclose(before, top_p, rtol=1e-9, atol=0).any():
            return None
        left = [i for i, mass in zip(left, before, strict=True) if mass < top_p]
    floor = scaled[left].min()
    return {int(i) for i in np.flatnonzero((scaled >= floor) & (weights >= min_p))}


TRUNCATION = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.5, 1.0, 1.7]),
        "top_k": st.one_of(st.just(0), st.integers(1, 12)),
        "top_p": st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    }
)
LOGITS = st.one_of(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=12),  # many ties
)


@given(LOGITS, TRUNCATION)
@settings(max_examples=200, deadline=None)
def test_truncation_of_a_small_vocabulary_is_that_of_the_definitions(
    logits: list[float], params: dict[str, Any]
) -> None:
    expected = naively_kept(np.array(logits), **params)
    assume(expected is not None)
    result = one(logits, **params)
    assert {i for i, logit in enumerate(result) if logit > -INF} == expected


@pytest.mark.parametrize("vocab_size", [255, 256, 257, 300, 4096, 4097, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
def test_truncation_of_a_large_vocabulary_is_that_of_the_definitions(
    vocab_size: int, spread: float
) -> None:
    generator = np.random.default_rng(vocab_size)
    cases = [
        {"top_k": k, "top_p": p, "min_p": m}
        for k, p, m in [
            (0, 0.001, 0.0),
            (0, 0.3, 0.0),
            (0, 0.9999, 0.0),
            (1, 1.0, 0.0),
            (50, 1.0, 0.0),
            (50, 0.5, 0.0),
            (254, 0.99, 0.0),
            (256, 1.0, 0.0),
            (257, 1.0, 0.0),
            (299, 0.999, 0.0),
            (4096, 0.9, 0.0),
            (4097, 1.0, 0.0),
            (10**6, 0.6, 0.0),
            (0, 1.0, 0.05),
            (0, 0.8, 0.5),
            (3000, 0.8, 0.01),
        ]
    ]
    logits = (generator.standard_normal((len(cases), vocab_size)) * spread).astype(np.float32)
    logits[:, 7] = logits[:, 3]  # a tie somewhere
    together = processed(logits.tolist(), *(row(**case) for case in cases))
    for i, case in enumerate(cases):
        alone = one(logits[i].tolist(), **case)
        assert alone == together[i]
        expected = naively_kept(logits[i], temperature=1.0, **case)
        if expected is not None:
            assert {j for j, logit in enumerate(alone) if logit > -INF} == expected


def test_what_went_wrong_in_a_row_is_told_and_the_others_are_done() -> None:
    errors: dict[int, str] = {}
    rows = [row(top_k=1), row(allowed_token_ids=[99]), row(allowed_token_ids=[0])]
    result = process(torch.tensor([[1.0, 2.0]] * 3), rows, errors).tolist()
    assert list(errors) == [1] and "99" in errors[1]
    assert (result[0], result[2]) == ([-INF, 2.0], [1.0, -INF])


def test_a_row_of_nan_leaves_the_truncation_of_the_others_alone() -> None:
    logits = [[1.0, 2.0, 3.0], [math.nan] * 3, [0.0, -INF, 5.0]]
    result = process(torch.tensor(logits), [row(top_p=0.9), row(top_p=0.9), row(top_k=1)], {})
    assert result[[0, 2]].tolist() == [[-INF, 2.0, 3.0], [-INF, -INF, 5.0]]
