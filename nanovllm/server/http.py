"""Limits on a request before it is one: how many connections there may be, what uvicorn's parser
may collect, and how long it takes.

    bytes ─▶ data_received ─▶ httptools ─▶ on_message_begin, on_url, on_header ... ─▶ the app
              counts what no callback            count a head's size,
              has answered for                   end its time

A timer runs while a head is incomplete, and while a body goes on after its response.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanovllm.server.guard import RETRY_AFTER_S, reply
from nanovllm.server.replies import error_json


async def too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """The app of a connection past the cap: nothing is read for it, and it closes."""
    headers = [(b"retry-after", b"%d" % RETRY_AFTER_S), (b"connection", b"close")]
    await reply(send, 503, "too many connections: try again later", headers)


class LimitedProtocol(HttpToolsProtocol):
    """A connection that answers 503, 431 and 408 and closes; give the class to
    `uvicorn.Config(http=)`. Past limit_concurrency a new one gets a 503; those before it go on.

    Attributes:
        max_head_bytes: of a request's target, header lines and trailers. A line that does not end
            may exceed it by what the system reads at once.
        max_head_lines: the request line and the header lines.
        header_timeout_s: from the connection's opening, or from a later request's first byte, to
            the end of the headers.
        linger_s: how long to read on, and throw away, what a client still sends after its
            response. Closing at once would reset the connection, and the response be lost.
    """

    max_head_bytes = 64 * 1024
    max_head_lines = 100
    header_timeout_s = 10.0
    linger_s = 2.0

    timer: asyncio.TimerHandle | None = None
    in_body = False
    is_too_large = False
    is_refused = False
    num_head_bytes = 0
    num_head_lines = 0
    num_loose_bytes = 0  # received since the parser last called back

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most, self.limit_concurrency = self.limit_concurrency, None  # uvicorn's 503 is no JSON
        if most is not None and len(self.connections) >= most:
            self.logger.warning("connection %d gets a 503", len(self.connections))
            self.app = too_many
        self._set_timer(self.header_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_refused:
            return
        if self.timer is None and not self.in_body:  # empty lines, too, begin a request
            self._set_timer(self.header_timeout_s, self._head_is_late)
        self.num_loose_bytes += len(data)
        super().data_received(data)
        if self.num_head_bytes + self.num_loose_bytes > self.max_head_bytes:
            self.is_too_large = True
            self.send_400_response("")

    # What the parser calls

    def on_message_begin(self) -> None:
        self.num_head_bytes, self.num_head_lines = 0, 1
        if self.cycle is not None:  # the first head's time runs already
            self._set_timer(self.header_timeout_s, self._head_is_late)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url), 0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(": \r\n"), 1)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self.in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.num_loose_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_body = False
        super().on_message_complete()
        if self.timer is not None:  # the response was there first
            self._set_timer(self.timeout_keep_alive, self.transport.close)

    # What uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.in_body and not self._is_busy():
            self._set_timer(self.linger_s, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Also called for an exception in a callback, such as that of `_count`."""
        if self.is_refused:
            return
        if self.is_too_large:
            what = f"{self.max_head_bytes} bytes or {self.max_head_lines} lines"
            self._refuse(431, f"the request's headers are over {what}: send less")
        else:
            self.is_refused = True
            super().send_400_response(msg)

    def _count(self, num_bytes: int, num_lines: int) -> None:
        self.num_loose_bytes = 0
        self.num_head_bytes += num_bytes
        self.num_head_lines += num_lines
        if self.num_head_bytes > self.max_head_bytes or self.num_head_lines > self.max_head_lines:
            self.is_too_large = True
            raise ValueError("too large")  # stops the parser

    def _head_is_late(self) -> None:
        if self._is_busy():
            self._set_timer(self.header_timeout_s, self._head_is_late)
        else:
            limit = f"{self.header_timeout_s:g} s"
            self._refuse(408, f"the request's headers took more than {limit}: send them faster")

    def _is_busy(self) -> bool:
        """Whether an earlier request of the connection has not had all of its response."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str) -> None:
        self.is_refused = True
        if self._is_busy():  # it would read as a part of that response
            self.transport.close()
            return
        body = error_json(message, status)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(head + lines + b"\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._set_timer(self.linger_s, self.transport.close)
        else:
            self.transport.close()

    def _set_timer(self, seconds: float, do: Callable[[], None]) -> None:
        self._stop_timer()
        self.timer = self.loop.call_later(seconds, do)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
