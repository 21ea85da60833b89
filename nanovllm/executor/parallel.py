"""The executor for several devices of one machine: tensor parallelism, a leader and followers.

      leader (rank 0)                               followers (ranks 1 ...)
        EngineCore ─▶ plan ─▶ ring ─────────────────▶ plan
                       │                               │
                     ModelRunner ◀── collectives ──▶ ModelRunner
                       │ samples, and shares the ids
                     result

The leader schedules, all ranks carry out the same plan. A watch hears at once of a follower that
has died or failed, and after a time of one that hangs: then all are killed, whoever waits for them
in a collective gets an error, and the engine is dead.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock, Thread

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from nanovllm.config import EngineConfig
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.errors import EngineDeadError, ModelLoadError
from nanovllm.executor.follower import Start, rank_device
from nanovllm.executor.ring import RingWriter, Shape, shared_memory
from nanovllm.models.config import ModelConfig
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.rank import Rank
from nanovllm.worker.ranks import Ranks

WATCH_S = 0.5  # between looks at a step's time
START_S = 600.0  # for all ranks to load their part
END_S = 5.0  # for followers to end by themselves

Died = Callable[[EngineDeadError], None]


class ParallelExecutor:
    """Loads a part of the model into each of several processes, this one included.

    Args:
        config: resolved for the model. path: where the checkpoint is.
        died: called in a thread of its own when the ranks are lost.

    Attributes:
        num_blocks: blocks in each rank's KV cache: as many as fit at the one with the least.
        device: the type of the ranks'.

    Raises:
        ConfigError: the model cannot be divided by so many.
        ModelLoadError: a follower could not load its part.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, path: Path, died: Died) -> None:
        self.died, self.closed = died, False
        self.dead: EngineDeadError | None = None
        self.timeout_s = float(config.distributed_timeout_seconds)
        self.step_began_s: float | None = None
        self.lock, self.encoder = Lock(), msgspec.msgpack.Encoder()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        size = config.tensor_parallel_size
        shape = Shape(size - 1)
        memory = shared_memory(shape.size)
        try:
            store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
            for number in range(1, size):
                start = Start(config, model, str(path), number, store.port, shape)
                self._start(memory, self.encoder.encode(start))
            self.ring = RingWriter(memory, shape, self.connections)
            os.close(memory)  # each has mapped it, or has a descriptor of its own
            device = rank_device(config, 0)
            self.device = device.type
            ranks = Ranks(store, 0, size, device, self.timeout_s)
            rank = Rank(config, model, path, ranks)
            self.num_blocks = min([rank.num_blocks, *map(int, self._answers())])
            for connection in self.connections:
                connection.send_bytes(b"%d" % self.num_blocks)
            self.runner: ModelRunner | None = rank.runner(self.num_blocks)
            self._answers()
        except BaseException:
            self._kill()
            raise
        Thread(target=self._watch, name="ranks", daemon=True).start()

    def execute(self, plan: StepPlan) -> StepResult:
        """
        Raises:
            EngineDeadError: a rank was lost, or failed; no step can follow.
        """
        return self.submit(plan)()

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step; see core.engine.AsyncExecutor. Raises what `execute` does."""
        if self.dead is not None or self.runner is None:
            raise self.dead or EngineDeadError("the engine is closed")
        self.step_began_s = time.monotonic()
        with self._together():
            self.ring.write(self.encoder.encode(plan), self._wait)
            return partial(self._result, self.runner.submit(plan))

    def _result(self, wait: Callable[[], StepResult]) -> StepResult:
        with self._together():
            result = wait()
        self.step_began_s = None
        return result

    @contextmanager
    def _together(self) -> Iterator[None]:
        """After an error in here the ranks are no longer at the same place."""
        try:
            yield
        except Exception as error:
            self._die(f"a step failed ({type(error).__name__}: {error})")
            assert self.dead is not None
            raise self.dead from error
        except BaseException:  # Ctrl-C: nobody waits for this step any more
            self.step_began_s = None
            raise

    def close(self) -> None:
        """End the followers and give up the model; closing twice does nothing."""
        self.closed, self.runner = True, None
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
        self._kill()

    def _start(self, memory: int, message: bytes) -> None:
        """One more follower."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "nanovllm.executor.follower"]
        command += [str(theirs.fileno()), str(memory)]
        self.processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno(), memory]))
        theirs.close()
        self.connections.append(Connection(ours.detach()))
        self.connections[-1].send_bytes(message)

    def _answers(self) -> list[bytes]:
        """What each follower says while it starts."""
        found = []
        for number, connection in enumerate(self.connections, 1):
            answer = b"!took too long"
            with suppress(OSError, EOFError):
                if connection.poll(START_S):
                    answer = connection.recv_bytes()
            if answer.startswith(b"!"):
                raise ModelLoadError(f"rank {number}: {answer[1:].decode()}")
            found.append(answer)
        return found

    def _wait(self, seconds: float) -> None:
        """For a place in the ring."""
        if self.dead is not None:
            raise self.dead
        time.sleep(seconds)

    def _watch(self) -> None:
        """In a thread: hear of followers that end, fail or hang."""
        while self.dead is None and not self.closed:
            with suppress(OSError, ValueError):  # closed meanwhile
                for ready in wait(self.connections, WATCH_S):
                    number = self.connections.index(ready) + 1  # type: ignore[arg-type]
                    self._die(f"rank {number} {self._last_words(number)}")
            began_s = self.step_began_s
            if began_s is not None and time.monotonic() - began_s > self.timeout_s:
                self._die(f"a step took more than {self.timeout_s:g} s")

    def _last_words(self, number: int) -> str:
        try:
            return "failed: " + self.connections[number - 1].recv_bytes().decode()[1:]
        except (OSError, EOFError):
            with suppress(subprocess.TimeoutExpired):
                self.processes[number - 1].wait(END_S)
            return f"died (status {self.processes[number - 1].returncode})"

    def _die(self, why: str) -> None:
        with self.lock:
            if self.dead is not None or self.closed:
                return
            self.dead = EngineDeadError(f"{why}; make a new engine")
        self._kill()
        self.died(self.dead)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
