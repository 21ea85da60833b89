"""From a checkpoint to a model with its weights in place."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.errors import ModelLoadError
from nanovllm.kernels import Backend, Form
from nanovllm.kernels.quantized import Groups
from nanovllm.layers.linear import Embedding, Linear
from nanovllm.models.checkpoint import Cut, open_tensors
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.registry import model_class

UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")  # computed anew; tied to the embedding


def load_model(
    path: Path,
    config: ModelConfig,
    backend: Backend,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    max_positions: int,
    quantization: str | None = None,
    seed: int = 0,
    cut: Cut | None = None,
) -> LlamaForCausalLM:
    """The model at `path` (see checkpoint.locate), on `device`, its products packed by `backend`.

    Args:
        config: of what is loaded. cut: which part of each tensor that is; None is all.

    Raises:
        ModelLoadError: names the file or the tensor that is missing, damaged or of a wrong shape.
    """
    build = model_class(config.architecture)
    dummy = load_format == "dummy"
    keep_groups = quantization == "gguf"
    tensors = iter(()) if dummy else open_tensors(path, load_format, keep_groups, cut)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build(config, max_positions).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(default)

    names = {module: name for name, module in model.named_modules()}

    def pack(module: nn.Module, weight: Tensor | Groups) -> None:
        if isinstance(module, Embedding) and config.tie_word_embeddings:
            pack(model.lm_head, weight)
        if isinstance(module, Linear):
            head = module is model.lm_head
            kind = "int8" if head and quantization == "int4" else quantization
            result = torch.float32 if head else dtype
            form = Form(dtype, result, kind, module.gated, names[module])
            module.product = backend.pack(weight, module.bias, form)
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    if dummy:
        from nanovllm.models.dummy import fill_randomly

        fill_randomly(model, seed)
        for module in model.modules():
            if isinstance(module, Embedding | Linear) and module.weight.numel():
                pack(module, module.weight)
    else:
        fill(model, tensors, path, pack)
    return model


class Place(NamedTuple):
    """Where a tensor of the checkpoint goes: a view of a parameter of a module."""

    module: nn.Module
    view: Tensor


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor | Groups]],
    path: Path,
    done: Callable[[nn.Module, Tensor | Groups], None] = lambda module, weight: None,
) -> None:
    """Copy each tensor of the checkpoint to its place; every place must be filled.

    Args:
        done: called with each module as soon as it has all of its tensors, and its weight.
    """
    places = destinations(model)
    missing = Counter(place.module for place in places.values())
    sizes: dict[nn.Module, int] = {}
    for module in missing:  # a product's weight has memory only from its first tensor to packing
        if isinstance(module, Linear):
            sizes[module] = module.weight.nbytes
            module.weight.untyped_storage().resize_(0)
    grouped: dict[nn.Module, list[tuple[Place, Groups]]] = {}
    for name, tensor in tensors:
        place = places.pop(name, None)
        if place is None and name.endswith(UNUSED):
            continue
        if place is None:
            raise ModelLoadError(f"{path}: tensor {name} has no place in this model (or is twice)")
        if place.view.shape != tensor.shape:
            shapes = f"is {list(tensor.shape)}, config.json says {list(place.view.shape)}"
            raise ModelLoadError(f"{path}: tensor {name} {shapes}")
        storage = place.view.untyped_storage()
        if not storage.nbytes():
            storage.resize_(sizes[place.module])
        if isinstance(tensor, Groups):
            grouped.setdefault(place.module, []).append((place, tensor))
        else:
            place.view.copy_(tensor)
        missing[place.module] -= 1
        if not missing[place.module]:
            weight = join(place.module, grouped.pop(place.module, []))
            if weight is not None:
                done(place.module, weight)
    if places:
        names = sorted(places)
        raise ModelLoadError(f"{path}: {len(names)} tensors are missing, the first is {names[0]}")


def join(module: nn.Module, parts: list[tuple[Place, Groups]]) -> Tensor | Groups | None:
    """The weight of a module whose tensors are all there, as groups if all of it came so."""
    weight = getattr(module, "weight", None)
    parts.sort(key=lambda part: part[0].view.storage_offset())
    groups, bits = [groups for _, groups in parts], {groups.bits for _, groups in parts}
    rows = sum(len(part.q) for part in groups)
    if isinstance(module, Linear) and rows == len(module.weight) and len(bits) == 1:
        arrays = zip(*(part.arrays for part in groups), strict=True)
        return Groups(bits.pop(), *map(torch.cat, arrays))
    for place, part in parts:
        part.dequantize_to(place.view)
    return groups[0] if isinstance(module, Embedding) and groups else weight


def destinations(model: nn.Module) -> dict[str, Place]:
    """The place of each tensor, by its name in the checkpoint."""
    places: dict[str, Place] = {}
    known: set[int] = set()
    for path, module in model.named_modules():
        if hasattr(module, "checkpoint_views"):
            parent = path.rpartition(".")[0]
            views = module.checkpoint_views()
            places |= {f"{parent}.{name}": Place(module, view) for name, view in views.items()}
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in known:  # a tied head is filled with the embedding
                known.add(id(parameter))
                places[f"{path}.{name}"] = Place(module, parameter.data)
    return places
