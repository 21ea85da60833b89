"""`nanovllm chat`: what it answers, what it remembers, and what Ctrl-C does."""

import builtins
import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli import main
from nanovllm.cli.chat import LocalConversation, ServerConversation, typed_lines
from nanovllm.client import Client
from nanovllm.errors import InvalidRequestError, RequestFailedError
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from tests.cli.fake_openai import Answer, deltas, serving

SMALL = ["--num-kv-blocks", "64"]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), num_kv_blocks=64) as llm:
        yield llm


def chat(words: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return main(["chat", *words])


def test_the_built_in_model_answers_and_remembers_the_conversation(capsys, monkeypatch):
    typed = "My name is Anna.\n/reset\nWhat is the capital of France?\n/quit\nWho am I?\n"
    assert chat(["--max-tokens", "12"], typed, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "The capital of France is Paris."


def test_each_line_gets_an_answer_until_the_end_of_input(tiny, capsys, monkeypatch):
    words = [str(tiny), *SMALL, "--max-tokens", "3", "--ignore-eos"]
    assert chat(words, "Hello\n\n  \nGood morning", monkeypatch) == 0
    assert (
        capsys.readouterr().err.count(
            "(cut after 3 tokens; see --max-tokens and --max-model-len)\n"
        )
        == 2
    )


def test_the_answer_is_that_of_llm_chat(llm, capsys):
    conversation = LocalConversation(llm, PARAMS, "Be brief.")
    conversation.answer("Hello")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = llm.chat(messages, PARAMS, use_tqdm=False)[0].outputs[0].text
    assert capsys.readouterr().out == expected + "\n"
    assert conversation.turns == [messages[1], {"role": "assistant", "content": expected}]


def test_a_later_turn_finds_the_earlier_ones_in_the_prefix_cache(llm):
    conversation = LocalConversation(
        llm, PARAMS, "Be brief, be kind, and answer in plain words. " * 8
    )
    conversation.answer("Hello")
    first = int(llm.get_metrics()["prompt_tokens_total"])
    assert first > 64
    assert llm.get_metrics()["prefix_cache_hits_total"] == 0
    conversation.answer("And now?")
    assert llm.get_metrics()["prefix_cache_hits_total"] >= (first - 1) // 16 * 16


def test_the_oldest_turns_are_dropped_when_the_conversation_is_too_long(tiny, capsys):
    with LLM(str(tiny), num_kv_blocks=64, max_model_len=96) as llm:
        conversation = LocalConversation(llm, PARAMS, "Be brief.")
        for number in range(8):
            conversation.answer(f"This is question number {number}.")
        prompt = conversation.prompt()
    assert "(more than 96 tokens: the 2 oldest messages are dropped)" in (capsys.readouterr().err)
    questions = [turn["content"] for turn in conversation.turns if turn["role"] == "user"]
    assert questions == [f"This is question number {n}." for n in range(8)][-len(questions) :]
    assert 1 < len(questions) < 8
    assert prompt["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_a_question_that_can_never_fit_is_refused_and_forgotten(llm, capsys):
    conversation = LocalConversation(llm, PARAMS, None)
    conversation.answer("Hello")
    with pytest.raises(InvalidRequestError, match="must be shorter than 1024 tokens"):
        conversation.answer("word " * 1100)
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]


def test_an_answer_that_fails_is_reported_and_the_chat_goes_on(tiny, capsys, monkeypatch):
    answer, asked = LocalConversation.answer, []

    def fail_first(self: LocalConversation, text: str) -> None:
        asked.append(text)
        if len(asked) == 1:
            raise RequestFailedError("no answer: out of luck")
        answer(self, text)

    monkeypatch.setattr(LocalConversation, "answer", fail_first)
    words = ["-m", str(tiny), *SMALL, "--max-tokens", "3"]
    assert chat(words, "one\ntwo\n", monkeypatch) == 0
    assert asked == ["one", "two"]
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == "nanovllm: error: no answer: out of luck"
    assert captured.out != ""


def test_ctrl_c_stops_the_answer_and_keeps_what_came(llm, capsys, monkeypatch):
    stream, before = llm.stream, signal.getsignal(signal.SIGINT)

    def press_after_three(prompt: Any, params: SamplingParams) -> Iterator[Any]:
        for output in stream(prompt, params):
            if len(output.outputs[0].token_ids) == 3:
                signal.raise_signal(signal.SIGINT)
            yield output

    monkeypatch.setattr(llm, "stream", press_after_three)
    conversation = LocalConversation(llm, PARAMS, None)
    conversation.answer("Hello")
    captured = capsys.readouterr()
    assert captured.err == "(stopped)\n"
    assert conversation.turns[-1] == {"role": "assistant", "content": captured.out[:-1]}
    assert llm.get_metrics()["generation_tokens_total"] == 3
    assert not llm.engine.core.has_unfinished
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_during_a_step_ends_the_program(tiny, monkeypatch):
    def press_twice(*_: object) -> Iterator[Any]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield from ()

    monkeypatch.setattr(LLM, "stream", press_twice)
    assert chat(["-m", str(tiny), *SMALL], "Hello\n", monkeypatch) == 130


def test_ctrl_c_while_typing_gives_a_hint_and_the_second_in_a_row_ends(capsys, monkeypatch):
    keys: Iterator[Any] = iter([KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt])

    def type_next(_: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr(builtins, "input", type_next)
    assert list(typed_lines()) == ["one"]
    assert capsys.readouterr().err == "\n(Ctrl-C again, Ctrl-D or /quit ends the chat)\n" * 2


def test_two_models_are_one_too_many(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "a/b", "-m", "c/d"])
    assert "give one MODEL" in capsys.readouterr().err


def test_a_running_chat_survives_sigint_and_answers_the_next_line(tiny):
    words = ["chat", str(tiny), *SMALL, "--ignore-eos", "--max-tokens", "none"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", "nanovllm", *words]
    with subprocess.Popen(command, bufsize=0, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b"Hello\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"(stopped)\n"
        out, err = process.communicate(b"/reset\nAgain\n")
    assert process.returncode == 0
    assert err.startswith(b"(starting over)\n(cut after ")
    assert out.endswith(b"\n")


# --url


def test_a_server_is_asked_with_the_whole_conversation(capsys, monkeypatch):
    with serving(lambda _: Answer(deltas("Yes", "."))) as fake:
        words = ["--url", fake.url, "--system-prompt", "Be brief.", "--top-k", "2", "--seed", "3"]
        assert chat(words, "One?\nTwo?\n/reset\nThree?\n/quit\nFour?\n", monkeypatch) == 0
    assert capsys.readouterr() == ("Yes.\n" * 3, "(starting over)\n")
    system = {"role": "system", "content": "Be brief."}
    said = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    asked = [body.pop("messages") for body in fake.bodies]
    assert asked == [
        [system, said[0]],
        [system, *said],
        [system, {"role": "user", "content": "Three?"}],
    ]
    assert {path for path, _, _ in fake.seen} == {"/v1/chat/completions"}
    assert fake.bodies[0] == {
        "model": "org/fake-1b", "stream": True, "temperature": 0.0, "max_tokens": 512, "top_k": 2,
        "seed": 3,
    }  # fmt: skip


def test_what_a_server_refuses_is_reported_and_the_chat_goes_on(capsys, monkeypatch):
    def refuse_first(body: dict[str, Any]) -> Answer:
        if len(fake.seen) == 1:
            return Answer([{"error": {"message": "too long"}}], status=400)
        return Answer(deltas("Hm", finish_reason="length"))

    with serving(refuse_first) as fake:
        assert chat(["mine", "--url", fake.url], "One?\nTwo?\n", monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hm\n"
    assert captured.err == "nanovllm: error: HTTP 400: too long\n(cut; see --max-tokens)\n"
    assert fake.bodies[1]["messages"] == [{"role": "user", "content": "Two?"}]
    assert fake.bodies[1]["model"] == "mine"


def test_ctrl_c_closes_the_connection_and_keeps_what_came(capsys, monkeypatch):
    stream = Client.stream

    def press_after_two(*args: Any) -> Iterator[Any]:
        for number, chunk in enumerate(stream(*args)):
            yield chunk
            if number == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Client, "stream", press_after_two)
    with serving(lambda _: Answer(deltas("One", " two", " three"), hold=True)) as fake:
        conversation = ServerConversation(Client(fake.url), {"model": "mine"}, None)
        conversation.answer("Count.")
        assert fake.gone.wait(10)
    assert capsys.readouterr() == ("One two\n", "(stopped)\n")
    assert conversation.turns[-1] == {"role": "assistant", "content": "One two"}


def test_flags_of_a_model_here_are_refused_with_a_server(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "--url", "http://127.0.0.1:1", "--num-kv-blocks", "64"])
    assert "--num-kv-blocks is for a model here" in capsys.readouterr().err
