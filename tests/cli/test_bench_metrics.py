"""The numbers of `nanovllm bench serve`, worked out by hand."""

import pytest

from nanovllm.cli.bench_metrics import Record, details, spread_of, summary, table

# Times in binary fractions, so that all sums are exact.
LONG = Record(
    num_input=10,
    num_output=4,
    arrival_s=99.75,
    start_s=100.0,
    times_s=[100.5, 100.75, 101.0, 101.5],
)
SHORT = Record(num_input=6, num_output=1, arrival_s=100.0, start_s=100.5, times_s=[100.75])
BROKEN = Record(num_input=8, start_s=100.5, arrival_s=100.5, times_s=[104.0], error="HTTP 500: no")
ALL = [LONG, SHORT, BROKEN]


def test_counts_and_rates_leave_out_what_failed():
    assert summary(ALL, 2.0, {}) == {
        "duration": 2.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 16,
        "total_output_tokens": 5,
        "request_throughput": 1.0,
        "request_goodput": None,
        "output_throughput": 2.5,
        "total_token_throughput": 10.5,
        "latencies": [1.5, 0.25, 3.5],
        "queue_times": [0.25, 0.5, 0.0],
        "max_output_tokens_per_s": 3.0,  # 0.5, 0.75 and 0.75 s after the start
        "max_concurrent_requests": 2,
    }


@pytest.mark.parametrize(
    ("limits_ms", "good"),
    [
        ({"ttft": 500}, 2),
        ({"ttft": 499}, 1),
        ({"tpot": 0}, 1),  # the answer of one token has none
        ({"tpot": 334}, 2),
        ({"ttft": 500, "e2el": 1499}, 1),
        ({"ttft": 100}, 0),
    ],
)
def test_a_request_is_good_if_it_keeps_all_limits(limits_ms, good):
    assert summary(ALL, 2.0, limits_ms)["request_goodput"] == good / 2.0


@pytest.mark.parametrize(
    ("name", "mean", "median", "std", "p99"),
    [
        ("ttft", 375, 375, 125, 497.5),  # 500, 250
        ("tpot", 1000 / 3, 1000 / 3, 0, 1000 / 3),  # (1500 - 500) / 3 tokens
        ("itl", 1000 / 3, 250, 13888.888888888889**0.5, 495),  # 250, 250, 500
        ("e2el", 875, 875, 625, 1487.5),  # 1500, 250
        ("client_queue_time", 375, 375, 125, 497.5),  # 250, 500
        ("e2el_including_client_queue", 1250, 1250, 500, 1740),  # 1750, 750
    ],
)
def test_the_spread_of_each_metric(name, mean, median, std, p99):
    found = spread_of(name, ALL, [99.0, 0.0])
    assert list(found)[:4] == [f"{key}_{name}_ms" for key in ("mean", "median", "std", "p99")]
    assert list(found.values())[:4] == pytest.approx([mean, median, std, p99])


def test_percentiles_keep_their_fractions_in_their_names():
    assert list(spread_of("ttft", ALL, [99.9, 50.0]))[3:] == ["p99.9_ttft_ms", "p50_ttft_ms"]


def test_nothing_but_failures_is_all_zeros():
    found = summary([BROKEN], 2.0, {"ttft": 1}) | spread_of("itl", [BROKEN], [99])
    assert found["max_output_tokens_per_s"] == found["p99_itl_ms"] == found["request_goodput"] == 0


def test_details_of_each_request():
    chat = Record(num_input=1, num_output=1, start_s=1.0, times_s=[1.5])
    chat.events = [b'{"choices": [{"delta": {"role": "assistant"}}, {"delta": {"content": "hi"}}]}']
    plain = Record(num_input=1, num_output=1, start_s=1.0, times_s=[1.5])
    plain.events = [b'{"choices": [{"text": "a"}]}', b'{"choices": [{"text": "b"}]}']
    assert details([*ALL, chat, plain]) == {
        "input_lens": [10, 6, 8, 1, 1],
        "output_lens": [4, 1, 0, 1, 1],
        "ttfts": [0.5, 0.25, 3.5, 0.5, 0.5],
        "itls": [[0.25, 0.25, 0.5], [], [], [], []],
        "start_times": [100.0, 100.5, 100.5, 1.0, 1.0],
        "generated_texts": ["", "", "", "hi", "ab"],
        "errors": ["", "", "HTTP 500: no", "", ""],
    }


def test_the_table_has_vllms_labels():
    result = summary(ALL, 2.0, {"ttft": 500}) | {"max_concurrency": None, "request_rate": "inf"}
    result |= spread_of("e2el", ALL, [99.0]) | spread_of("tpot", ALL, [50.0])
    lines = [line.rstrip() for line in table(result, ["tpot", "e2el"]).splitlines()]
    assert lines == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     2",
        "Failed requests:                         1",
        "Benchmark duration (s):                  2.00",
        "Total input tokens:                      16",
        "Total generated tokens:                  5",
        "Request throughput (req/s):              1.00",
        "Request goodput (req/s):                 1.00",
        "Output token throughput (tok/s):         2.50",
        "Peak output token throughput (tok/s):    3.00",
        "Peak concurrent requests:                2",
        "Total token throughput (tok/s):          10.50",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          333.33",
        "Median TPOT (ms):                        333.33",
        "P50 TPOT (ms):                           333.33",
        "----------------End-to-end Latency----------------",
        "Mean E2EL (ms):                          875.00",
        "Median E2EL (ms):                        875.00",
        "P99 E2EL (ms):                           1487.50",
        "==================================================",
    ]
