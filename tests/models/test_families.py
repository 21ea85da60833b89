"""Each family and each RoPE kind, small and random, against transformers in float32: the logits of
every position, and the tokens of greedy decoding, with a paged cache whose blocks are shuffled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.config import EngineConfig
from nanovllm.errors import ModelLoadError
from nanovllm.kernels import AttentionBatch, KVCache, reference
from nanovllm.models.config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.load import load_model

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 24}
PROMPTS = [[(37 * i + 5) % 199 for i in range(9)], [(53 * i + 11) % 199 for i in range(21)]]
NUM_NEW = 28  # past the windows of 7, and, from 9 or 21 positions, past the original lengths
LONGEST = len(PROMPTS[1]) + NUM_NEW


def rope(kind: str, **parameters: object) -> dict[str, Any]:
    """An override for a RoPE kind; the original length lies within the decoded tokens."""
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = 16
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **parameters}}


# name of the case -> (family, what differs from SMALL)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, one head a group": ("llama", {"num_key_value_heads": 4}),
    "llama, tied, biases, head_dim": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "linear": ("llama", rope("linear", factor=4.0)),
    "dynamic": ("llama", rope("dynamic", factor=3.0) | {"max_position_embeddings": 24}),
    "llama3": ("llama", rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "yarn": ("llama", rope("yarn", factor=4.0)),
    "yarn, betas": ("llama", rope("yarn", factor=4.0, beta_fast=0.8, beta_slow=0.2)),
    "yarn, no truncation": ("llama", rope("yarn", factor=4.0, truncate=False)),
    "yarn, mscale": ("llama", rope("yarn", factor=4.0, mscale=1.3, mscale_all_dim=0.7)),
    "yarn, attention_factor": ("llama", rope("yarn", factor=4.0, attention_factor=1.5)),
    "mistral, window": ("mistral", {"sliding_window": 7, "head_dim": 24}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, max_window_layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2, layer_types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2, yarn": ("qwen2", rope("yarn", factor=4.0) | {"max_position_embeddings": 16}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, tied, biases, window": (
        "qwen3",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
    "qwen3_moe": ("qwen3_moe", MOE | {"norm_topk_prob": True}),
    "qwen3_moe, raw weights, window": (
        "qwen3_moe",
        MOE | {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 7},
    ),
    "qwen3_moe, some layers dense": (
        "qwen3_moe",
        MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
}


def make_reference(family: str, overrides: dict[str, Any]) -> Any:
    """A transformers model whose every weight, biases and norms too, matters."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | overrides))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.eval()


def load(folder: Path) -> tuple[LlamaForCausalLM, ModelConfig]:
    config = ModelConfig.from_folder(folder)
    model = load_model(
        EngineConfig(max_model_len=LONGEST),
        config,
        folder,
        reference,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return model, config


def greedy(
    model: LlamaForCausalLM, config: ModelConfig, prompts: list[list[int]], num_new: int
) -> tuple[list[list[int]], list[Tensor]]:
    """All tokens of each sequence, and the logits [length - 1, V] that they were chosen from.

    The barest engine: each step takes up to 6 tokens of every sequence, so prompts are cut into
    chunks, and prompts and decodes share batches.
    """
    block_size, max_blocks = 4, -(-LONGEST // 4)
    ids = torch.randperm(len(prompts) * max_blocks, generator=torch.Generator().manual_seed(3))
    tables = ids.view(len(prompts), max_blocks)
    shape = (len(ids), config.num_kv_heads, block_size, config.head_dim)
    caches = [
        KVCache(torch.full(shape, 1e3), torch.full(shape, 1e3)) for _ in range(config.num_layers)
    ]
    tokens, ends = [list(prompt) for prompt in prompts], [len(p) + num_new for p in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while running := [i for i in range(len(prompts)) if len(tokens[i]) < ends[i]]:
        counts = [min(6, len(tokens[i]) - done[i]) for i in running]
        positions = [
            torch.arange(done[i], done[i] + n) for i, n in zip(running, counts, strict=True)
        ]
        pairs = list(zip(running, positions, strict=True))
        batch = AttentionBatch(
            torch.tensor([0, *counts]).cumsum(0),
            torch.tensor([int(p[-1]) + 1 for p in positions]),
            tables[running],
            torch.cat([tables[i][p // block_size] * block_size + p % block_size for i, p in pairs]),
        )
        hidden = model(
            torch.tensor([tokens[i][p] for i, ps in pairs for p in ps.tolist()]),
            torch.cat(positions),
            reference.plan(batch, caches),
        )
        for i, rows in zip(running, model.logits(hidden).split(counts), strict=True):
            logits[i].append(rows)
            done[i] += len(rows)
            if done[i] == len(tokens[i]):
                tokens[i].append(int(rows[-1].argmax()))
    return tokens, [torch.cat(rows) for rows in logits]


def assert_parity(theirs: Any, folder: Path) -> None:
    """The model in the folder does what transformers' does."""
    model, config = load(folder)
    with torch.inference_mode():
        tokens, logits = greedy(model, config, PROMPTS, NUM_NEW)
        for i, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            expected = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_NEW,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert tokens[i] == expected.sequences[0].tolist()
            assert len(set(tokens[i][len(prompt) :])) > 3  # not one token again and again
            expected_logits = torch.cat((theirs(ids).logits[0, :-1], *expected.logits))
            torch.testing.assert_close(logits[i], expected_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = make_reference(*CASES[name])
    theirs.save_pretrained(tmp_path)
    assert_parity(theirs, tmp_path)


def test_a_checkpoint_in_many_files_loads_whole(tmp_path: Path) -> None:
    theirs = make_reference("qwen3_moe", MOE)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_parity(theirs, tmp_path)


def edit_config(folder: Path, *removed: str, **changed: object) -> None:
    """Rewrite config.json with some fields gone and some set."""
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({name: raw[name] for name in raw if name not in removed}))


def test_rope_as_transformers_4_wrote_it_means_the_same(tmp_path: Path) -> None:
    theirs = make_reference("llama", rope("yarn", factor=4.0))
    theirs.save_pretrained(tmp_path)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    edit_config(tmp_path, "rope_parameters", "dtype", rope_scaling=scaling, rope_theta=1000.0)
    assert_parity(theirs, tmp_path)


def test_yarn_without_factor_and_original_length_takes_them_from_the_config(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1000.0}
    theirs = make_reference(
        "llama", {"max_position_embeddings": 16, "rope_parameters": yarn | {"factor": 4.0}}
    )
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=yarn | {"factor": 4.0})
    assert_parity(theirs, tmp_path)
    edit_config(
        tmp_path,
        max_position_embeddings=64,
        rope_parameters=yarn | {"factor": None, "original_max_position_embeddings": 16},
    )
    assert_parity(theirs, tmp_path)


def test_max_window_layers_says_which_layers_have_the_window(tmp_path: Path) -> None:
    theirs = make_reference(*CASES["qwen2, max_window_layers"])
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, "layer_types")
    assert_parity(theirs, tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_window_that_is_not_used_does_nothing(family: str, tmp_path: Path) -> None:
    theirs = make_reference(family, MOE | {"head_dim": 16})
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, "layer_types", "use_sliding_window", sliding_window=7)
    assert_parity(theirs, tmp_path)
    edit_config(tmp_path, use_sliding_window=False, max_window_layers=0)
    assert_parity(theirs, tmp_path)


def test_qwens_own_name_for_the_number_of_experts_is_read(tmp_path: Path) -> None:
    theirs = make_reference("qwen3_moe", MOE)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, "num_local_experts", num_experts=5)
    assert_parity(theirs, tmp_path)


def test_a_field_that_only_one_family_has_is_named_when_missing(tmp_path: Path) -> None:
    make_reference("qwen3_moe", MOE).save_pretrained(tmp_path)
    edit_config(tmp_path, "moe_intermediate_size")
    with pytest.raises(ModelLoadError, match="moe_intermediate_size is missing"):
        load(tmp_path)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    make_reference("llama", {"hidden_act": "gelu"}).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"hidden_act='gelu'"):
        load(tmp_path)
