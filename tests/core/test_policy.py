"""Policies: what each hook decides, by itself and through the scheduler."""

from nanovllm.core.policies.priority import Priority
from nanovllm.core.policy import Decision, Policy, StepView, make_policy
from nanovllm.core.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from tests.core.fakes import Rig


def seq(seq_id: int, arrival_s: float = 0.0, priority: int = 0) -> Sequence:
    return Sequence(seq_id, [1], SamplingParams(), arrival_s=arrival_s, priority=priority)


def view(num_available_blocks: int = 10, num_decodes: int = 0, num_prefills: int = 0) -> StepView:
    return StepView(
        now_s=0.0,
        token_budget=16,
        num_decodes=num_decodes,
        num_prefills=num_prefills,
        num_waiting=1,
        num_available_blocks=num_available_blocks,
    )


def test_make_policy_finds_what_is_registered():
    assert type(make_policy("fcfs")) is Policy
    assert type(make_policy("priority")) is Priority


def test_fcfs_orders_by_arrival_and_priority_by_value_first():
    first, second = seq(0, arrival_s=1.0, priority=5), seq(1, arrival_s=2.0, priority=-1)
    assert Policy().key(first, 9.0) < Policy().key(second, 9.0)
    assert Priority().key(second, 9.0) < Priority().key(first, 9.0)
    assert Priority().key(seq(2, 1.0, 5), 9.0) == Priority().key(first, 9.0)


def test_admission_needs_the_blocks():
    policy = Policy()
    assert policy.admit(seq(0), 10, view(10)) == Decision(True, "fits")
    assert policy.admit(seq(0), 11, view(10)) == Decision(False, "no blocks")
    assert policy.admit(seq(0), 10, view(10, num_decodes=5)) == Decision(True, "fits")


def test_who_was_preempted_also_needs_a_spare_block_for_each_running():
    policy, back = Policy(), seq(0)
    back.num_preemptions = 1
    assert policy.admit(back, 7, view(10, num_decodes=2, num_prefills=1)).value
    assert not policy.admit(back, 8, view(10, num_decodes=2, num_prefills=1)).value


def test_the_budget_is_whole_for_both_and_decodes_come_first():
    assert Policy().share_budget(view()) == Decision((16, 16), "decodes first")


def test_fcfs_preempts_the_last_to_come_also_if_it_is_the_needy():
    running = [seq(0, 2.0), seq(1, 3.0), seq(2, 1.0), seq(3, 3.0)]
    assert Policy().victim(running, running[0]) == Decision(running[3], "came last")
    assert Policy().victim(running, running[3]) == Decision(running[3], "came last")


def test_fcfs_preempts_nobody_for_an_arrival():
    assert Policy().victim([seq(0)], seq(1)) == Decision(None, "arrivals preempt nobody")


def test_priority_preempts_the_highest_value_and_of_these_the_last_to_come():
    running = [seq(0, 1.0, 2), seq(1, 2.0, 2), seq(2, 3.0, 1)]
    assert Priority().victim(running, running[2]).value is running[1]
    assert Priority().victim(running, seq(3, 4.0, 1)).value is running[1]
    assert Priority().victim(running, seq(3, 0.0, 2)) == Decision(
        None, "nobody runs with a lower priority"
    )


def test_the_least_recently_used_block_is_evicted():
    assert Policy().evict({4: object(), 2: object()}) == 4


class Recorder(Policy):
    """Shortest prompt first, one request at a time; keeps what it was shown."""

    def __init__(self) -> None:
        self.admitted: list[tuple[int, int, StepView]] = []

    def key(self, seq: object, now_s: float) -> tuple[float, ...]:
        return (seq.num_prompt_tokens,)

    def admit(self, seq: object, num_blocks: int, step: StepView) -> Decision[bool]:
        self.admitted.append((seq.seq_id, num_blocks, step))
        return Decision(step.num_decodes + step.num_prefills == 0, "one at a time")


def test_a_policy_of_ones_own_orders_the_queue_and_its_reasons_are_logged():
    rig = Rig(16, policy=Recorder(), max_num_batched_tokens=8)
    for i, num_tokens in enumerate([12, 6, 3]):
        rig.add([i] * num_tokens, max_tokens=1)
    steps = [rig.step() for _ in range(4)]
    assert steps == [{2: 3}, {1: 6}, {0: 8}, {0: 4}]
    assert rig.said("admitted", "waiting") == [
        ("admitted", 2, "one at a time"),
        ("waiting", 1, "one at a time"),
        ("admitted", 1, "one at a time"),
        ("waiting", 0, "one at a time"),
        ("admitted", 0, "one at a time"),
    ]


def test_admit_sees_the_step_as_it_stands():
    policy = Recorder()
    rig = Rig(16, policy=policy, max_num_batched_tokens=8)
    rig.now_s = 2.5
    rig.add([1] * 3)
    rig.add([2] * 6)
    rig.step()
    assert policy.admitted == [
        (
            0,
            1,
            StepView(
                now_s=2.5,
                token_budget=8,
                num_decodes=0,
                num_prefills=0,
                num_waiting=2,
                num_available_blocks=16,
            ),
        ),
        (
            1,
            2,
            StepView(
                now_s=2.5,
                token_budget=5,
                num_decodes=0,
                num_prefills=1,
                num_waiting=1,
                num_available_blocks=15,
            ),
        ),
    ]
