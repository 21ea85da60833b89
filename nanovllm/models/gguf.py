"""GGUF checkpoints (llama.cpp's format), read as if they were Hugging Face's."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from math import log, pi
from pathlib import Path
from shutil import copymode
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from nanovllm.errors import MissingDependencyError, ModelLoadError
from nanovllm.kernels.quantized import Groups
from nanovllm.models.checkpoint import Cut
from nanovllm.models.config import ModelConfig
from nanovllm.models.gguf_file import GGUFFile, TensorInfo, open_gguf
from nanovllm.models.gguf_tokenizer import build_tokenizer

GROUP_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of 32 weights
# general.architecture -> (model_type, architecture)
FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERT_NAMES = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # what each frequency is divided by: [head_dim / 2]


def gguf_config(path: Path) -> ModelConfig:
    """The shape of the model in a GGUF file.

    Raises:
        ModelLoadError: the file is damaged, or holds a model that is not supported.
    """
    file = open_gguf(path)
    return ModelConfig.from_hf(hf_config(file), generation_config(file))


def checkpoint_tensors(
    path: Path, ggufs: list[Path], keep_groups: bool, cut: Cut | None
) -> Iterator[tuple[str, Tensor | Groups]]:
    """See checkpoint.open_tensors, and `gguf_tensors`.

    Args:
        ggufs: the files at `path`; there can be only one.
    """
    if len(ggufs) != 1:
        raise ModelLoadError(f"{path}: holds {len(ggufs)} .gguf files; name one as the model")
    tensors = gguf_tensors(ggufs[0], keep_groups)
    if cut is None:
        return tensors
    from nanovllm.models.sharding import cut_tensors

    return cut_tensors(tensors, cut)


def gguf_tensors(path: Path, keep_groups: bool = False) -> Iterator[tuple[str, Tensor | Groups]]:
    """(name, tensor) of each tensor, dequantized, with Hugging Face's names and layout.

    Args:
        keep_groups: leave matrices in Q4_0, Q4_1 and Q8_0 as they are.

    The header is checked before the first tensor is read.

    Raises:
        ModelLoadError: the file is damaged, or a tensor is of a type or name that is unknown.
        MissingDependencyError: the gguf package, which dequantizes, is not there.
    """
    require_gguf()
    file = open_gguf(path)
    architecture = file.require("general.architecture", str)
    heads = head_counts(file) if architecture == "llama" else {}
    places = {name: hf_name(file, name) for name in file.tensors if name != ROPE_FACTORS}
    return read_tensors(file, places, heads, keep_groups)


def read_tensors(
    file: GGUFFile, places: dict[str, str], heads: dict[str, int], keep_groups: bool
) -> Iterator[tuple[str, Tensor | Groups]]:
    """Read, dequantize and rearrange one tensor after the other."""
    for name, place in places.items():
        info, raw = file.tensors[name], file.raw(file.tensors[name])
        if "{expert}" in place:
            for expert, part in enumerate(raw):
                yield place.format(expert=expert), dequantize(part, info)
            continue
        part = name.split(".")[-2]
        if keep_groups and info.kind in GROUP_BYTES and raw.ndim == 2:
            groups = read_groups(raw, info.kind)
            if part in heads:
                rows = (unpermute(file.path, name, a, heads[part]) for a in groups.arrays)
                groups = Groups(groups.bits, *rows)
            yield place, groups
            continue
        tensor = dequantize(raw, info)
        yield place, unpermute(file.path, name, tensor, heads[part]) if part in heads else tensor


def dequantize(raw: NDArray[np.uint8], info: TensorInfo) -> Tensor:
    """A tensor from its bytes, [..., bytes of a row]; quantized ones become float32."""
    if info.kind in PLAIN:
        return torch.from_numpy(raw.copy()).view(PLAIN[info.kind])
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[info.kind]))


def read_groups(raw: NDArray[np.uint8], kind: str) -> Groups:
    """The numbers of quantized blocks, each 32 weights: [rows, bytes of a row] -> Groups.

    Q4_0: scale, 16 bytes; weight = scale · (q - 8). Q4_1: scale, minimum, 16 bytes. Q8_0: scale, 32
    signed bytes. Byte j of 16 holds weight j in its low half and j + 16 in its high half.
    """
    blocks = torch.from_numpy(raw.copy()).unflatten(1, (-1, GROUP_BYTES[kind]))
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if kind == "Q8_0":
        q = blocks[..., 2:] ^ 128  # from -128 up, as unsigned
        return Groups(8, q.flatten(1), scale, scale * -128)
    halves = blocks[..., -16:]
    q = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)
    if kind == "Q4_0":
        return Groups(4, q, scale, scale * -8)
    return Groups(4, q, scale, blocks[..., 2:4].contiguous().view(torch.float16)[..., 0])


def unpermute(path: Path, name: str, tensor: Tensor, heads: int) -> Tensor:
    """Rows of llama's q and k in Hugging Face's order.

    GGUF pairs neighbours (2i, 2i+1) for the rotary embedding, Hugging Face (i, i + D/2).
    """
    if tensor.shape[0] % (2 * heads):
        raise ModelLoadError(
            f"{path}: tensor {name} is {list(tensor.shape)}, which {heads} heads do not divide"
        )
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def hf_name(file: GGUFFile, name: str) -> str:
    """Hugging Face's name of a tensor; "{expert}" stands for each of a stack of experts."""
    if found := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        part, suffix = found.groups()
        if part in OUTER_NAMES:
            return f"{OUTER_NAMES[part]}.{suffix}"
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, suffix = found.groups()
        if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"
        if part in EXPERT_NAMES and len(file.tensors[name].shape) == 3:
            return f"model.layers.{layer}.mlp.experts.{{expert}}.{EXPERT_NAMES[part]}.{suffix}"
    raise ModelLoadError(f"{file.path}: tensor {name} is not known in any supported architecture")


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """What Hugging Face would write to config.json."""
    check_supported(file)
    architecture = file.require("general.architecture", str)
    model_type, hf_architecture = FAMILIES[architecture]
    key = architecture + "."
    window = file.optional("llama.attention.sliding_window", int) or None
    if window:  # GGUF knows no other name for Mistral
        model_type, hf_architecture = "mistral", "MistralForCausalLM"
    heads, kind = head_counts(file), file.tensors["blk.0.attn_q.weight"].kind
    config = {
        "architectures": [hf_architecture],
        "model_type": model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": file.require(key + "embedding_length", int),
        "intermediate_size": file.require(key + "feed_forward_length", int),
        "num_hidden_layers": file.require(key + "block_count", int),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": head_dim(file),
        "hidden_act": "silu",
        "rms_norm_eps": file.require(key + "attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": file.require(key + "context_length", int),
        "rope_theta": file.optional(key + "rope.freq_base", float, 10_000.0),
        "rope_scaling": rope_scaling(file),
        "sliding_window": window,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": architecture == "llama" and "blk.0.ffn_down.bias" in file.tensors,
        "dtype": str(PLAIN.get(kind, torch.bfloat16)).removeprefix("torch."),
    }
    if architecture == "qwen3moe":
        config |= {
            "num_experts": file.require(key + "expert_count", int),
            "num_experts_per_tok": file.require(key + "expert_used_count", int),
            "moe_intermediate_size": file.require(key + "expert_feed_forward_length", int),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    config |= generation_config(file)
    return {name: value for name, value in config.items() if value is not None}


def check_supported(file: GGUFFile) -> None:
    """Refuse what would load but not work.

    Raises:
        ModelLoadError: names what is not supported, or missing.
    """
    architecture = file.require("general.architecture", str)
    if architecture not in FAMILIES:
        raise ModelLoadError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; "
            f"these are: {', '.join(FAMILIES)}"
        )
    if file.optional("split.count", int, 0) > 1:
        raise ModelLoadError(
            f"{file.path}: one part of a split model; join them with llama-gguf-split --merge"
        )
    if architecture == "llama" and file.optional("llama.expert_count", int):
        raise ModelLoadError(f"{file.path}: llama.expert_count: experts in a llama are unsupported")
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        if name not in file.tensors:
            raise ModelLoadError(f"{file.path}: tensor {name} is missing")
    key = architecture + ".rope.dimension_count"
    if file.optional(key, int, size := head_dim(file)) != size:
        raise ModelLoadError(f"{file.path}: {key}={file.metadata[key]} must be the head's {size}")


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """What Hugging Face would write to generation_config.json: special token ids."""
    bos, eos, eot, pad = (
        file.optional(f"tokenizer.ggml.{name}_token_id", int)
        for name in ("bos", "eos", "eot", "padding")
    )
    ends = list(dict.fromkeys(token for token in (eos, eot) if token is not None))
    found = {
        "bos_token_id": bos,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad,
    }
    return {name: value for name, value in found.items() if value is not None}


def head_counts(file: GGUFFile) -> dict[str, int]:
    """Heads of queries and of keys, by the name of their tensor."""
    key = file.require("general.architecture", str) + ".attention.head_count"
    queries = file.require(key, int)
    keys = file.optional(key + "_kv", int, queries)
    if queries < 1 or keys < 1:
        raise ModelLoadError(f"{file.path}: metadata {key}={queries}, {key}_kv={keys}")
    return {"attn_q": queries, "attn_k": keys}


def head_dim(file: GGUFFile) -> int:
    """Size of a head: stated, or the rows of q divided among the heads."""
    key = file.require("general.architecture", str) + ".attention.key_length"
    rows = file.tensors["blk.0.attn_q.weight"].shape[0]
    return file.optional(key, int) or rows // head_counts(file)["attn_q"]


def rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """rope_scaling as config.json has it.

    Raises:
        ModelLoadError: the kind is unknown.
    """
    prefix = file.require("general.architecture", str) + ".rope."
    if ROPE_FACTORS in file.tensors:
        return llama3_scaling(file, file.optional(prefix + "freq_base", float, 10_000.0))
    old_factor = file.optional(prefix + "scale_linear", float)  # before there was a type
    kind = file.optional(prefix + "scaling.type", str, "linear" if old_factor else "none")
    factor = file.optional(prefix + "scaling.factor", float, old_factor)
    if kind == "none":
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor:
        return yarn_scaling(file, prefix + "scaling.", factor)
    raise ModelLoadError(f"{file.path}: rope scaling {kind!r} of factor {factor} is not supported")


def yarn_scaling(file: GGUFFile, prefix: str, factor: float) -> dict[str, Any]:
    """YaRN's parameters; what the file does not say is left to its defaults."""
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.optional(prefix + "original_context_length", int),
        "beta_fast": file.optional(prefix + "yarn_beta_fast", float),
        "beta_slow": file.optional(prefix + "yarn_beta_slow", float),
    }
    for name in ("yarn_attn_factor", "attn_factor"):
        if extra := file.optional(prefix + name, float):
            # llama.cpp multiplies this with what Hugging Face takes for the default.
            found["attention_factor"] = extra * (0.1 * log(factor) + 1)
    return {name: value for name, value in found.items() if value is not None}


def llama3_scaling(file: GGUFFile, theta: float) -> dict[str, Any] | None:
    """Llama 3's scaling, of which GGUF keeps only the factors that it comes to.

    The published models differ in the factor alone, so their other parameters are tried.

    Raises:
        ModelLoadError: the factors are others.
    """
    info = file.tensors[ROPE_FACTORS]
    if info.kind != "F32" or info.shape != (head_dim(file) // 2,):
        raise ModelLoadError(f"{file.path}: tensor {ROPE_FACTORS} must hold half a head of F32")
    factors = file.raw(info).view(np.float32).astype(np.float64)
    if np.all(factors == 1):
        return None
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    turns = original / (2 * pi) * theta ** -(np.arange(len(factors)) / len(factors))
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 0: divided by factor, 1: kept
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelLoadError(f"{file.path}: tensor {ROPE_FACTORS} is no scaling of a known llama3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def convert(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a Hugging Face checkpoint, in the dtype of its config.

    Raises:
        ModelLoadError, MissingDependencyError: see `gguf_tensors`.
    """
    tensors, file = gguf_tensors(path), open_gguf(path)
    config = hf_config(file)
    tokenizer, tokenizer_config = build_tokenizer(file)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in (
        ("config", config),
        ("generation_config", generation_config(file)),
        ("tokenizer_config", tokenizer_config),
    ):
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    weights, dtype = folder / "model.safetensors", getattr(torch, config["dtype"])
    dense = {name: tensor.to(dtype) for name, tensor in tensors if isinstance(tensor, Tensor)}
    save_file(dense, weights, {"format": "pt"})
    copymode(folder / "config.json", weights)  # safetensors lets only the owner read


def require_gguf() -> None:
    """Check for the package that dequantizes.

    Raises:
        MissingDependencyError: it is not there.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError("gguf", "gguf", "reading a GGUF file")
