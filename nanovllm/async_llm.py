"""AsyncLLM: the engine in a thread of its own, for use from asyncio.

event loop                                    engine thread
  prepare (tokenizer, forms)
  generate ──▶ commands: submit, abort ──────▶ between two steps
                                               step
  Stream   ◀── one call a step and loop ────── outputs of what advanced
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, ParamSpec, Protocol, Self, TypeVar

from nanovllm.config import DEFAULT_MODEL, EngineConfig
from nanovllm.core.sequence import Sequence
from nanovllm.errors import (
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
)
from nanovllm.llm import build
from nanovllm.models.checkpoint import locate
from nanovllm.outputs import RequestOutput, merged
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.text_engine import Prompt, Request, TextEngine

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Hears what the engine does, in the engine's thread."""

    def stepped(self, sequences: list[Sequence]) -> None:
        """After each step: the sequences that got a token or ended in it."""

    def aborted(self, sequences: list[Sequence]) -> None:
        """Sequences ended between steps, by an abort or, as finish_reason says, an error."""


class Stream:
    """The outputs of one request, on their way to who reads them.

    One output waits at most: what comes before it is read is merged into it. So a slow reader
    costs no more memory than the whole output, and never slows the engine.
    """

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request, self.loop = request, loop
        self.kind = request.params.output_kind
        self.shown = dict.fromkeys(range(request.params.n), (0, 0))  # of samples that go on
        self.pending: RequestOutput | Exception | None = None
        self.news = asyncio.Event()

    def next_output(self, engine: TextEngine) -> RequestOutput | None:
        """In the engine's thread: what there is to show after a step; None: nothing yet."""
        if self.kind is not RequestOutputKind.DELTA:
            wanted = self.request.finished or self.kind is RequestOutputKind.CUMULATIVE
            return engine.output(self.request, partial=True) if wanted else None
        output = engine.output(self.request, partial=True, since=self.shown)
        for new in output.outputs:
            num_chars, num_tokens = self.shown.pop(new.index)
            if new.finish_reason is None:
                self.shown[new.index] = num_chars + len(new.text), num_tokens + len(new.token_ids)
        return output

    def put(self, output: RequestOutput | Exception) -> None:
        """In the event loop: take what is new."""
        before = self.pending
        if self.kind is RequestOutputKind.DELTA and isinstance(before, RequestOutput):
            output = merged(before, output) if isinstance(output, RequestOutput) else output
        self.pending = output
        self.news.set()

    async def get(self) -> RequestOutput:
        """What is new since the last call, as soon as there is something.

        Raises:
            EngineDeadError: nothing will ever be.
            RequestFailedError: something raised on the request's account.
        """
        await self.news.wait()
        self.news.clear()
        output, self.pending = self.pending, None
        assert output is not None
        if isinstance(output, Exception):
            raise output
        return output


class AsyncLLM:
    """An engine that steps in a thread of its own while requests come and go.

        llm = AsyncLLM("smollm2-135m")
        async for output in llm.generate("The capital of France is", SamplingParams()):
            print(output.outputs[0].text)

    Args:
        model, settings: see EngineConfig.
        max_num_queued_reqs: sequences that may wait; a request that comes then is refused.
        observe: makes an observer of the engine, once it is there.

    Raises:
        ConfigError, ModelLoadError, MissingDependencyError: see llm.build.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        max_num_queued_reqs: int = 2048,
        observe: Callable[[TextEngine], Observer] | None = None,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig.make(model=str(model), **settings)
        self.max_num_queued_reqs = max_num_queued_reqs
        self.dead: EngineDeadError | None = None
        self.ended: Future[EngineDeadError] = Future()  # done when the engine is closed or gone
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[Request, Stream] = {}  # of the engine's thread
        self._ids: dict[str, Request] = {}  # of the event loop
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._compiling = ThreadPoolExecutor(2, "grammar")
        started: Future[tuple[TextEngine, Observer | None]] = Future()
        # The thread that loads the model also steps it: a team of CPU threads belongs to the
        # thread that made it.
        self._thread = Thread(target=self._run, args=(started, observe), name="engine", daemon=True)
        self._thread.start()
        self.engine, self.observer = started.result()
        self._vocabulary = self._compiling.submit(self._load_vocabulary)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str = "",
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Complete a prompt, and show how far it is; see SamplingParams.output_kind. Ending the
        iteration early aborts the request.

        Args:
            prompt: see LLM.generate.
            request_id: names it for `abort`; no two that run may share one.
            priority: lower goes first under the priority policy.

        Raises:
            InvalidRequestError: the prompt or a parameter is impossible.
            QueueFullError: too many requests wait.
            EngineDeadError: the engine is closed or gone.
        """
        request = await self.prepare(prompt, sampling_params, priority)
        async with aclosing(self.run(request, request_id)) as outputs:
            async for output in outputs:
                yield output

    async def prepare(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> Request:
        """Check and tokenize a request, for `run`; see TextEngine.prepare. One whose output must
        have a form, which may take seconds to check, holds up no others."""
        params = sampling_params or SamplingParams()
        if getattr(params, "structured_outputs", None) is None:
            return await self.in_background(self.engine.prepare, prompt, params, priority)
        call = partial(self._prepare_form, prompt, params, priority)
        self.check_health()
        return await asyncio.get_running_loop().run_in_executor(self._compiling, call)

    def _prepare_form(self, prompt: Prompt, params: SamplingParams, priority: int) -> Request:
        self._vocabulary.result()
        return self.engine.prepare(prompt, params, priority)

    def _load_vocabulary(self) -> None:
        """Load what forms need in this process. Nothing else runs meanwhile, so the first request
        with a form is too late for it."""
        if self.engine.tokenizer is not None:
            with suppress(Exception):  # a form that comes will find out
                from nanovllm.worker.grammar import vocabulary_at

                path = locate(self.config.tokenizer or self.config.model)
                vocabulary_at(path, self.engine.vocab_size)

    async def in_background(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the tokenizer's thread, so that a long text stops nobody."""
        self.check_health()
        loop, call = asyncio.get_running_loop(), partial(function, *args, **kwargs)
        return await loop.run_in_executor(self._tokenizing, call)

    async def run(self, request: Request, request_id: str = "") -> AsyncGenerator[RequestOutput]:
        """Queue a prepared request and show how far it is; see `generate`."""
        self.check_health()
        if request_id in self._ids:
            raise InvalidRequestError("request_id", request_id, "is running already; take another")
        if self.num_queued + request.params.n > self.max_num_queued_reqs:
            why = f"{self.num_queued} of at most {self.max_num_queued_reqs} requests wait already"
            raise QueueFullError(f"{why}: try again later")
        stream = Stream(request, asyncio.get_running_loop())
        if request_id:
            self._ids[request_id] = request
        finished = False
        try:
            self._commands.put(partial(self._submit, stream, request_id))
            self.check_health()  # again: an engine that died before this answers no command
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            self._ids.pop(request_id, None)
            if not finished:
                self._commands.put(partial(self._abort, request))

    def abort(self, request_id: str) -> None:
        """End the request of that name before the next step; its reader gets a last output with
        finish_reason "abort". A request that has ended stays as it is."""
        if request_id in self._ids:
            self._commands.put(partial(self._abort, self._ids[request_id]))

    @property
    def num_queued(self) -> int:
        """Sequences that wait, at this moment."""
        return len(self.engine.core.scheduler.waiting) + self._commands.qsize()

    def check_health(self) -> None:
        """
        Raises:
            EngineDeadError: the engine is closed or gone.
        """
        if self.dead is not None:
            raise self.dead.with_traceback(None)  # else it keeps the frames of every raise

    def get_metrics(self) -> dict[str, float]:
        """Counters and gauges of the engine under vLLM's names."""
        return self.engine.core.get_metrics()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next step."""
        self._commands.put(self.engine.core.scheduler.blocks.reset_prefix_cache)

    def close(self) -> None:
        """End what still runs and give up the model; closing twice does nothing."""
        self._commands.put(None)
        self._thread.join()
        self._tokenizing.shutdown()
        self._compiling.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the engine's thread

    def _run(
        self,
        started: "Future[tuple[TextEngine, Observer | None]]",
        observe: Callable[[TextEngine], Observer] | None,
    ) -> None:
        try:
            self.engine = build(self.config, self._hear_of_death)
            self.observer = observe(self.engine) if observe else None
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result((self.engine, self.observer))
        why = "the engine is closed; make a new one"
        try:
            while self._obey():
                advanced = self.engine.step()
                if self.observer:
                    self.observer.stepped([seq for _, seq in advanced])
                self._publish([request for request, _ in advanced])
        except BaseException as error:
            logger.exception("the engine died")
            why = f"the engine died: {type(error).__name__}: {error}"
        self.dead = EngineDeadError(why)
        self._tell_all(self.dead)
        self.engine.core.executor.close()
        self.ended.set_result(self.dead)

    def _hear_of_death(self, error: EngineDeadError) -> None:
        """Let the engine's thread learn of it even if it has nothing to do."""

        def die() -> None:
            raise error

        self._commands.put(die)

    def _obey(self) -> bool:
        """Carry out what the event loop asks for; wait for it if there is nothing else to do.
        False if that is to end."""
        while not (self._commands.empty() and self.engine.core.has_unfinished):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _tell_all(self, error: EngineDeadError) -> None:
        """Tell those who wait for an output that there will be none."""
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, partial) and command.func == self._submit:
                self._streams[command.args[0].request] = command.args[0]
        for stream in list(self._streams.values()):
            self._send([(stream, error)], stream.loop)

    def _submit(self, stream: Stream, request_id: str) -> None:
        self._streams[stream.request] = stream
        try:
            self.engine.submit(stream.request, request_id)
        except Exception as error:
            self._fail(stream, error)

    def _fail(self, stream: Stream, error: Exception) -> None:
        """End a request on whose account something raised; the others go on."""
        logger.error("a request failed", exc_info=error)
        why = f"{type(error).__name__}: {error}"
        self._streams.pop(stream.request, None)
        self._end(stream.request, "error", why)
        self._send([(stream, RequestFailedError(f"the request failed: {why}"))], stream.loop)

    def _abort(self, request: Request) -> None:
        self._end(request)
        self._publish([request])

    def _end(self, request: Request, reason: str = "abort", why: str | None = None) -> None:
        running = [seq for seq in request.sequences if seq.finish_reason is None]
        self.engine.core.finish(running, reason, why)
        self.engine.abort(request)  # forgets it
        if self.observer and running:
            self.observer.aborted(running)

    def _publish(self, requests: list[Request]) -> None:
        """Send what is new of requests to their readers, in one call for each event loop."""
        news = defaultdict[
            asyncio.AbstractEventLoop, list[tuple[Stream, RequestOutput | Exception]]
        ](list)
        for request in dict.fromkeys(requests):
            stream = self._streams.get(request)
            if stream is None:
                continue
            try:
                output = stream.next_output(self.engine)
            except Exception as error:
                self._fail(stream, error)
                continue
            if output is not None:
                news[stream.loop].append((stream, output))
            if request.finished:
                del self._streams[request]
        for loop, outputs in news.items():
            self._send(outputs, loop)

    def _send(
        self,
        outputs: Items[tuple[Stream, RequestOutput | Exception]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        try:
            loop.call_soon_threadsafe(put_all, outputs)
        except RuntimeError:  # the loop is closed, and all its readers with it
            for stream, _ in outputs:
                self._streams.pop(stream.request, None)
                self._end(stream.request)


def put_all(outputs: Items[tuple[Stream, RequestOutput | Exception]]) -> None:
    for stream, output in outputs:
        stream.put(output)
