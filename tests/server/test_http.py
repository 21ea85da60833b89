"""The edge of the server over real sockets: requests that are too large, too slow or no HTTP."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.server.guard import Guard, ServerState
from nanovllm.server.http import LimitedProtocol

REQUEST = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = 30.0  # no test waits for it


class Limited(LimitedProtocol):
    max_head_bytes = 1000
    max_head_lines = 10
    header_timeout_s = SLOW


class Hasty(Limited):
    header_timeout_s = 0.2


class Leaving(Limited):
    linger_s = 0.2


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path and the body; on /early, before it has read any."""
    body, more = b"", scope["path"] != "/early"
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    text = scope["path"].encode() + b" " + body
    headers = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@contextmanager
def serve(
    protocol: type[asyncio.Protocol], app: ASGIApp = echo, **settings: Any
) -> Iterator[tuple[str, int]]:
    """An address at which uvicorn serves the app."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings |= {"lifespan": "off", "log_config": None, "ws": "none"}
        server = uvicorn.Server(uvicorn.Config(app, http=protocol, **settings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = server.force_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serve(Limited) as address:
        yield address


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        more = connection.recv(65536)
        assert more, data
        data += more
    return data


def exchange(address: tuple[str, int], *parts: bytes) -> bytes:
    """Send, and read until the server closes."""
    with socket.create_connection(address, timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        return read_all(connection)


def check_error(response: bytes, status: int) -> None:
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 %d " % status)
    assert {b"content-type: application/json", b"connection: close"} <= set(lines)
    error: dict[str, Any] = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, None)


def get(num_lines: int = 2, num_bytes: int | None = None, path: bytes = b"/") -> bytes:
    """A request whose headers have so many lines and bytes, as the limits count them."""
    lines = [b"Connection: close\r\n"] + [b"a: b\r\n"] * (num_lines - 2)
    if num_bytes is not None:
        rest = num_bytes - len(path) - sum(map(len, lines)) - len(b"c: \r\n")
        lines.append(b"c: " + b"x" * rest + b"\r\n")
    return b"GET " + path + b" HTTP/1.1\r\n" + b"".join(lines) + b"\r\n"


# Too large


@pytest.mark.parametrize("request_", [get(10), get(2, 1000), get(2, path=b"/" + b"p" * 980)])
def test_requests_at_the_limits_pass(address: tuple[str, int], request_: bytes) -> None:
    assert exchange(address, request_).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "request_",
    [
        get(11),
        get(2, 1001),
        get(2, path=b"/" + b"p" * 1000),
        get(2, 10**6),
        get(10**5),
        b"GET /" + b"p" * 10**6,
        b"GET / HTTP/1.1\r\na: " + b"x" * 10**6,
        b"GET / HTTP/1.1\r\n" + b"n" * 10**6,
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 100,
        b"\r\n" * 10**5 + b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=lambda request_: ascii(request_[:30]),
)
def test_larger_ones_are_431(address: tuple[str, int], request_: bytes) -> None:
    check_error(exchange(address, request_), 431)


def test_a_header_line_without_end_is_not_collected() -> None:
    def send_on() -> None:
        for _ in range(10**6):
            connection.sendall(b"x" * 10**5)

    with serve(Leaving) as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\na: ")
        with pytest.raises(ConnectionError):
            send_on()


def test_the_real_limits() -> None:
    with serve(LimitedProtocol) as address:
        assert exchange(address, get(100)).startswith(b"HTTP/1.1 200 ")
        check_error(exchange(address, get(101)), 431)
        assert exchange(address, get(2, 65536)).startswith(b"HTTP/1.1 200 ")
        check_error(exchange(address, get(2, 65537)), 431)


def test_a_body_does_not_count(address: tuple[str, int]) -> None:
    body = b"x" * 10**6
    head = b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert exchange(address, head, body).endswith(b"\r\n\r\n/ " + body)


def test_a_chunked_body_does_not_count(address: tuple[str, int]) -> None:
    head = b"POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (size, b"x" * size) for size in [1] * 1000 + [5000] * 20)
    response = exchange(address, head, chunks, b"0\r\n\r\n")
    assert response.endswith(b"\r\n\r\n/ " + b"x" * 101_000)


@pytest.mark.parametrize(
    "rest",
    [b"0\r\na: " + b"x" * 10**6, b"0\r\n" + b"a: b\r\n" * 100, b"5;a=" + b"x" * 10**6],
    ids=["a long trailer", "many trailers", "a chunk's extension"],
)
def test_what_a_chunked_body_may_hide_counts(address: tuple[str, int], rest: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(address, timeout=20) as connection:
        try:
            connection.sendall(head + rest)
            assert read_all(connection) == b""  # closed; its app may be answering already
        except ConnectionError:
            pass


def test_a_head_after_a_body_is_counted_from_its_own_start(address: tuple[str, int]) -> None:
    first = b"POST /1 HTTP/1.1\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000
    half = len(get(2, 1000)) // 2
    response = exchange(address, first + get(2, 1000)[:half], get(2, 1000)[half:])
    assert response.count(b"HTTP/1.1 200 OK") == 2


# Too slow


def test_a_connection_that_says_nothing_is_408() -> None:
    with serve(Hasty) as address:
        check_error(exchange(address), 408)


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
def test_headers_that_never_end_are_408(start: bytes) -> None:
    with serve(Hasty) as address:
        check_error(exchange(address, start), 408)
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(REQUEST % 1)
            read_until(connection, b"\r\n\r\n/1 ")
            connection.sendall(start)  # on a connection that was idle
            check_error(read_all(connection), 408)


def test_a_second_request_that_never_ends_is_408() -> None:
    with serve(Hasty) as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(REQUEST % 1 + b"GET")  # in one go
        read_until(connection, b"\r\n\r\n/1 ")
        check_error(read_all(connection), 408)


def test_a_slow_second_request_does_not_cut_the_first_ones_response() -> None:
    proceed = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        loops.append(asyncio.get_running_loop())
        await proceed.wait()
        await echo(scope, receive, send)

    class Counting(Hasty):
        late = threading.Semaphore(0)

        def _head_is_late(self) -> None:
            super()._head_is_late()
            self.late.release()

    with serve(Counting, wait) as address, socket.create_connection(address, 20) as connection:
        connection.sendall(REQUEST % 1 + b"GET")
        assert Counting.late.acquire(timeout=20)
        loops[0].call_soon_threadsafe(proceed.set)
        assert read_until(connection, b"/1 ").startswith(b"HTTP/1.1 200 OK")
        check_error(read_all(connection), 408)


def test_a_body_may_take_longer_than_headers() -> None:
    class Counting(Hasty):
        header_timeout_s = 0.05
        passed = threading.Event()

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self.loop.call_later(4 * self.header_timeout_s, self.passed.set)

    with serve(Counting) as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\na")
        assert Counting.passed.wait(20)
        connection.sendall(b"b")
        assert read_until(connection, b"/ ab").startswith(b"HTTP/1.1 200 OK")


# Responses before the end of a request


def test_a_client_reads_the_response_and_goes_on(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        read_until(connection, b"\r\n\r\n/early ")
        connection.sendall(b"x" * 1000000 + REQUEST % 2)
        read_until(connection, b"\r\n\r\n/2 ")


def test_a_client_that_goes_on_for_long_is_cut_off() -> None:
    with serve(Leaving) as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        read_until(connection, b"\r\n\r\n/early ")
        assert connection.recv(1) == b""


def test_a_body_over_the_limit_is_413_and_the_connection_goes_on() -> None:
    guard = Guard(echo, state=ServerState(ready=True), max_body_bytes=1000)
    with serve(LimitedProtocol, guard) as address:
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n")
            assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413 ")
            connection.sendall(b"x" * 1001 + REQUEST % 2)
            read_until(connection, b"\r\n\r\n/2 ")
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
            connection.sendall(b"385\r\n" + b"x" * 901 + b"\r\n")
            assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413 ")
            connection.sendall(b"0\r\n\r\n" + REQUEST % 3)
            read_until(connection, b"\r\n\r\n/3 ")


def test_a_body_that_never_ends_is_408() -> None:
    guard = Guard(echo, state=ServerState(ready=True), body_timeout_s=0.2)
    with serve(Leaving, guard) as address:
        response = exchange(address, b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nx")
        assert response.startswith(b"HTTP/1.1 408 ")
        assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == 408


# Too many


def test_past_the_cap_requests_are_503_and_told_when_to_come_back() -> None:
    post = b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000
    with (
        serve(Leaving, limit_concurrency=2) as address,
        socket.create_connection(address, timeout=20) as connection,
    ):
        connection.sendall(REQUEST % 1)
        read_until(connection, b"\r\n\r\n/1 ")
        for request in (REQUEST % 2, REQUEST % 2 + REQUEST % 3, post):
            response = exchange(address, request)
            check_error(response, 503)
            assert b"\r\nretry-after: 5\r\n" in response
            assert response.count(b"HTTP/1.1") == 1
        connection.sendall(REQUEST % 4)  # what was there before goes on
        read_until(connection, b"\r\n\r\n/4 ")


# As without limits


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"]
)
@pytest.mark.parametrize("length", [0, 2000])  # over Limited's own limit
def test_what_is_no_http_is_400(address: tuple[str, int], garbage: bytes, length: int) -> None:
    response = exchange(address, garbage + b"x" * length)
    assert response.startswith(b"HTTP/1.1 400 Bad Request")
    assert response.count(b"HTTP/1.1") == 1


def test_byte_by_byte(address: tuple[str, int]) -> None:
    request = (
        b"POST /1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    with socket.create_connection(address, timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(request)):
            connection.sendall(request[i : i + 1])
        read_until(connection, b"\r\n\r\n/1 abc")


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), max_size=8), sizes=st.lists(st.integers(0, 90)))
def test_pipelined_requests_cut_anywhere(
    address: tuple[str, int], cuts: list[int], sizes: list[int]
) -> None:
    data, expected = b"", []
    for i, size in enumerate(sizes):
        body = b"x" * size
        data += b"POST /%d HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (i, size, body)
        expected.append(b"/%d %s" % (i, body))
    parts, rest = [], data + get(path=b"/last")
    for cut in cuts:
        parts.append(rest[:cut])
        rest = rest[cut:]
    response = exchange(address, *parts, rest)
    assert response.count(b"HTTP/1.1 200 OK") == len(sizes) + 1
    for text in expected:
        response = response.partition(b"\r\n\r\n" + text)[2]
    assert response.endswith(b"\r\n\r\n/last ")
