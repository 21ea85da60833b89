"""From a checkpoint to a model with its weights in place."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovllm.errors import ModelLoadError
from nanovllm.layers.linear import Linear
from nanovllm.models.checkpoint import open_tensors
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.registry import model_class

UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")  # computed anew; tied to the embedding


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    max_positions: int,
    seed: int = 0,
) -> LlamaForCausalLM:
    """The model at `path` (see checkpoint.locate), on `device`.

    Raises:
        ModelLoadError: names the file or the tensor that is missing, damaged or of a wrong shape.
    """
    build = model_class(config.architecture)
    dummy = load_format == "dummy"
    tensors = iter(()) if dummy else open_tensors(path, load_format)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build(config, max_positions).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(default)
    if dummy:
        from nanovllm.models.dummy import fill_randomly

        fill_randomly(model, seed)
    else:
        fill(model, tensors, path)
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cpu" and dtype == torch.bfloat16 and onednn:
        for module in model.modules():
            if isinstance(module, Linear):
                module.pack()
    return model


def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Copy each tensor of the checkpoint to its place; every place must be filled."""
    places = destinations(model)
    for name, tensor in tensors:
        place = places.pop(name, None)
        if place is None and name.endswith(UNUSED):
            continue
        if place is None:
            raise ModelLoadError(f"{path}: tensor {name} has no place in this model (or is twice)")
        if place.shape != tensor.shape:
            shapes = f"is {list(tensor.shape)}, config.json says {list(place.shape)}"
            raise ModelLoadError(f"{path}: tensor {name} {shapes}")
        place.copy_(tensor)
    if places:
        names = sorted(places)
        raise ModelLoadError(f"{path}: {len(names)} tensors are missing, the first is {names[0]}")


def destinations(model: nn.Module) -> dict[str, Tensor]:
    """The place of each tensor: its name in the checkpoint -> a view of a parameter."""
    places: dict[str, Tensor] = {}
    known: set[int] = set()
    for path, module in model.named_modules():
        if hasattr(module, "checkpoint_views"):
            parent = path.rpartition(".")[0]
            places |= {f"{parent}.{name}": v for name, v in module.checkpoint_views().items()}
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in known:  # a tied head is filled with the embedding
                known.add(id(parameter))
                places[f"{path}.{name}"] = parameter.data
    return places
