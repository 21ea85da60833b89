"""ServerConfig: every setting of the server, beside those of its engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanovllm.checks import check_fields, one_of, ranged
from nanovllm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of a server; the names are vLLM's where vLLM has them.

    Args:
        host: the address to listen at; 0.0.0.0 is reachable from other machines.
        port: 0 takes a free one; it is printed.
        api_key: what clients must send as a bearer token, on every route but /health. Any of
            several will do. The environment variable NANOVLLM_API_KEY sets one that other users of
            this machine cannot see.
        served_model_name: the model's name in the API; the first of several is the one shown.
        chat_template: a file, or the template itself, instead of the model's own.
        trust_request_chat_template: let a request bring a template of its own.
        tool_call_parser: how the model writes tool calls; "auto" sees it in its template.
        generation_config: "auto" takes sampling parameters that a request leaves open from the
            model's generation_config.json, "vllm" those of SamplingParams.
        root_path: where a proxy in front has put the server.
        data_parallel_size: engines of the model, behind Ray Serve if more than one.
        max_num_queued_reqs: samples that may wait; requests beyond are answered with 503.
        max_logprobs: log probabilities a request may ask for at each position.
        max_body_bytes: of a request.
        write_timeout: seconds after which a client that takes nothing of a stream has left.
        shutdown_timeout: seconds that requests get to end in after SIGTERM.
        log_requests: log the sampling parameters of each request; never its text.
        enable_dev_endpoints: serve /reset_prefix_cache.

    Raises:
        ConfigError: a value is impossible.
    """

    host: str = "127.0.0.1"
    port: int = ranged(8000, 0, 65535)
    api_key: Sequence[str] = ()
    served_model_name: Sequence[str] = field(default=(), metadata={"several": True})
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    tool_call_parser: str = one_of("auto", "hermes", "llama3_json")
    generation_config: str = one_of("auto", "vllm")
    root_path: str = ""
    data_parallel_size: int = ranged(1, 1, 4096)
    max_num_queued_reqs: int = ranged(2048, 1, 2**24)
    max_logprobs: int = ranged(20, 0, 2**24)
    max_body_bytes: int = ranged(8 * 2**20, 1, 2**40)
    write_timeout: float = ranged(60.0, 0.001, 86_400.0)
    shutdown_timeout: float = ranged(30.0, 0.0, 86_400.0)
    log_requests: bool = False
    enable_dev_endpoints: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("api_key", "served_model_name"):
            for entry in getattr(self, name):
                if not isinstance(entry, str) or not entry:
                    raise ConfigError(name, entry, "must be a non-empty string")
