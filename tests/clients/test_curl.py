"""curl, as the documents show it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import KEY
from tests.server.servers import LIMIT_S, Served

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")

BODY = {
    "model": "smollm2-135m",
    "messages": [
        {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    ],
    "temperature": 0,
}
ANSWER = "The capital of France is Paris."
AUTHORIZATION = ["-H", f"Authorization: Bearer {KEY}"]
JSON = ["-H", "Content-Type: application/json"]


def curl(served: Served, *words: str, path: str = "/v1/chat/completions") -> tuple[int, str]:
    """The status and the text of a response."""
    command = ["curl", "-sS", *words, "-w", "\n%{http_code}", served.url + path]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=True)
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text


def error(text: str) -> tuple[str, int, str | None]:
    """The type, code and param of an error's body."""
    found: dict[str, Any] = json.loads(text)["error"]
    assert found["message"]
    return found["type"], found["code"], found["param"]


def test_an_answer(served: Served) -> None:
    status, text = curl(served, *AUTHORIZATION, *JSON, "-d", json.dumps(BODY))
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == ANSWER


def test_a_stream(served: Served) -> None:
    body = json.dumps({**BODY, "stream": True})
    status, text = curl(served, "-N", "-i", *AUTHORIZATION, *JSON, "-d", body)
    head, _, events = text.partition("\r\n\r\n")
    assert status == 200
    assert "content-type: text/event-stream; charset=utf-8" in head.lower().splitlines()
    *lines, done, rest = events.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == ANSWER


def test_a_body_from_a_file(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "body.json"
    file.write_text(json.dumps(BODY, indent=2), encoding="utf-8")
    for words in (
        ["-d", f"@{file}"],
        ["--data-binary", f"@{file}"],
        ["-X", "POST", "-T", str(file)],
    ):
        status, text = curl(served, *AUTHORIZATION, *JSON, *words)
        assert status == 200
        assert json.loads(text)["choices"][0]["message"]["content"] == ANSWER


def test_a_long_body_that_asks_to_go_on(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "body.json"
    file.write_text(json.dumps({**BODY, "padding": "x" * 2**21}), encoding="utf-8")
    words = ["-v", "-H", "Expect: 100-continue", "--expect100-timeout", str(LIMIT_S)]
    status, _ = curl(served, *words, *AUTHORIZATION, *JSON, "-d", f"@{file}")
    assert status == 200


def test_models_and_health(served: Served) -> None:
    status, text = curl(served, *AUTHORIZATION, path="/v1/models")
    assert (status, json.loads(text)["data"][0]["id"]) == (200, "smollm2-135m")
    assert curl(served, path="/health") == (200, '{"status":"ok"}')


@pytest.mark.parametrize(
    "words", [[], ["-H", "Authorization: Bearer wrong"], ["-u", f"user:{KEY}"]]
)
def test_no_key_is_401(served: Served, words: list[str]) -> None:
    status, text = curl(served, *words, *JSON, "-d", json.dumps(BODY))
    assert (status, error(text)) == (401, ("AuthenticationError", 401, None))


def test_a_forgotten_content_type_is_415(served: Served) -> None:
    status, text = curl(served, *AUTHORIZATION, "-d", json.dumps(BODY))
    assert (status, error(text)) == (415, ("UnsupportedMediaTypeError", 415, None))
    assert "Content-Type must be application/json" in text


@pytest.mark.parametrize("body", ['{"model": ', "{'model': 'x'}", "", "[]", "null", "\x80"])
def test_broken_json_is_400(served: Served, body: str) -> None:
    status, text = curl(served, *AUTHORIZATION, *JSON, "-d", body)
    kind, code, _ = error(text)
    assert (status, kind, code) == (400, "BadRequestError", 400)


def test_what_is_not_there(served: Served) -> None:
    status, text = curl(served, *AUTHORIZATION, path="/v1/chat")
    assert (status, error(text)) == (404, ("NotFoundError", 404, None))
    status, text = curl(served, *AUTHORIZATION)  # GET
    assert (status, error(text)) == (405, ("MethodNotAllowedError", 405, None))
