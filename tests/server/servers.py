"""`nanovllm serve` in a process of its own, for tests."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

LIMIT_S = 60.0  # for anything that is waited for


class Served:
    """A server on loopback, on a port that the system picks, up when the block is entered.

    Args:
        flags: of `nanovllm serve`. log: where its stderr goes. program: a module that serves in
            its place.

    Attributes:
        http: a client of it.
    """

    def __init__(
        self,
        *flags: str,
        log: Path,
        environment: dict[str, str] | None = None,
        program: str = "nanovllm",
    ) -> None:
        self.command = [sys.executable, "-m", program, "serve", "--port", "0", *flags]
        self.log, self.environment = log, os.environ | (environment or {})
        self.lines: list[str] = []

    def __enter__(self) -> Self:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
        self.url = self.read_until(r"(http://\S+:\d+) loads")
        self.http = httpx.Client(base_url=self.url, timeout=LIMIT_S)
        self.read_until("(ready)")
        return self

    def read_until(self, pattern: str) -> str:
        """The first group of the next line on stdout that matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"the server ended: {self.lines} {self.log.read_text()[-2000:]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(LIMIT_S)
            finally:
                self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def new_client(self) -> httpx.Client:
        """Another client, for requests beside those of `http`."""
        return httpx.Client(base_url=self.url, headers=self.http.headers, timeout=LIMIT_S)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        text = self.http.get("/metrics").text
        found = [
            float(value)
            for series, value in re.findall(rf"^vllm:{name}{{(.*)}} (\S+)$", text, re.MULTILINE)
            if all(f'{label}="{labels[label]}"' in series for label in labels)
        ]
        assert found, name
        return sum(found)
