"""1,000 streams at once: each gets its own answer, whole and once, and nothing stays behind."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from nanovllm.server.run import raise_file_limit
from tests.server.process import num_files, rss_bytes
from tests.server.servers import Served
from tests.server.wire import DONE, Connection

NUM_STREAMS = 1000
NUM_TOKENS = (2, 2, 2, 3, 6)  # by turns
LIMIT_S = 120.0  # for a wave
ROOM_BYTES = 64 * 2**20  # what allocators still take in a second wave; a third takes nothing


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    raise_file_limit()  # the streams are descriptors of this process too
    log = tmp_path_factory.mktemp("load") / "log"
    with Served("smollm2-135m", "--dtype=float32", "--max-model-len=64", log=log) as server:
        yield server


@dataclass
class Stream:
    """What one stream brought."""

    ids: set[str] = field(default_factory=set)
    prompts: list[list[int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    usage: list[dict[str, Any]] = field(default_factory=list)
    num_done: int = 0

    def take(self, event: str) -> None:
        assert self.num_done == 0
        if event == DONE:
            self.num_done += 1
            return
        data = json.loads(event)
        self.ids.add(data["id"])
        self.usage += [data["usage"]] if data.get("usage") else []
        for choice in data["choices"]:
            assert choice["index"] == 0 and not self.ends
            self.token_ids += choice["token_ids"]
            self.prompts += [choice["prompt_token_ids"]] if choice["prompt_token_ids"] else []
            self.ends += [choice["finish_reason"]] if choice["finish_reason"] else []


def body(number: int) -> dict[str, Any]:
    """A request that no other number makes. The model is what takes time: few tokens."""
    return {
        "prompt": [1000 + number],
        "max_tokens": NUM_TOKENS[number % 5],
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def follow(connection: Connection, number: int) -> Stream:
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    stream, name = Stream(), f"load-{number}"
    connection.send("/v1/completions", body(number) | streaming, name)
    response = await connection.read_head()
    assert (response.status, response.headers["x-request-id"]) == (200, name)
    async for event in connection.events():
        stream.take(event)
    connection.leave()
    return stream


async def wave(url: str) -> list[Stream]:
    """All connections are there before the first request is sent."""
    async with asyncio.timeout(LIMIT_S):
        connections = [await Connection.open(url) for _ in range(NUM_STREAMS)]
        return await asyncio.gather(*(follow(c, i) for i, c in enumerate(connections)))


def check(streams: list[Stream]) -> None:
    """None is lost, none is doubled, none got what is another's."""
    for number, stream in enumerate(streams):
        num_tokens = NUM_TOKENS[number % 5]
        assert len(stream.ids) == stream.num_done == len(stream.usage) == 1
        assert stream.prompts == [[1000 + number]]
        assert (len(stream.token_ids), stream.ends) == (num_tokens, ["length"])
        assert stream.usage[0]["completion_tokens"] == num_tokens
    assert len(set.union(*(stream.ids for stream in streams))) == len(streams)


def test_1000_streams_at_once(server: Served) -> None:
    pid, held = server.process.pid, []
    for _ in range(2):
        streams = asyncio.run(wave(server.url))
        check(streams)
        assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
        held.append((rss_bytes(pid), num_files(pid)))
    assert len({tuple(stream.token_ids) for stream in streams}) > 200
    for number in range(0, NUM_STREAMS, NUM_STREAMS // 20):
        alone = server.post("/v1/completions", **body(number)).json()["choices"][0]
        assert alone["token_ids"] == streams[number].token_ids
    (memory, files), (later_memory, later_files) = held
    assert later_memory < memory + ROOM_BYTES
    assert later_files <= files
