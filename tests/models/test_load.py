"""Filling a model from tensors that come one by one: what is handed on, when, and how it is joined.
Weights in groups here have rows of one value each, which is the number of the row."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nanovllm.config import EngineConfig
from nanovllm.errors import ModelLoadError
from nanovllm.kernels import Form, Product, reference
from nanovllm.kernels.quantized import Groups
from nanovllm.layers.linear import Embedding, Linear, MergedLinear
from nanovllm.layers.norm import RMSNorm
from nanovllm.models.checkpoint import read_config
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.load import fill, load_model
from tests.models.gguf_files import quantized_gguf

Q, K, V = (f"attention.{name}_proj.weight" for name in "qkv")
PATH = Path("checkpoint")
BF16, F32 = torch.bfloat16, torch.float32


def rows(first: int, last: int) -> Tensor:
    """[last - first, 32]"""
    return torch.arange(float(first), last)[:, None].repeat(1, 32)


def groups(first: int, last: int, bits: int = 4) -> Groups:
    """The same."""
    scale = torch.ones(last - first, 1).half()
    return Groups(bits, rows(first, last).to(torch.uint8), scale, 0 * scale)


def make_attention(*, bias: bool = False) -> tuple[nn.Module, MergedLinear]:
    """A model with nothing but a merged product: rows 0 to 3, 4 and 5, 6 and 7."""
    merged = MergedLinear(32, {"q_proj": 4, "k_proj": 2, "v_proj": 2}, bias=bias)
    model = nn.ModuleDict({"attention": nn.ModuleDict({"qkv_proj": merged})})
    return model.requires_grad_(False), merged


def filled(tensors: dict[str, Tensor | Groups]) -> tuple[Tensor, Tensor | Groups]:
    """The weight of a merged product after it was filled, and the one that was handed on."""
    model, merged = make_attention()
    found = list[Tensor | Groups]()
    fill(model, tensors.items(), PATH, lambda module, weight: found.append(weight))
    [weight] = found
    return merged.weight, weight


def test_a_module_is_handed_on_as_soon_as_its_last_tensor_is_there() -> None:
    attention, merged = make_attention(bias=True)
    own = {"embedding": Embedding(3, 32), "norm": RMSNorm(32, 1e-5), "head": Linear(32, 3)}
    model = nn.ModuleDict({**own, **attention}).requires_grad_(False)
    tensors = {
        "embedding.weight": rows(0, 3),
        V: rows(6, 8),
        "attention.q_proj.bias": torch.zeros(4),
        Q: rows(0, 4),
        "norm.weight": torch.ones(32),
        "attention.v_proj.bias": torch.zeros(2),
        K: rows(4, 6),
        "head.weight": groups(0, 3),
        "attention.k_proj.bias": torch.zeros(2),
    }
    events, weights = list[object](), dict[nn.Module, Tensor | Groups]()

    def read() -> Iterator[tuple[str, Tensor | Groups]]:
        for name, tensor in tensors.items():
            events.append(name)
            yield name, tensor

    def done(module: nn.Module, weight: Tensor | Groups) -> None:
        events.append(module)
        weights[module] = weight

    fill(model, read(), PATH, done)
    names, (embedding, norm, head) = list(tensors), own.values()
    assert events == [
        *(names[0], embedding, *names[1:5], norm),
        *(*names[5:8], head, names[8], merged),
    ]
    in_groups = weights[head]
    assert isinstance(in_groups, Groups) and torch.equal(in_groups.dequantize(), rows(0, 3))
    for module, expected in (embedding, rows(0, 3)), (norm, torch.ones(32)), (merged, rows(0, 8)):
        assert torch.equal(weights[module], expected)


@pytest.mark.parametrize("order", [(Q, K, V), (V, K, Q), (K, V, Q)])
def test_groups_of_a_merged_product_are_joined_in_the_order_of_its_rows(
    order: tuple[str, ...],
) -> None:
    parts: dict[str, Tensor | Groups] = {Q: groups(0, 4), K: groups(4, 6), V: groups(6, 8)}
    _, weight = filled({name: parts[name] for name in order})
    assert isinstance(weight, Groups)
    assert (weight.bits, weight.shape) == (4, (8, 32))
    assert weight.scale.shape == weight.minimum.shape == (8, 1)
    assert torch.equal(weight.dequantize(), rows(0, 8))


@pytest.mark.parametrize(
    "parts",
    [
        {Q: groups(0, 4), K: rows(4, 6), V: groups(6, 8)},
        {V: rows(6, 8), Q: groups(0, 4), K: groups(4, 6)},
        {Q: groups(0, 4, bits=8), K: groups(4, 6), V: groups(6, 8)},
    ],
    ids=["one part dense", "the first one dense", "other bits"],
)
def test_parts_that_do_not_go_together_become_dense(parts: dict[str, Tensor | Groups]) -> None:
    dense, weight = filled(parts)
    assert isinstance(weight, Tensor)
    assert torch.equal(weight, rows(0, 8))
    assert torch.equal(dense, rows(0, 8))


def test_an_embedding_in_groups_can_be_looked_up_and_is_handed_on_as_it_is() -> None:
    embedding, own, found = Embedding(3, 32), groups(0, 3), list[Tensor | Groups]()
    model = nn.ModuleDict({"embedding": embedding}).requires_grad_(False)
    fill(model, [("embedding.weight", own)], PATH, lambda _, weight: found.append(weight))
    assert len(found) == 1 and found[0] is own
    assert embedding(torch.tensor([2])).tolist() == [[2.0] * 32]


def test_groups_of_a_wrong_shape_are_refused() -> None:
    model, _ = make_attention()
    with pytest.raises(ModelLoadError, match=r"checkpoint: tensor .*q_proj.weight is \[3, 32\]"):
        fill(model, [(Q, groups(0, 3))], PATH)


class Recorder:
    """The reference, which notes down what it packs."""

    plan = reference.plan

    def __init__(self) -> None:
        self.weights: list[Tensor | Groups] = []
        self.forms: list[Form] = []

    def pack(self, weight: Tensor | Groups, bias: Tensor | None, form: Form) -> Product:
        self.weights.append(weight)
        self.forms.append(form._replace(name=""))
        return reference.pack(weight, bias, form)


def load(path: Path, quantization: str) -> tuple[LlamaForCausalLM, Recorder]:
    """A model of two layers of four products each: q, k and v; output; gate and up; down. What it
    packed comes with it, the head first."""
    backend = Recorder()
    model = load_model(
        EngineConfig(max_model_len=8, quantization=quantization),
        read_config(path),
        path,
        backend,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return model, backend


def forms(quantization: str, of_head: str) -> list[Form]:
    """What is asked for, in the order of the checkpoint."""
    plain, gated = (Form(BF16, BF16, quantization, gate) for gate in (False, True))
    return [Form(BF16, F32, of_head), *[plain, plain, gated, plain] * 2]


def test_a_tied_head_gets_the_groups_of_the_embedding(tmp_path: Path) -> None:
    model, backend = load(quantized_gguf(tmp_path / "model.gguf", "Q8_0"), "gguf")
    assert backend.forms == forms("gguf", of_head="gguf")
    assert all(isinstance(weight, Groups) and weight.bits == 8 for weight in backend.weights)
    head = backend.weights[0]
    assert isinstance(head, Groups)
    assert torch.equal(head.dequantize().bfloat16(), model.model.embed_tokens.weight)
    assert model.lm_head.weight.numel() == 0


def test_with_int4_the_head_keeps_8_bits(tmp_path: Path) -> None:
    _, backend = load(quantized_gguf(tmp_path / "model.gguf", "Q8_0"), "int4")
    assert backend.forms == forms("int4", of_head="int8")
    assert not any(isinstance(weight, Groups) for weight in backend.weights)
