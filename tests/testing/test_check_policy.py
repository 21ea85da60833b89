"""check_policy lets the built-in policies pass, and says what is wrong with broken ones."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime

import pytest

from nanovllm.core.policies import POLICIES, load_policy
from nanovllm.core.policy import Decision, Policy
from nanovllm.errors import PolicyError
from nanovllm.testing import Setting, Trial, check_policy
from nanovllm.testing.check import overload, random_workload


def refusal(make: Callable[[], Policy]) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        check_policy(make)
    return caught.value


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_each_built_in_policy_holds(name: str) -> None:
    may_starve = name == "priority"
    report = check_policy(lambda: load_policy(name), max_bypass=None if may_starve else 32)
    assert (report.num_trials, report.num_requests) == (21, 275)
    assert report.num_preemptions > 0
    assert (report.max_bypass > 32) is may_starve


def test_a_report_says_what_was_tried():
    assert str(check_policy(Policy, num_trials=1)) == (
        "Policy holds: 2 trials, 132 requests, 271 steps, 4 preemptions; at most 0 overtook one"
    )


class AdmitsNothing(Policy):
    def admit(self, seq, num_blocks, step):
        return Decision(False, "never")


def test_a_policy_that_admits_nothing_breaks_progress():
    error = refusal(AdmitsNothing)
    assert str(error) == (
        "AdmitsNothing breaks progress: nobody advances in step 1: 0 run and 1 wait, the first of "
        'them, request 0, because of "never"\n'
        "    with 10 blocks of 4, max_num_seqs=3, max_num_batched_tokens=5:\n"
        "    request 0 at 0.055 s: 12 tokens, 6 to come, priority 2, of bob\n"
        "    step 1: request 0 waiting: never"
    )
    assert (error.rule, len(error.trace)) == ("progress", 3)


class AlwaysTheFirst(Policy):
    def victim(self, running, needy):
        return Decision(min(running, key=lambda seq: seq.seq_id), "the first")


def test_a_policy_that_always_preempts_the_same_is_caught_with_two_requests():
    error = refusal(AlwaysTheFirst)
    assert error.rule == "preemptions"
    assert error.why.startswith("request 0 was preempted ")
    assert sum(" to come, " in line for line in error.trace) == 2
    assert "request 0 preempted: the first by=1" in "\n".join(error.trace)


class LastComeFirst(Policy):
    def key(self, seq, now_s):
        return (-seq.arrival_s,)


def test_a_policy_that_starves_the_first_to_come_is_caught():
    error = refusal(LastComeFirst)
    assert error.rule == "starvation"
    assert error.why.endswith("waits while 33 that came later were admitted; at most 32 may be")
    assert check_policy(LastComeFirst, max_bypass=None).max_bypass > 32


class Rolls(Policy):
    def key(self, seq, now_s):
        return (random.random(),)


class RollsItsOwn(Policy):
    def __init__(self):
        self.random = random.Random()  # no seed

    def key(self, seq, now_s):
        return (self.random.random(),)


class Hashes(Policy):
    def key(self, seq, now_s):
        return (hash(seq.terms.tenant),)


class LooksAtTheClock(Policy):
    def admit(self, seq, num_blocks, step):
        time.monotonic()
        return super().admit(seq, num_blocks, step)


class LooksAtTheDate(Policy):
    def finished(self, seq):
        datetime.now()


class Peeks(Policy):
    def key(self, seq, now_s):
        return (seq.params.max_tokens,)


class Writes(Policy):
    def added(self, seq):
        seq.priority = 0


class SaysOnlyYes(Policy):
    def admit(self, seq, num_blocks, step):
        return True


class Divides(Policy):
    def share_budget(self, step):
        return Decision((step.token_budget // 0, 1), "")


class Invents(Policy):
    def victim(self, running, needy):
        return Decision("somebody", "any")


class EvictsNothing(Policy):
    def evict(self, idle):
        return -1


@pytest.mark.parametrize(
    ("policy", "rule", "why"),
    [
        (Rolls, "purity", "key draws from global randomness; keep a seeded random.Random"),
        (LooksAtTheClock, "purity", "admit calls time.monotonic(); the engine's clock is in now_s"),
        (LooksAtTheDate, "purity", "finished calls datetime.now(); the engine's clock is in now_s"),
        (Peeks, "purity", "key reads seq.params; policies are shown what SequenceView has"),
        (Writes, "purity", "added writes seq.priority; views are read-only"),
        (SaysOnlyYes, "contract", "admit returned True; a Decision with a reason is wanted"),
        (
            Divides,
            "contract",
            "share_budget raised ZeroDivisionError: integer division or modulo by zero",
        ),
        (Invents, "contract", "victim returned somebody who is not among `running`"),
        (EvictsNothing, "contract", "evict returned -1, which is not among `idle`"),
    ],
)
def test_what_a_hook_must_not_do_is_said_in_words(
    policy: type[Policy], rule: str, why: str
) -> None:
    error = refusal(policy)
    assert (error.rule, error.why) == (rule, why)
    assert str(error).startswith(f"{policy.__name__} breaks {rule}: {why}\n    with ")


@pytest.mark.parametrize("policy", [RollsItsOwn, Hashes])
def test_a_policy_that_decides_otherwise_the_second_time_is_caught(policy: type[Policy]) -> None:
    error = refusal(policy)
    assert error.rule == "determinism"
    assert error.why.startswith("the same arrivals twice, and once [step ")


EVENTS = """
import sys
from nanovllm.core.policies import load_policy
from nanovllm.testing import Trial
from nanovllm.testing.check import random_workload
for seed in range(5):
    setting, arrivals = random_workload(seed)
    for name in sys.argv[1:]:
        trial = Trial(arrivals, load_policy(name), setting)
        trial.run()
        print(name, *trial.events)
"""


def test_processes_that_hash_strings_differently_log_the_same_events():
    logs = [
        subprocess.run(
            [sys.executable, "-c", EVENTS, *POLICIES],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert logs[0] == logs[1]
    assert logs[0].count(b"admitted") > 200


def test_a_trial_moves_its_own_clock_and_ends():
    setting, arrivals = random_workload(3)
    trial = Trial(arrivals, Policy(), setting)
    sequences = trial.run()
    assert [seq.num_tokens - seq.num_prompt_tokens for seq in sequences] == [
        arrival.num_output_tokens for arrival in sorted(arrivals, key=lambda a: a.arrival_s)
    ]
    assert trial.done and trial.blocks.num_available == setting.num_kv_blocks
    assert trial.executor.now_s >= 0.01 * trial.executor.num_steps


def test_a_trial_that_stands_still_says_so():
    with pytest.raises(RuntimeError, match="check_policy says more"):
        Trial(overload(0, 3), AdmitsNothing(), Setting()).run()
