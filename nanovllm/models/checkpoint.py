"""A checkpoint on disk: where MODEL is, and its tensors one by one."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.errors import ModelLoadError
from nanovllm.models.config import ModelConfig, read_json

if TYPE_CHECKING:
    from nanovllm.kernels.quantized import Groups

# name and shape of a tensor -> the part that is wanted, an axis each; None: nothing of it
Cut = Callable[[str, Sequence[int]], tuple[slice, ...] | None]


def locate(model: str) -> Path:
    """The folder (or .gguf file) of MODEL: a path, "smollm2-135m", or a hub id to be fetched.

    Raises:
        ModelLoadError: it is none of these, or cannot be had.
    """
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # False, where Path.is_dir raises, for what is no path at all
        ggufs = list(path.glob("*.gguf"))  # one alone is a whole checkpoint
        return ggufs[0] if len(ggufs) == 1 and not (path / "config.json").exists() else path
    if path.suffix == ".gguf" and os.path.isfile(path):
        return path
    from nanovllm.models.fetch import fetch  # talks to the network, so only when it must

    return fetch(model)


def read_config(path: Path) -> ModelConfig:
    """The shape of the model at `path` (see `locate`)."""
    if path.suffix == ".gguf":
        from nanovllm.models.gguf import gguf_config

        return gguf_config(path)
    return ModelConfig.from_folder(path)


def open_tensors(
    path: Path, load_format: str, keep_groups: bool = False, cut: Cut | None = None
) -> "Iterator[tuple[str, Tensor | Groups]]":
    """(name, tensor) of each tensor at `path`, named as Hugging Face's checkpoints name them.

    All files are opened and their headers checked before the first tensor is read.

    Args:
        load_format: "auto" takes what is there. keep_groups: leave the quantized blocks of a GGUF
            file as they are, where they are of a kind that Groups can hold.
        cut: the part of each tensor to read.

    Raises:
        ModelLoadError: no weights, a damaged file, a missing shard, or pickle weights.
    """
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    auto = load_format == "auto" and ggufs and not any(path.glob("*.safetensors"))
    if auto or load_format == "gguf":
        from nanovllm.models.gguf import checkpoint_tensors

        return checkpoint_tensors(path, ggufs, keep_groups, cut)
    if keep_groups:
        raise ModelLoadError(f"{path}: quantization='gguf' needs a .gguf file as the model")
    names: list[tuple[Path, str]] = []
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                names += ((file, name) for name in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file}: not a whole safetensors file ({error})") from error
    found = ((name, read_tensor(file, name, cut)) for file, name in names)
    return ((name, tensor) for name, tensor in found if tensor is not None)


def read_tensor(file: Path, name: str, cut: Cut | None = None) -> Tensor | None:
    """One tensor, or the part of it that is wanted. The file is opened for it alone: what an open
    file has read stays in memory."""
    with safe_open(file, framework="pt") as opened:
        if cut is None:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
        stored = opened.get_slice(name)
        where = cut(name, stored.get_shape())
        return None if where is None else stored[where]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each known to be there."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        try:
            names = {Path(name).name for name in read_json(index)["weight_map"].values()}
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"{index}: not an index of weights ({error!r})") from error
        files = sorted(folder / name for name in names)
    for file in files:
        if not file.is_file():
            raise ModelLoadError(f"{file}: missing, though {index.name} names it")
    if not files:
        pickles = sorted(file for kind in ("bin", "pt", "pth") for file in folder.glob(f"*.{kind}"))
        why = "holds no weights (*.safetensors, or *.gguf with load_format='auto')"
        if pickles:
            why = f"{pickles[0].name} can run code and is not loaded; convert it to safetensors"
        raise ModelLoadError(f"{folder}: {why}")
    return files
