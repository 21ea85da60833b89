"""`nanovllm bench`: what it counts, what it writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nanovllm.cli import main
from nanovllm.cli.bench import as_flag, draw_length, percentiles
from nanovllm.core.engine import EngineCore

SMALL = ["--num-kv-blocks", "64"]


def bench(kind: str, line: str, tiny: Path, folder: Path) -> Any:
    """The JSON that a benchmark of the tiny model wrote."""
    file = folder / "result.json"
    words = ["bench", kind, "-m", str(tiny), *SMALL, *line.split(), "--output-json", str(file)]
    assert main(words) == 0
    return json.loads(file.read_text())


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status of `nanovllm bench LINE` and the end of its line on stderr."""
    try:
        status = main(["bench", *line.split()])
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err.removeprefix("nanovllm: error: ").rstrip("\n")


# throughput


def test_throughput_counts_prompts_times_lengths(tiny, tmp_path, capsys):
    found = bench("throughput", "--num-prompts 5 --input-len 7 --output-len 3", tiny, tmp_path)
    assert found.keys() == {
        "elapsed_time", "num_requests", "total_num_tokens", "requests_per_second",
        "tokens_per_second",
    }  # fmt: skip
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 5 * (7 + 3))
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"])
    assert found["tokens_per_second"] == pytest.approx(50 / found["elapsed_time"])
    first, *others = capsys.readouterr().out.splitlines()
    assert others == ["Total num prompt tokens:  35", "Total num output tokens:  15"]
    output_rate = 15 / found["elapsed_time"]
    assert first == (
        f"Throughput: {found['requests_per_second']:.2f} requests/s, "
        f"{found['tokens_per_second']:.2f} total tokens/s, {output_rate:.2f} output tokens/s"
    )


def test_the_seed_decides_the_lengths(tiny, tmp_path):
    line = "--num-prompts 4 --input-len 20 --output-len 10 --random-range-ratio 0.5 "
    line += "--skip-tokenizer-init --seed "
    totals = [
        bench("throughput", line + seed, tiny, tmp_path)["total_num_tokens"] for seed in "121"
    ]
    assert totals[0] == totals[2] != totals[1]


def test_without_a_tokenizer_the_counts_are_the_same(tiny, tmp_path):
    line = "--num-prompts 2 --input-len 4 --output-len 2 --skip-tokenizer-init"
    assert bench("throughput", line, tiny, tmp_path)["total_num_tokens"] == 12


def test_lengths_cover_the_whole_range_and_nothing_else():
    rng = Random(0)
    assert {draw_length(rng, 10, 0.25) for _ in range(500)} == {7, 8, 9, 10, 11, 12, 13}
    assert {draw_length(rng, 10, 0) for _ in range(50)} == {10}
    assert {draw_length(rng, 1, 0.9) for _ in range(50)} == {1, 2}


# latency


def test_latency_times_every_round_but_the_warm_up(tiny, tmp_path, capsys, monkeypatch):
    lengths, add = [], EngineCore.add

    def note(self: EngineCore, prompt: list[int], params: Any, *more: Any) -> Any:
        lengths.append((len(prompt), params.max_tokens))
        return add(self, prompt, params, *more)

    monkeypatch.setattr(EngineCore, "add", note)
    line = "--input-len 6 --output-len 2 --batch-size 3 --num-iters-warmup 1 --num-iters 4"
    found = bench("latency", line, tiny, tmp_path)
    assert lengths == [(6, 2)] * 3 * (1 + 4)
    assert found.keys() == {"avg_latency", "std_latency", "latencies", "percentiles"}
    assert len(found["latencies"]) == 4
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 4)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert f"Avg latency: {found['avg_latency']:.4f} seconds\n" in capsys.readouterr().out


def test_percentiles_lie_between_neighbours_as_numpy_puts_them():
    assert percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(
        {10: 1.4, 25: 2.0, 50: 3.0, 75: 4.0, 90: 4.6, 99: 4.96}
    )
    assert percentiles([7.0]) == {10: 7.0, 25: 7.0, 50: 7.0, 75: 7.0, 90: 7.0, 99: 7.0}


# startup


def test_startup_times_a_command_of_its_own_each_round(tiny, tmp_path, capsys):
    line = "--num-iters-cold 0 --num-iters-warmup 0 --num-iters-warm 1"
    found = bench("startup", line, tiny, tmp_path)
    assert found.keys() == {
        "avg_warm_startup_time", "warm_startup_times", "warm_startup_percentiles",
    }  # fmt: skip
    assert found["warm_startup_times"] == [found["avg_warm_startup_time"]]
    assert capsys.readouterr().out.startswith("Avg warm startup time: ")


def test_a_cold_start_finds_no_compiled_kernels(tiny, tmp_path, monkeypatch):
    found = []

    def first_token_s(words: list[str], variables: dict[str, str]) -> float:
        found.append([list(Path(folder).iterdir()) for folder in variables.values()])
        return 1.5

    monkeypatch.setattr("nanovllm.cli.bench.first_token_s", first_token_s)
    line = "--num-iters-cold 1 --num-iters-warmup 0 --num-iters-warm 1"
    assert bench("startup", line, tiny, tmp_path)["cold_startup_times"] == [1.5]
    assert found == [[[], []], []]  # an empty folder for each of the two kinds; then the usual ones


def test_a_start_that_fails_is_told_in_the_words_of_the_command(tmp_path, capsys):
    line = f"startup -m {tmp_path}/missing --num-iters-cold 0"
    status, message = error_of(line, capsys)
    assert (status, message.partition(":")[0]) == (1, f"model '{tmp_path}/missing'")


def test_a_setting_becomes_the_flag_that_gives_it():
    assert as_flag("max_num_seqs", 4) == ["--max-num-seqs", "4"]
    assert as_flag("max_model_len", None) == ["--max-model-len", "none"]
    assert as_flag("enforce_eager", True) == ["--enforce-eager"]
    assert as_flag("enforce_eager", False) == ["--no-enforce-eager"]


# What is refused


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("throughput --num-prompts 0", "num_prompts=0: must be an integer from 1"),
        ("throughput --random-range-ratio 1", "random_range_ratio=1.0: must be a number from 0.0"),
        ("latency --batch-size -1", "batch_size=-1: must be"),
        ("startup --num-iters-warm 0", "num_iters_warm=0: must be"),
        ("latency --output-json /no/such/x", "output_json='/no/such/x': name a file in a folder"),
        ("latency --output-json /", "output_json='/': name a file in a folder"),
        ("throughput --block-size 0", "block_size=0: must be"),
        ("throughput --num-iters 3", "unrecognized arguments: --num-iters 3"),
        ("startup --skip-tokenizer-init", "unrecognized arguments: --skip-tokenizer-init"),
        ("thruput", "argument KIND: invalid choice: 'thruput'"),
        ("", "the following arguments are required: KIND"),
    ],
)
def test_a_bad_value_is_refused_and_named(line, start, capsys):
    status, message = error_of(line, capsys)
    assert (status, message[: len(start)]) == (2, start)


def test_lengths_that_the_engine_would_cut_are_refused(tiny, capsys):
    line = f"throughput -m {tiny} --num-kv-blocks 4 --input-len 50 --output-len 20"
    assert error_of(line, capsys) == (
        2,
        "output_len=20: with prompts of up to 50 tokens, 64 is the most for both together "
        "(see --max-model-len)",
    )


def test_help_and_bad_values_load_no_torch():
    code = (
        "import sys, nanovllm.cli\n"
        "for words in (['throughput', '--help'], ['latency', '--help'], ['startup', '--help'],\n"
        "              ['latency', '--num-iters', '0']):\n"
        "    try: nanovllm.cli.main(['bench', *words])\n"
        "    except SystemExit: pass\n"
        "print('LOADED', {'torch', 'numpy', 'tokenizers', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("LOADED set()\n"), done.stderr
