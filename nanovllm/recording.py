"""Recordings: what an engine was asked, decided and took, as JSON lines; written and read.

A Recorder reads the event log and stands before the executor; the core knows nothing of it. No text
and no token is written: of a prompt there are the chain hashes of its full blocks, under a key that
is thrown away, which tell what it shares with others and nothing else.
"""

import logging
import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import blake2b
from threading import Lock
from typing import Any

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.core.engine import EngineCore
from nanovllm.core.events import Event, Kind
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.core.sequence import Sequence, Terms
from nanovllm.errors import ConfigError

FORMAT = 1
PIECE = 1 << 16  # bytes that are gathered before they are written
FLUSH_S = 1.0  # but none waits longer, as long as there are new ones
LAST = 256  # bytes kept free for the last line

logger = logging.getLogger(__name__)


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """A line of a recording. Times are seconds on the engine's clock, which has no date."""


class Header(Line, tag="header", frozen=True, kw_only=True):
    """The first line.

    Attributes:
        policy: as `make_policy` takes it. max_num_tokens: the longest a sequence can get.
        config: of the engine, if it had one. versions: of what was loaded.
    """

    format: int
    time_s: float
    model: str
    policy: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_tokens: int
    enable_chunked_prefill: bool
    enable_prefix_caching: bool
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}


class Arrival(Line, tag="arrival", frozen=True, kw_only=True):
    """A sequence came into the queue.

    Attributes:
        time_s: when. arrival_s: when its caller says it came. step: the last one before.
        salt: a hash of its cache_salt. own_prompt: it takes nothing from the prefix cache.
        blocks: a chain hash for each full block of the prompt.
        terms: those that are not the usual ones.
    """

    time_s: float
    step: int
    seq_id: int
    request_id: str
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    salt: str = ""
    own_prompt: bool = False
    blocks: list[str] = []
    terms: Terms | None = None


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """A decision that the scheduler made for a step: core.events.Event as a list."""

    time_s: float
    step: int
    kind: Kind
    seq_id: int
    reason: str
    data: dict[str, int]


class Step(Line, tag="step", frozen=True, kw_only=True):
    """A plan and how long it took.

    Attributes:
        start_s, end_s: around Executor.execute.
        seq_ids: the rows. In the file it is left out if it is that of the step before.
        tokens: by sequence, how many it computed; 1 where it is not named.
        partial: rows that got no token. failed: rows whose sampling failed.
        choices: what was decided since the step before.
        running, waiting, blocks: how many there are, and are held, during the step.
        error: the exception that ended the step.
    """

    step: int
    start_s: float
    end_s: float
    running: int
    waiting: int
    blocks: int
    seq_ids: list[int] | None = None
    tokens: dict[int, int] = {}
    partial: list[int] = []
    failed: list[int] = []
    choices: list[Choice] = []
    error: str = ""

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Finish(Line, tag="finish", frozen=True, kw_only=True):
    """A sequence ended.

    Attributes:
        reason: "stop", "length", "abort" or "error".
        outside: not by what the step sampled: a client left, a stop string was found.
        blocks: the chain hashes that follow those of its Arrival.
    """

    time_s: float
    step: int
    seq_id: int
    reason: str
    output_tokens: int
    outside: bool = False
    blocks: list[str] = []


class Rejected(Line, tag="rejected", frozen=True, kw_only=True):
    """A request was refused."""

    time_s: float
    step: int
    reason: str


class Reset(Line, tag="reset", frozen=True, kw_only=True):
    """Somebody had the prefix cache forget all it held."""

    time_s: float
    step: int


class End(Line, tag="end", frozen=True, kw_only=True):
    """The last line, if the engine lived to write it: why there are no more."""

    time_s: float
    reason: str


Record = Header | Arrival | Step | Finish | Rejected | Reset | End


class Recorder:
    """Records an engine from now on, until its executor is closed or `max_bytes` are written.

    An error of the disk ends the recording with a warning, and never the engine. Lines are written
    in pieces of 64 KiB or each second, whichever is first.

    Args:
        core: its executor, its event log's sink and what resets its prefix cache become this, which
            passes all on; it should have no requests yet.
        path: the file; what it held is lost.
        config: goes into the header. max_bytes: the file's largest size.
        key: of the hashes; only recordings with the same key compare.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(
        self,
        core: EngineCore,
        path: str,
        config: EngineConfig | None = None,
        max_bytes: int = 1 << 30,
        key: bytes | None = None,
    ) -> None:
        self.scheduler, self.events, self.clock = core.scheduler, core.events, core.events.clock
        self.executor, self.sink = core.executor, core.events.sink
        self.path, self.max_bytes, self.key = path, max_bytes, key or os.urandom(16)
        self.pieces: list[bytes] = []
        self.num_gathered = self.num_bytes = 0
        self.lock = Lock()  # requests may be refused in another thread
        self.encode = msgspec.json.Encoder().encode
        self.live: dict[int, tuple[Sequence, list[bytes]]] = {}
        self.choices: list[Choice] = []
        self.seq_ids: list[int] = []
        self.failed: set[int] = set()
        try:
            self.file = open(path, "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            why = f"cannot be written: {error.strerror}"
            raise ConfigError("record", path, why) from error
        self.open, self.flushed_s = True, self.clock()
        self._write(make_header(core, config))
        core.executor, core.events.sink = self, self.event
        blocks = core.scheduler.blocks
        self.reset, blocks.reset_prefix_cache = blocks.reset_prefix_cache, self.reset_prefix_cache  # type: ignore[method-assign]

    def execute(self, plan: StepPlan) -> StepResult:
        start_s = self.clock()
        try:
            result = self.executor.execute(plan)
        except BaseException as error:
            self.failed = set(plan.seq_ids)
            if self.open:
                why = writable(f"{type(error).__name__}: {error}")
                self._write(self._step(plan, start_s, None, why))
            raise
        if self.open:
            self.failed = set(result.errors)
            self._write(self._step(plan, start_s, result, ""))
        else:  # here, as this is the engine's thread
            self.live.clear()
            self.choices.clear()
        return result

    def close(self) -> None:
        """Write what is left; close the executor."""
        with self.lock:
            if self.open:
                self._end("the engine was closed")
        self.executor.close()

    def reset_prefix_cache(self) -> None:
        """What takes the place of the BlockManager's."""
        if self.open:
            self._write(Reset(time_s=self.clock(), step=self.events.step))
        self.reset()

    def event(self, event: Event) -> None:
        """The event log's sink."""
        if self.sink is not None:
            self.sink(event)
        if not self.open:
            return
        if event.kind is Kind.ADDED:
            self._write(self._arrival(event))
        elif event.kind in (Kind.FINISHED, Kind.ABORTED):
            if event.seq_id in self.live:  # else it came before the recording
                self._write(self._finish(event))
        elif event.kind is Kind.REJECTED:
            line = Rejected(time_s=event.time_s, step=event.step, reason=event.reason)
            self._write(line)
        else:
            self.choices.append(Choice(*event))

    # The lines

    def _arrival(self, event: Event) -> Arrival:
        waiting = reversed(self.scheduler.waiting)
        seq = next(seq for _, seq in waiting if seq.seq_id == event.seq_id)
        salt = self._hash(b"", seq.cache_salt.encode(errors="surrogatepass"))
        self.live[seq.seq_id] = seq, [salt]
        terms = replace(seq.terms, tenant=writable(seq.terms.tenant))
        return Arrival(
            time_s=event.time_s,
            step=event.step,
            seq_id=seq.seq_id,
            request_id=writable(seq.request_id),
            arrival_s=seq.arrival_s,
            prompt_tokens=seq.num_prompt_tokens,
            max_tokens=seq.max_num_tokens - seq.num_prompt_tokens,
            priority=max(-(2**63), min(seq.priority, 2**63 - 1)),
            salt=salt.hex() if seq.cache_salt else "",
            own_prompt=seq.params.prompt_logprobs is not None,
            blocks=self._new_blocks(seq.seq_id),
            terms=terms if seq.terms != Terms() else None,
        )

    def _finish(self, event: Event) -> Finish:
        seq, blocks = self.live[event.seq_id][0], self._new_blocks(event.seq_id)
        del self.live[event.seq_id]
        sampled = event.reason == "length" or isinstance(seq.stop_reason, int)
        return Finish(
            time_s=event.time_s,
            step=event.step,
            seq_id=seq.seq_id,
            reason=event.reason,
            output_tokens=seq.num_tokens - seq.num_prompt_tokens,
            outside=not sampled and (event.reason != "error" or seq.seq_id not in self.failed),
            blocks=blocks,
        )

    def _step(self, plan: StepPlan, start_s: float, result: StepResult | None, error: str) -> Step:
        seq_ids, counts, scheduler = plan.seq_ids, plan.num_scheduled_tokens, self.scheduler
        changed, self.seq_ids = seq_ids != self.seq_ids, seq_ids
        choices, self.choices = self.choices, []
        tokens, partial = {}, [] if result else seq_ids
        if counts.count(1) < len(counts):
            tokens = {i: n for i, n in zip(seq_ids, counts, strict=True) if n != 1}
        if result and -1 in result.token_ids:
            partial = [i for i, t in zip(seq_ids, result.token_ids, strict=True) if t < 0]
        return Step(
            step=plan.step,
            start_s=start_s,
            end_s=self.clock(),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks=scheduler.blocks.num_blocks - scheduler.blocks.num_available,
            seq_ids=seq_ids if changed else None,
            tokens=tokens,
            partial=partial,
            failed=sorted(result.errors) if result else [],
            choices=choices,
            error=error,
        )

    def _new_blocks(self, seq_id: int) -> list[str]:
        """The hashes of full blocks of a sequence that have not been written."""
        (seq, chain), size = self.live[seq_id], self.scheduler.blocks.block_size
        start = len(chain) - 1  # the first is that of the salt
        for i in range(start, seq.num_tokens // size):
            tokens = array("q", seq.token_ids[i * size : (i + 1) * size])
            chain.append(self._hash(chain[-1], tokens.tobytes()))
        return [block.hex() for block in chain[start + 1 :]]

    def _hash(self, parent: bytes, content: bytes) -> bytes:
        return blake2b(parent + content, key=self.key, digest_size=8).digest()

    # The file

    def _write(self, line: Line) -> None:
        data = self.encode(line)
        with self.lock:
            if not self.open:
                return
            if self.num_bytes + len(data) + 1 + LAST > self.max_bytes:
                self._end(f"it reached record_max_bytes={self.max_bytes}")
                return
            self._gather(data)
            if self.num_gathered >= PIECE or self.clock() - self.flushed_s >= FLUSH_S:
                self._flush()

    def _gather(self, data: bytes) -> None:
        self.pieces += (data, b"\n")
        self.num_gathered += len(data) + 1
        self.num_bytes += len(data) + 1

    def _end(self, reason: str) -> None:
        self._gather(self.encode(End(time_s=self.clock(), reason=reason)))
        self._flush()
        if self.open:
            self._stop()

    def _flush(self) -> None:
        data = memoryview(b"".join(self.pieces))
        self.pieces, self.num_gathered, self.flushed_s = [], 0, self.clock()
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            logger.warning("%s: the recording ends here: %s", self.path, error)
            self._stop()

    def _stop(self) -> None:
        self.open = False
        try:
            self.file.close()
        except OSError as error:
            logger.warning("%s: the recording may lack its end: %s", self.path, error)


def writable(text: str) -> str:
    """A text that UTF-8 can hold: half a surrogate pair, which a client may send, cannot be."""
    return text.encode(errors="replace").decode()


def make_header(core: EngineCore, config: EngineConfig | None) -> Header:
    scheduler, kind = core.scheduler, type(core.scheduler.policy)
    blocks, names = scheduler.blocks, ("nanovllm", "torch", "numpy")
    loaded = {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}
    return Header(
        format=FORMAT,
        time_s=core.events.clock(),
        model=config.model if config else "",
        policy=config.scheduling_policy if config else f"{kind.__module__}:{kind.__qualname__}",
        num_blocks=blocks.num_blocks,
        block_size=blocks.block_size,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_tokens=core.max_num_tokens,
        enable_chunked_prefill=scheduler.enable_chunked_prefill,
        enable_prefix_caching=blocks.enable_prefix_caching,
        config=asdict(config) if config else {},
        versions={"python": sys.version.split()[0], **loaded},
    )


def read_recording(path: str) -> Iterator[Record]:
    """The lines of a recording, the Header first. A last line that was cut off is left out.

    Raises:
        ConfigError: the file cannot be read, or a line is damaged; the line's number is named.
    """
    decode = msgspec.json.Decoder(Record).decode
    seq_ids: list[int] = []
    number = 0
    try:
        with open(path, "rb") as file:
            for number, data in enumerate(file, 1):
                try:
                    line = decode(data)
                except (msgspec.MsgspecError, UnicodeError) as error:
                    if number > 1 and not data.endswith(b"\n"):
                        return
                    raise ConfigError("recording", path, f"line {number}: {error}") from error
                check_place(path, number, line)
                if isinstance(line, Step):
                    seq_ids = seq_ids if line.seq_ids is None else line.seq_ids
                    line = msgspec.structs.replace(line, seq_ids=seq_ids)
                yield line
    except OSError as error:
        raise ConfigError("recording", path, f"cannot be read: {error.strerror}") from error
    if not number:
        raise ConfigError("recording", path, "is empty; name a file that --record wrote")


def check_place(path: str, number: int, line: Record) -> None:
    """Hold the first line, and no other, to be a header of this format."""
    if isinstance(line, Header) != (number == 1):
        where = "is no header" if number == 1 else f"line {number}: a second header"
        raise ConfigError("recording", path, f"{where}; name a file that --record wrote")
    if isinstance(line, Header) and line.format != FORMAT:
        why = f"is of format {line.format}; this version reads {FORMAT}"
        raise ConfigError("recording", path, why)
