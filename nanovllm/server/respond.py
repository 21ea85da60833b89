"""From prepared requests to an HTTP response, whole or as server-sent events. A client that leaves
takes its requests with it."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from collections.abc import Sequence as Items
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.async_llm import AsyncLLM
from nanovllm.errors import NanoVLLMError, RequestFailedError
from nanovllm.outputs import RequestOutput
from nanovllm.server.replicas.front import Replicas
from nanovllm.server.replies import error_reply
from nanovllm.text_engine import Request

Json = dict[str, Any]
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class Form(Protocol):
    """How the outputs of an endpoint look. Choices are numbered over all its requests."""

    kind: str  # the "object" of a whole response
    chunk_kind: str  # and of an event

    def chunks(self, choice: int, output: RequestOutput) -> list[Json]:
        """The choices of the events that a piece of output makes; `choice` is the number of its
        request's first."""

    def choices(self, choice: int, output: RequestOutput) -> list[Json]:
        """The choices of a whole response."""


@dataclass(slots=True)
class Usage:
    """Tokens of a response, counted as they come."""

    num_prompt_tokens: int
    num_output_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # by request

    def add(self, index: int, output: RequestOutput) -> None:
        self.num_output_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        self.cached[index] = output.num_cached_tokens

    def show(self) -> Json:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that answer one HTTP request.

    Attributes:
        model: the name that the client sees. response_id: "cmpl-..." or "chatcmpl-...".
    """

    llm: AsyncLLM | Replicas
    requests: Items[Request]
    form: Form
    model: str
    response_id: str

    async def whole(self) -> Json:
        """The response, when all is done."""
        usage, choices = self.usage(), []
        finals: dict[int, RequestOutput] = {}
        async with aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                finals[index] = output
                usage.add(index, output)
        for index, request in enumerate(self.requests):
            choices += self.form.choices(index * request.params.n, finals[index])
        return {**self.head(self.form.kind), "choices": choices, "usage": usage.show()}

    async def events(self, options: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """The response as events, several in one piece where they come together.

        Args:
            options: stream_options.
        """
        head, usage = self.head(self.form.chunk_kind), self.usage()
        always = options.get("continuous_usage_stats")
        async with aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                usage.add(index, output)
                first = index * self.requests[index].params.n
                chunks = [{**head, "choices": [c]} for c in self.form.chunks(first, output)]
                if always:
                    chunks = [{**chunk, "usage": usage.show()} for chunk in chunks]
                if chunks:
                    yield b"".join(map(event, chunks))
        if options.get("include_usage"):
            yield event({**head, "choices": [], "usage": usage.show()})
        yield DONE

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Outputs of all requests as they come, with the request's index.

        Raises:
            RequestFailedError: one ended with an error; the others are aborted.
        """
        runs = [self.llm.run(r, f"{self.response_id}-{i}") for i, r in enumerate(self.requests)]
        async with aclosing(merge(runs)) as outputs:
            async for index, output in outputs:
                for sample in output.outputs:
                    if sample.finish_reason == "error":
                        raise RequestFailedError(f"the request failed: {sample.stop_reason}")
                yield index, output

    def usage(self) -> Usage:
        return Usage(sum(len(request.prompt_token_ids) for request in self.requests))

    def head(self, kind: str) -> Json:
        created = int(time.time())
        return {"id": self.response_id, "object": kind, "created": created, "model": self.model}


async def respond(
    job: Job,
    receive: Receive,
    *,
    stream: bool,
    options: Mapping[str, Any],
    write_timeout_s: float,
) -> Response:
    """Run a job. A stream begins when there is something to show, so that what fails before has
    a status of its own.

    Args:
        options: stream_options. write_timeout_s: a client that takes nothing for so long has left.

    Raises:
        NanoVLLMError: it failed before anything was shown.
    """
    async with leaving_cancels(receive) as gone:
        if not stream:
            return JsonResponse(await job.whole())
        events = job.events(options)
        return EventStream(await anext(events), events, write_timeout_s)
    assert gone.done()
    return Response(status_code=499)  # nobody reads it


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        try:
            return msgspec.json.encode(content)
        except UnicodeEncodeError:  # an error names half a surrogate pair, which json escapes
            return json.dumps(content).encode()


class EventStream(Response):
    """Server-sent events, the first of which is there already."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes], write_timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.first, self.events, self.write_timeout_s = first, events, write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            async with asyncio.timeout(self.write_timeout_s):
                await send(message)

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self.events), leaving_cancels(receive):
            await send(start)
            await write(self.first)
            try:
                async for data in self.events:
                    await write(data)
            except NanoVLLMError as error:
                await write(event(error_reply(error)[1]) + DONE)
            await write(b"", more=False)


@asynccontextmanager
async def leaving_cancels(receive: Receive) -> AsyncIterator["asyncio.Task[None]"]:
    """Inside, the client's leaving cancels what is done, and the block ends early."""

    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.create_task(cancel_on_disconnect(receive, task))
    try:
        yield watch
    except asyncio.CancelledError:
        if not watch.done():
            raise
        task.uncancel()
    finally:
        watch.cancel()


async def cancel_on_disconnect(receive: Receive, task: "asyncio.Task[Any]") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


async def merge(sources: Items[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """What all sources yield, as it comes, with the source's index."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield 0, item
        return
    waiting = {asyncio.ensure_future(anext(source)): i for i, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                item = task.result()
                waiting[asyncio.ensure_future(anext(sources[index]))] = index
                yield index, item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


def event(data: Json) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"
