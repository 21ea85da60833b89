"""vLLM's own `vllm bench serve`, where there is one: VLLM_BIN names it, or it is on the PATH."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.servers import Served

START_S, RUN_S = 120.0, 240.0  # it takes a while to import itself
# It asks /tokenize and /metrics without a key, so this server has none.


@pytest.fixture(scope="module")
def vllm() -> str:
    command = os.environ.get("VLLM_BIN") or shutil.which("vllm")
    if command is None:
        pytest.skip("there is no vllm: install it, or set VLLM_BIN to the command")
    done = subprocess.run(
        [command, "bench", "serve", "--help"], capture_output=True, timeout=START_S
    )
    if done.returncode != 0:
        pytest.skip(f"{command} does not start: {done.stderr.decode().strip()[-200:]}")
    return command


@pytest.fixture(scope="module")
def open_server(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("vllm_bench") / "server.log"
    with Served("--num-kv-blocks", "2048", log=log) as server:
        yield server


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_bench_serve(
    vllm: str, open_server: Served, smollm2: Path, tmp_path: Path, backend: str, endpoint: str
) -> None:
    flags = {
        "backend": backend,
        "endpoint": endpoint,
        "base-url": open_server.url,
        "model": "smollm2-135m",
        "tokenizer": str(smollm2),
        "dataset-name": "random",
        "random-input-len": "16",
        "random-output-len": "8",
        "num-prompts": "8",
        "result-dir": str(tmp_path),
        "result-filename": "result.json",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [vllm, "bench", "serve", *words, "--ignore-eos", "--save-result"]
    done = subprocess.run(command, capture_output=True, timeout=RUN_S)
    printed = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, printed
    assert "/tokenize unavailable" not in printed and "tokenizer mismatch" not in printed
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"]) == (8, 0)
    assert found["total_output_tokens"] == 64
    assert found["mean_ttft_ms"] > 0 and found["mean_tpot_ms"] > 0
