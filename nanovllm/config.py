"""EngineConfig: every setting of an engine, checked once, before anything is loaded."""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from nanovllm.core.policy import POLICIES
from nanovllm.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"
# field -> values it may have; each is listed where the error can name the nearest one.
CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "scheduling_policy": tuple(POLICIES),
    "load_format": ("auto", "safetensors", "gguf", "dummy"),
    "attention_backend": ("auto", "cpu", "reference"),
    "tensor_parallel_size": (1,),
    "quantization": (None,),
}
# field -> (kind, smallest, largest); None is allowed where it is the default.
RANGES: dict[str, tuple[type, float, float]] = {
    "max_model_len": (int, 2, 2**24),
    "max_num_seqs": (int, 1, 2**16),
    "max_num_batched_tokens": (int, 1, 2**24),
    "block_size": (int, 1, 1024),
    "num_kv_blocks": (int, 1, 2**31 - 1),
    "kv_cache_memory_bytes": (int, 1, 2**63 - 1),
    "gpu_memory_utilization": (float, 0.01, 1),
    "seed": (int, 0, 2**62),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; the names are vLLM's where vLLM has them.

    Args:
        model: a folder, a .gguf file, a hub id, or "smollm2-135m". tokenizer: the same; None
            takes the model's.
        dtype: of weights, activations and KV cache; "auto" is the checkpoint's.
        device: "auto" is cuda where there is one.
        max_model_len: tokens a sequence may have; None is what the model was trained for.
        max_num_seqs: sequences that run at once; None is 256, or less if a step has less tokens.
        max_num_batched_tokens: tokens a step computes at most; None is 2,048, or what
            max_num_seqs and, without chunked prefill, max_model_len need.
        block_size: tokens in a block of the KV cache.
        num_kv_blocks: blocks in the pool; None is what kv_cache_memory_bytes hold, or, without
            that, what the memory allows (on a GPU gpu_memory_utilization of it, less the
            weights; elsewhere at most 4 GiB).
        enable_prefix_caching: share the blocks of equal prefixes.
        enable_chunked_prefill: let a long prompt take several steps.
        scheduling_policy: "fcfs" or "priority".
        seed: of requests that bring none.
        skip_tokenizer_init: prompts are token ids and no text is made.
        load_format: "auto" sees what is there; "dummy" needs a config.json only and makes small
            random weights.
        attention_backend: "auto", "cpu" (Numba, reads blocks in place) or "reference" (plain
            torch, any device).
        enforce_eager: no CUDA graphs.

    Raises:
        ConfigError: a value is impossible; see `make` for unknown names.
    """

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    seed: int = 0
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    attention_backend: str = "auto"
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    quantization: str | None = None

    @classmethod
    def make(cls, **settings: object) -> "EngineConfig":
        """An EngineConfig from settings whose names are not known to be right.

        Raises:
            ConfigError: a name is unknown (the nearest is in the message) or a value impossible.
        """
        names = [field.name for field in fields(cls)]
        for name, value in settings.items():
            if name not in names:
                near = get_close_matches(name, names, 1, 0.3) or ["model"]
                raise ConfigError(name, value, f"no such setting; the nearest is {near[0]}")
        return cls(**settings)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            choice, listed = getattr(self, name), [str(choice) for choice in choices]
            if choice not in choices:
                near = get_close_matches(str(choice), listed, 1, 0)[0]
                raise ConfigError(name, choice, f"the nearest of {', '.join(listed)} is {near}")
        for name, (kind, low, high) in RANGES.items():
            value: Any = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            if value is None and optional:
                continue
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                nearest = high if number and value > high else low
                raise ConfigError(name, value, f"the nearest possible value is {nearest}")
        for name, entry in type(self).__dataclass_fields__.items():
            if isinstance(entry.default, bool) and not isinstance(getattr(self, name), bool):
                raise ConfigError(name, getattr(self, name), "must be True or False")
        num_seqs, num_tokens = self.max_num_seqs, self.max_num_batched_tokens
        if num_seqs and num_tokens and num_tokens < num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                num_tokens,
                f"each of max_num_seqs={num_seqs} needs a token; the nearest is {num_seqs}",
            )

    def for_model(self, longest: int) -> "EngineConfig":
        """The same with max_model_len, max_num_seqs and max_num_batched_tokens filled in.

        Args:
            longest: positions that the model can take.

        Raises:
            ConfigError: the model cannot take max_model_len, or a step cannot take a prompt.
        """
        length = self.max_model_len or longest
        if length > longest:
            raise ConfigError("max_model_len", length, f"the nearest possible value is {longest}")
        whole_prompt = 0 if self.enable_chunked_prefill else length
        num_tokens = self.max_num_batched_tokens or max(2048, self.max_num_seqs or 0, whole_prompt)
        if num_tokens < whole_prompt:
            raise ConfigError(
                "max_num_batched_tokens",
                num_tokens,
                f"without chunked prefill the nearest is max_model_len={whole_prompt}",
            )
        return replace(
            self,
            max_model_len=length,
            max_num_seqs=self.max_num_seqs or min(256, num_tokens),
            max_num_batched_tokens=num_tokens,
        )
