"""ModelConfig: a model's shape, read from its config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelLoadError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer.

    Attributes:
        architecture: name in the registry, e.g. "LlamaForCausalLM".
        max_position_embeddings: positions that the model was trained for (but see max_model_len).
        rope_scaling: kind ("rope_type") and parameters of the rotary embedding's scaling.
        sliding_window: positions that a token sees, itself included, in the layers that have a
            window (each family knows which); None is all.
        eos_token_ids: tokens with which the model ends its output.
        extra: the whole config.json, for what only one family has.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, Any]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: tuple[int, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> "ModelConfig":
        """From the contents of config.json and generation_config.json (may be empty).

        Raises:
            ModelLoadError: a field that every model has is missing.
        """
        activation = raw.get("hidden_act", "silu")
        if activation != "silu":
            raise ModelLoadError(f"config.json: hidden_act {activation!r} is not supported")
        try:
            # transformers 5 writes rope_parameters, with theta inside; others rope_scaling.
            rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
            rope.setdefault("rope_type", rope.get("type", "default"))
            heads = raw["num_attention_heads"]
            eos = generation.get("eos_token_id", raw.get("eos_token_id"))
            return cls(
                architecture=raw["architectures"][0],
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                max_position_embeddings=raw["max_position_embeddings"],
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000),
                rope_scaling=rope,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                attention_bias=raw.get("attention_bias", False),
                mlp_bias=raw.get("mlp_bias", False),
                sliding_window=raw.get("sliding_window"),
                dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
                eos_token_ids=() if eos is None else tuple([eos] if isinstance(eos, int) else eos),
                extra=raw,
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ModelLoadError(f"config.json: {error!r} is missing or of a wrong kind") from error

    @property
    def max_model_len(self) -> int:
        """Positions that sequences may reach: those of the training, stretched by the scaling.

        max_position_embeddings is the length before linear and dynamic scaling, but the length
        after llama3's; for yarn it is found either way, so the original length is taken.
        """
        kind, length = self.rope_scaling.get("rope_type"), self.max_position_embeddings
        if kind == "yarn":
            original = self.rope_scaling.get("original_max_position_embeddings") or length
            return int(original * (self.rope_scaling.get("factor") or length / original))
        if kind in ("linear", "dynamic"):
            return int(length * (self.rope_scaling.get("factor") or 1))
        return length

    def need(self, *names: str) -> Any:
        """The first of these fields that config.json has.

        Raises:
            ModelLoadError: it has none of them.
        """
        for name in names:
            if self.extra.get(name) is not None:
                return self.extra[name]
        raise ModelLoadError(
            f"config.json: {names[0]} is missing, but {self.architecture} needs it"
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """From a checkpoint's folder.

        Raises:
            ModelLoadError: config.json is missing or unreadable, or asks to run code.
        """
        raw = read_json(folder / "config.json")
        if "auto_map" in raw:
            raise ModelLoadError(
                f"{folder}/config.json: auto_map asks to run code of the checkpoint, which "
                "nano-vllm never does; use a checkpoint of a supported architecture"
            )
        path = folder / "generation_config.json"
        return cls.from_hf(raw, read_json(path) if path.exists() else {})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelLoadError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelLoadError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object")
    return value
