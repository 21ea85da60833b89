"""One server that all clients talk to. It asks for a key, as their users would set one."""

import time
from collections.abc import Iterator

import pytest

from tests.server.servers import LIMIT_S, Served

KEY = "sk-of-the-tests"


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("clients") / "server.log"
    with Served("--num-kv-blocks", "2048", "--api-key", KEY, log=log) as server:
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        yield server


def until_idle(served: Served) -> None:
    """Wait until nothing runs: what was left must have been aborted."""
    deadline_s = time.monotonic() + LIMIT_S
    while served.metric("num_requests_running") or served.http.get("/load").json()["server_load"]:
        assert time.monotonic() < deadline_s
