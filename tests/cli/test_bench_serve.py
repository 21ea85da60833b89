"""`nanovllm bench serve`: what it sends, when, and what it makes of the answers."""

import json
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli import main
from nanovllm.cli.bench_serve import COMMON_WORDS, arrival_times, draw_ids
from tests.cli.fake_openai import Answer, FakeOpenAI, complete, deltas, serving, texts, usage

DETAILS = {
    "input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors",
}  # fmt: skip
KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "latencies", "queue_times",
    "max_output_tokens_per_s", "max_concurrent_requests",
    "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "std_tpot_ms", "p99_tpot_ms",
    "mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms",
}  # fmt: skip
SMALL = "--num-prompts 3 --random-input-len 7 --random-output-len 4"


def bench(fake: FakeOpenAI, line: str, folder: Path) -> Any:
    """The results of a run."""
    words = f"bench serve --base-url {fake.url} {line} --save-result --result-filename found.json"
    assert main([*words.split(), "--result-dir", str(folder)]) == 0
    return json.loads((folder / "found.json").read_text())


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status of `nanovllm bench serve LINE` and its only line."""
    try:
        status = main(["bench", "serve", *line.split()])
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err.removeprefix("nanovllm: error: ").rstrip("\n")


# What is sent


def test_a_completion_asks_for_so_many_tokens_after_so_many_token_ids(tmp_path):
    with serving(complete) as fake:
        bench(fake, f"{SMALL} --temperature 0 --top-k 5 --logprobs 2", tmp_path)
    assert [path for path, _, _ in fake.seen] == ["/v1/completions"] * 3
    for body in fake.bodies:
        prompt = body.pop("prompt")
        assert len(prompt) == 7
        assert all(1000 <= token_id < 32_000 for token_id in prompt)
        assert body == {
            "model": "org/fake-1b", "max_tokens": 4, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}, "temperature": 0.0, "top_k": 5,
            "logprobs": 2,
        }  # fmt: skip


def test_a_chat_is_asked_in_common_words(tmp_path):
    line = f"--backend openai-chat {SMALL} --model mine --no-ignore-eos --logprobs 2"
    with serving(complete) as fake:
        found = bench(fake, line, tmp_path)
    assert found["model_id"] == "mine"
    assert found["total_input_tokens"] == 3 * (7 + 3)  # as the server counts
    assert [path for path, _, _ in fake.seen] == ["/v1/chat/completions"] * 3
    for body in fake.bodies:
        [message] = body.pop("messages")
        assert message["role"] == "user"
        words = message["content"].split(" ")
        assert len(words) == 7
        assert set(words) <= set(COMMON_WORDS.split())
        assert body == {
            "model": "mine", "max_completion_tokens": 4, "stream": True, "logprobs": True,
            "top_logprobs": 2, "stream_options": {"include_usage": True},
        }  # fmt: skip


def test_the_seed_decides_prompts_and_lengths(tmp_path):
    sent = []
    with serving(complete) as fake:
        for seed in (1, 1, 2):
            line = f"{SMALL} --random-range-ratio 0.9 --max-concurrency 1 --seed {seed}"
            bench(fake, line, tmp_path)
            sent.append([(body["prompt"], body["max_tokens"]) for body in fake.bodies])
            fake.seen.clear()
    assert sent[0] == sent[1] != sent[2]
    assert len({len(prompt) for prompt, _ in sent[0]}) > 1


def test_prompts_share_their_prefix_and_no_more(tmp_path):
    with serving(complete) as fake:
        bench(fake, f"{SMALL} --random-prefix-len 5 --num-warmups 1", tmp_path)
    warmup, *prompts = [body["prompt"] for body in fake.bodies]
    assert [len(prompt) for prompt in prompts] == [12, 12, 12]
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 1
    assert len({prompt[5] for prompt in prompts}) == 3
    assert len(warmup) == 12
    assert warmup[0] != prompts[0][0]


def test_headers_carry_the_key_the_ids_and_what_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    line = f"{SMALL} --header x-a=1 x-b=2=3 --request-id-prefix r- --served-model-name lora"
    with serving(complete) as fake:
        found = bench(fake, line, tmp_path)
    headers = [head for _, head, _ in fake.seen]
    assert {head["authorization"] for head in headers} == {"Bearer secret"}
    assert {(head["x-a"], head["x-b"]) for head in headers} == {("1", "2=3")}
    assert sorted(head["x-request-id"] for head in headers) == ["r-0", "r-1", "r-2"]
    assert {body["model"] for body in fake.bodies} == {"lora"}
    assert found["model_id"] == "org/fake-1b"


def test_a_trace_is_replayed_with_what_its_prompts_share(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 520, "output_length": 2, "hash_ids": [4, 5]},
        {"timestamp": 40, "input_length": 1024, "output_length": 3, "hash_ids": [4, 6]},
        {"timestamp": 80, "input_length": 1, "output_length": 1, "hash_ids": [7]},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"--dataset-name trace --dataset-path {file} --trace-speed 4 --num-prompts 2"
    with serving(complete) as fake:
        found = bench(fake, f"{line} --save-detailed", tmp_path)
    assert found["input_lens"] == [520, 1024]
    assert found["output_lens"] == [2, 3]
    assert found["num_prompts"] == 2
    first, second = sorted((body["prompt"] for body in fake.bodies), key=len)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:520]
    assert found["start_times"][1] - found["start_times"][0] >= 0.009


def test_requests_of_a_trace_keep_their_terms(tmp_path):
    file, one = tmp_path / "trace.jsonl", {"prompt_tokens": 2, "output_tokens": 1}
    terms = {"priority": 3, "ttft_target_ms": 250, "tpot_target_ms": 62.5}
    rows = [{"arrival_s": 1, **one, **terms, "tenant": "a"}, {"arrival_s": 1.001, **one}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(complete) as fake:
        bench(fake, f"--dataset-name trace --dataset-path {file}", tmp_path)
    sent, bare = sorted(fake.bodies, key=len, reverse=True)
    assert {name: sent[name] for name in (*terms, "user")} == terms | {"user": "a"}
    assert not bare.keys() & {*terms, "user"}


# When


def test_requests_come_when_vllms_would():
    assert arrival_times(5, 2.0, 1.0, 0) == pytest.approx(
        [0.4612933000308972, 1.189237769060302, 1.724343049132401, 2.180609223781806, 2.5]
    )
    assert arrival_times(3, 3.0, 5.0, 2) == pytest.approx(
        [0.3772160823185857, 0.8257848257821051, 1.0]
    )


def test_arrivals_without_a_rate_or_without_bursts():
    assert arrival_times(3, inf, 1.0, 0) == [0, 0, 0]
    assert arrival_times(4, 4.0, inf, 0) == [0.25, 0.5, 0.75, 1.0]


def test_no_more_requests_run_than_allowed(tmp_path):
    running, most = [0], [0]

    def count(body: dict[str, Any]) -> Answer:
        running[0] += 1
        most[0] = max(most[0], running[0])
        answer = complete(body)
        running[0] -= 1  # the next comes when this one is answered
        return answer

    with serving(count) as fake:
        line = "--max-concurrency 1 --percentile-metrics client_queue_time"
        found = bench(fake, f"{SMALL} {line} --save-detailed", tmp_path)
    assert most == [1]
    starts_s, latencies_s = found["start_times"], found["latencies"]
    ends_s = [start_s + lasted_s for start_s, lasted_s in zip(starts_s, latencies_s, strict=True)]
    assert starts_s[1] >= ends_s[0]
    assert starts_s[2] >= ends_s[1]
    assert found["queue_times"] == sorted(found["queue_times"])
    assert found["mean_client_queue_time_ms"] > 0


def test_shorter_draws_of_tokens_are_the_first_of_longer_ones():
    assert draw_ids("a", 3, 32_000) == draw_ids("a", 9, 32_000)[:3]
    assert draw_ids("a", 9, 32_000) != draw_ids("b", 9, 32_000)
    assert set(draw_ids("a", 200, 4)) == {0, 1, 2, 3}


# What is made of the answers


def test_the_result_file_has_vllms_keys(tmp_path, capsys):
    with serving(complete) as fake:
        found = bench(fake, f"{SMALL} --metadata tp=1 gpu=none --label mine", tmp_path)
        detailed = bench(fake, f"{SMALL} --save-detailed --goodput ttft:60000", tmp_path)
    assert found.keys() == KEYS | {"tp", "gpu"}
    assert detailed.keys() == KEYS | DETAILS
    assert (found["tp"], found["gpu"], found["label"]) == ("1", "none", "mine")
    assert (found["completed"], found["failed"], found["num_prompts"]) == (3, 0, 3)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (21, 12)
    assert (found["request_rate"], found["burstiness"], found["max_concurrency"]) == (
        "inf",
        1,
        None,
    )
    assert found["request_throughput"] == pytest.approx(3 / found["duration"])
    assert found["request_goodput"] is None
    assert detailed["request_goodput"] == detailed["request_throughput"]
    assert detailed["generated_texts"] == ["aaaa"] * 3
    assert [len(itls) for itls in detailed["itls"]] == [3, 3, 3]
    assert detailed["errors"] == [""] * 3
    assert capsys.readouterr().out.count("Successful requests:                     3 ") == 2


def test_only_the_metrics_and_percentiles_asked_for_are_there(tmp_path):
    line = f"{SMALL} --percentile-metrics e2el --metric-percentiles 50,99.9 --disable-tqdm"
    with serving(complete) as fake:
        found = bench(fake, line, tmp_path)
    assert {key for key in found if key.endswith("_ms")} == {
        "mean_e2el_ms", "median_e2el_ms", "std_e2el_ms", "p50_e2el_ms", "p99.9_e2el_ms",
    }  # fmt: skip


def test_results_are_appended_as_lines_of_a_file_named_after_the_run(tmp_path):
    words = f"bench serve {SMALL} --max-concurrency 2 --append-result --result-dir {tmp_path}/new"
    with serving(complete) as fake:
        assert main([*words.split(), "--base-url", fake.url]) == 0
        [file] = (tmp_path / "new").iterdir()
        assert file.match("openai-infqps-concurrency2-fake-1b-*.json")
        assert main([*words.split(), "--base-url", fake.url, "--result-filename", file.name]) == 0
    lines = file.read_text().splitlines()
    assert [json.loads(line)["completed"] for line in lines] == [3, 3]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer([{"error": {"message": "out of luck"}}], status=500), "HTTP 500: out of luck"),
        (Answer([{"detail": "warming up"}], status=503), "HTTP 503: warming up"),
        (Answer([b"<html>"], status=502), "HTTP 502: <html>"),
        (Answer(texts("a", "b"), whole=False), "Response payload is not completed"),
        (Answer([*texts("a"), {"error": {"message": "no memory"}}]), "no memory"),
        (Answer([usage(7, 0)]), "the answer has no tokens"),
        (Answer([*texts("a", "b"), usage(7, 2)]), "only 2 tokens came; 4 were asked for"),
    ],
)
def test_a_request_that_fails_is_counted_and_says_why(answer, why, tmp_path, capsys):
    def fail_second(body: dict[str, Any]) -> Answer:
        return answer if len(fake.seen) == 2 else complete(body)

    with serving(fail_second) as fake:
        found = bench(fake, f"{SMALL} --max-concurrency 1 --save-detailed", tmp_path)
    assert (found["completed"], found["failed"]) == (2, 1)
    first, error, last = found["errors"]
    assert (first, last) == ("", "")
    assert error.startswith(why)
    assert capsys.readouterr().err == f"a request failed: {error}\n"
    assert found["output_lens"] == [4, 0, 4]
    assert found["total_output_tokens"] == 8


def test_a_shorter_answer_is_fine_where_it_may_end(tmp_path):
    with serving(lambda _: Answer([*texts("a", "b"), usage(9, 2)])) as fake:
        found = bench(fake, f"{SMALL} --no-ignore-eos", tmp_path)
    assert (found["completed"], found["total_output_tokens"]) == (3, 6)


def test_chunks_are_counted_where_the_server_reports_no_usage(tmp_path):
    with serving(lambda _: Answer([": ping", *texts("a", "b", "c", "d")])) as fake:
        found = bench(fake, SMALL, tmp_path)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (21, 12)


def test_the_words_of_an_answer_are_never_taken_for_what_the_server_says(tmp_path):
    tricky = ['{"usage":{"completion_tokens":9}}', '"error":', "data: [DONE]\n\n", "é"]
    with serving(lambda _: Answer([*deltas(*tricky), usage(9, 4)])) as fake:
        found = bench(fake, f"--backend openai-chat {SMALL} --save-detailed", tmp_path)
    assert found["generated_texts"] == ["".join(tricky)] * 3
    assert found["output_lens"] == [4] * 3
    assert [len(itls) for itls in found["itls"]] == [4] * 3


def test_it_waits_until_the_server_is_ready(tmp_path):
    def ready_at_last(body: dict[str, Any]) -> Answer:
        if len(fake.seen) < 2:
            return Answer([{"detail": "loading"}], status=503)
        return complete(body)

    with serving(ready_at_last) as fake:
        found = bench(fake, f"{SMALL} --ready-check-timeout-sec 60", tmp_path)
    assert (found["completed"], len(fake.seen)) == (3, 5)


def test_connections_are_used_again(tmp_path):
    with serving(complete) as fake:
        bench(fake, f"{SMALL} --max-concurrency 1", tmp_path)
    assert fake.num_connections == 2  # one for the name of the model


# What is refused


def test_nothing_but_failures_is_one(capsys):
    with serving(lambda _: Answer([{"detail": "closed"}], status=503)) as fake:
        found = error_of(f"--base-url {fake.url}/v1 {SMALL}", capsys)
        warm = error_of(f"--base-url {fake.url} {SMALL} --num-warmups 1", capsys)
    assert found == (1, "all 3 requests failed; the first: HTTP 503: closed")
    assert warm == (1, "a warm-up failed: HTTP 503: closed")


def test_a_server_that_is_not_there_is_one_line(capsys):
    with serving(complete) as fake:
        pass
    status, line = error_of(f"--base-url {fake.url}", capsys)
    assert status == 1
    assert line == (
        f"no server answers at {fake.url} (Connection refused); is one running? "
        "`nanovllm serve` starts one"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset-name sharegpt", "dataset_name='sharegpt': can be random, trace"),
        ("--dataset-name trace", "dataset_path=None: names the file of --dataset-name trace"),
        ("--dataset-path x", "dataset_path='x': names the file of --dataset-name trace"),
        ("--dataset-name trace --dataset-path /none", "trace='/none': cannot be read: No such"),
        (
            "--dataset-name trace --dataset-path x --request-rate 1",
            "request_rate=1.0: a trace says",
        ),
        ("--backend tgi", "backend='tgi': can be openai, openai-chat, vllm"),
        ("--goodput ttft=3", "goodput='ttft=3': must be NAME:MS"),
        ("--goodput ttft:1 itl:2", "goodput='itl': can be ttft, tpot, e2el"),
        ("--goodput ttft:x", "goodput='x': must be a number"),
        ("--metadata a", "metadata='a': must be KEY=VALUE"),
        ("--percentile-metrics ttft,speed", "percentile_metrics='speed': can be ttft, tpot, itl"),
        ("--metric-percentiles 50,101", "metric_percentiles=101.0: must be from 0 to 100"),
        ("--request-rate 0", "request_rate=0.0: must be a number at least 1e-06"),
        ("--base-url ftp://x", "url='ftp://x': must be like http://127.0.0.1:8000"),
        ("--num-prompts 0", "num_prompts=0: must be an integer from 1"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_sent(line, message, capsys):
    status, found = error_of(line, capsys)
    assert status == 2
    assert found.startswith(message)


def test_without_aiohttp_it_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "nanovllm.cli.bench_requests", raising=False)
    status, line = error_of("", capsys)
    assert status == 1
    assert line.endswith("needs the package aiohttp: pip install 'nano-vllm[bench]'")
