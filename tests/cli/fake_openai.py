"""A server that speaks OpenAI's API as a test tells it to."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


@dataclass
class Answer:
    """What a request gets.

    Attributes:
        chunks: sent one by one; a dictionary as JSON.
        status: with another than 200, the first chunk is the whole body.
        whole: False breaks the connection off after the chunks.
        hold: False ends with [DONE]; True waits until the client has gone.
    """

    chunks: Sequence[Any]
    status: int = 200
    whole: bool = True
    hold: bool = False


@dataclass
class FakeOpenAI:
    """Attributes:
    answer: what a POST of this body gets.
    seen: path, headers and body of each POST.
    gone: set when a held answer's client has closed its connection.
    num_connections: so far.
    """

    answer: Callable[[dict[str, Any]], Answer]
    url: str = ""
    model: str | None = "org/fake-1b"
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    gone: Event = field(default_factory=Event)
    num_connections: int = 0

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.seen]


class QuietServer(ThreadingHTTPServer):
    """One that does not print what a client did by leaving early."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[FakeOpenAI]:
    fake = FakeOpenAI(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            fake.num_connections += 1

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.whole(200, {"data": [{"id": fake.model}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            fake.seen.append((self.path, headers, body))
            given = fake.answer(body)
            if given.status != 200:
                self.whole(given.status, given.chunks[0])
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in given.chunks:
                self.event(json.dumps(chunk) if isinstance(chunk, dict) else chunk)
            if given.hold:
                if self.rfile.read(1) == b"":
                    fake.gone.set()
            elif given.whole:
                self.event("[DONE]")
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = given.hold or not given.whole

        def event(self, text: str) -> None:
            data = f"data: {text}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def whole(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with QuietServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


def texts(*pieces: str, finish_reason: str = "length") -> list[dict[str, Any]]:
    """Chunks of a completion."""
    ends = [None] * (len(pieces) - 1) + [finish_reason]
    return [
        {"choices": [{"index": 0, "text": piece, "finish_reason": end}], "usage": None}
        for piece, end in zip(pieces, ends, strict=True)
    ]


def deltas(*pieces: str, finish_reason: str = "stop") -> list[dict[str, Any]]:
    """Chunks of a chat's answer, the first of which says who speaks."""
    starts = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
    ends = [None] * len(pieces) + [finish_reason]
    return [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
        for delta, end in zip(starts, ends, strict=True)
    ]


def usage(num_input: int, num_output: int) -> dict[str, Any]:
    """The last chunk, if `stream_options` ask for it."""
    counts = {"prompt_tokens": num_input, "completion_tokens": num_output}
    return {"choices": [], "usage": counts | {"total_tokens": num_input + num_output}}


def complete(body: dict[str, Any]) -> Answer:
    """As many tokens as were asked for, each in a chunk of its own."""
    count = body.get("max_tokens") or body["max_completion_tokens"]
    if "messages" in body:
        words = body["messages"][-1]["content"].split()
        return Answer([*deltas(*["a"] * count), usage(len(words) + 3, count)])
    return Answer([*texts(*["a"] * count), usage(len(body["prompt"]), count)])
