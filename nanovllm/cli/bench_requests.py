"""How `nanovllm bench serve` sends requests and times the answers. It often shares the CPU with the
server it measures, so a chunk costs it a time stamp and a search for a few bytes."""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import aiohttp
from tqdm import tqdm

from nanovllm.cli.bench_metrics import Record
from nanovllm.client import server_message
from nanovllm.errors import RequestFailedError

TELLING = (b'"usage":{', b'"usage": {', b'"error":')  # what is read of a chunk after the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request that is ready to be sent.

    Attributes:
        arrival_s: after the start of the run.
        body: what is posted, as JSON. request_id: goes into a header.
        num_input: tokens of the prompt, until the server says how many it counts.
        min_output: with fewer tokens the answer has failed.
    """

    arrival_s: float
    body: bytes
    request_id: str
    num_input: int
    min_output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go, and how.

    Attributes:
        url: with the path. headers: of each request.
        max_concurrency: requests that run at once; None: all that have arrived.
        keep_events: keep the text of the answers.
    """

    url: str
    headers: Mapping[str, str]
    max_concurrency: int | None
    keep_events: bool


async def measure(
    target: Target,
    requests: Sequence[Request],
    *,
    ready: Request,
    ready_timeout_s: float,
    warmups: Sequence[Request],
    quiet: bool,
) -> tuple[list[Record], float]:
    """Send requests when they are due, and wait for all answers.

    Args:
        requests: by time of arrival.
        ready: sent until it succeeds, for so many seconds at most; for 0 it is not sent.
        warmups: sent next, all at once, and not recorded.
        quiet: show no progress.

    Returns:
        a record of each request, and the seconds from the first arrival to the last answer.

    Raises:
        RequestFailedError: the server never got ready, or a warm-up failed.
    """
    # idle connections are dropped before a server does so, as most do after 5 s
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    unlimited = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=unlimited) as session:

        async def ask(request: Request) -> Record:
            return await send(session, target, request)

        if ready_timeout_s:
            await wait_until_ready(ask, ready, ready_timeout_s)
        for record in (await run(ask, warmups, target.max_concurrency, True))[0]:
            if record.error:
                raise RequestFailedError(f"a warm-up failed: {record.error}")
        gc.collect()
        gc.freeze()
        return await run(ask, requests, target.max_concurrency, quiet)


Ask = Callable[[Request], Awaitable[Record]]


async def wait_until_ready(ask: Ask, request: Request, timeout_s: float) -> None:
    end_s = time.perf_counter() + timeout_s
    while error := (await ask(request)).error:
        left_s = end_s - time.perf_counter()
        if left_s <= 0:
            raise RequestFailedError(f"the server was not ready in {timeout_s:g} s: {error}")
        await asyncio.sleep(min(left_s, 0.25))


async def run(
    ask: Ask, requests: Sequence[Request], max_concurrency: int | None, quiet: bool
) -> tuple[list[Record], float]:
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    tasks = []
    with tqdm(total=len(requests), disable=quiet, file=sys.stderr) as bar:

        async def pass_gate(request: Request, arrival_s: float) -> Record:
            async with gate:
                record = await ask(request)
            record.arrival_s = arrival_s
            bar.update()
            return record

        start_s = time.perf_counter()
        for request in requests:
            early_s = start_s + request.arrival_s - time.perf_counter()
            if early_s > 0:
                await asyncio.sleep(early_s)
            tasks.append(asyncio.create_task(pass_gate(request, time.perf_counter())))
        records = await asyncio.gather(*tasks)
        return records, time.perf_counter() - start_s


async def send(session: aiohttp.ClientSession, target: Target, request: Request) -> Record:
    """Send one request. Whatever goes wrong ends up in its record."""
    headers = {**target.headers, "x-request-id": request.request_id}
    record = Record(num_input=request.num_input, start_s=time.perf_counter())
    try:
        async with session.post(target.url, data=request.body, headers=headers) as response:
            if response.status != 200:
                why = server_message(await response.read()) or response.reason
                raise RequestFailedError(f"HTTP {response.status}: {why}")
            await listen(response.content, record, target.keep_events)
        if record.num_output < request.min_output:
            asked = f"{request.min_output} were asked for"
            raise RequestFailedError(f"only {record.num_output} tokens came; {asked}")
    except (aiohttp.ClientError, OSError, ValueError, AttributeError, RequestFailedError) as error:
        record.error = str(error) or type(error).__name__
    return record


async def listen(content: aiohttp.StreamReader, record: Record, keep_events: bool) -> None:
    """Read an answer to its end. Where the server reports no usage, a chunk counts as a token.

    Raises:
        RequestFailedError: it has an error in it, or no tokens, or no end.
    """
    rest, ended = b"", False
    async for (
        data
    ) in content.iter_any():  # also what comes after the end, or the connection is lost
        now_s = time.perf_counter()
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            event = event.removeprefix(b"data:").strip()
            if event == b"[DONE]":
                ended = True
            elif event and not event.startswith(b":") and advances(event, record):
                record.times_s.append(now_s)
                if keep_events:
                    record.events.append(event)
    if not ended:
        raise RequestFailedError("the answer broke off")
    if not record.times_s:
        raise RequestFailedError("the answer has no tokens")
    record.num_output = record.num_output or len(record.times_s)


def advances(event: bytes, record: Record) -> bool:
    """Whether a chunk is part of the answer; a summary of usage is not, and goes into the record.

    Raises:
        RequestFailedError: the chunk is an error.
    """
    if record.times_s and not any(mark in event for mark in TELLING):
        return True
    chunk = json.loads(event)
    if chunk.get("error"):
        raise RequestFailedError(server_message(event))
    if usage := chunk.get("usage"):
        record.num_input = usage.get("prompt_tokens", record.num_input)
        record.num_output = usage.get("completion_tokens", record.num_output)
    return bool(chunk.get("choices"))
