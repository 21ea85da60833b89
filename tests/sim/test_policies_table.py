"""benchmarks/policies.py, without a model."""

import pytest

from benchmarks.policies import METRICS, agreement, cell, prompt_of, ranks, simulated, small
from nanovllm.traces import TraceRequest


def test_a_cell_says_how_far_a_policy_is_from_fcfs() -> None:
    base = [10.0, 20.0, 30.0]
    assert cell(base, base, 1, True) == "20.0 ± 24.8"
    assert cell(base, base, 1, False) == "20.0 (=)"
    assert cell(base, [5.0, 10.0, 15.0], 1, False) == "10.0 (-50% ± 0)"
    assert cell(base, [9.0, 22.0, 30.0], 1, False) == "20.3 (~)"
    assert cell([0.0, 1.0], [2.0, 3.0], 0, False) == "2"  # no share of 0
    assert cell([4.0], [6.0], 0, False) == "6 (+50%)"


def test_equal_values_share_a_rank() -> None:
    assert ranks([5.0, 1.0, 5.0, 9.0]) == [2.0, 0.5, 2.0, 3.5]


def test_pairs_within_the_noise_count_neither_way() -> None:
    live = {"a": [1.0, 1.2], "b": [1.1, 1.3], "c": [5.0, 5.2]}
    # deviations of 0.02 each, pooled; t for 3 degrees of freedom is 3.182
    found = agreement(live, {"a": 2.0, "b": 1.0, "c": 7.0})
    assert found["noise"] == pytest.approx(3.182 * (2 * 0.02 / 2) ** 0.5)
    assert (found["within_noise"], found["agree"], found["differ"]) == (1, 2, [])
    assert found["spearman"] == pytest.approx(0.5)


def test_pairs_that_the_simulation_turns_round_or_ties_are_named() -> None:
    live = {"a": [1.0], "b": [2.0], "c": [3.0]}
    found = agreement(live, {"a": 5.0, "b": 4.0, "c": 5.0})
    assert (found["agree"], found["differ"]) == (1, ["a, b", "a, c"])
    assert agreement(live, dict.fromkeys("abc", 1.0))["spearman"] is None


def test_prompts_share_their_pieces_and_nothing_else() -> None:
    request = TraceRequest(0.0, 6, 1, (("system", 4),))
    one, other = prompt_of(request, 1, 9999), prompt_of(request, 2, 9999)
    assert len(one) == len(other) == 6
    assert one[:4] == other[:4]
    assert one[4:] != other[4:]
    assert one == prompt_of(request, 1, 9999)


def test_the_small_workload_is_the_same_each_time_and_of_all_kinds() -> None:
    requests = small(0)
    assert requests == small(0)
    assert len(requests) == 64
    assert {request.tenant for request in requests} == {"large", "small"}
    assert {request.priority for request in requests} == {1, 2}
    assert {request.arrival_s for request in requests[:8]} == {0.0}


def test_each_policy_is_simulated_with_all_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.policies.POLICIES", {"fcfs": "", "priority": ""})
    result = simulated(1)
    assert list(result) == ["bursts", "chat"]
    for policies in result.values():
        assert [list(values) for [values] in policies.values()] == [list(METRICS)] * 2
    urgent = [result["bursts"][name][0]["urgent TTFT mean, s"] for name in ("fcfs", "priority")]
    assert urgent[1] < urgent[0] / 5
    assert result["chat"]["fcfs"] == result["chat"]["priority"]  # which has nothing to go by
