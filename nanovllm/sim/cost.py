"""How long a step takes: a roofline over a device and a model, with at most four fitted numbers."""

from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

from nanovllm.checks import check_fields, ranged
from nanovllm.errors import ConfigError
from nanovllm.sim.hardware import Hardware
from nanovllm.sim.shape import ModelShape

LATENCY_S = 10e-6  # of one all-reduce, however small: an assumption


class Work(NamedTuple):
    """What a step asks of a model.

    Attributes:
        num_seqs: rows. num_tokens: computed. num_sampled: rows whose next token is wanted.
        num_kv_tokens: positions that all rows read.
        num_pairs: of a token and a position that it attends to.
    """

    num_seqs: int
    num_tokens: int
    num_sampled: int
    num_kv_tokens: int
    num_pairs: float


class CostModel(Protocol):
    def step_s(self, work: Work) -> float:
        """Seconds that a step takes."""
        ...


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a data sheet cannot say. Defaults are typical of vLLM with CUDA graphs.

    Args:
        compute_efficiency, bandwidth_efficiency: shares of the sheet's rates.
        overhead_s: of each step. overhead_per_seq_s: of each row in it.

    Raises:
        ConfigError: a number is impossible.
    """

    compute_efficiency: float = ranged(0.85, 0.001, 2.0)
    bandwidth_efficiency: float = ranged(0.9, 0.001, 2.0)
    overhead_s: float = ranged(5e-4, 0.0, 10.0)
    overhead_per_seq_s: float = ranged(0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Roofline:
    """Seconds of a step: overhead + max(weights / bandwidth, FLOPs / rate) + KV / bandwidth, and
    with tensor parallelism two all-reduces a layer (ring). (Williams et al., 2009.)

    Args:
        tensor_parallel_size: devices, which share heads and MLPs evenly.

    Raises:
        ConfigError: the heads cannot be shared so.
    """

    def __init__(
        self,
        hardware: Hardware,
        shape: ModelShape,
        tensor_parallel_size: int = 1,
        calibration: Calibration | None = None,
    ) -> None:
        tp, fitted = tensor_parallel_size, calibration or Calibration()
        if tp < 1 or shape.num_heads % tp:
            why = f"must divide the model's {shape.num_heads} heads; the nearest sure one is 1"
            raise ConfigError("tensor_parallel_size", tp, why)
        self.shape, self.fitted = shape, fitted
        bandwidth = hardware.bandwidth * fitted.bandwidth_efficiency
        rate = tp * hardware.flops * fitted.compute_efficiency
        # per device: seconds to read one weight, one token's KV; to compute with one weight
        self.weight_s = shape.num_bytes / bandwidth / tp
        self.kv_token_s = kv_bytes_per_device(shape, tp) / bandwidth
        self.flop_s = 1 / rate
        self.experts = shape.num_experts
        active = (shape.num_active_experts or 1) * shape.mlp_weights
        self.token_weights = shape.num_layers * (shape.shared_weights + active)
        self.dense_weights = self.token_weights + shape.head_weights
        self.pair_flops = 4 * shape.num_layers * shape.num_heads * shape.head_dim
        reduces = 2 * shape.num_layers * (tp > 1)
        message = shape.hidden_size * shape.num_bytes * 2 * (tp - 1) / tp
        self.reduce_s, self.reduce_token_s = reduces * LATENCY_S, reduces * message / hardware.link

    def step_s(self, work: Work) -> float:
        """Seconds that a step takes."""
        weights: float = self.dense_weights
        if self.experts:
            weights = self._weights_read(work.num_tokens)
        linear = self.token_weights * work.num_tokens
        dense = linear + self.shape.head_weights * work.num_sampled
        flops = 2 * dense + self.pair_flops * work.num_pairs
        return (
            self.fitted.overhead_s
            + self.fitted.overhead_per_seq_s * work.num_seqs
            + max(weights * self.weight_s, flops * self.flop_s)
            + work.num_kv_tokens * self.kv_token_s
            + self.reduce_s
            + self.reduce_token_s * work.num_tokens
        )

    def _weights_read(self, num_tokens: int) -> float:
        """With experts that tokens choose independently and evenly, in expectation."""
        shape = self.shape
        missed = (1 - shape.num_active_experts / shape.num_experts) ** num_tokens
        experts = shape.num_experts * (1 - missed) * shape.mlp_weights
        return shape.num_layers * (shape.shared_weights + experts) + shape.head_weights


def kv_bytes_per_device(shape: ModelShape, tensor_parallel_size: int) -> float:
    """Bytes of one token's keys and values on each device; a head is not cut."""
    return shape.kv_bytes / min(tensor_parallel_size, shape.num_kv_heads)


def num_blocks_in(
    hardware: Hardware,
    shape: ModelShape,
    block_size: int,
    max_num_batched_tokens: int,
    tensor_parallel_size: int = 1,
    utilization: float = 0.9,
) -> int:
    """Blocks that fit beside the weights, 1 GiB of graphs and libraries, and a step's activations.

    Raises:
        ConfigError: none does.
    """
    tp = tensor_parallel_size
    weights = shape.num_weights * shape.num_bytes / tp
    widest = 4 * shape.hidden_size + 2 * shape.intermediate_size / tp
    activations = 2**30 + max_num_batched_tokens * widest * shape.num_bytes
    room = hardware.memory * utilization - weights - activations
    blocks = int(room / (kv_bytes_per_device(shape, tp) * block_size))
    if blocks < 1:
        why = (
            f"{weights / 1e9:.1f} GB of weights leave no room for a KV cache in "
            f"{hardware.memory / 1e9:.1f} GB; take larger devices or more (tensor_parallel_size)"
        )
        raise ConfigError("num_kv_blocks", blocks, why)
    return blocks
