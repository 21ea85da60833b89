"""A recording's requests served again: the same under the same settings and step times, and the
report of a recording."""

import pytest
from msgspec.structs import replace

from nanovllm.core.events import Kind
from nanovllm.core.sequence import Terms
from nanovllm.recording import Arrival, Finish, Step, read_recording
from nanovllm.sampling_params import SamplingParams
from nanovllm.sim.rerun import report_of, rerun
from nanovllm.sim.steps import fit_steps
from tests.core.fakes import Rig
from tests.test_recording import recorded


class HalfASecond:
    def step_s(self, work):
        return 0.5


@pytest.fixture
def records(tmp_path):
    """Two sequences at once, six blocks of 4: preemptions, a shared prefix, one that comes late,
    one that is given up while it waits and one while it runs."""
    path = tmp_path / "r.jsonl"
    rig = Rig(num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=12)
    recorder = recorded(path, rig)
    for name, prompt in {"one": [1] * 8, "two": [2] * 8, "three": [1] * 9}.items():
        rig.add(prompt, max_tokens=6, request_id=name)
    rig.engine.step()
    rig.add([4] * 4, max_tokens=5)
    rig.add([5] * 4, max_tokens=5)
    waits = rig.engine.scheduler.waiting[-1][1]
    rig.engine.step()
    rig.engine.abort([waits])
    rig.run()
    rig.now_s += 60.0  # idle
    rig.add([6] * 5, max_tokens=9)
    rig.engine.step()
    rig.engine.step()
    rig.engine.abort(list(rig.engine.scheduler.running.values()))
    recorder.close()
    return list(read_recording(str(path)))


def again(records, tmp_path, header=None, cost=None, sink=None):
    path = str(tmp_path / "again.jsonl")
    num_cut = rerun(records, header or records[0], cost or HalfASecond(), path, sink)
    return list(read_recording(path)), num_cut


def told(records):
    """All but hashes and names."""
    kinds = {
        Step: lambda step: (step.seq_ids, step.tokens, step.start_s, step.end_s, step.choices),
        Finish: lambda end: (end.seq_id, end.reason, end.output_tokens, end.time_s),
        Arrival: lambda one: (one.seq_id, one.arrival_s, one.prompt_tokens, len(one.blocks)),
    }
    return [kinds[type(one)](one) for one in records if type(one) in kinds]


def test_the_same_settings_and_times_give_the_same_recording(records, tmp_path):
    found, num_cut = again(records, tmp_path)
    assert told(found) == told(records)
    assert num_cut == 0
    assert any(choice.kind is Kind.PREEMPTED for step in steps(found) for choice in step.choices)


def test_a_fit_to_the_recording_gives_it_too(records, tmp_path):
    found, _ = again(records, tmp_path, cost=fit_steps(records))
    assert [step.seq_ids for step in steps(found)] == [step.seq_ids for step in steps(records)]
    was, same = report_of(records).result(), report_of(found).result()
    assert same["ttft_ms"] == pytest.approx(was["ttft_ms"], rel=1e-3)


def steps(records):
    return [record for record in records if isinstance(record, Step)]


def test_other_settings_make_other_plans_of_the_same_requests(records, tmp_path):
    header = replace(records[0], max_num_seqs=8, num_blocks=64, block_size=2)
    found, _ = again(records, tmp_path, header)
    assert max(len(step.seq_ids) for step in steps(found)) == 5
    was, now = report_of(records).result(), report_of(found).result()
    assert (was["num_preemptions"], now["num_preemptions"]) == (2, 0)
    assert now["num_finished"] == was["num_finished"] == 4  # of six: two clients left
    assert now["ttft_ms"]["mean"] < was["ttft_ms"]["mean"]


def test_what_outgrows_another_engine_is_counted(records, tmp_path):
    header = replace(records[0], num_blocks=3, max_num_tokens=12)
    found, num_cut = again(records, tmp_path, header)
    assert num_cut == 3
    assert report_of(found).result()["num_finished"] == 4
    tiny = replace(records[0], num_blocks=2, max_num_tokens=8)
    found, _ = again(records, tmp_path, tiny)
    assert report_of(found).result()["num_rejected"] == 3


def test_the_report_of_a_recording(tmp_path):
    """Prompts of 4 tokens, 2 each; one sequence at a time; a step takes half a second."""
    path = tmp_path / "r.jsonl"
    rig = Rig(num_blocks=6, block_size=4, max_num_seqs=1, max_num_batched_tokens=12)
    recorder = recorded(path, rig)
    for token, tenant in enumerate("ab"):
        terms = Terms(tenant, 0.6, None)
        rig.engine.add([token] * 4, SamplingParams(max_tokens=2), terms=terms)
    rig.run()
    recorder.close()
    found = report_of(read_recording(str(path)), price_per_hour=3600.0).result()
    assert (found["num_requests"], found["num_finished"], found["duration_s"]) == (2, 2, 2.0)
    assert found["ttft_ms"]["mean"] == pytest.approx((500 + 1500) / 2)
    assert found["queue_ms"]["mean"] == pytest.approx((0 + 1000) / 2)
    assert found["tpot_ms"]["p99"] == pytest.approx(500)
    assert found["itl_ms"]["mean"] == pytest.approx(500)
    assert found["e2e_ms"]["mean"] == pytest.approx((1000 + 2000) / 2)
    assert found["goodput"] == 1 / 2.0
    assert found["kv_usage"]["max"] == pytest.approx(2 / 6)
    assert found["prefix_cache_hit_rate"] == 0.0
    assert found["cost_per_million_tokens"] == pytest.approx(2.0 / 12 * 1e6)
    assert list(found["fairness"]["tenants"]["groups"]) == ["a", "b"]
