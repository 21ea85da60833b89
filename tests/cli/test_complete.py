"""`nanovllm complete`, and the client it asks a server with."""

import io
import signal
import subprocess
import sys
from typing import Any

import pytest

from nanovllm.cli import main
from nanovllm.client import Client
from nanovllm.errors import InvalidRequestError, RequestFailedError
from tests.cli.fake_openai import Answer, serving, texts, usage


def echo(body: dict[str, Any]) -> Answer:
    return Answer([*texts(body["prompt"], "!"), usage(1, 2)])


def test_one_prompt_prints_its_text_alone(capsys):
    with serving(echo) as fake:
        assert main(["complete", "Hello", "--url", fake.url]) == 0
    assert capsys.readouterr().out == "Hello!\n"
    [(path, _, body)] = fake.seen
    assert path == "/v1/completions"
    assert body == {
        "model": "org/fake-1b", "prompt": "Hello", "stream": True, "temperature": 0.0,
        "max_tokens": 128,
    }  # fmt: skip


def test_several_prompts_print_each_with_its_text(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\n"))
    with serving(echo) as fake:
        assert main(["complete", "é", "-", "--url", f"{fake.url}/v1/", "--", "--x"]) == 0
    assert capsys.readouterr().out == "> é\né!\n\n> typed\ntyped!\n\n> --x\n--x!\n\n"


def test_flags_go_into_the_request(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    line = "complete Hi -m mine --api-key key --top-k 3 --stop a --stop b --seed 7 --ignore-eos"
    with serving(echo) as fake:
        assert main([*line.split(), "--max-tokens", "none", "--url", fake.url]) == 0
    [(_, headers, body)] = fake.seen
    assert headers["authorization"] == "Bearer key"
    assert body == {
        "model": "mine", "prompt": "Hi", "stream": True, "temperature": 0.0, "top_k": 3,
        "stop": ["a", "b"], "seed": 7, "ignore_eos": True,
    }  # fmt: skip


def test_bad_values_are_refused_before_a_server_is_asked(capsys):
    assert main(["complete", "Hi", "--top-p", "2"]) == 2
    assert capsys.readouterr().err.startswith("nanovllm: error: top_p=2.0: must be a number")
    with pytest.raises(SystemExit, match="2"):
        main(["complete"])
    assert "PROMPT is missing" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(capsys):
    with serving(echo) as fake:
        pass
    assert main(["complete", "Hi", "--url", fake.url]) == 1
    assert capsys.readouterr().err == (
        f"nanovllm: error: no server answers at {fake.url} (Connection refused); is one running? "
        "`nanovllm serve` starts one\n"
    )


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://x:port", "ftp://x"])
def test_a_url_of_no_server_is_refused(url, capsys):
    assert main(["complete", "Hi", "--url", url]) == 2
    remedy = "must be like http://127.0.0.1:8000"
    assert capsys.readouterr().err == f"nanovllm: error: url={url!r}: {remedy}\n"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer([{"error": {"message": "too long", "param": None}}], status=400), "too long"),
        (Answer([{"error": "no key"}], status=401), "HTTP 401: no key"),
        (Answer([{"detail": "loading"}], status=503), "HTTP 503: loading"),
        (Answer([b""], status=500), "HTTP 500: Internal Server Error"),
        (Answer([*texts("a"), {"error": {"message": "no memory"}}]), "no memory"),
        (Answer(texts("a", "b"), whole=False), "the answer broke off"),
        (Answer(["{"], whole=False), "the answer broke off: Expecting property name"),
    ],
)
def test_failures_come_with_the_servers_message(answer, why):
    with serving(lambda _: answer) as fake, pytest.raises(RequestFailedError, match=why):
        list(Client(fake.url).stream("/v1/completions", {"prompt": "Hi"}))


def test_a_field_that_the_server_refuses_is_named():
    message = "top_p=2: must be a number from 0 to 1: the nearest is 1"
    answer = Answer([{"error": {"message": message, "param": "top_p"}}], status=400)
    with serving(lambda _: answer) as fake, pytest.raises(InvalidRequestError) as error:
        list(Client(fake.url).stream("/v1/completions", {"prompt": "Hi", "top_p": 2}))
    assert (error.value.field, error.value.value, str(error.value)) == ("top_p", 2, message)


def test_a_server_without_models_is_told():
    with serving(echo) as fake:
        fake.model = None
        with pytest.raises(RequestFailedError, match="/v1/models names no model"):
            Client(fake.url).first_model()


def test_closing_an_answer_closes_its_connection():
    with serving(lambda _: Answer(texts("a", "b"), hold=True)) as fake:
        chunks = Client(fake.url).stream("/v1/completions", {"prompt": "Hi"})
        assert next(chunks)["choices"][0]["text"] == "a"
        chunks.close()
        assert fake.gone.wait(10)


def test_text_is_shown_as_it_comes_and_ctrl_c_ends_it():
    with serving(lambda _: Answer(texts("one", " two"), hold=True)) as fake:
        command = [sys.executable, "-m", "nanovllm", "complete", "Hi", "--url", fake.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(7) == b"one two"
            process.send_signal(signal.SIGINT)
            assert process.communicate() == (b"", b"")
        assert process.returncode == 130
        assert fake.gone.wait(10)


def test_no_torch_is_loaded():
    code = "import sys, nanovllm.cli.complete, nanovllm.cli.chat, nanovllm.cli.bench_serve\n"
    code += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
