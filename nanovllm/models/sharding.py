"""How a model is divided over ranks (Megatron-LM, Shoeybi et al., 2019).

    q, k, v, gate, up     rows: whole heads, or features of the MLP  ┐ nothing is exchanged
    o, down               the columns that go with them              ┘ before the sum over ranks
    experts               whole ones; their results are summed
    embedding             rows; what other ranks hold is zero, and all are summed
    head                  rows; logits are gathered at rank 0

A model is built from the config of one rank's part and knows nothing of the others: what is
exchanged is done behind its products (DividedBackend), and where it has none, by what `connect`
hands it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.errors import ConfigError
from nanovllm.kernels import AttentionBatch, Backend, Form, KVCache, Ops, Product
from nanovllm.kernels.quantized import GROUP, Groups
from nanovllm.layers.linear import Embedding
from nanovllm.models.checkpoint import Cut
from nanovllm.models.config import ModelConfig

SUMMED = ("o_proj", "down_proj")
EVERYTHING = slice(None)


class Collective(Protocol):
    """What ranks exchange; all of them call the same in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks; may be done in place."""

    def gather(self, x_RV: Tensor) -> Tensor:
        """The columns of all ranks, side by side, at rank 0; its own part at another."""


class Division:
    """One rank's part of a model.

    Args:
        config: of the whole. rank: 0 is the leader.

    Attributes:
        local: the config of the part, from which its model is built.

    Raises:
        ConfigError: the model cannot be divided by so many.
    """

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        self.config, self.rank, self.size = config, rank, size
        if problem := obstacle(config, size):
            nearest = next(n for n in range(size - 1, 0, -1) if not obstacle(config, n))
            why = f"the model has {problem}, which so many cannot share; the nearest is {nearest}"
            raise ConfigError("tensor_parallel_size", size, why)
        num_kv_heads = config.num_kv_heads
        self.heads = even(config.num_heads, rank, size)
        self.features = even(config.intermediate_size, rank, size)
        self.vocab = uneven(config.vocab_size, rank, size)
        first = rank * num_kv_heads // size
        self.kv_heads = slice(first, first + max(num_kv_heads // size, 1))
        num_experts = config.extra.get("num_experts") or config.extra.get("num_local_experts")
        self.experts = uneven(num_experts, rank, size) if num_experts else None
        self.local = replace(
            config,
            num_heads=length(self.heads),
            num_kv_heads=length(self.kv_heads),
            intermediate_size=length(self.features),
            vocab_size=length(self.vocab),
            held_experts=self.experts and (self.experts.start, self.experts.stop),
        )

    def cut(self, name: str, shape: Sequence[int]) -> tuple[slice, ...] | None:
        """The part of a checkpoint's tensor that this rank holds; None if it holds none of it."""
        module = name.split(".")[-2]
        if ".experts." in name and self.experts is not None:
            expert = int(name.split(".experts.")[1].split(".")[0])
            held = self.experts.start <= expert < self.experts.stop
            return (EVERYTHING,) * len(shape) if held else None
        rows, columns = EVERYTHING, EVERYTHING
        match module:
            case "q_proj":
                rows = times(self.heads, self.config.head_dim)
            case "k_proj" | "v_proj":
                rows = times(self.kv_heads, self.config.head_dim)
            case "o_proj":
                columns = times(self.heads, self.config.head_dim)
            case "gate_proj" | "up_proj":
                rows = self.features
            case "down_proj":
                columns = self.features
            case "embed_tokens" | "lm_head":
                rows = self.vocab
        return (rows, columns) if len(shape) == 2 else (rows,)


def obstacle(config: ModelConfig, size: int) -> str:
    """What of a model cannot be divided by `size`; empty if all can."""
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    if num_heads % size:
        return f"{num_heads} heads"
    if num_kv_heads % size and size % num_kv_heads:  # else several ranks have a copy of one
        return f"{num_kv_heads} key-value heads"
    if config.intermediate_size % size:
        return f"{config.intermediate_size} features in its MLP"
    return "" if config.vocab_size >= size else f"a vocabulary of {config.vocab_size}"


class DividedBackend:
    """A backend whose products are followed by the exchange that they need."""

    def __init__(self, backend: Backend, rank: int, collective: Collective) -> None:
        self.backend, self.rank, self.collective = backend, rank, collective

    def plan(self, batch: AttentionBatch, caches: list[KVCache]) -> Ops:
        return self.backend.plan(batch, caches)

    def pack(self, weight: Tensor | Groups, bias: Tensor | None, form: Form) -> Product:
        module = form.name.rpartition(".")[2]
        if module in SUMMED:  # one rank's bias is enough
            product = self.backend.pack(weight, None if self.rank else bias, form)
            return lambda x: self.collective.sum(product(x))
        product = self.backend.pack(weight, bias, form)
        if module == "lm_head":
            return lambda x: self.collective.gather(product(x))
        return product


def connect(model: nn.Module, division: Division, collective: Collective) -> None:
    """Let what is no product be summed too: embeddings, and the results of experts."""
    for module in model.modules():
        part: Any = module
        if hasattr(module, "combine"):
            part.combine = collective.sum
        if isinstance(module, Embedding):
            part.forward = partial(look_up, module, division.vocab.start, collective)


def look_up(held: Embedding, first: int, collective: Collective, input_ids_T: Tensor) -> Tensor:
    """The vectors of token ids, of which this rank holds those from `first` on."""
    rows_T = input_ids_T - first
    here_T = (rows_T >= 0) & (rows_T < len(held.weight))
    return collective.sum(F.embedding(rows_T * here_T, held.weight) * here_T[:, None])


def cut_tensors(
    tensors: Iterator[tuple[str, Tensor | Groups]], cut: Cut
) -> Iterator[tuple[str, Tensor | Groups]]:
    """The parts that are wanted of tensors that can only be read whole."""
    for name, tensor in tensors:
        where = cut(name, tensor.shape)
        if where is not None:
            yield name, cut_groups(tensor, *where) if isinstance(tensor, Groups) else tensor[where]


def cut_groups(groups: Groups, rows: slice, columns: slice) -> Groups:
    """Some rows, and of these some columns.

    Raises:
        ConfigError: a group would be cut through.
    """
    first, stop, _ = columns.indices(groups.q.shape[1])
    if first % GROUP or stop % GROUP:
        why = f"{stop - first} columns for each are no whole groups of {GROUP}; the nearest is 1"
        raise ConfigError("tensor_parallel_size", groups.q.shape[1] // (stop - first), why)
    own = slice(first // GROUP, stop // GROUP)
    arrays = groups.q[rows, columns], groups.scale[rows, own], groups.minimum[rows, own]
    return Groups(groups.bits, *(array.contiguous() for array in arrays))


def even(total: int, rank: int, size: int) -> slice:
    return slice(rank * total // size, (rank + 1) * total // size)


def uneven(total: int, rank: int, size: int) -> slice:
    """All ranks but the last ones hold the same number."""
    share = -(-total // size)
    return slice(min(rank * share, total), min((rank + 1) * share, total))


def times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def length(part: slice) -> int:
    return int(part.stop - part.start)
