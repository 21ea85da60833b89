"""ModelConfig: a model's shape, read from its config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from nanovllm.errors import ModelLoadError

Size = Annotated[int, Meta(ge=1)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
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
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_layers: Size = field(name="num_hidden_layers")
    num_heads: Size = field(name="num_attention_heads")
    num_kv_heads: Size = field(name="num_key_value_heads")
    head_dim: Size
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: Size
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Size | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
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
        fields = {name: value for name, value in raw.items() if value is not None}
        # transformers 5 writes rope_parameters, with theta inside; others rope_scaling.
        rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))
        try:
            heads = fields["num_attention_heads"]
            fields |= {
                "architecture": fields["architectures"][0],
                "num_key_value_heads": fields.get("num_key_value_heads", heads),
                "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
                "rope_scaling": {"rope_type": rope.get("type", "default"), **rope},
                "rope_theta": rope.get("rope_theta") or fields.get("rope_theta", 10_000),
                "dtype": fields.get("dtype") or fields.get("torch_dtype", "float32"),
                "eos_token_ids": eos if isinstance(eos, list) else [eos] * (eos is not None),
                "extra": dict(raw),
            }
            return msgspec.convert(fields, cls)
        except (msgspec.ValidationError, ArithmeticError, TypeError, LookupError) as error:
            raise ModelLoadError(f"{source}: a field is missing or impossible: {error}") from error

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
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ModelLoadError(f"{path}: not a JSON object ({error})") from error
