"""A workload in virtual time: exact where steps have exact costs."""

import json
import os
import subprocess
import sys

import pytest

from nanovllm.core.events import Kind
from nanovllm.errors import ConfigError
from nanovllm.sim.run import Engine, simulate
from nanovllm.sim.workload import Synthetic, make_workload
from nanovllm.traces import TraceRequest


class OneSecond:
    """Each step takes a second."""

    def step_s(self, work):
        return 1.0


class PerToken:
    """Each computed token takes a second."""

    def step_s(self, work):
        return float(work.num_tokens)


def run(requests, cost=OneSecond, sink=None, **settings):
    return simulate(requests, Engine(**settings), cost(), sink=sink).result()


def test_times_of_two_requests():
    """The second comes in the first one's second step and starts with its third."""
    result = run([TraceRequest(0.0, 10, 4), TraceRequest(1.5, 10, 3)])
    assert result["ttft_ms"]["mean"] == pytest.approx((1000 + 1500) / 2)
    assert result["queue_ms"]["mean"] == pytest.approx((0 + 500) / 2)
    assert result["e2e_ms"]["mean"] == pytest.approx((4000 + 3500) / 2)
    assert result["tpot_ms"] == {"mean": 1000.0, "p50": 1000, "p90": 1000, "p95": 1000, "p99": 1000}
    assert result["itl_ms"]["mean"] == pytest.approx(1000)
    assert result["duration_s"] == 5.0
    assert result["output_throughput"] == pytest.approx(7 / 5)
    assert result["total_token_throughput"] == pytest.approx(27 / 5)
    assert result["fairness"]["tenants"]["groups"][""]["output_tokens"] == 7


def test_idle_time_is_jumped_over():
    result = run([TraceRequest(0.0, 4, 1), TraceRequest(1e6, 4, 1)])
    assert result["duration_s"] == 1e6 + 1
    assert result["ttft_ms"]["p99"] == pytest.approx(1000)


def test_what_a_preemption_costs_is_counted():
    """Two blocks of 4 for each, three in all: the second is thrown out and computed anew."""
    events = []
    requests = [TraceRequest(0.0, 4, 4), TraceRequest(0.0, 4, 4)]
    settings = {"num_kv_blocks": 3, "block_size": 4, "enable_prefix_caching": False}
    result = run(requests, sink=events.append, **settings)
    assert result["num_preemptions"] == 1
    lost = [event.data["computed_tokens"] for event in events if event.kind == Kind.PREEMPTED]
    assert result["recomputed_tokens"] == lost[0] == 4
    assert result["num_finished"] == 2
    assert result["kv_usage"]["max"] == pytest.approx(2 / 3)


def test_shared_prefixes_hit_the_cache():
    shared = (("system", 32),)
    requests = [TraceRequest(0.0, 40, 1, shared), TraceRequest(99.0, 48, 1, shared)]
    result = run(requests, PerToken)
    assert result["prefix_cache_hit_rate"] == 32 / 88
    assert result["ttft_ms"]["mean"] == pytest.approx((40_000 + 16_000) / 2)


def test_a_chat_finds_its_own_answers_in_the_cache():
    turns = [
        TraceRequest(0.0, 16, 17, (("chat", 16),)),
        TraceRequest(99.0, 48, 1, (("chat", 48),)),
    ]
    assert run(turns)["prefix_cache_hit_rate"] == 32 / 64


def test_what_never_fits_is_rejected_and_what_outgrows_is_cut():
    requests = [TraceRequest(0.0, 64, 1), TraceRequest(0.0, 8, 100), TraceRequest(0.0, 8, 1)]
    result = run(requests, num_kv_blocks=4)
    assert (result["num_requests"], result["num_finished"]) == (3, 2)
    assert (result["num_rejected"], result["num_truncated"]) == (1, 1)
    only = run([TraceRequest(0.0, 10**12, 1)], num_kv_blocks=4)
    assert (only["num_finished"], only["ttft_ms"]["mean"], only["duration_s"]) == (0, None, 0.0)


def test_goodput_takes_each_requests_targets():
    fast, slow = {"ttft_target_s": 0.5}, {"ttft_target_s": 2.0, "tpot_target_s": 1.0}
    requests = [TraceRequest(0.0, 4, 2, **fast), TraceRequest(0.0, 4, 2, **slow)]
    assert run(requests)["goodput"] == 1 / 2


def test_a_workload_without_requests_or_out_of_order_is_refused():
    with pytest.raises(ConfigError, match="has no requests"):
        run([])
    with pytest.raises(ConfigError, match="request 2"):
        run([TraceRequest(1.0, 4, 1), TraceRequest(0.0, 4, 1)])


def test_the_event_log_is_the_same_in_every_process(tmp_path):
    spec = "synthetic:num_requests=60,turns=3,system_prompt_tokens=64,system_prompts=3,tenants=2"
    logs = []
    for hash_seed in ("0", "1"):
        file = tmp_path / hash_seed
        words = ["simulate", "--workload", spec, "--seed", "5", "--events", str(file)]
        words += ["--num-kv-blocks", "600"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "nanovllm", *words]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        logs.append(file.read_bytes())
    assert logs[0] == logs[1]
    first = json.loads(logs[0].splitlines()[0])
    assert (first["kind"], first["seq_id"], first["time_s"]) == ("added", 0, 0.0)


def test_synthetic_workloads_are_in_order_and_follow_the_seed():
    settings = Synthetic(num_requests=500, turns=4, arrivals="bursts", lengths="uniform")
    first = list(make_workload(settings, 1))
    assert first == list(make_workload(settings, 1)) != list(make_workload(settings, 2))
    assert len(first) == 500
    assert [one.arrival_s for one in first] == sorted(one.arrival_s for one in first)


def test_arrivals_and_lengths_have_the_means_asked_for():
    for arrivals in ("poisson", "gamma", "bursts"):
        for lengths in ("fixed", "uniform", "lognormal"):
            settings = Synthetic(
                num_requests=20_000, request_rate=5, arrivals=arrivals, lengths=lengths
            )
            drawn = list(make_workload(settings, 0))
            assert drawn[-1].arrival_s == pytest.approx(4000, rel=0.05)
            mean = sum(one.num_prompt_tokens for one in drawn) / len(drawn)
            assert mean == pytest.approx(512, rel=0.05)
