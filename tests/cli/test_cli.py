"""The `nanovllm` command, from its words to what it prints and its exit status."""

import io
import json
import subprocess
import sys

import pytest

import nanovllm
from nanovllm.cli import main
from nanovllm.cli.generate import names_model

COMMAND = [sys.executable, "-m", "nanovllm"]
SMALL = ["--num-kv-blocks", "64", "--max-tokens", "4", "--ignore-eos"]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and the line on stderr of a command that fails."""
    try:
        status = main(words)
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err.rstrip("\n")


# The whole, in a process of its own


def test_generate_completes_a_prompt_with_the_built_in_model():
    words = ["generate", "The capital of France is", "--max-tokens", "8"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"nanovllm {nanovllm.__version__}\n"


# generate


def test_one_prompt_prints_its_text_alone(tiny, capsys):
    assert main(["generate", "Hello", "-m", str(tiny), *SMALL, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["outputs"][0]["text"]
    assert main(["generate", "Hello", "-m", str(tiny), *SMALL]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_several_prompts_print_each_with_its_text(tiny, capsys):
    words = ["generate", str(tiny), "Hello", *SMALL, "Good morning"]
    assert main([*words, "--json"]) == 0
    lines = capsys.readouterr().out.split("\n")
    texts = [json.loads(line)["outputs"][0]["text"] for line in lines[:-1]]
    assert main(words) == 0
    expected = f"> Hello\n{texts[0]}\n\n> Good morning\n{texts[1]}\n\n"
    assert capsys.readouterr().out == expected


def test_json_holds_the_whole_request(tiny, capsys):
    words = ["generate", "-m", str(tiny), "Hello", *SMALL, "-n", "2", "--logprobs", "1", "--json"]
    assert main([*words, "--temperature", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {
        "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished",
        "num_cached_tokens", "timing",
    }  # fmt: skip
    assert found["request_id"] == "0"
    assert found["prompt"] == "Hello"
    assert found["num_cached_tokens"] == 0
    assert found["timing"]["arrival_s"] <= found["timing"]["first_token_s"]
    assert [sample["index"] for sample in found["outputs"]] == [0, 1]
    for sample in found["outputs"]:
        assert sample["finish_reason"] == "length"
        assert sample["stop_reason"] is None
        assert len(sample["token_ids"]) == len(sample["logprobs"]) == 4
        for token_id, logprobs in zip(sample["token_ids"], sample["logprobs"], strict=True):
            assert logprobs[str(token_id)]["logprob"] <= 0


def test_the_likeliest_tokens_are_taken_by_default(tiny, capsys):
    words = ["generate", "-m", str(tiny), "Hello", *SMALL]
    shown = []
    for more in (["--temperature", "0"], ["--seed", "1"], ["--temperature", "1"]):
        assert main([*words, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_the_seed_decides_what_is_sampled(tiny, capsys):
    words = ["generate", "-m", str(tiny), "Hello", *SMALL, "--temperature", "1"]
    shown = []
    for seed in ("1", "2", "1"):
        assert main([*words, "--seed", seed]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[2] != shown[1]


def test_a_dash_is_the_prompt_on_stdin_without_its_last_newline(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nworld\n"))
    assert main(["generate", str(tiny), "-", *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Hello\nworld"


def test_there_is_no_progress_bar_where_stderr_is_no_terminal(tiny, capsys):
    assert main(["generate", "-m", str(tiny), "Hello", *SMALL]) == 0
    assert capsys.readouterr().err == ""


def test_a_request_that_fails_alone_is_reported_after_the_others(tiny, capsys, monkeypatch):
    from nanovllm.tokenizer import Detokenizer

    push = Detokenizer.push

    def fail_on_hello(self: Detokenizer, token_id: int) -> str:
        if "Hello" in self.tokenizer.decode(self.window):
            raise ValueError("no such piece")
        return push(self, token_id)

    monkeypatch.setattr(Detokenizer, "push", fail_on_hello)
    assert main(["generate", str(tiny), "Hello", "Good morning", *SMALL, "--json"]) == 1
    captured = capsys.readouterr()
    samples = [json.loads(line)["outputs"][0] for line in captured.out.split("\n")[:-1]]
    assert [sample["finish_reason"] for sample in samples] == ["error", "length"]
    assert captured.err == "nanovllm: error: request 0: ValueError: no such piece\n"


@pytest.mark.parametrize(
    ("word", "is_model"),
    [
        ("smollm2-135m", True),
        ("Qwen/Qwen3-0.6B", True),
        ("bartowski/SmolLM2-GGUF:q4.gguf", True),
        ("./missing", True),
        ("missing.gguf", True),
        ("Hello", False),
        ("Is and/or a word?", False),
        ("What is model.gguf", False),
        ("", False),
    ],
)
def test_the_first_of_several_words_is_the_model_if_it_looks_like_one(word, is_model):
    assert names_model(word) is is_model


def test_a_folder_is_a_model_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert names_model("my model")


def test_a_single_word_is_a_prompt_even_if_it_is_a_folder(tiny, capsys):
    assert main(["generate", str(tiny), "-m", str(tiny), *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == str(tiny)


# Errors are one line, and the exit status says whose fault it is


def test_a_missing_or_unknown_command_or_prompt_is_a_usage_error(capsys):
    assert error_of([], capsys) == (
        2,
        "nanovllm: error: the following arguments are required: COMMAND (see nanovllm --help)",
    )
    status, message = error_of(["genrate", "hi"], capsys)
    assert (status, message.split(" (")[0]) == (
        2,
        "nanovllm: error: argument COMMAND: invalid choice: 'genrate'",
    )
    assert error_of(["generate"], capsys) == (
        2,
        "nanovllm: error: PROMPT is missing (see nanovllm generate --help)",
    )


def test_an_impossible_setting_parameter_or_prompt_exits_with_2(tiny, capsys):
    assert error_of(["generate", "hi", "--scheduling-policy", "fcsf"], capsys) == (
        2,
        "nanovllm: error: scheduling_policy='fcsf': can be fcfs, priority, sjf, lpm, edf, fair, "
        "prefill-first, sarathi, or module:Class; the nearest is fcfs",
    )
    status, message = error_of(["generate", "hi", "--max-tokens", "0"], capsys)
    assert (status, message[:30]) == (2, "nanovllm: error: max_tokens=0:")
    status, message = error_of(["generate", "-m", str(tiny), "", *SMALL], capsys)
    assert (status, message[:24]) == (2, "nanovllm: error: prompt=")
    assert message.endswith("must hold at least one token")


def test_a_model_that_cannot_be_loaded_exits_with_1(tmp_path, capsys):
    status, message = error_of(["generate", "./no-such-model", "hi"], capsys)
    assert (status, message[:41]) == (1, "nanovllm: error: model './no-such-model':")
    assert error_of(["generate", str(tmp_path), "hi"], capsys)[0] == 1


def test_ctrl_c_in_generate_exits_with_130(tiny, capsys, monkeypatch):
    from nanovllm.llm import LLM

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    assert main(["generate", "-m", str(tiny), "Hello", *SMALL]) == 130


# pull


def test_pull_prints_where_the_model_is_and_what_it_is(smollm2, capsys):
    assert main(["pull", "smollm2-135m"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{smollm2}\n"
    assert captured.err.startswith("LlamaForCausalLM: 30 layers of 576, 49152 tokens, up to 8192")


def test_pull_refuses_a_model_that_cannot_be_read(tiny, tmp_path, capsys):
    shape = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape))
    status, message = error_of(["pull", str(tmp_path)], capsys)
    assert (status, "holds no weights" in message) == (1, True)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"architectures": ["GPT5"]}))
    status, message = error_of(["pull", str(tmp_path)], capsys)
    assert (status, "architecture 'GPT5' is not supported" in message) == (1, True)
