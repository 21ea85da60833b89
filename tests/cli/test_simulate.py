"""`nanovllm simulate` and `nanovllm calibrate` from their command lines."""

import json

import pytest

from nanovllm.cli import main

REQUESTS = "".join(
    json.dumps(
        {
            "input_toks": 100 + i,
            "output_toks": 5,
            "queued_ts": i / 10,
            "first_token_ts": i / 10 + 0.03,
            "last_token_ts": i / 10 + 0.15,
        }
    )
    + "\n"
    for i in range(5)
)


def test_a_report_is_printed_and_written(tmp_path, capsys):
    trace, report = tmp_path / "trace.jsonl", tmp_path / "report.json"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 3, "tenant": "a"}\n')
    words = ["simulate", "--workload", str(trace), "--json", str(report), "--price-per-hour", "2"]
    assert main([*words, "--ttft-target-ms", "1000"]) == 0
    result = json.loads(report.read_text())
    assert (result["num_requests"], result["num_finished"]) == (1, 1)
    assert result["goodput"] == result["request_throughput"]
    hours = result["duration_s"] / 3600
    assert result["cost_per_million_tokens"] == pytest.approx(2 * hours / 11 * 1e6)
    assert list(result["fairness"]["tenants"]["groups"]) == ["a"]
    assert "ttft_ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--hardware", "abacus"], "choose one of rtx4090"),
        (["--model", "nothing"], "name a config.json"),
        (["--model", "llama-3.1-70b", "--hardware", "l4"], "take larger devices or more"),
        (["--tensor-parallel-size", "3"], "must divide"),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "needs a token"),
        (["--scheduling-policy", "nonsense"], "scheduling_policy"),
        (["--workload", "synthetic:color=3"], "choose from num_requests"),
        (["--workload", "synthetic:turns=x"], "must be a number"),
        (["--workload", "{folder}/none"], "No such file"),
        (["--workload", "{folder}/bad"], "request 1 has no prompt_tokens"),
        (["--calibration", "{folder}/bad"], "no file that `nanovllm calibrate` wrote"),
        (["--max-model-len", "999999"], "the model takes 131072"),
    ],
)
def test_what_is_impossible_is_said_and_nothing_is_written(words, why, tmp_path, capsys):
    (tmp_path / "bad").write_text('{"arrival_s": 0}\n')
    files = ["--json", str(tmp_path / "report"), "--events", str(tmp_path / "events")]
    assert main(["simulate", *(word.format(folder=tmp_path) for word in words), *files]) == 2
    assert why in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["bad"]


def test_a_calibration_is_written_and_used(tmp_path, capsys):
    log, fit = tmp_path / "log.jsonl", tmp_path / "fit.json"
    log.write_text(REQUESTS)
    assert main(["calibrate", "--requests", str(log), "-o", str(fit), "--hardware", "l40s"]) == 0
    assert set(json.loads(fit.read_text())) >= {"compute_efficiency", "overhead_s", "errors"}
    words = ["--workload", "synthetic:num_requests=5", "--calibration", str(fit)]
    assert main(["simulate", *words, "--hardware", "l40s"]) == 0
    assert "bandwidth_efficiency" in capsys.readouterr().out


def test_a_fit_without_files_is_refused(capsys):
    assert main(["calibrate"]) == 2
    assert "requests=None: name a file" in capsys.readouterr().err
