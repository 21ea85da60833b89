"""A model small enough to load anew in every test."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SIZE, WIDE, VOCABULARY = 32, 64, 49152
LAYER = {
    "input_layernorm": (SIZE,),
    "self_attn.q_proj": (SIZE, SIZE),
    "self_attn.k_proj": (SIZE // 2, SIZE),
    "self_attn.v_proj": (SIZE // 2, SIZE),
    "self_attn.o_proj": (SIZE, SIZE),
    "post_attention_layernorm": (SIZE,),
    "mlp.gate_proj": (WIDE, SIZE),
    "mlp.up_proj": (WIDE, SIZE),
    "mlp.down_proj": (SIZE, WIDE),
}
OUTER = {"model.embed_tokens": (VOCABULARY, SIZE), "model.norm": (SIZE,)}


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of SmolLM2 and a one-layer Llama of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (smollm2 / name).exists():
            shutil.copy(smollm2 / name, folder)
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": SIZE,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "dtype": "float32",
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    generator = torch.Generator().manual_seed(0)
    shapes = OUTER | {f"model.layers.0.{name}": shape for name, shape in LAYER.items()}
    weights = {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder
