"""Intervals and paired differences, with numbers worked out by hand."""

import pytest

from nanovllm.sim.stats import Interval, difference, in_words, interval


def test_an_interval_of_three_runs():
    """Standard deviation 1, t of two degrees of freedom 4.303: 4.303 / sqrt(3)."""
    found = interval([9.0, 10.0, 11.0])
    assert found.mean == 10.0
    assert found.half == pytest.approx(2.48434, abs=1e-5)


def test_beyond_the_table_its_last_number_is_used():
    values = [0.0, 2.0] * 50  # standard deviation sqrt(100 / 99)
    assert interval(values).half == pytest.approx(2.042 * (100 / 99) ** 0.5 / 10)


def test_one_run_has_no_interval():
    assert interval([7.0]) == Interval(7.0, None)
    assert not interval([7.0]).sure
    assert in_words(difference([2.0], [3.0])) == "+50.0%"


def test_pairs_show_what_means_hide():
    """Seeds differ tenfold; the second setting is 10% or 12% above the first in each."""
    base, other = [10.0, 100.0, 1000.0], [11.0, 112.0, 1110.0]
    found = difference(base, other)
    assert found.mean == pytest.approx(0.11)
    assert found.half == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert found.sure
    assert in_words(found) == "+11.0% ± 2.5"


def test_a_difference_within_the_noise_is_called_that():
    found = difference([100.0, 200.0], [110.0, 240.0])  # 10% and 20%
    assert in_words(found) == "+15.0% ± 63.5, within the noise"
    assert in_words(difference([1.0, 2.0], [1.0, 2.0])) == "the same"


def test_nothing_is_said_of_numbers_that_are_not_there():
    assert difference([0.0, 1.0], [1.0, 1.0]) is None
    assert difference([1.0, None], [1.0, 1.0]) is None
    assert difference([], []) is None
    assert in_words(None) == "-"
