"""The shape of a model: how many bytes it weighs, reads and stores."""

from dataclasses import dataclass
from pathlib import Path

from nanovllm.errors import ConfigError, ModelLoadError
from nanovllm.models.config import ModelConfig, read_json


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer with gated MLPs; the names are ModelConfig's.

    Attributes:
        tied: the embedding is the head too.
        num_experts: 0 has one MLP; else `intermediate_size` is an expert's.
        num_active_experts: that one token goes through.
        num_bytes: of a weight, and of a number in the KV cache.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    tied: bool = False
    num_experts: int = 0
    num_active_experts: int = 0
    num_bytes: int = 2

    @property
    def mlp_weights(self) -> int:
        """Of one MLP, or of one expert."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def shared_weights(self) -> int:
        """Of a layer, but for MLP or experts: attention and the router."""
        heads = 2 * (self.num_heads + self.num_kv_heads)
        return self.hidden_size * (heads * self.head_dim + self.num_experts)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        mlps = (self.num_experts or 1) * self.mlp_weights
        layers = self.num_layers * (self.shared_weights + mlps)
        return layers + self.head_weights * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Of one token, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.num_bytes


# From the models' config.json files.
SHAPES = {
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "llama-3.1-70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, 131072),
    "qwen3-0.6b": ModelShape(28, 1024, 3072, 16, 8, 128, 151936, 40960, True),
    "qwen3-1.7b": ModelShape(28, 2048, 6144, 16, 8, 128, 151936, 40960, True),
    "qwen3-4b": ModelShape(36, 2560, 9728, 32, 8, 128, 151936, 40960, True),
    "qwen3-8b": ModelShape(36, 4096, 12288, 32, 8, 128, 151936, 40960),
    "qwen3-14b": ModelShape(40, 5120, 17408, 40, 8, 128, 151936, 40960),
    "qwen3-32b": ModelShape(64, 5120, 25600, 64, 8, 128, 151936, 40960),
    "qwen3-30b-a3b": ModelShape(48, 2048, 768, 32, 4, 128, 151936, 40960, False, 128, 8),
    "smollm2-135m": ModelShape(30, 576, 1536, 9, 3, 64, 49152, 8192, True),
}


def find_shape(name: str) -> ModelShape:
    """A preset, or the shape in a config.json or the folder of one.

    Raises:
        ConfigError: neither is there, or the file says too little.
    """
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError("model", name, f"name a config.json, or one of {', '.join(SHAPES)}")
    try:
        config = ModelConfig.from_hf(read_json(path), {}, str(path))
        experts = int(config.extra.get("num_experts") or 0)
        size = config.extra["moe_intermediate_size"] if experts else config.intermediate_size
        return ModelShape(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=int(size),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_model_len=config.max_model_len,
            tied=config.tie_word_embeddings,
            num_experts=experts,
            num_active_experts=int(config.extra["num_experts_per_tok"]) if experts else 0,
            num_bytes=4 if config.dtype == "float32" else 2,
        )
    except (ModelLoadError, LookupError, TypeError, ValueError) as error:
        raise ConfigError("model", name, f"is no shape to simulate: {error}") from error
