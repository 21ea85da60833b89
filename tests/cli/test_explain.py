"""`nanovllm explain`: what it says of a recording, the timeline it writes, what it refuses."""

import json
from pathlib import Path

import pytest

from nanovllm.cli import main
from nanovllm.recording import Step, read_recording
from nanovllm.replay import replay
from tests.core.fakes import Rig
from tests.test_recording import recorded


@pytest.fixture
def scarce(tmp_path: Path) -> str:
    """A recording of three requests of which the middle one is preempted, half a second a step."""
    path = tmp_path / "scarce.jsonl"
    rig = Rig(num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=12)
    recorder = recorded(path, rig)
    for name, prompt in {"one": [1] * 8, "two": [2] * 8, "three": [1] * 9}.items():
        rig.add(prompt, max_tokens=6, request_id=name)
    rig.run()
    recorder.close()
    return str(path)


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status of `nanovllm explain WORDS` and its line on stderr."""
    try:
        status = main(["explain", *words])
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err.removeprefix("nanovllm: error: ").rstrip("\n")


def test_the_overview(scarce: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", scarce]) == 0
    assert (
        capsys.readouterr().out
        == """\
An engine under nanovllm.core.policy:Policy: 6 blocks of 4 tokens, at most 2 sequences and \
12 tokens a step
Sequences: 3 (3 length)
Steps: 13 in 6.500 s, 6.500 s of it in the executor; 1.5 sequences a step
Tokens: 25 of prompts, 18 of output
Prefix cache: 8 of 25 prompt tokens
Preemptions: 2; 4 tokens computed again
TTFT: median 1.000 s, longest 3.500 s
Waited, all together: 2.500 s for max_num_seqs, 1.000 s for no blocks, 500.0 ms for its turn
What limited admission most: max_num_seqs
"""
    )


def test_a_request_that_was_preempted(scarce: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", scarce, "--request", "two"]) == 0
    assert (
        capsys.readouterr().out
        == """\
Request two, sequence 1: 8 prompt tokens, at most 6 more; it came 0.0 ms into the recording
  waited: 500.0 ms for no blocks
  +0.0 ms step 1: admitted (fits), 8 tokens to have
  +0.0 ms step 1: cache miss: first block not cached
  +0.0 ms step 1: got 4 of 8 tokens (budget)
  +2.500 s step 6: preempted for request one (came last), 11 computed tokens lost
  +2.500 s step 6: looked at and left waiting: no blocks
  +3.000 s step 7: admitted (fits), 12 tokens to have
  +3.000 s step 7: cache hit: 8 tokens (prefix)
  prefilled: 4 in step 1, 4 in step 2, 4 in step 7
  tokens computed again after preemptions: 3
  TTFT 1.000 s, then 600.0 ms a token, the longest 1.000 s (before token 5)
  +4.000 s ended: length, 6 tokens
"""
    )


def test_a_request_that_found_its_prefix(scarce: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", scarce, "--request", "three"]) == 0
    assert (
        capsys.readouterr().out
        == """\
Request three, sequence 2: 9 prompt tokens, at most 6 more; it came 0.0 ms into the recording
  waited: 2.500 s for max_num_seqs, 500.0 ms for its turn, 500.0 ms for no blocks
  +500.0 ms step 2: looked at and left waiting: max_num_seqs
  +3.000 s step 7: admitted (fits), 9 tokens to have
  +3.000 s step 7: cache hit: 8 tokens (prefix)
  +3.500 s step 8: preempted for request two (came last), 9 computed tokens lost
  +3.500 s step 8: looked at and left waiting: no blocks
  +4.000 s step 9: admitted (fits), 10 tokens to have
  +4.000 s step 9: cache hit: 8 tokens (prefix)
  prefilled: 1 in step 7, 2 in step 9
  tokens computed again after preemptions: 1
  TTFT 3.500 s, then 600.0 ms a token, the longest 1.000 s (before token 2)
  +6.500 s ended: length, 6 tokens
"""
    )


def test_perfetto_writes_a_timeline(
    scarce: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["explain", scarce, "--perfetto", str(out)]) == 0
    events = json.loads(out.read_text())["traceEvents"]
    assert [
        (event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X" and event["pid"] == 2 and event["tid"] == 1
    ] == [
        ("prefill", 0.0, 1e6),
        ("decode", 1e6, 1.5e6),
        ("preempted", 2.5e6, 5e5),
        ("prefill", 3e6, 5e5),
        ("decode", 3.5e6, 5e5),
    ]


def test_generate_records_what_explain_reads(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "live.jsonl")
    words = ["generate", "-m", str(tiny), "--num-kv-blocks", "64", "--max-tokens", "4"]
    assert main([*words, "--ignore-eos", "--record", path, "Hello there"]) == 0
    assert "Hello" not in Path(path).read_text()
    records = list(read_recording(path))
    steps = [record.seq_ids for record in records if isinstance(record, Step)]
    assert [plan.seq_ids for plan in replay(records)] == steps == [[0]] * 4
    capsys.readouterr()
    assert main(["explain", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tiny} under fcfs: 64 blocks of 16 tokens")
    assert lines[1] == "Sequences: 1 (1 length)"
    assert main(["explain", path, "--request", "0"]) == 0
    assert "ended: length, 4 tokens" in capsys.readouterr().out


def test_what_is_refused(scarce: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of([], capsys) == (2, "name one FILE (see nanovllm explain --help)")
    status, line = error_of([scarce, "--request", "four"], capsys)
    assert (status, line) == (2, "request='four': the recording has one, two, three")
    status, line = error_of([scarce, "--perfetto", str(tmp_path)], capsys)
    assert (status, line.startswith("perfetto=")) == (2, True)
    status, line = error_of([str(tmp_path / "none")], capsys)
    assert status == 2 and "cannot be read: No such file" in line
    (tmp_path / "bad").write_text("hello\n")
    status, line = error_of([str(tmp_path / "bad")], capsys)
    assert status == 2 and "line 1: " in line
