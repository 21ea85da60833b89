"""The metrics, to the number: a real EngineCore on a clock that the test moves."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.sampling_params import SamplingParams
from nanovllm.server.metrics import Metrics
from tests.core.fakes import Rig

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"
LABELS = {"model_name": "tiny", "engine": "0"}

TYPES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:num_preemptions_total": "counter",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:request_success_total": "counter",
    "vllm:iteration_tokens_total": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_prefill_kv_computed_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:request_num_preemptions": "histogram",
    "vllm:cache_config_info": "gauge",
}


class Watched(Rig):
    """A rig whose steps are watched."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.metrics = Metrics("tiny", self.engine)

    def at(self, *times_s: float) -> None:
        """A step at each of these times."""
        for self.now_s in times_s:
            self.metrics.stepped(self.engine.step())

    def abort(self, *sequences: object) -> None:
        self.engine.abort(sequences)
        self.metrics.aborted(list(sequences))

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value

    def __getitem__(self, name: str) -> float | tuple[float, float]:
        """The one value of a series without further labels; count and sum of a histogram."""
        found = {n: value for n, labels, value in self.samples() if labels == LABELS}
        name = f"vllm:{name}"
        return found[name] if name in found else (found[f"{name}_count"], found[f"{name}_sum"])

    def ended(self) -> dict[str, float]:
        return {
            labels["finished_reason"]: value
            for name, labels, value in self.samples()
            if name == "vllm:request_success_total"
        }

    def buckets(self, name: str) -> dict[str, float]:
        return {
            labels["le"]: value for n, labels, value in self.samples() if n == f"vllm:{name}_bucket"
        }


def test_all_names_are_there_from_the_start_with_their_types_and_at_zero():
    rig = Watched(num_blocks=64, block_size=4)
    text = rig.metrics.render().decode()
    types = dict(re.findall(r"^# TYPE (vllm:\S+) (\w+)$", text, re.MULTILINE))
    assert types == TYPES
    assert set(re.findall(r"^# HELP (vllm:\S+) \S", text, re.MULTILINE)) == set(TYPES)
    seen = [(name, labels, value) for name, labels, value in rig.samples() if "vllm:" in name]
    assert all(labels.items() >= LABELS.items() for _, labels, _ in seen)
    settings = {"block_size": "4", "num_gpu_blocks": "64", "enable_prefix_caching": "True"}
    info = ("vllm:cache_config_info", {**LABELS, **settings}, 1.0)
    assert [entry for entry in seen if entry[2] != 0] == [info]
    assert rig.ended() == {"stop": 0, "length": 0, "abort": 0, "error": 0}


def test_the_process_is_described_too():
    process = {name: value for name, _, value in Watched().samples() if name.startswith("process_")}
    assert process["process_resident_memory_bytes"] > 1e6
    assert process["process_open_fds"] > 2


def test_labels_that_need_quoting_come_back_as_they_were():
    name = 'C:\\models\\"new"\none'
    metrics = Metrics(name, Rig().engine, '"1"')
    [family, *_] = text_string_to_metric_families(metrics.render().decode())
    assert family.samples[0].labels == {"model_name": name, "engine": '"1"'}


def test_the_times_of_one_request():
    rig = Watched(max_num_batched_tokens=4)
    rig.now_s = 10.0
    rig.add([5] * 10, max_tokens=4)
    rig.at(10.5, 11.0)  # 4 tokens of the prompt each
    assert rig["time_to_first_token_seconds"] == rig["iteration_tokens_total"] == (0, 0)
    assert rig["num_requests_running"] == 1
    rig.at(12.0, 12.25, 12.75, 13.25)  # the rest of it and a token, then one token each
    assert rig["time_to_first_token_seconds"] == (1, 2.0)
    assert rig["inter_token_latency_seconds"] == (3, 1.25)
    assert rig["request_time_per_output_token_seconds"] == (1, 1.25 / 3)
    assert rig["e2e_request_latency_seconds"] == (1, 3.25)
    assert rig["request_queue_time_seconds"] == (1, 0.5)
    assert rig["request_prefill_time_seconds"] == (1, 1.5)
    assert rig["request_decode_time_seconds"] == (1, 1.25)
    assert rig["request_inference_time_seconds"] == (1, 2.75)
    assert rig["iteration_tokens_total"] == (4, 11 + 1 + 1 + 1)
    assert rig["request_prompt_tokens"] == rig["request_prefill_kv_computed_tokens"] == (1, 10)
    assert rig["request_generation_tokens"] == rig["request_params_max_tokens"] == (1, 4)
    assert rig["request_max_num_generation_tokens"] == (1, 4)
    assert rig["request_params_n"] == (1, 1)
    assert rig["request_num_preemptions"] == (1, 0)
    assert (rig["prompt_tokens_total"], rig["generation_tokens_total"]) == (10, 4)
    assert (rig["num_requests_running"], rig["num_requests_waiting"]) == (0, 0)
    assert rig.ended() == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_a_single_token_has_no_gaps_and_no_time_per_further_token():
    rig = Watched()
    rig.add([5] * 3, max_tokens=1)
    rig.at(1.0)
    assert rig["inter_token_latency_seconds"] == (0, 0)
    assert rig["request_time_per_output_token_seconds"] == (1, 0)
    assert rig["request_decode_time_seconds"] == (1, 0)


def test_a_value_on_a_bound_is_in_its_bucket_and_buckets_add_up():
    rig = Watched(max_model_len=100)
    for arrival_s in (0.0, -0.25, -0.3, -9999.0):
        rig.add([5] * 3, max_tokens=1, arrival_s=arrival_s)
    rig.at(1.0)
    found = rig.buckets("time_to_first_token_seconds")
    assert list(found)[:3] == ["0.001", "0.005", "0.01"] and len(found) == 23
    assert {le: found[le] for le in ("0.75", "1.0", "2.5", "2560.0", "+Inf")} == {
        "0.75": 0,
        "1.0": 1,
        "2.5": 3,
        "2560.0": 3,
        "+Inf": 4,
    }
    found = rig.buckets("request_prompt_tokens")
    assert found == {
        **dict.fromkeys(["1.0", "2.0"], 0),
        **dict.fromkeys(["5.0", "10.0", "20.0", "50.0", "100.0", "+Inf"], 4),
    }
    assert " ".join(rig.buckets("iteration_tokens_total")) == (
        "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0 +Inf"
    )
    assert " ".join(rig.buckets("e2e_request_latency_seconds")) == (
        "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 "
        "120.0 240.0 480.0 960.0 1920.0 7680.0 +Inf"
    )
    assert " ".join(rig.buckets("inter_token_latency_seconds")) == (
        "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 "
        "1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 +Inf"
    )


def test_cached_tokens_are_queried_hit_and_not_computed():
    rig = Watched(block_size=4)
    rig.add([5] * 10, max_tokens=1)
    rig.at(1.0)
    rig.add([5] * 10, max_tokens=1)
    rig.at(2.0)
    assert (rig["prefix_cache_queries_total"], rig["prefix_cache_hits_total"]) == (20, 8)
    assert rig["prompt_tokens_total"] == 20
    assert rig["iteration_tokens_total"] == (2, 11 + 3)
    assert rig["request_prefill_kv_computed_tokens"] == (2, 10 + 2)


def test_the_samples_of_a_request_count_singly_but_for_n_and_the_longest():
    rig = Watched(max_num_seqs=2, eos_token_ids=(7,), sample=lambda tokens: 7)
    rig.engine.add([5] * 3, SamplingParams(n=3, max_tokens=5, min_tokens=0))
    other = rig.add([6] * 3, max_tokens=2, ignore_eos=True)
    rig.at(1.0)
    assert rig.ended()["stop"] == 2 and rig["num_requests_waiting"] == 2
    assert rig["request_params_n"] == (0, 0)  # one sample is yet to come
    rig.at(2.0)
    assert rig["request_params_n"] == (1, 3)
    assert rig["request_max_num_generation_tokens"] == (1, 1)
    rig.at(3.0)
    assert other.finish_reason == "length"
    assert rig["request_params_n"] == (2, 4)
    assert rig["request_max_num_generation_tokens"] == (2, 3)
    assert rig.ended() == {"stop": 3, "length": 1, "abort": 0, "error": 0}


def test_a_request_given_up_is_counted_and_not_timed():
    rig = Watched(max_num_seqs=2)
    running = rig.add([5] * 3)
    done, rest = rig.engine.add([6] * 3, SamplingParams(n=2, max_tokens=1))
    waiting = rig.add([7] * 3)
    rig.at(1.0)
    assert (done.finish_reason, waiting.scheduled_s) == ("length", None)
    rig.abort(running)
    rig.abort(rest)
    rig.abort(waiting)
    assert rig.ended() == {"stop": 0, "length": 1, "abort": 3, "error": 0}
    assert rig["e2e_request_latency_seconds"] == (1, 1.0)
    assert rig["request_queue_time_seconds"] == (1, 1.0)
    assert (rig["num_requests_running"], rig["num_requests_waiting"]) == (0, 0)
    rig.at(2.0)
    assert rig["iteration_tokens_total"] == (1, 8)  # a step with nothing to do is none
    rig.add([8] * 3, max_tokens=1)
    rig.at(3.0)
    assert rig["request_params_n"] == (1, 1)


def test_a_request_that_fails_outside_a_step_is_an_error():
    rig = Watched()
    failed, other = rig.add([5] * 3), rig.add([6] * 3)
    rig.at(1.0)
    rig.engine.finish([failed], "error", "not a word")
    rig.metrics.aborted([failed])
    rig.abort(other)
    assert rig.ended() == {"stop": 0, "length": 0, "abort": 1, "error": 1}
    assert (rig.metrics.last_token_s, rig.metrics.samples) == ({}, {})


def test_a_step_that_fails_ends_requests_whose_tokens_never_came():
    rig = Watched()
    rig.add([5] * 3)
    rig.at(1.0)
    rig.add([6] * 3)
    rig.executor.failures = [RuntimeError("out of luck")]
    rig.at(3.0)
    assert rig.ended() == {"stop": 0, "length": 0, "abort": 0, "error": 2}
    assert rig["time_to_first_token_seconds"] == (1, 1.0)
    assert rig["inter_token_latency_seconds"] == (0, 0)
    assert rig["iteration_tokens_total"] == (2, 4 + 0)
    assert rig["e2e_request_latency_seconds"] == (2, 3.0 + 2.0)
    assert rig["request_queue_time_seconds"] == (2, 1.0 + 2.0)
    assert rig["request_prefill_time_seconds"] == (1, 0)
    assert rig["request_generation_tokens"] == (2, 1)


def test_a_token_whose_text_fails_was_a_token():
    rig = Watched()
    seq = rig.add([5] * 3)
    rig.at(1.0)
    rig.now_s = 2.0
    advanced = rig.engine.step()
    rig.engine.finish([seq], "error", "not a word")
    rig.metrics.stepped(advanced)
    assert rig["inter_token_latency_seconds"] == (1, 1.0)
    assert rig.ended()["error"] == 1


def test_a_preempted_request_waits_between_two_tokens():
    rig = Watched(num_blocks=4, block_size=4, enable_prefix_caching=False)
    rig.add([5] * 6, max_tokens=4)
    victim = rig.add([6] * 7, max_tokens=3)
    rig.at(1.0, 2.0)
    assert rig["kv_cache_usage_perc"] == 1.0
    rig.at(3.0)
    assert (victim.num_preemptions, rig["num_preemptions_total"]) == (1, 1)
    assert rig["num_requests_waiting"] == 1
    rig.at(4.0, 5.0)
    assert victim.finish_reason == "length"
    assert rig["request_num_preemptions"] == (2, 1)
    assert rig["inter_token_latency_seconds"] == (3 + 2, 3.0 + 4.0)
    assert rig["request_queue_time_seconds"] == (2, 2.0)
    assert rig["request_inference_time_seconds"] == (2, 3.0 + 4.0)


def test_nothing_is_kept_of_requests_that_ended():
    rig = Watched(max_num_seqs=4)
    for i in range(40):
        sequences = rig.engine.add([5 + i] * 3, SamplingParams(n=1 + i % 3, max_tokens=1 + i % 5))
        rig.at(i + 0.5)
        if i % 4 == 0:
            rig.abort(*(seq for seq in sequences if seq.finish_reason is None))
    assert rig.metrics.last_token_s
    while rig.engine.has_unfinished:
        rig.at(rig.now_s + 1.0)
    assert (rig.metrics.last_token_s, rig.metrics.samples) == ({}, {})
    assert sum(rig.ended().values()) == rig.engine.num_added


def test_another_thread_may_render_while_the_engine_steps():
    rig = Watched(max_num_seqs=8)
    name = "vllm:iteration_tokens_total"
    with ThreadPoolExecutor(1) as pool:
        pages = [pool.submit(rig.metrics.render) for _ in range(30)]
        while not all(page.done() for page in pages):
            rig.engine.add([5] * 3, SamplingParams(max_tokens=2))
            rig.at(rig.now_s + 1.0)
    counts = []
    for page in pages:
        text = page.result().decode()
        count, end = (
            float(re.search(rf"^{name}_{part} (\S+)$", text, re.MULTILINE)[1])
            for part in (r"count\{.*\}", r'bucket\{.*le="\+Inf".*\}')
        )
        assert count == end
        counts.append(count)
    assert all(before <= after for before, after in pairwise(counts))


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text())


def test_the_dashboard_asks_for_what_is_there(dashboard):
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expr in exprs for name in re.findall(r"vllm:\w+|process_\w+", expr)}
    assert len(asked) > 20
    assert asked - {name for name, _, _ in Watched().samples()} == set()
    assert all('{model_name="$model_name"}' in expr for expr in exprs)


def test_the_dashboard_can_be_imported(dashboard):
    panels, variables = dashboard["panels"], dashboard["templating"]["list"]
    assert [variable["name"] for variable in variables] == ["datasource", "model_name"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    cells = [
        (panel["gridPos"]["y"] + y, panel["gridPos"]["x"] + x)
        for panel in panels
        for y in range(panel["gridPos"]["h"])
        for x in range(panel["gridPos"]["w"])
    ]
    assert len(cells) == len(set(cells)) and max(x for _, x in cells) == 23
    for panel in panels:
        assert [t["refId"] for t in panel["targets"]] == list("ABC")[: len(panel["targets"])]
