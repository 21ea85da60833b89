"""EngineConfig: every setting of an engine, checked once, before anything is loaded."""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from nanovllm.checks import check_fields, one_of, ranged
from nanovllm.core.policy import make_policy
from nanovllm.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"


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
        scheduling_policy: "fcfs", "priority", "sjf", "lpm", "edf", "fair", "prefill-first",
            "sarathi" (core/policies/ says what they do), or "module:Class", one of your own.
        seed: of requests that bring none.
        skip_tokenizer_init: prompts are token ids and no text is made.
        load_format: "auto" sees what is there; "dummy" needs a config.json only and makes small
            random weights.
        attention_backend: "auto", "triton" (GPUs), "native" (C++, bfloat16 on CPUs with AVX-512),
            "cpu" (oneDNN and Numba) or "reference" (plain torch, any device); the other operations
            come with it.
        enforce_eager: no CUDA graphs.
        async_scheduling: plan a step while the one before is still computed; None is so on a GPU,
            unless the engine is recorded or its ranks are reached through Ray.
        tensor_parallel_size: devices that share the model; on a CPU, processes.
        distributed_executor_backend: how these are reached: "mp", processes of this machine, or
            "ray", actors of a Ray cluster.
        distributed_timeout_seconds: after which a step that several ranks share counts as hung.
        quantization: of the weights at load: "int8" (a scale for each row, activations too), "int4"
            (groups of 32; the head in 8 bits) or "gguf" (a GGUF's own blocks, as they are).
        num_threads: CPU threads; None is as many as there are cores for this process.
        record: a file to write what the engine is asked, decides and takes to, as JSON lines, for
            `nanovllm explain` and replays.
        record_max_bytes: the size at which a recording ends.

    Raises:
        ConfigError: a value is impossible; see `make` for unknown names.
    """

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = one_of("auto", "float32", "bfloat16", "float16")
    device: str = one_of("auto", "cpu", "cuda")
    max_model_len: int | None = ranged(None, 2, 2**24)
    max_num_seqs: int | None = ranged(None, 1, 2**16)
    max_num_batched_tokens: int | None = ranged(None, 1, 2**24)
    block_size: int = ranged(16, 1, 1024)
    num_kv_blocks: int | None = ranged(None, 1, 2**31)
    kv_cache_memory_bytes: int | None = ranged(None, 1, 2**62)
    gpu_memory_utilization: float = ranged(0.9, 0.01, 1.0)
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    seed: int = ranged(0, 0, 2**62)
    load_format: str = one_of("auto", "safetensors", "gguf", "dummy")
    attention_backend: str = one_of("auto", "triton", "native", "cpu", "reference")
    enforce_eager: bool = False
    async_scheduling: bool | None = one_of(None, False, True)
    tensor_parallel_size: int = ranged(1, 1, 1024)
    distributed_executor_backend: str = one_of("mp", "ray")
    distributed_timeout_seconds: int = ranged(120, 1, 86_400)
    quantization: str | None = one_of(None, "int8", "int4", "gguf")
    num_threads: int | None = ranged(None, 1, 1024)
    record: str | None = None
    record_max_bytes: int = ranged(2**30, 2**16, 2**62)

    @classmethod
    def make(cls, **settings: object) -> "EngineConfig":
        """An EngineConfig from settings whose names are not known to be right.

        Raises:
            ConfigError: a name is unknown (the nearest is in the message) or a value impossible.
        """
        names = [entry.name for entry in fields(cls)]
        for name, value in settings.items():
            if name not in names:
                near = get_close_matches(name, names, 1, 0.3) or ["model"]
                raise ConfigError(name, value, f"no such setting; the nearest is {near[0]}")
        return cls(**settings)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        make_policy(self.scheduling_policy)
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs and tokens and tokens < seqs:
            why = f"each of max_num_seqs={seqs} needs a token; the nearest is {seqs}"
            raise ConfigError("max_num_batched_tokens", tokens, why)
        if self.record is not None or self.distributed_executor_backend == "ray":
            if self.async_scheduling:
                why = "goes neither with a recording nor with Ray; the nearest is False"
                raise ConfigError("async_scheduling", True, why)
            object.__setattr__(self, "async_scheduling", False)
        if self.quantization == "gguf" and self.load_format == "dummy":
            why = "load_format='dummy' reads no file; the nearest is int8"
            raise ConfigError("quantization", "gguf", why)

    def for_model(self, longest: int) -> "EngineConfig":
        """The same with max_model_len, max_num_seqs and max_num_batched_tokens filled in.

        Args:
            longest: positions that the model can take.

        Raises:
            ConfigError: the model cannot take max_model_len, or a step cannot take a prompt.
        """
        length = self.max_model_len or longest
        if length > longest:
            raise ConfigError("max_model_len", length, f"the model takes {longest}, the nearest")
        least = 0 if self.enable_chunked_prefill else length
        tokens = self.max_num_batched_tokens or max(2048, self.max_num_seqs or 0, least)
        if tokens < least:
            why = f"without chunked prefill the nearest is max_model_len={least}"
            raise ConfigError("max_num_batched_tokens", tokens, why)
        seqs = self.max_num_seqs or min(256, tokens)
        return replace(self, max_model_len=length, max_num_seqs=seqs, max_num_batched_tokens=tokens)
