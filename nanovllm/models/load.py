"""From a checkpoint to a model with its weights in place."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanovllm.config import EngineConfig
from nanovllm.errors import ModelLoadError
from nanovllm.kernels import Backend, Form
from nanovllm.layers.linear import Embedding, Linear
from nanovllm.models.checkpoint import Cut, open_tensors
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.registry import model_class

if TYPE_CHECKING:
    from nanovllm.kernels.quantized import Groups

UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")  # computed anew; tied to the embedding


def load_model(
    config: EngineConfig,
    shape: ModelConfig,
    path: Path,
    backend: Backend,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cut: Cut | None = None,
) -> LlamaForCausalLM:
    """The model at `path` (see checkpoint.locate), on `device`, its products packed by `backend`.

    Args:
        config: resolved for the model. shape: of what is loaded. cut: which part of each tensor
            that is; None is all.

    Raises:
        ModelLoadError: names the file or the tensor that is missing, damaged or of a wrong shape.
    """
    assert config.max_model_len
    build, quantization, tensors = model_class(shape.architecture), config.quantization, None
    if config.load_format != "dummy":
        tensors = open_tensors(path, config.load_format, quantization == "gguf", cut)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build(shape, config.max_model_len).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(default)

    names = {module: name for name, module in model.named_modules()}

    def pack(module: nn.Module, weight: "Tensor | Groups") -> None:
        if isinstance(module, Embedding) and shape.tie_word_embeddings:
            pack(model.lm_head, weight)
        if isinstance(module, Linear):
            head = module is model.lm_head
            kind = "int8" if head and quantization == "int4" else quantization
            result = torch.float32 if head else dtype
            form = Form(dtype, result, kind, module.gated, names[module])
            module.product = backend.pack(weight, module.bias, form)
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    if tensors is None:
        from nanovllm.models.dummy import random_tensors

        tensors = random_tensors(model, config.seed)
    fill(model, tensors, path, pack)
    return model


def fill(
    model: nn.Module,
    tensors: "Iterable[tuple[str, Tensor | Groups]]",
    path: Path,
    done: "Callable[[nn.Module, Tensor | Groups], None]" = lambda module, weight: None,
) -> None:
    """Copy each tensor of the checkpoint to its place; every place must be filled.

    Args:
        done: called with each module as soon as it has all of its tensors, and its weight.
    """
    places = destinations(model)
    missing = Counter(module for module, _ in places.values())
    for module in missing:  # a product's weight has memory only from its first tensor to packing
        if isinstance(module, Linear):
            module.weight.untyped_storage().resize_(0)
    grouped: dict[nn.Module, list[tuple[Tensor, Groups]]] = {}
    for name, tensor in tensors:
        if name not in places and name.endswith(UNUSED):
            continue
        if name not in places:
            raise ModelLoadError(f"{path}: tensor {name} has no place in this model (or is twice)")
        module, view = places.pop(name)
        if view.shape != tensor.shape:
            shapes = f"is {list(tensor.shape)}, config.json says {list(view.shape)}"
            raise ModelLoadError(f"{path}: tensor {name} {shapes}")
        if not view.untyped_storage().nbytes():
            view.untyped_storage().resize_(module.weight.nbytes)
        if isinstance(tensor, Tensor):
            view.copy_(tensor)
        else:
            grouped.setdefault(module, []).append((view, tensor))
        missing[module] -= 1
        if not missing[module]:
            weight = getattr(module, "weight", None)
            if module in grouped:
                from nanovllm.models.groups import join

                weight = join(module, grouped.pop(module))
            if weight is not None:
                done(module, weight)
    if places:
        first = min(places)
        raise ModelLoadError(f"{path}: {len(places)} tensors are missing, the first is {first}")


def destinations(model: nn.Module) -> dict[str, tuple[Any, Tensor]]:
    """Where each tensor of the checkpoint goes: a module, and a view of one of its parameters."""
    places: dict[str, tuple[Any, Tensor]] = {}
    for name, parameter in model.named_parameters():  # a tied head is filled with the embedding
        path = name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        if hasattr(module, "checkpoint_views"):
            parent = path.rpartition(".")[0]
            views = module.checkpoint_views()
            places |= {f"{parent}.{name}": (module, view) for name, view in views.items()}
        else:
            places[name] = module, parameter.data
    return places
