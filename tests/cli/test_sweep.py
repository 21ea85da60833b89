"""`nanovllm sweep` from its command line: what it writes, and what it refuses before it runs."""

import builtins
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from nanovllm.cli import main

PNG = b"\x89PNG"
WORDS = ["--num-requests", "12", "--output-tokens", "4", "--num-workers", "1", "--model"]
WORDS += ["qwen3-0.6b", "--num-kv-blocks", "2000"]


def test_a_table_json_and_pictures(tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["sweep", "--output-dir", str(folder), "--scheduling-policy", "fcfs,sjf", *WORDS]
    words += ["--request-rate", "2,64", "--seeds", "2", "--price", "h100=2.5"]
    assert main([*words, "--ttft-target-ms", "100"]) == 0
    files = {"table.md", "results.json", "frontier.svg", "latency.svg", "cost.svg"}
    assert {file.name for file in folder.iterdir()} == files
    found = json.loads((folder / "results.json").read_text())
    assert found["prices_per_hour"] == {"h100": 2.5}
    assert [(one["setting"]["scheduling_policy"], one["seed"]) for one in found["points"]] == [
        *(("fcfs", 0), ("fcfs", 1)) * 2,
        *(("sjf", 0), ("sjf", 1)) * 2,
    ]
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0].startswith("| scheduling policy | request rate | out tok/s | TTFT p50, ms |")
    assert lines[2].startswith("| fcfs | 2 |")
    assert "Means of 2 seeds" in capsys.readouterr().out
    first = {name: (folder / name).read_bytes() for name in files}
    assert main([*words, "--ttft-target-ms", "100"]) == 0
    assert {name: (folder / name).read_bytes() for name in files} == first


def test_a_trace_has_bars_and_no_interval(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 3}\n' * 4)
    words = ["sweep", "--output-dir", str(tmp_path / "out"), "--workload", str(trace)]
    words += ["--hardware", "l4,h100", "--model", "llama-3.1-8b,llama-3.1-70b", "--plots", "png"]
    assert main([*words, "--num-workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "One trace: no interval." in said
    assert "±" not in said
    assert "cannot run" in said
    assert "it needs --price" in said
    assert (tmp_path / "out" / "latency.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--hardware", "h100,abacus"], "choose one of rtx4090"),
        (["--model", "nothing"], "name a config.json"),
        (["--scheduling-policy", "fcfs,nonsense"], "scheduling_policy"),
        (["--max-num-seqs", "0,1"], "max_num_seqs=0"),
        (["--request-rate", "1,-1"], "request_rate=-1"),
        (["--workload", "{folder}/none"], "No such file"),
        (["--workload", "{folder}/bad"], "request 1 has no prompt_tokens"),
        (["--workload", "{folder}/empty"], "has no requests"),
        (["--workload", "{folder}/good", "--seeds", "2"], "a trace is served once"),
        (["--workload", "{folder}/good", "--request-rate", "2"], "a trace is served once"),
        (["--price", "h100"], "write it as h100=2.5"),
        (["--price", "h100=-1"], "must be above 0"),
        (["--price", "abacus=1"], "choose one of"),
        (["--price", "l4=1"], "give --price h100=USD too"),
        (["--calibration", "{folder}/bad"], "no file that `nanovllm calibrate` wrote"),
        (["--output-dir", "{folder}/no/such"], "name a folder"),
        (["--output-dir", "{folder}/bad"], "name a folder"),
    ],
)
def test_what_is_impossible_is_said_before_anything_runs(words, why, tmp_path, capsys):
    (tmp_path / "bad").write_text('{"arrival_s": 0}\n')
    (tmp_path / "empty").write_text("")
    (tmp_path / "good").write_text('{"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 3}\n')
    folder = ["--output-dir", str(tmp_path / "out"), "--num-workers", "1"]
    assert main(["sweep", *folder, *(word.format(folder=tmp_path) for word in words)]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_number_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--output-dir", "out", "--max-num-seqs", "1,many"])
    assert stop.value.code == 2
    assert "--max-num-seqs" in capsys.readouterr().err
    assert main(["sweep"]) == 2
    assert "name a folder for the results" in capsys.readouterr().err


def test_pictures_without_matplotlib_name_the_extra(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    words = ["sweep", "--output-dir", str(tmp_path / "out"), *WORDS]
    assert main(words) == 1
    assert "nano-vllm[bench]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--plots", "none"]) == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks /proc for processes")
def test_ctrl_c_ends_all_processes_and_writes_nothing(tmp_path):
    words = ["sweep", "--output-dir", str(tmp_path / "out"), "--num-workers", "2", "--seeds", "500"]
    command = [sys.executable, "-m", "nanovllm", *words]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = monotonic() + 60
        while len(children.read_text().split()) < 3:  # two, and Python's tracker of resources
            assert monotonic() < deadline
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()
