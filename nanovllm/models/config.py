"""ModelConfig: a model's shape, read from its config.json."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from nanovllm.checks import check_fields, one_of, ranged
from nanovllm.errors import FieldError, ModelLoadError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer; the defaults are those of transformers.

    Attributes:
        architecture: name in the registry, e.g. "LlamaForCausalLM".
        max_position_embeddings: positions that the model was trained for (but see max_model_len).
        rope_scaling: kind ("rope_type") and parameters of the rotary embedding's scaling.
        sliding_window: positions that a token sees, itself included, in the layers that have a
            window (each family knows which); None is all.
        eos_token_ids: tokens with which the model ends its output.
        held_experts: which experts, from and to, this rank holds; None is all.
        extra: the whole config.json, for what only one family has.
    """

    architecture: str
    vocab_size: int = ranged(MISSING, 1, 2**31)
    hidden_size: int = ranged(MISSING, 1, 2**31)
    intermediate_size: int = ranged(MISSING, 1, 2**31)
    num_layers: int = ranged(MISSING, 1, 2**31)
    num_heads: int = ranged(MISSING, 1, 2**31)
    num_kv_heads: int = ranged(MISSING, 1, 2**31)
    head_dim: int = ranged(MISSING, 1, 2**31)
    hidden_act: str = one_of("silu")
    rms_norm_eps: float = ranged(1e-6, 0.0, 1.0)
    max_position_embeddings: int = ranged(MISSING, 1, 2**31)
    rope_theta: float = ranged(10_000.0, 1.0, 1e30)
    rope_scaling: dict[str, Any]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = ranged(None, 1, 2**62)
    dtype: str = one_of("float32", "bfloat16", "float16")
    eos_token_ids: tuple[int, ...]
    held_experts: tuple[int, int] | None = None
    extra: dict[str, Any]

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any], source: str = "config.json"
    ) -> "ModelConfig":
        """From the contents of config.json and generation_config.json (may be empty).

        Raises:
            ModelLoadError: a field is missing or of a wrong kind; names it and `source`.
        """
        known = {name: value for name, value in raw.items() if value is not None}
        # transformers 5 writes rope_parameters, with theta inside; others rope_scaling.
        rope = known.get("rope_scaling") or known.get("rope_parameters") or {}
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))
        try:
            heads = known["num_attention_heads"]
            known |= {
                "architecture": known["architectures"][0],
                "num_layers": known["num_hidden_layers"],
                "num_heads": heads,
                "num_kv_heads": known.get("num_key_value_heads", heads),
                "head_dim": known.get("head_dim") or known["hidden_size"] // heads,
                "rope_scaling": {"rope_type": rope.get("type", "default"), **rope},
                "rope_theta": rope.get("rope_theta") or known.get("rope_theta", 10_000),
                "dtype": known.get("dtype") or known.get("torch_dtype", "float32"),
                "eos_token_ids": tuple(eos if isinstance(eos, list) else [eos] * (eos is not None)),
                "extra": dict(raw),
            }
            names = [entry.name for entry in fields(cls)]
            config = cls(**{name: known[name] for name in names if name in known})
            check_fields(config, FieldError)
        except (FieldError, ArithmeticError, AttributeError, TypeError, LookupError) as error:
            raise ModelLoadError(f"{source}: a field is missing or impossible: {error}") from error
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """From a checkpoint's folder.

        Raises:
            ModelLoadError: config.json is missing or unreadable, or asks to run code.
        """
        source, generation = folder / "config.json", folder / "generation_config.json"
        raw = read_json(source)
        if "auto_map" in raw:
            why = "auto_map asks to run code of the checkpoint, which nano-vllm never does"
            raise ModelLoadError(f"{source}: {why}; take one of a supported architecture")
        return cls.from_hf(raw, read_json(generation) if generation.exists() else {}, str(source))

    @property
    def max_model_len(self) -> int:
        """Positions that sequences may reach: those of the training, stretched by the scaling."""
        if self.rope_scaling["rope_type"] == "default":
            return self.max_position_embeddings
        from nanovllm.layers.rope_scaling import stretched_length

        return stretched_length(self.rope_scaling, self.max_position_embeddings)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelLoadError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelLoadError(f"{path}: not a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path}: not a JSON object")
    return found
