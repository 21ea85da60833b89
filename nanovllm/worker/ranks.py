"""Ranks: the processes that share a model, as one of them sees them."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from nanovllm.core.plan import NewSequence
from nanovllm.kernels import Backend
from nanovllm.models.checkpoint import Cut
from nanovllm.models.config import ModelConfig
from nanovllm.models.sharding import DividedBackend, Division, connect
from nanovllm.worker.inputs import Array
from nanovllm.worker.sampler import Samples, sample

if TYPE_CHECKING:
    from nanovllm.worker.grammar import Grammars


class Ranks:
    """What the ranks exchange. All of them call the same, in the same order.

    Args:
        store: where they meet. rank: this one's number; 0 is the leader.
        timeout_s: for one exchange.

    Raises:
        RuntimeError: another rank is gone or too slow (also from each exchange).
    """

    def __init__(
        self, store: Store, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        timeout = timedelta(seconds=timeout_s)
        # A group of one's own: torch's default one is global, and a process may have two engines.
        self.group: Any
        if device.type == "cuda":
            torch.cuda.set_device(device)
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self.group = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.vocab_size = 0

    def divide(self, config: ModelConfig, backend: Backend) -> tuple[ModelConfig, Cut, Backend]:
        """The config of this rank's part, which part of each tensor it has, and a backend whose
        products exchange what they must."""
        self.division = Division(config, self.rank, self.size)
        self.vocab_size = config.vocab_size
        packer = DividedBackend(backend, self.rank, self)
        return self.division.local, self.division.cut, packer

    def connect(self, model: nn.Module) -> None:
        connect(model, self.division, self)

    def sum(self, x: Tensor) -> Tensor:
        self.group.allreduce([x]).wait()
        return x

    def gather(self, x_RV: Tensor) -> Tensor:
        share = -(-self.vocab_size // self.size)  # columns of all ranks but the last ones
        own = nn.functional.pad(x_RV, (0, share - x_RV.shape[1]))
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self.group.gather([parts] if parts else [], [own], options).wait()
        return torch.cat(parts, 1)[:, : self.vocab_size] if parts else x_RV

    def sample(
        self,
        logits_RV: Tensor,
        rows: list[tuple[NewSequence, Array]],
        grammars: "Grammars | None" = None,
    ) -> Samples:
        """See sampler.sample: the leader does, and the others get its tokens."""
        if self.rank:
            return Samples(self.share([-1] * len(rows)))
        samples = sample(logits_RV, rows, grammars)
        self.share(samples.token_ids)
        return samples

    def share(self, token_ids: list[int]) -> list[int]:
        """The leader's token ids; of the others only the number counts."""
        return self.broadcast(
            torch.tensor(token_ids, dtype=torch.int64, device=self.device)
        ).tolist()

    def broadcast(self, token_ids_R: Tensor) -> Tensor:
        """The leader's, over those of the others."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([token_ids_R], options).wait()
        return token_ids_R
