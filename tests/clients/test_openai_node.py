"""The npm package `openai`, by a script that Node runs."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cache import cache_root
from tests.clients.conftest import KEY, until_idle
from tests.server.servers import LIMIT_S, Served

HERE = Path(__file__).parent / "openai_node"
INSTALL_S = 120.0


@pytest.fixture(scope="module")
def script() -> Path:
    """The script, beside the package that it imports: in the cache, so that no file of npm's gets
    into the source tree."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node, or no npm")
    folder = cache_root() / "tests" / "openai_node"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / name, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, timeout=INSTALL_S, check=True)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install took more than {INSTALL_S:g} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm install failed: {error.stderr.decode().strip()[-300:]}")
    return folder / "client.mjs"


def test_the_npm_package(served: Served, script: Path) -> None:
    command = ["node", str(script), f"{served.url}/v1", KEY]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    answer = "The capital of France is Paris."
    assert found["whole"]["message"]["content"] == answer
    assert (found["whole"]["finish_reason"], found["whole"]["tokens"]) == ("stop", 8)
    assert found["stream"] == {"text": answer, "tokens": 8}
    assert found["completion"] == " Paris."
    assert found["leave"] == "text_completion"
    until_idle(served)
    assert found["callTool"]["name"] == "get_weather"
    assert found["callTool"]["arguments"]["city"] in ("Paris", "Rome")
    assert found["runTools"] in (["Paris"], ["Rome"])
    assert found["form"] in ({"city": "Paris"}, {"city": "Rome"})
    assert found["errors"] == [
        [400, "temperature", "string"],
        [404, "model", "string"],
        [401, None, "string"],
    ]
