"""Starts that must fail: at once, with a status other than 0, and with the file or the flag named.
The number in a test's name is that of the kind of bad input."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import ConfigError
from nanovllm.server.run import listen
from tests.server.canary import until
from tests.server.servers import Served

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
MEMORY_BYTES = 2**30  # more than a start takes before it has weights


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, its weights not yet written."""
    files = {path.name: path for path in tiny.iterdir() if path.suffix == ".json"}
    (tmp_path / "model").mkdir()
    for name, path in files.items():
        shutil.copy(path, tmp_path / "model" / name)
    return tmp_path / "model"


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def write_weights(folder: Path, header: dict[str, Any] | bytes, num_bytes: int = 256) -> Path:
    """A safetensors file with this header and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return folder / WEIGHTS


def tensor(begin: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [64], "data_offsets": [begin, end]}


# A process begins its life with the most memory that its parent had, so a small one starts it.
START = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def refuse(*words: str, status: int = 1) -> str:
    """What a start says on stderr that fails before it has taken memory for a model."""
    command = [sys.executable, "-c", START, sys.executable, "-m", "nanovllm", "serve"]
    done = subprocess.run([*command, "--port", "0", *words], capture_output=True, text=True)
    code, num_bytes = map(int, done.stdout.split())
    assert (code, num_bytes < MEMORY_BYTES) == (status, True), done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("nanovllm: error: ") and "Traceback" not in done.stderr
    return line


BAD_HEADERS: dict[str, Callable[[Path], Path]] = {
    "that says it has over 100 MB": lambda f: write_weights(f, b"{" + b" " * (101 * 10**6) + b"}"),
    "with overlapping offsets": lambda f: write_weights(
        f, {NORM: tensor(0, 256), "model.more": tensor(128, 384)}, 384
    ),
    "with offsets that overflow": lambda f: write_weights(
        f, {NORM: tensor(2**64 - 256, 2**64 - 1)}
    ),
    "with a shape that overflows": lambda f: write_weights(
        f, {NORM: tensor(0, 256, [2**32, 2**32, 64])}
    ),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_26_a_safetensors_header(folder, kind):
    file = BAD_HEADERS[kind](folder)
    assert str(file) in refuse(str(folder))


@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_27_a_shard_is_refused_before_memory_is_taken(folder, tiny, kind):
    """The model would have 20 GB; its first shard is whole."""
    change_config(folder, hidden_size=8192, intermediate_size=32768, num_hidden_layers=8)
    write_weights(folder, {NORM: tensor(0, 256)})
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    shutil.copy(tiny / WEIGHTS, folder / "model-2.safetensors")
    files = {NORM: "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    if kind == "truncated":
        os.truncate(folder / "model-2.safetensors", 10**6)
    else:
        (folder / "model-2.safetensors").unlink()
    assert str(folder / "model-2.safetensors") in refuse(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_28_a_missing_file(folder, name):
    (folder / name).unlink()
    assert str(folder / name) in refuse(str(folder), "--load-format", "dummy")


def test_28_code_of_a_checkpoint_is_not_run(folder):
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own", "__init__"):
        (folder / f"{name}.py").write_text(code)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    line = refuse(str(folder), "--load-format", "dummy")
    assert str(folder / "config.json") in line and "auto_map" in line
    assert not marker.exists()


def test_29_pickled_weights_are_refused_unopened(folder):
    marker = folder / "ran"
    harm = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(harm)
    line = refuse(str(folder))
    assert "model.pt" in line or "pytorch_model.bin" in line
    assert not marker.exists()


def test_30_a_port_in_use_is_found_before_a_model_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refuse("/nowhere/at/all", "--port", port, status=2)
    assert f"port={port}" in line


def test_30_of_two_that_start_at_once_one_gets_the_port():
    with (
        listen("127.0.0.1", 0) as first,
        pytest.raises(ConfigError, match="cannot listen there"),
    ):
        listen("127.0.0.1", first.getsockname()[1])


def test_30_a_start_that_fails_leaves_no_process(folder):
    (folder / "tokenizer.json").unlink()
    mark = f"OF_THIS_TEST={time.time_ns()}"
    name, _, value = mark.partition("=")
    os.environ[name] = value
    try:
        refuse(str(folder), "--load-format", "dummy")
    finally:
        del os.environ[name]
    until(lambda: not processes_with(mark.encode()), "all its processes have ended")


def processes_with(setting: bytes) -> list[str]:
    """Processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if setting in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:  # it has ended, or is not ours
            continue
    return found


def test_30_two_servers_on_one_machine(tiny, tmp_path):
    flags = str(tiny), "--max-model-len", "64", "--num-kv-blocks", "8"
    with Served(*flags, log=tmp_path / "1") as one, Served(*flags, log=tmp_path / "2") as two:
        assert one.url != two.url
        bodies = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 8}
        texts = {
            s.post("/v1/completions", **bodies).json()["choices"][0]["text"] for s in (one, two)
        }
        assert len(texts) == 1
