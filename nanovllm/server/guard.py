"""What every request passes before it reaches a route, and what is noted when it is over.

request id ─▶ API key ─▶ ready? ─▶ body: size, time, type ─▶ the app ─▶ access log
                401        503           413  408  415         500
"""

import asyncio
import functools
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.replies import error_json

OPEN_PATHS = {"/health", "/version", "/metrics", "/load", "/docs", "/openapi.json"}
REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
RETRY_AFTER_S = 5
logger = logging.getLogger("nanovllm.server")


@dataclass(slots=True)
class ServerState:
    """Whether requests are taken in, and how many are there.

    Attributes:
        ready: the model is loaded. draining: the server is about to end. dead: why the engine is.
        num_in_flight: requests taken in and not over, those to OPEN_PATHS not counted.
        idle: set while there are none; await it to drain.
    """

    ready: bool = False
    draining: bool = False
    dead: str | None = None
    num_in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def refusal(self) -> str | None:
        """Why no requests are taken in."""
        if self.dead is not None:
            return f"the engine is dead: {self.dead}"
        if self.draining:
            return "the server is shutting down"
        return None if self.ready else "the server is starting: try again later"

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        self.num_in_flight += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if self.num_in_flight == 0:
                self.idle.set()


class RefusedError(Exception):
    """A request ends here with an error response."""

    def __init__(self, status: int, message: str, header: tuple[bytes, bytes] | None = None):
        super().__init__(message)
        self.status, self.headers = status, [] if header is None else [header]


class Guard:
    """ASGI middleware; the outermost, so that nothing is read or run for a request it refuses.

    Args:
        api_keys: one of them must be sent, on every path but /health; none asks for none.
        body_timeout_s: from the end of the headers to the end of the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        state: ServerState,
        api_keys: Sequence[str] = (),
        max_body_bytes: int = 8 * 2**20,
        body_timeout_s: float = 60.0,
    ) -> None:
        self.app, self.state = app, state
        self.digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self.max_body_bytes, self.body_timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": request_id}}
        status: int | None = None  # of the response, once it has begun

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), name]}
            await send(message)

        try:
            with traced(headers):
                await self._admit(scope, headers, receive, send_named)
        except RefusedError as error:
            await reply(send_named, error.status, str(error), error.headers)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status is not None:
                raise  # the server cuts the connection: the client sees that the response is short
            await reply(send_named, 500, f"internal error; the log has it under {request_id}")
        finally:
            duration_ms = 1000 * (time.perf_counter() - started_s)
            log_access(scope, headers, request_id, status, duration_ms)

    async def _admit(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        """Call the app, or raise RefusedError before anything of a response is sent."""
        path = route_path(scope)
        if self.digests and path != "/health":
            self._check_key(headers.get(b"authorization", b""))
        if path in OPEN_PATHS:
            await self._call(scope, headers, receive, send)
            return
        refusal = self.state.refusal
        if refusal is not None:
            raise RefusedError(503, refusal, (b"retry-after", b"%d" % RETRY_AFTER_S))
        with self.state.in_flight():
            await self._call(scope, headers, receive, send)

    def _check_key(self, authorization: bytes) -> None:
        """In a time that depends neither on how much of a key is right nor on which it is."""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "no valid API key: send it as 'Authorization: Bearer KEY'"
            raise RefusedError(401, message, (b"www-authenticate", b"Bearer"))

    async def _call(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        body = await self._read_body(headers, receive)
        if body is None:  # the client has left
            return
        if body and takes_json(scope) and not is_json(headers.get(b"content-type", b"")):
            raise RefusedError(415, "Content-Type must be application/json")
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            message, whole = whole, None
            return await receive() if message is None else message

        await self.app(scope, receive_whole, send)

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None if the client leaves before its end."""
        too_large = RefusedError(413, f"the body has more than {self.max_body_bytes} bytes")
        if int(headers.get(b"content-length", b"0")) > self.max_body_bytes:
            raise too_large
        parts: list[bytes] = []
        num_bytes, more = 0, True
        try:
            async with asyncio.timeout(self.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > self.max_body_bytes:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError as error:
            message_408 = f"the body took more than {self.body_timeout_s:g} s: send it faster"
            raise RefusedError(408, message_408) from error
        return b"".join(parts)


async def reply(
    send: Send, status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Send a whole error response."""
    body = error_json(message, status)
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


def route_path(scope: Scope) -> str:
    """The path as routes know it: without the prefix under which a proxy has put the server."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def takes_json(scope: Scope) -> bool:
    path = route_path(scope)
    is_api = path.startswith("/v1/") or path in ("/tokenize", "/detokenize")
    return is_api and scope["method"] == "POST"


def is_json(content_type: bytes) -> bool:
    kind = content_type.partition(b";")[0].strip().lower()
    is_extended = kind.startswith(b"application/") and kind.endswith(b"+json")
    return kind == b"application/json" or is_extended


def log_access(
    scope: Scope,
    headers: dict[bytes, bytes],
    request_id: str,
    status: int | None,
    duration_ms: float,
) -> None:
    """One line of JSON for a request that is over; status None: its client left too early."""
    if not logger.isEnabledFor(logging.INFO):
        return
    client = scope.get("client")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(duration_ms, 3),
        "client": client[0] if client else None,
    }
    trace = TRACEPARENT.fullmatch(headers.get(b"traceparent", b"").decode("latin-1"))
    if trace is not None:
        line["trace_id"] = trace[1]
    logger.info(json.dumps(line))


@contextmanager
def traced(headers: dict[bytes, bytes]) -> Iterator[None]:
    """Inside, OpenTelemetry's current span is the client's, if there are both."""
    modules = opentelemetry() if b"traceparent" in headers else None
    if modules is None:
        yield
        return
    context, propagate = modules
    carrier = {
        name: headers[name.encode()].decode("latin-1")
        for name in ("traceparent", "tracestate", "baggage")
        if name.encode() in headers
    }
    token = context.attach(propagate.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)


@functools.cache
def opentelemetry() -> tuple[Any, Any] | None:
    try:
        return import_module("opentelemetry.context"), import_module("opentelemetry.propagate")
    except ImportError:
        return None
