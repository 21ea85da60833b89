"""Traces of three kinds come out alike."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm.errors import ConfigError
from nanovllm.traces import TraceRequest, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [4, 7, 9]}
{"timestamp": 30535, "input_length": 512, "output_length": 26, "hash_ids": [4]}
"""
TARGETS = "its targets must be positive numbers"
SHARED = '{"arrival_s": 7.5, "prompt_tokens": 30, "output_tokens": 4, "prefix_id": 1, '
OWN = f"""{SHARED} "prefix_tokens": 20}}

{{"arrival_s": 7.0, "prompt_tokens": 5, "output_tokens": 6, "priority": 2}}
"""


def trace(text: str, folder: Path, most: int = 99) -> list[TraceRequest]:
    file = folder / "trace"
    file.write_text(text)
    found = read_trace(str(file), most)
    return [replace(request, arrival_s=round(request.arrival_s, 5)) for request in found]


def test_azure(tmp_path):
    assert trace(AZURE, tmp_path) == [
        TraceRequest(0.0, 4808, 10),
        TraceRequest(0.052, 3180, 8),
    ]


def test_mooncake_blocks_are_512_tokens_but_for_the_last(tmp_path):
    assert trace(MOONCAKE, tmp_path) == [
        TraceRequest(0.0, 1100, 52, (("4", 512), ("7", 512), ("9", 76))),
        TraceRequest(3.053, 512, 26, (("4", 512),)),
    ]


def test_own_format_is_sorted_and_starts_with_the_first_arrival(tmp_path):
    assert trace(OWN, tmp_path) == [
        TraceRequest(0.0, 5, 6, priority=2),
        TraceRequest(0.5, 30, 4, (("1", 20),)),
    ]


def test_tenants_and_targets(tmp_path):
    terms = '"priority": 2, "tenant": "a", "ttft_target_ms": 250, "tpot_target_ms": 50'
    first = trace(OWN.replace('"priority": 2', terms), tmp_path)[0]
    assert (first.tenant, first.ttft_target_s, first.tpot_target_s) == ("a", 0.25, 0.05)


def test_no_more_is_read_than_asked_for(tmp_path):
    assert trace(AZURE + "nonsense\n", tmp_path, most=1) == [TraceRequest(0.0, 4808, 10)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no requests"),
        ("a,b\n1,2\n", "request 1 has no TIMESTAMP"),
        (AZURE + "yesterday,1,1\n", "request 3: Invalid isoformat string: 'yesterday'"),
        (AZURE + "2023-11-16 18:17:05,1,0\n", "request 3: prompt and output need at least 1 token"),
        ('{"timestamp": 1}\n', "request 1 has no input_length"),
        ('{"arrival_s": 1', "request 1: Expecting ',' delimiter: line 1 column 16 (char 15)"),
        (OWN.replace("30", "19"), "request 1: its prefix is longer than its prompt"),
        (OWN.replace("7.5", "NaN"), "request 1: its time of arrival is no number of seconds"),
        (OWN.replace('"priority": 2', '"priority": "x"'), "request 2: its priority is no integer"),
        (OWN.replace('"priority"', '"tpot_target_ms": -1, "x"'), f"request 2: {TARGETS}"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, why, tmp_path):
    with pytest.raises(ConfigError) as error:
        trace(text, tmp_path)
    assert str(error.value).partition(": ")[2] == why


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(str(tmp_path / "none"), 1)
