"""A canary for a server: a greedy request that must never notice what happens beside it, and the
state to which the server must come back."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.llm.helpers import make_ids
from tests.server.servers import LIMIT_S, Served

SLACK_BYTES = 100 * 2**20  # what an allocator may keep for later
BODY: dict[str, Any] = {
    "prompt": make_ids(1, 40),
    "max_tokens": 32,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
}


class Canary:
    """One server, known when all is well.

    Args:
        slack_bytes: by which its memory may have grown.

    Attributes:
        alone: the tokens that the canary gets when nothing else runs.
        num_files, num_bytes: descriptors and resident memory of the idle server.
    """

    def __init__(self, server: Served, slack_bytes: int = SLACK_BYTES) -> None:
        self.server, self.http, self.slack_bytes = server, server.http, slack_bytes
        large = [7] * 2 * 10**6  # so that a large body, or a form, is nothing new to the allocator
        assert server.post("/v1/completions", prompt=large).status_code == 400
        form = {"structured_outputs": {"choice": ["yes"]}, "max_tokens": 1}
        assert server.post("/v1/completions", prompt="x", **form).status_code == 200
        self.alone = self.sing(self.http)
        assert len(set(self.alone)) > 3
        self.num_files, self.num_bytes = self.count_files(), self.resident_bytes()

    @contextmanager
    def singing(self) -> Iterator[None]:
        """The canary sings while the block runs, from before its start to after its end; then the
        server is as it was."""
        began, over = threading.Event(), threading.Event()

        def sing_on() -> None:
            with self.server.new_client() as client:
                ending = False
                while not ending:
                    ending = over.is_set()
                    assert self.sing(client, began) == self.alone

        with ThreadPoolExecutor(1) as pool:
            song = pool.submit(sing_on)
            try:
                until(lambda: began.is_set() or song.done(), "the canary begins")
                yield
            finally:
                over.set()
            song.result()
        self.check()

    def check(self) -> None:
        """Nothing is left of any request, and the canary is well."""
        until(self.is_idle, "requests and their blocks are gone")
        assert self.http.get("/health").json() == {"status": "ok"}
        assert self.sing(self.http) == self.alone
        until(self.is_idle, "the canary and its blocks are gone")
        until(lambda: self.count_files() <= self.num_files, "descriptors are closed")
        more = self.resident_bytes() - self.num_bytes
        assert more < self.slack_bytes

    def sing(self, client: httpx.Client, began: threading.Event | None = None) -> list[int]:
        """The tokens of the canary's request; `began` is set with the first."""
        token_ids: list[int] = []
        with client.stream("POST", "/v1/completions", json=BODY) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    token_ids += json.loads(line[len("data: ") :])["choices"][0]["token_ids"]
                    if began is not None:
                        began.set()
        return token_ids

    def is_idle(self) -> bool:
        names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
        return not any(map(self.server.metric, names))

    def count_files(self) -> int:
        return len(list(Path(f"/proc/{self.server.process.pid}/fd").iterdir()))

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) * 1024


def until(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again; fail if it is not so in the end."""
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.01)
