"""Models divided over ranks, each rank a thread here: together they are the whole model."""

from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.kernels import reference
from nanovllm.kernels.quantized import to_groups
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.load import load_model
from nanovllm.models.sharding import DividedBackend, Division, connect, cut_groups, uneven
from tests.models.test_families import (
    CASES,
    LONGEST,
    NUM_NEW,
    PROMPTS,
    greedy,
    load,
    make_reference,
)


class Meeting:
    """Where threads exchange tensors: all come, all see what each brought, all go."""

    def __init__(self, size: int) -> None:
        self.barrier, self.brought = Barrier(size, timeout=60), [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.barrier.wait()
        self.brought[rank] = x
        self.barrier.wait()
        return list(self.brought)


class ThreadRank:
    """A Collective among threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x.clone())).sum(0)

    def gather(self, x_RV: Tensor) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x_RV.clone()), 1)  # for all ranks


def part(folder: Path, collective: ThreadRank, size: int) -> tuple[LlamaForCausalLM, ModelConfig]:
    division = Division(ModelConfig.from_folder(folder), collective.rank, size)
    model = load_model(
        EngineConfig(max_model_len=LONGEST),
        division.local,
        folder,
        DividedBackend(reference, collective.rank, collective),  # type: ignore[arg-type]
        dtype=torch.float32,
        device=torch.device("cpu"),
        cut=division.cut,
    )
    connect(model, division, collective)
    return model, division.local


def together(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """What each of `size` threads returns."""
    meeting, found = Meeting(size), [None] * size

    def run(rank: int) -> None:
        with torch.inference_mode():
            try:
                found[rank] = work(ThreadRank(meeting, rank))
            except BaseException:
                meeting.barrier.abort()
                raise

    threads = [Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [2, 4])  # 4: two ranks share each of the two key-value heads
@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_a_model_are_together_the_model(name: str, size: int, tmp_path: Path) -> None:
    make_reference(*CASES[name]).save_pretrained(tmp_path)
    with torch.inference_mode():
        tokens, logits = greedy(*load(tmp_path), PROMPTS, NUM_NEW)

    def work(collective: ThreadRank) -> tuple[list[list[int]], list[Tensor]]:
        model, config = part(tmp_path, collective, size)
        return greedy(model, config, PROMPTS, NUM_NEW)

    for own_tokens, own_logits in together(size, work):
        assert own_tokens == tokens
        for own, whole in zip(own_logits, logits, strict=True):
            torch.testing.assert_close(own, whole, atol=1e-4, rtol=0)


def test_a_rank_has_memory_for_its_part_only(tmp_path: Path) -> None:
    make_reference("qwen3_moe", CASES["qwen3_moe"][1]).save_pretrained(tmp_path)
    division = Division(ModelConfig.from_folder(tmp_path), 1, 2)
    assert division.local.num_heads == 2
    assert division.local.num_kv_heads == 1
    assert division.local.held_experts == (3, 5)
    assert division.cut("model.layers.0.mlp.experts.2.up_proj.weight", [24, 64]) is None
    assert division.cut("model.layers.0.self_attn.q_proj.weight", [96, 64]) == (
        slice(48, 96),
        slice(None),
    )
    assert division.cut("model.layers.0.self_attn.o_proj.weight", [64, 96]) == (
        slice(None),
        slice(48, 96),
    )
    assert division.cut("model.embed_tokens.weight", [199, 64]) == (slice(100, 199), slice(None))


@pytest.mark.parametrize(
    ("fields", "size", "what"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, 4, "6 heads.* nearest is 3"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 3, "2 key-value.* nearest is 2"),
        ({"intermediate_size": 97}, 2, "97 features.* nearest is 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(fields: dict[str, int], size: int, what: str) -> None:
    raw = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 96,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64, **fields,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=what):
        Division(ModelConfig.from_hf(raw, {}), 0, size)


@pytest.mark.parametrize(
    ("total", "size", "parts"),
    [(6, 2, [(0, 3), (3, 6)]), (5, 2, [(0, 3), (3, 5)]), (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)])],
)
def test_uneven_parts(total: int, size: int, parts: list[tuple[int, int]]) -> None:
    assert [uneven(total, rank, size) for rank in range(size)] == [slice(*part) for part in parts]


def test_groups_are_cut_between_them() -> None:
    groups = to_groups(torch.randn(4, 96), 4)
    whole, own = groups.dequantize(), cut_groups(groups, slice(1, 3), slice(32, 96))
    assert torch.equal(own.dequantize(), whole[1:3, 32:96])
    with pytest.raises(ConfigError, match="no whole groups of 32"):
        cut_groups(groups, slice(None), slice(0, 48))
