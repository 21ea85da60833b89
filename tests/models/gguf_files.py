"""Small GGUF files for tests, written with the gguf package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
# A whole llama of one layer: 2 heads of 4, vocabulary of 6.
METADATA: dict[str, Any] = {
    "llama.context_length": 32,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TOKENS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "Ġ", "<end>", "<turn>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 3, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 4,
}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Array | tuple[Array, str]],
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file.

    Args:
        tensors: name -> values, written in their own dtype, or (raw bytes [..., bytes of a row],
            type of the tensor).
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=gguf.GGMLQuantizationType[value[1]])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_tensors(seed: int = 0) -> dict[str, Array]:
    """The tensors of the model that `METADATA` describes; the head is tied."""
    shapes = {"token_embd": (6, 8), "output_norm": (8,), "blk.0.attn_norm": (8,)}
    shapes |= {f"blk.0.attn_{name}": (8, 8) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8)}
    shapes |= {"blk.0.ffn_down": (8, 16)}
    random = np.random.default_rng(seed)
    return {
        f"{name}.weight": random.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def small_gguf(path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A whole file, model and tokenizer, with changes to the metadata."""
    return write_gguf(path, METADATA | TOKENS | dict(changes or {}), small_tensors())


def quantized_gguf(path: Path, kind: str) -> Path:
    """A llama of two layers with all of its matrices in a quantized kind: 2 heads of queries and
    1 of keys of 32 each, vocabulary of 48; no tokenizer, and the head is tied."""
    changes = {
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count_kv": 1,
    }
    shapes = {"token_embd": (48, 64), "output_norm": (64,)}
    for layer in ("blk.0", "blk.1"):
        shapes |= {f"{layer}.attn_{name}": (64, 64) for name in ("q", "output")}
        shapes |= {f"{layer}.attn_{name}": (32, 64) for name in ("k", "v")}
        shapes |= {f"{layer}.{name}_norm": (64,) for name in ("attn", "ffn")}
        shapes |= {f"{layer}.ffn_{name}": (96, 64) for name in ("gate", "up")}
        shapes |= {f"{layer}.ffn_down": (64, 96)}
    random, tensors = np.random.default_rng(0), dict[str, Any]()
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 2:
            raw = gguf.quants.quantize(values / 8, gguf.GGMLQuantizationType[kind])
            tensors[f"{name}.weight"] = raw, kind
        else:
            tensors[f"{name}.weight"] = values
    return write_gguf(path, METADATA | changes, tensors)


def to_gguf_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], architecture: gguf.MODEL_ARCH
) -> dict[str, Array]:
    """A Hugging Face checkpoint's tensors, named and laid out as llama.cpp's converter does it."""
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found: dict[str, Array] = {}
    for name, tensor in tensors.items():
        for part, count in heads.items():
            if architecture == gguf.MODEL_ARCH.LLAMA and part in name:
                pairs = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
                tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            expert, _, part = after.partition(".")
            if expert == "0":
                stack = [
                    tensors[f"{before}.experts.{i}.{part}"] for i in range(config["num_experts"])
                ]
                new = names.get_name(f"{before}.experts.{part}", try_suffixes=(".weight",))
                found[str(new)] = torch.stack(stack).numpy()
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        found[new] = tensor.numpy()
    return found
