"""docs/serving.md against a server: its commands and its code do what the page says."""

import contextlib
import io
import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.server.servers import Served
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "serving.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("serving") / "log"
    with Served("--num-kv-blocks", "512", log=log) as served:
        yield served


def bodies(served: Served, kind: str) -> list[str]:
    found = [body for _, info, body in blocks(PAGE.read_text()) if info == kind]
    return [body.replace(ADDRESS, served.url) for body in found]


def test_the_commands_answer(served: Served) -> None:
    chat, stream = [
        subprocess.run(["bash", "-c", body], capture_output=True, text=True, timeout=60, check=True)
        for body in bodies(served, "sh")
    ]
    answer = json.loads(chat.stdout)["choices"][0]["message"]["content"]
    assert answer == "The capital of France is Paris."
    *events, done = [line for line in stream.stdout.splitlines() if line]
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in events]
    assert len(pieces) == 8 and "".join(pieces).startswith(" four")
    assert done == "data: [DONE]"


def test_the_code_runs(served: Served) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for body in bodies(served, "python"):
            exec(compile(body, str(PAGE), "exec"), names)
    assert "The capital of France is Paris." in out.getvalue()


@pytest.mark.parametrize("name", ["Limits", "Security"])
def test_the_flags_that_the_page_names_exist(name: str) -> None:
    from dataclasses import fields

    from nanovllm.cli.flags import flag
    from nanovllm.config import EngineConfig
    from nanovllm.server.config import ServerConfig

    known = {flag(entry.name) for kind in (EngineConfig, ServerConfig) for entry in fields(kind)}
    section = PAGE.read_text().split(f"## {name}")[1].split("\n## ")[0]
    named = {word.strip("`|(),.") for word in section.split() if word.startswith(("`--", "--"))}
    assert named and named <= known
