"""A follower: the process of a rank other than 0. ParallelExecutor starts it with a connection, and
it does what the leader's ring says until that ends.

    python -m nanovllm.executor.follower CONNECTION MEMORY
"""

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from nanovllm.config import EngineConfig
from nanovllm.core.plan import StepPlan
from nanovllm.executor.ring import RingReader, Shape
from nanovllm.models.config import ModelConfig
from nanovllm.worker.rank import Rank, pick_device
from nanovllm.worker.ranks import Ranks


class Start(msgspec.Struct):
    """What a follower is told first. port: where the ranks meet, on this machine."""

    config: EngineConfig
    model: ModelConfig
    path: str
    rank: int
    port: int
    ring: Shape


def follow(connection: Connection, memory: int) -> None:
    """Load this rank's part, say how many blocks fit, hear how many there are, then follow."""
    start = msgspec.msgpack.decode(connection.recv_bytes(), type=Start)
    config, size = start.config, start.config.tensor_parallel_size
    ring = RingReader(memory, start.ring, start.rank - 1, connection)
    device = rank_device(config, start.rank)
    store = TCPStore("127.0.0.1", start.port, is_master=False)
    ranks = Ranks(store, start.rank, size, device, config.distributed_timeout_seconds)
    rank = Rank(config, start.model, Path(start.path), ranks)
    connection.send_bytes(b"%d" % rank.num_blocks)
    runner = rank.runner(int(connection.recv_bytes()))
    connection.send_bytes(b"ready")
    decoder = msgspec.msgpack.Decoder(StepPlan)
    wait = None
    while True:
        following = runner.submit(decoder.decode(ring.read()))
        if wait is not None:
            wait()  # only now, as the leader may be a step ahead
        wait = following


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """Rank i has GPU i; on a CPU all share the cores."""
    device = pick_device(config.device)
    return torch.device("cuda", rank) if device.type == "cuda" else device


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the leader
    connection = Connection(int(sys.argv[1]))
    try:
        follow(connection, int(sys.argv[2]))
    except EOFError:  # the leader is done, or gone
        return 0
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        try:
            connection.send_bytes(f"!{text}".encode())
        except OSError:
            return 0  # it failed since the leader is gone
        print(f"nanovllm rank: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads of libraries
