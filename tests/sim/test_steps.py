"""Steps of a recording, and a fit that finds again what made their times."""

import random

import numpy as np
import pytest

from nanovllm.core.events import Kind
from nanovllm.errors import ConfigError
from nanovllm.recording import Arrival, Choice, Finish, Record, Step
from nanovllm.sim.cost import Work
from nanovllm.sim.steps import (
    EDGES,
    StepTimes,
    Taken,
    check,
    fit,
    fit_steps,
    least_squares,
    steps_taken,
)

# 10 ms, 0.1 ms a row, 0.2 ms a sampled one, 1 us a position, 2 us a pair, 1 ms a token
TRUTH = StepTimes(0.01, 1e-4, 2e-4, 1e-6, 2e-6, (1e-3,) * len(EDGES))


def arrival(seq_id: int, time_s: float, step: int) -> Arrival:
    who = {"request_id": str(seq_id), "prompt_tokens": 9, "max_tokens": 9}
    return Arrival(time_s=time_s, step=step, seq_id=seq_id, arrival_s=time_s, **who)


def step(number: int, start_s: float, end_s: float, seq_ids: list[int], **more: object) -> Step:
    counts = {"running": len(seq_ids), "waiting": 0, "blocks": 1}
    return Step(step=number, start_s=start_s, end_s=end_s, seq_ids=seq_ids, **counts, **more)


def admitted(seq_id: int, num_cached: int = 0) -> list[Choice]:
    found = [Choice(0.0, 0, Kind.ADMITTED, seq_id, "fits", {"tokens": 9})]
    if num_cached:
        found.append(Choice(0.0, 0, Kind.CACHE_HIT, seq_id, "prefix", {"tokens": num_cached}))
    return found


def random_steps(seed: int, count: int = 400, most: int = 600) -> list[Work]:
    """Steps of up to 40 rows, half of which only decode."""
    rng, works = random.Random(seed), []
    for i in range(count):
        num_seqs = rng.randint(1, 40)
        num_tokens = num_seqs + (rng.randint(1, most) if i % 2 else 0)
        num_kv = num_tokens + rng.randint(0, 500) * num_seqs
        pairs = num_kv + (num_tokens - num_seqs) * rng.uniform(1, 300)
        works.append(Work(num_seqs, num_tokens, rng.randint(0, num_seqs), num_kv, pairs))
    return works


def test_seconds_of_a_step_by_hand() -> None:
    prices = (3.0, 1.0, 2.0)  # the first two tokens, the next two, all after them
    cost = StepTimes(5.0, 0.5, 0.25, 0.125, 0.0625, prices, (0, 2, 4))
    assert cost.step_s(Work(1, 1, 1, 8, 16)) == 5 + 0.5 + 0.25 + 1 + 1 + 3
    assert cost.step_s(Work(1, 3, 0, 0, 0)) == 5 + 0.5 + 6 + 1
    assert cost.step_s(Work(2, 7, 0, 0, 0)) == 5 + 1 + 6 + 2 + 6


def test_steps_and_the_time_before_them() -> None:
    """The first step waits for nobody but the arrival; idle time is none's."""
    records: list[Record] = [
        arrival(0, 1.0, 0),
        step(1, 1.25, 2.0, [0], tokens={0: 6}, partial=[0], choices=admitted(0)),
        step(2, 2.5, 3.0, [0], tokens={0: 3}),
        arrival(1, 2.75, 2),
        step(3, 3.25, 4.0, [0, 1], tokens={1: 5}, choices=admitted(1, num_cached=4)),
        Finish(time_s=4.0, step=3, seq_id=0, reason="length", output_tokens=2),
        Finish(time_s=4.0, step=3, seq_id=1, reason="length", output_tokens=1),
        arrival(2, 9.0, 3),
        step(4, 9.25, 9.5, [2], tokens={2: 9}, choices=admitted(2), error="RuntimeError: x"),
    ]
    assert list(steps_taken(records)) == [
        Taken(Work(1, 6, 0, 6, 21.0), 1.0, 0.25),
        Taken(Work(1, 3, 1, 9, 24.0), 1.0, 0.5),
        Taken(Work(2, 6, 2, 10 + 9, 10 + 35.0), 1.0, 0.25),
    ]


def test_what_made_the_times_is_found_again() -> None:
    steps = [Taken(work, TRUTH.step_s(work), 0.0) for work in random_steps(0)]
    found = fit(steps)
    assert found.numbers == pytest.approx(TRUTH.numbers, rel=1e-4)
    assert found.token_s == pytest.approx(TRUTH.token_s, rel=1e-4)
    assert check(steps) == pytest.approx(
        {"decode only": 0.0, "with prefill": 0.0, "all steps": 0.0}, abs=1e-5
    )


def test_steps_that_stall_do_not_rule() -> None:
    steps = [Taken(work, TRUTH.step_s(work), 0.0) for work in random_steps(1)]
    for i in range(0, len(steps), 100):
        steps[i] = steps[i]._replace(step_s=steps[i].step_s + 1.0)
    works = random_steps(2)
    expected = [TRUTH.step_s(work) for work in works]
    found = fit(steps)
    assert [found.step_s(work) for work in works] == pytest.approx(expected, rel=0.05)


def test_a_price_that_changes_is_followed_and_larger_steps_go_on_with_the_last_one() -> None:
    bent = StepTimes(0.01, 0.0, 0.0, 0.0, 0.0, tuple(1e-4 if e < 16 else 1e-3 for e in EDGES))
    steps = [Taken(work, bent.step_s(work), 0.0) for work in random_steps(3, 2000, 100)]
    found = fit(steps)
    for num_tokens in (1, 16, 100, 2000):
        num_seqs = min(num_tokens, 20)
        work = Work(num_seqs, num_tokens, num_seqs, num_tokens, num_tokens)
        assert found.step_s(work) == pytest.approx(bent.step_s(work), rel=0.1)


def test_a_recording_with_too_few_steps_is_refused() -> None:
    records = [arrival(0, 0.0, 0), *(step(i, i, i + 0.5, [0]) for i in range(9))]
    with pytest.raises(ConfigError, match="recording=9: steps went well, too few for a fit"):
        fit_steps(records)


def test_no_number_is_negative() -> None:
    """Without that, the least squares are (2, -1)."""
    table = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert least_squares(table, np.array([2.0, 1.0, -1.0])) == pytest.approx([1.5, 0.0])
    assert least_squares(table, np.array([2.0, 3.0, 1.0])) == pytest.approx([2.0, 1.0])
    assert least_squares(table, np.array([-2.0, -3.0, -1.0])) == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"row_s": -1.0},
        {"row_s": float("nan")},
        {"token_s": (1e-3,)},
        {"edges": (1, *EDGES[1:])},
        {"edges": (0, 0, *EDGES[2:])},
    ],
)
def test_impossible_numbers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        StepTimes(**{**TRUTH.as_dict(), **wrong})
