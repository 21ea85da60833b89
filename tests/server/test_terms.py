"""Whose a request is, and how fast it wants to be served: over HTTP, scheduling policies see it."""

import asyncio
from typing import Any

import pytest

from tests.llm.helpers import make_ids
from tests.server.canary import until
from tests.server.servers import Served
from tests.server.wire import Connection

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETE: {"prompt": make_ids(4, 16)},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
}
LONG = {"max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module", params=["fair", "edf"])
def served(request, tiny, tmp_path_factory):
    """A server that runs one request at a time."""
    flags = "--scheduling-policy", request.param, "--max-num-seqs", "1", "--num-kv-blocks", "1024"
    log = tmp_path_factory.mktemp(request.param) / "log"
    with Served(str(tiny), *flags, log=log) as served:
        yield request.param, served


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_the_policy_sees_the_terms(served, path):
    """A request comes last and goes first: another tenant's under fair, a hasty one's under edf."""
    policy, server = served
    terms: dict[str, Any] = {"user": "served before"}
    others: dict[str, Any] = {"safety_identifier": "new", "user": "served before"}
    if policy == "edf":
        terms, others = {"ttft_target_ms": 3_600_000}, {"ttft_target_ms": 100}

    async def ask(body: dict[str, Any]) -> Connection:
        connection = await Connection.open(server.url)
        connection.send(path, BODIES[path] | body)
        return connection

    async def main() -> None:
        running = await ask(terms | LONG)
        until(lambda: server.metric("num_requests_running") == 1, "the first runs")
        waiting = await ask(terms | LONG)
        until(lambda: server.metric("num_requests_waiting") == 1, "the second waits")
        last = await ask(others | {"max_tokens": 1})
        until(lambda: server.metric("num_requests_waiting") == 2, "the third waits too")
        running.leave()
        assert (await last.read_head()).status == 200
        waiting.leave()
        last.leave()

    before = server.metric("request_success_total", finished_reason="length")
    asyncio.run(main())
    until(lambda: server.metric("num_requests_running") == 0, "all have left")
    assert server.metric("request_success_total", finished_reason="length") == before + 1
