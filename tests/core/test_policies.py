"""The built-in policies and how policies are found; each in a trial without a model."""

import sys
from pathlib import Path
from random import Random

import pytest

from nanovllm.core.policies import POLICIES, load_policy
from nanovllm.core.policies.edf import EarliestDeadline
from nanovllm.core.policies.fair import FairShare
from nanovllm.core.policies.lpm import LongestPrefixMatch
from nanovllm.core.policies.prefill_first import PrefillFirst
from nanovllm.core.policies.sarathi import Sarathi
from nanovllm.core.policies.sjf import LengthMeans, ShortestJobFirst
from nanovllm.core.policy import Policy, make_policy
from nanovllm.core.sequence import Sequence, Terms
from nanovllm.errors import ConfigError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.terms import terms_of
from nanovllm.testing import Arrival, Setting, Trial
from nanovllm.text_engine import TextEngine

ONE_BY_ONE = Setting(max_num_seqs=1, step_s=1.0, token_s=0.0)


def arrival(
    num_prompt: int, num_output: int = 1, at_s: float = 0.0, first: int = 0, **terms: object
) -> Arrival:
    return Arrival(at_s, (first,) + (1,) * (num_prompt - 1), num_output, terms=Terms(**terms))


def admitted(trial: Trial) -> list[int]:
    trial.run()
    return [event.seq_id for event in trial.events if event.kind == "admitted"]


def reasons(trial: Trial, kind: str) -> list[str]:
    return [event.reason for event in trial.events if event.kind == kind]


# How they are found


def test_each_built_in_policy_is_made_by_its_name():
    assert list(POLICIES) == [
        *("fcfs", "priority", "sjf", "lpm", "edf", "fair", "prefill-first", "sarathi")
    ]
    for name, path in POLICIES.items():
        policy = make_policy(name)
        assert f"{type(policy).__module__}:{type(policy).__name__}" == path


def test_a_policy_of_ones_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    source = "from nanovllm.core.policy import Policy\nclass Mine(Policy): pass\nnumber = 3\n"
    (tmp_path / "my_first_policy.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    policy = make_policy("my_first_policy:Mine")
    assert isinstance(policy, Policy) and type(policy).__name__ == "Mine"


BROKEN = {
    "raises": "1 / 0\n",
    "needs": "import no_such_thing_at_all\n",
    "classes": (
        "from nanovllm.core.policy import Policy\n"
        "class NotOne: pass\n"
        "class Picky(Policy):\n    def __init__(self, wanted): pass\n"
    ),
}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "prio",
            "can be fcfs, priority, sjf, lpm, edf, fair, prefill-first, sarathi, or module:Class; "
            "the nearest is priority",
        ),
        ("nowhere_at_all:Mine", "there is no module nowhere_at_all here or installed"),
        ("classes:Missing", "module classes has no Missing"),
        ("classes:NotOne", "NotOne is not a subclass of nanovllm.core.policy.Policy"),
        ("raises:Mine", "importing raises failed: ZeroDivisionError: division by zero"),
        (
            "needs:Mine",
            "importing needs failed: ModuleNotFoundError: No module named 'no_such_thing_at_all'",
        ),
        (
            "classes:Picky",
            "Picky() must work without arguments: TypeError: Picky.__init__() missing 1 required "
            "positional argument: 'wanted'",
        ),
    ],
)
def test_what_is_no_policy_is_refused_by_name(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, source in BROKEN.items():
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_policy(name)
    assert str(caught.value) == f"scheduling_policy={name!r}: {why}"
    assert (caught.value.field, caught.value.value) == ("scheduling_policy", name)


@pytest.mark.parametrize("name", [":", "a:", ":B", "a.b", "", "fcfs:", None, 3])
def test_half_a_name_is_refused_with_the_choices(name: object) -> None:
    with pytest.raises(ConfigError, match="or module:Class"):
        load_policy(name)  # type: ignore[arg-type]


# sjf


def ended(num_prompt: int, num_output: int) -> Sequence:
    seq = Sequence(0, [1] * num_prompt, SamplingParams())
    seq.num_tokens += num_output
    return seq


def test_output_lengths_are_learned_by_class_of_prompt_length():
    means = LengthMeans(prior=100.0, weight=1.0)
    assert means.predict(ended(10, 0)) == 100.0
    means.learn(ended(9, 20))  # of the same class: 8 to 15
    all_of_them = (100 + 20) / 2
    assert means.predict(ended(10, 0)) == (all_of_them + 20) / 2
    assert means.predict(ended(100, 0)) == all_of_them


class Told:
    """Predicts ten times the prompt's length."""

    def predict(self, seq: Sequence) -> float:
        return 10.0 * seq.num_prompt_tokens

    def learn(self, seq: Sequence) -> None:
        pass


def test_sjf_takes_the_shortest_prediction_first():
    arrivals = [arrival(n, first=n) for n in (5, 3, 4, 2)]
    assert admitted(Trial(arrivals, ShortestJobFirst(Told()), ONE_BY_ONE)) == [3, 1, 2, 0]


def test_sjf_ages_so_that_a_long_job_is_not_overtaken_for_ever():
    # request 1 has 70 predicted tokens more than the others, which is 7 s at 10 tokens a second
    arrivals = [arrival(1), arrival(9, first=1)]
    arrivals += [arrival(2, 1, 0.5 * i, first=i) for i in range(2, 40)]
    order = admitted(Trial(arrivals, ShortestJobFirst(Told()), ONE_BY_ONE))
    before = order[: order.index(1)]
    assert before == [0, *range(2, 14)]  # those of 1.0 to 6.5 s


def test_sjf_learns_of_ended_requests_and_keeps_nothing_of_them():
    policy = ShortestJobFirst()
    Trial([arrival(5, 3), arrival(9, 5)], policy).run()
    assert policy.predicted == {}
    assert policy.predictor.requests[-1] == 2
    assert policy.predictor.tokens[-1] == 8


# lpm


def test_lpm_takes_first_what_the_cache_has():
    setting = Setting(block_size=4, max_num_seqs=1, max_num_batched_tokens=64, step_s=0.01)
    shared, other = (1, 2, 3, 4) * 4, (5, 6, 7, 8) * 4
    prompts = [(*shared, 9), (*other, 9), (*shared[:8], 9), (*shared, 8)]
    arrivals = [Arrival(0.001 * i, prompt, 2) for i, prompt in enumerate(prompts)]
    assert admitted(Trial(arrivals, LongestPrefixMatch(), setting)) == [0, 3, 2, 1]
    assert admitted(Trial(arrivals, Policy(), setting)) == [0, 1, 2, 3]


def test_lpm_counts_waiting_like_cached_tokens():
    setting = Setting(block_size=4, max_num_seqs=1, max_num_batched_tokens=64, step_s=1.0)
    shared = (1, 2, 3, 4) * 4
    arrivals = [Arrival(0.0, shared, 3), Arrival(0.0, (9,) * 5, 1), Arrival(1.0, shared, 1)]
    assert admitted(Trial(arrivals, LongestPrefixMatch(aging=15.9), setting)) == [0, 2, 1]
    assert admitted(Trial(arrivals, LongestPrefixMatch(aging=16.1), setting)) == [0, 1, 2]


# edf


def test_edf_takes_the_earliest_deadline_first_and_has_one_for_all():
    arrivals = [
        arrival(3),  # due by 10 s, as nothing is said
        arrival(3, first=1, ttft_target_s=20.0),
        arrival(3, first=2, ttft_target_s=1.0),
        arrival(3, first=3, ttft_target_s=5.0),
    ]
    assert admitted(Trial(arrivals, EarliestDeadline(), ONE_BY_ONE)) == [2, 3, 0, 1]


def test_edf_preempts_whose_next_token_is_due_last():
    tight = Setting(num_kv_blocks=4, block_size=4, step_s=0.01)
    arrivals = [
        arrival(7, 6, first=1, ttft_target_s=1.0, tpot_target_s=5.0),
        arrival(7, 6, first=2, ttft_target_s=1.0, tpot_target_s=0.1),
    ]
    trial = Trial(arrivals, EarliestDeadline(), tight)
    first, second = trial.run()
    assert (first.num_preemptions, second.num_preemptions) == (1, 0)
    assert reasons(trial, "preempted") == ["latest deadline"]


# fair


def test_fair_share_takes_turns_though_one_tenant_came_first_with_everything():
    arrivals = [arrival(10, 5, first=i, tenant="greedy") for i in range(4)]
    arrivals += [arrival(10, 5, 0.001, first=9 + i, tenant="modest") for i in range(2)]
    fair = admitted(Trial(arrivals, FairShare(), ONE_BY_ONE))
    assert fair == [0, 4, 1, 5, 2, 3]
    assert admitted(Trial(arrivals, Policy(), ONE_BY_ONE)) == [0, 1, 2, 3, 4, 5]


def test_fair_share_mixes_tenants_that_are_admitted_in_one_step():
    arrivals = [arrival(10, 5, first=i, tenant="greedy") for i in range(3)]
    arrivals += [arrival(10, 5, first=9 + i, tenant="modest") for i in range(3)]
    assert admitted(Trial(arrivals, FairShare())) == [0, 3, 1, 4, 2, 5]


def test_fair_share_counts_an_output_token_twice_and_idleness_saves_up_nothing():
    policy = FairShare()
    Trial([arrival(10, 5, tenant="early")], policy).run()
    assert policy.floor == 10 + 1 + 4 * 2
    Trial([arrival(4, 1, tenant="late")], policy).run()
    assert policy.floor == 19 + 4 + 1
    assert (policy.waiting, policy.ahead) == (set(), {})


class NeverForgets(FairShare):
    """Keeps the counter of each tenant that ever came."""

    def _leave(self, tenant: str) -> None:
        self.left[tenant] = self.served_tokens.pop(tenant)
        self.floor = max(self.left.values())


@pytest.mark.parametrize("seed", range(3))
def test_fair_share_forgets_tenants_whose_counters_decide_nothing(seed: int) -> None:
    rng, arrivals = Random(seed), []
    for i in range(200):
        tenant = rng.choice(["ann", "bob", f"guest {i}"])
        lengths = rng.randint(1, 60), rng.randint(1, 20)
        arrivals.append(arrival(*lengths, 0.03 * i, first=i, tenant=tenant))
    setting = Setting(num_kv_blocks=24, block_size=4, max_num_seqs=4)
    forgets, remembers = Trial(arrivals, FairShare(), setting), NeverForgets()
    most = 0
    while not forgets.done:
        forgets.step()
        most = max(most, len(forgets.scheduler.policy.left))
    assert admitted(Trial(arrivals, remembers, setting)) == admitted(forgets)
    assert len(remembers.left) == len({one.terms.tenant for one in arrivals}) > 50
    assert most < 20
    policy = forgets.scheduler.policy
    for memory in (policy.left, policy.served_tokens, policy.num_here, policy.queued):
        assert not memory
    assert not policy.started


# prefill-first and sarathi


def test_prefill_first_stalls_those_that_stream_and_says_so():
    setting = Setting(max_num_batched_tokens=8, step_s=1.0, token_s=0.0)
    arrivals = [arrival(4, 6), arrival(16, 1, 2.0, first=5)]
    trial = Trial(arrivals, PrefillFirst(), setting)
    plans = []
    while not trial.done:
        before = [seq.num_computed_tokens for seq in trial.sequences]
        trial.step()
        after = [seq.num_computed_tokens for seq in trial.sequences]
        plans.append([b - a for a, b in zip(before + [0] * 2, after, strict=False)])
    assert plans == [[4], [1], [0, 8], [0, 8], [1, 0], [1, 0], [1, 0], [1, 0]]
    held = [(e.step, e.reason, e.data) for e in trial.events if e.kind == "held"]
    assert held == [(i, "prefills first", {"sequences": 1}) for i in (3, 4)]


def test_prefill_first_decodes_when_no_prompt_can_be_admitted():
    setting = Setting(max_num_seqs=1, step_s=1.0)
    trial = Trial([arrival(4, 3), arrival(4, 1, first=5)], PrefillFirst(), setting)
    assert admitted(trial) == [0, 1]
    assert reasons(trial, "waiting") == ["max_num_seqs"]
    assert reasons(trial, "held") == []


def test_sarathi_fills_a_step_with_prompt_up_to_its_budget_and_says_so():
    arrivals = [arrival(3, 9), arrival(20, 1, 0.5, first=5), arrival(3, 1, 0.5, first=6)]
    trial = Trial(arrivals, Sarathi(chunk_budget=8), Setting(step_s=1.0))
    assert admitted(trial) == [0, 1, 2]
    chunks = [(e.reason, e.data["tokens"]) for e in trial.events if e.kind == "chunked"]
    assert chunks == [("budget: 8 tokens a step", num_tokens) for num_tokens in (7, 7, 1)]
    assert reasons(trial, "waiting") == ["no budget: 8 tokens a step"]


def test_shares_that_let_nobody_go_are_not_kept():
    class Nothing(Policy):
        def share_budget(self, step):
            return super().share_budget(step)._replace(value=(0, 0))

    assert len(Trial([arrival(4, 3), arrival(5, 2)], Nothing()).run()) == 2


# Terms


def test_terms_come_from_a_prompt_that_is_a_dictionary():
    assert terms_of({"prompt": "Hi"}) is None
    assert terms_of({"prompt": "Hi", "tenant": None, "ttft_target_ms": None}) is None
    given = {"prompt": "Hi", "tenant": "ann", "ttft_target_ms": 500, "tpot_target_ms": 12.5}
    assert terms_of(given) == Terms("ann", 0.5, 0.0125)
    assert terms_of({"tpot_target_ms": 40}) == Terms("", None, 0.04)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("tenant", 3, "must be a string"),
        ("tenant", 0, "must be a string"),
        *(
            (name, value, "must be milliseconds, above 0 and up to 1000000000")
            for name in ("ttft_target_ms", "tpot_target_ms")
            for value in (0, -1, "5", True, float("nan"), float("inf"), [5])
        ),
    ],
)
def test_impossible_terms_are_refused_by_name(name: str, value: object, why: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        terms_of({"prompt": "Hi", name: value})
    assert str(caught.value) == f"{name}={value!r}: {why}"


def test_terms_reach_the_sequences_that_policies_see():
    [sample] = Trial([arrival(3, tenant="ann", ttft_target_s=2.0)], Policy()).run()
    assert sample.terms == Terms("ann", 2.0, None)
    engine = Trial([], Policy()).engine
    assert [seq.terms for seq in engine.add([1], SamplingParams(n=2))] == [Terms(), Terms()]
    text = TextEngine(engine, None, vocab_size=9)
    prompt = {"prompt_token_ids": [1, 2], "tenant": "bob", "tpot_target_ms": 20}
    request = text.submit(text.prepare(prompt, SamplingParams()))
    assert [seq.terms for seq in request.sequences] == [Terms("bob", None, 0.02)]
    with pytest.raises(InvalidRequestError, match="tenant=3"):
        text.prepare(prompt | {"tenant": 3}, SamplingParams())
