"""`nanovllm advise` from its command line."""

import json

import pytest

from nanovllm.cli import main

WORDS = ["--num-requests", "20", "--output-tokens", "8", "--num-workers", "1", "--seeds", "2"]
WORDS += ["--model", "qwen3-0.6b", "--num-kv-blocks", "2000", "--tensor-parallel-size", "1"]


def test_advice_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "answers.json"
    words = ["advise", "--ttft-p99-ms", "200", "--tpot-p99-ms", "50", *WORDS, "--json", str(file)]
    assert main([*words, "--price", "l4=0.5", "--price", "h100=2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Take l4, TP 1, ")
    assert "1 replica (1 device), $0.50 an hour" in said
    assert "Next: h100, TP 1" in said
    assert "300% more" in said
    answers = json.loads(file.read_text())["answers"]
    assert len(answers) == 2 + 2 * (2 * 3 * 2 - 1)  # both, and the same with what is tuned
    assert answers[0]["met"] and answers[0]["num_devices"] == 1


def test_what_the_command_line_sets_is_not_tuned(tmp_path, capsys):
    words = ["advise", "--ttft-p99-ms", "0.01", *WORDS, "--hardware", "l4,cpu"]
    file = tmp_path / "answers.json"
    assert main([*words, "--max-num-seqs", "8", "--json", str(file)]) == 0
    assert "No setting meets TTFT p99 of 0.01 ms" in capsys.readouterr().out
    answers = json.loads(file.read_text())["answers"]
    assert [answer["setting"]["max_num_seqs"] for answer in answers] == [8, 8]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "ttft_p99_ms=None: give this"),
        (["--ttft-p99-ms", "0"], "must be a number from 0.001"),
        (["--ttft-p99-ms", "9", "--price", "l4=1", "--hardware", "h100"], "--price h100=USD"),
        (["--ttft-p99-ms", "9", "--workload", "{folder}/bad"], "request 1 has no"),
        (["--ttft-p99-ms", "9", "--workload", "{folder}/one", "--seeds", "2"], "served once"),
        (["--ttft-p99-ms", "9", "--json", "{folder}/no/such"], "in a folder that exists"),
        (["--ttft-p99-ms", "9", "--hardware", "abacus"], "choose one of"),
    ],
)
def test_what_is_impossible_is_said(words, why, tmp_path, capsys):
    (tmp_path / "bad").write_text('{"arrival_s": 0}\n')
    (tmp_path / "one").write_text('{"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 3}\n')
    assert main(["advise", *(word.format(folder=tmp_path) for word in words)]) == 2
    assert why in capsys.readouterr().err
