"""Advice where the answer is known: each step takes 100 ms on all hardware, two sequences run at
once, and eight requests of two tokens come together."""

import json
from dataclasses import replace

import pytest

from nanovllm.sim.advise import Search, Target, advise, in_words, search, table
from nanovllm.sim.experiment import Load
from nanovllm.sim.steps import EDGES
from nanovllm.sim.sweep import deployments


@pytest.fixture
def known(tmp_path):
    """What `advise` is given beside a target."""
    trace, fit = tmp_path / "trace.jsonl", tmp_path / "fit.json"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 16, "output_tokens": 2}\n' * 8)
    numbers = dict.fromkeys(("row_s", "sampled_s", "kv_token_s", "pair_s"), 0.0)
    prices = {"overhead_s": 0.1, "token_s": [0.0] * len(EDGES), "edges": list(EDGES)}
    fit.write_text(json.dumps({"form": "steps", **numbers, **prices}))
    others = {"max_num_seqs": 2, "model": "qwen3-0.6b", "num_kv_blocks": 64}
    candidates = deployments({"hardware": ["h100", "l4"]}, others)
    load = Load(workload=str(trace))
    prices = {"h100": 3.0, "l4": 1.0}
    return {"candidates": candidates, "load": load, "calibration": str(fit), "prices": prices}


def test_the_fewest_replicas_on_the_cheapest_hardware(known):
    """The k-th pair of an engine has its first token after 200 k - 100 ms: each needs its own."""
    target = Target(ttft_p99_ms=150.0, margin=0.0)
    best, other = advise(target=target, **known)
    assert (best.deployment.hardware, other.deployment.hardware) == ("l4", "h100")
    assert (best.met, best.trial.num_replicas, best.num_devices, best.hourly) == (True, 4, 4, 4.0)
    assert best.trial.p99_ms == pytest.approx({"ttft": 100.0, "tpot": 100.0})
    assert best.fewer.p99_ms["ttft"] == pytest.approx(300.0)
    # 0.2 s of $4 an hour, for 8 * 18 tokens
    assert best.trial.cost_per_million == pytest.approx(4 * 0.2 / 3600 / 144 * 1e6)
    assert (
        in_words([best, other], target, 1)
        == """\
Take l4, TP 1, 2 seqs, 2048 tokens, fcfs: 4 replicas (4 devices), $4.00 an hour, $1.54 per million \
tokens.
Wanted: TTFT p99 of 150 ms, with 0% to spare; p99 there, one workload: TTFT 100 ms.
What binds is TTFT: with 3 replicas its p99 is 300 ms.
Next: h100, TP 1, 2 seqs, 2048 tokens, fcfs: 4 replicas (4 devices), $12.00 an hour, $4.63 per \
million tokens, 200% more."""
    )
    assert table([best, other], target).splitlines()[2] == (
        "| l4 | 1 | 2 | 2048 | fcfs | 4 | 4 | 4 | 1.54 | 100 | yes |"
    )


def test_without_prices_devices_are_counted(known):
    answers = advise(target=Target(ttft_p99_ms=350.0, margin=0.0), **known | {"prices": None})
    assert [answer.cost for answer in answers] == [2, 2]
    assert answers[0].hourly is None


def test_a_margin_asks_for_more(known):
    def replicas(margin):
        target = Target(ttft_p99_ms=310.0, margin=margin)
        return advise(target=target, **known)[0].trial.num_replicas

    assert (replicas(0.0), replicas(0.1)) == (2, 4)


def test_what_no_number_of_replicas_can_do(known):
    target = Target(ttft_p99_ms=500.0, tpot_p99_ms=80.0, margin=0.0)
    answers = advise(target=target, **known)
    assert not any(answer.met for answer in answers)
    assert (
        in_words(answers, target, 1)
        == """\
No setting meets TTFT p99 of 500 ms and TPOT p99 of 80 ms with 0% to spare.
Nearest: h100, TP 1, 2 seqs, 2048 tokens, fcfs (requests are late even alone): TPOT p99 is \
100 ms, 1.25 times the target."""
    )


def test_too_few_replicas_are_the_nearest_miss(known):
    task = {name: known[name] for name in ("load", "calibration")}
    target = Target(ttft_p99_ms=150.0, margin=0.0)
    deployment = known["candidates"][0]
    answer = search(Search(deployment, task["load"], target, (0,), None, task["calibration"], 3))
    assert (answer.met, answer.error) == (False, "3 replicas too few")
    assert answer.trial.p99_ms["ttft"] == pytest.approx(300.0)


def test_weights_that_do_not_fit_are_an_answer_too(known):
    large = deployments({"hardware": ["l4"]}, {"model": "llama-3.1-70b"})
    target = Target(ttft_p99_ms=1e6)
    answers = advise(target=target, **known | {"candidates": large})
    assert in_words(answers, target, 1).startswith("No setting can run. l4, TP 1,")
    assert "cannot run" in table(answers, target)


def test_requests_that_never_fit_rule_a_setting_out(known):
    target = Target(ttft_p99_ms=1e6)
    small = [replace(one, num_kv_blocks=1) for one in known["candidates"]]
    answers = advise(target=target, **known | {"candidates": small})
    assert [answer.error for answer in answers] == ["8 requests too long for it"] * 2
    assert in_words(answers, target, 1).endswith("so that they never fit or are cut.")
