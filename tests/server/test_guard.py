"""What every request passes: id, key, readiness, limits, the log."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.errors import EngineDeadError, InvalidRequestError, RequestFailedError
from nanovllm.server.guard import OPEN_PATHS, Guard, ServerState
from nanovllm.server.replies import error_json, error_reply, error_type

KEYS = ["first-key", "schlüssel", "k" * 100]
JSON = {"content-type": "application/json"}
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class App:
    """Answers 200 with the body it got, and keeps the scopes; `act` runs before."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        self.act, self.scopes = act, list[Scope]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        message = await receive()
        assert message["type"] == "http.request" and not message["more_body"]
        result = self.act()
        if result is not None:
            await result
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})


def guarded(app: ASGIApp, **options: Any) -> Guard:
    return Guard(app, **{"state": ServerState(ready=True), **options})


@asynccontextmanager
async def client_of(guard: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client


def ask(guard: ASGIApp, path: str = "/v1/x", method: str = "GET", **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(guard) as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def check_error(response: httpx.Response, status: int, type_: str) -> str:
    """Hold that a response is this error; its message."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    message = error.pop("message")
    assert error == {"type": type_, "param": None, "code": status}
    assert isinstance(message, str)
    return message


# Request ids


@pytest.mark.parametrize("request_id", ["a", "req-1.2_3", "x" * 128])
def test_a_clients_id_is_kept(request_id: str) -> None:
    app = App()
    response = ask(guarded(app), headers={"X-Request-Id": request_id})
    assert response.headers["x-request-id"] == request_id
    assert app.scopes[0]["state"]["request_id"] == request_id


@pytest.mark.parametrize("request_id", [None, "", "x" * 129, "a b", "a\n", "é", "../x", 'a"'])
def test_any_other_is_replaced(request_id: str | None) -> None:
    headers = {} if request_id is None else {b"X-Request-Id": request_id.encode()}
    ids = [ask(guarded(App()), headers=headers).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", made) for made in ids)
    assert ids[0] != ids[1]


def test_errors_have_an_id_too() -> None:
    response = ask(guarded(App(), api_keys=KEYS), headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"


def test_what_the_server_put_into_the_state_stays() -> None:
    app, shared = App(), {"service": 1}

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await guarded(app)({**scope, "state": shared}, receive, send)

    ask(with_state)
    assert app.scopes[0]["state"]["service"] == 1
    assert shared == {"service": 1}


# Keys


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_key_is_let_in(key: str, scheme: str) -> None:
    headers = {b"Authorization": f"{scheme} {key}".encode()}
    assert ask(guarded(App(), api_keys=KEYS), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-key2",
        "Bearer FIRST-KEY",
        "Basic first-key",
        "first-key",
        "Bearer first-key, schlüssel",
        "Bearer " + "x" * 10_000,
        "Bearer \x00",
    ],
)
def test_nothing_else_is(value: str | None) -> None:
    app = App()
    headers = {} if value is None else {b"Authorization": value.encode()}
    response = ask(guarded(app, api_keys=KEYS), headers=headers)
    assert "Authorization: Bearer" in check_error(response, 401, "AuthenticationError")
    assert response.headers["www-authenticate"] == "Bearer"
    assert not app.scopes


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/docs", "/no/such", "/", "/health/", "//health", "/Health"]
)
def test_every_path_but_health_needs_a_key(method: str, path: str) -> None:
    guard = guarded(App(), api_keys=KEYS)
    url = "http://x" + path
    assert ask(guard, url, method).status_code == 401
    assert ask(guard, "/health?x=1", method).status_code == 200


def test_without_keys_none_is_needed() -> None:
    assert ask(guarded(App())).status_code == 200


def test_a_proxys_prefix_is_no_part_of_the_path() -> None:
    guard = guarded(App(), api_keys=KEYS)

    def ask_at(path: str) -> int:
        async def run() -> int:
            transport = httpx.ASGITransport(guard, root_path="/ai")
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return (await client.get(path)).status_code

        return asyncio.run(run())

    assert [ask_at(path) for path in ("/ai/health", "/health", "/ai/v1/x", "/aihealth")] == [
        *(200, 200, 401, 401)
    ]


# Readiness


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (ServerState(), "starting"),
        (ServerState(ready=True, draining=True), "shutting down"),
        (ServerState(ready=True, dead="worker 0 was killed"), "worker 0 was killed"),
    ],
)
def test_while_it_is_not_ready_requests_are_503(state: ServerState, why: str) -> None:
    app = App()
    guard = guarded(app, state=state)
    for path in ("/v1/chat/completions", "/v1/models", "/tokenize", "/no/such"):
        response = ask(guard, path, "POST", content=b"x" * 100)
        assert why in check_error(response, 503, "ServiceUnavailableError")
        assert int(response.headers["retry-after"]) > 0
    assert not app.scopes
    for path in OPEN_PATHS:
        assert ask(guard, path).status_code == 200


def test_a_wrong_key_learns_nothing_of_that() -> None:
    assert ask(guarded(App(), state=ServerState(), api_keys=KEYS)).status_code == 401


def test_requests_in_flight_are_counted() -> None:
    state = ServerState(ready=True)
    arrived, proceed = asyncio.Semaphore(0), asyncio.Event()

    async def hold() -> None:
        arrived.release()
        await proceed.wait()

    async def run() -> None:
        async with client_of(guarded(App(hold), state=state)) as client:
            tasks = [asyncio.create_task(client.get("/v1/x")) for _ in range(3)]
            open_task = asyncio.create_task(client.get("/metrics"))
            for _ in range(4):
                await arrived.acquire()
            assert state.num_in_flight == 3 and not state.idle.is_set()
            tasks[0].cancel()
            await asyncio.wait(tasks[:1])
            assert state.num_in_flight == 2
            state.draining = True
            assert (await client.get("/v1/x")).status_code == 503
            assert state.num_in_flight == 2
            proceed.set()
            await state.idle.wait()
            await asyncio.gather(*tasks[1:], open_task)
            assert state.num_in_flight == 0

    asyncio.run(run())


def test_a_request_that_fails_is_no_longer_in_flight() -> None:
    state = ServerState(ready=True)
    ask(guarded(App(lambda: 1 / 0), state=state))
    assert state.num_in_flight == 0 and state.idle.is_set()


# Bodies


async def drive(guard: ASGIApp, *messages: Message, method: str = "POST") -> list[Message]:
    """What the guard sends for a request that comes in these pieces; then nothing more comes."""
    queue, sent = list(messages), list[Message]()

    async def receive() -> Message:
        if not queue:
            await asyncio.Event().wait()
        return queue.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/v1/x"}
    headers = [(b"content-type", b"application/json")]
    await guard({**scope, "headers": headers, "query_string": b""}, receive, send)
    return sent


def piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_at_the_limit_comes_whole() -> None:
    sent = asyncio.run(
        drive(guarded(App(), max_body_bytes=6), piece(b"123"), piece(b""), piece(b"456", False))
    )
    assert [m.get("status") for m in sent] == [200, None]
    assert sent[1]["body"] == b"123456"


def test_a_longer_one_is_413_as_soon_as_it_is() -> None:
    app = App()
    sent = asyncio.run(drive(guarded(app, max_body_bytes=6), piece(b"123"), piece(b"4567")))
    assert sent[0]["status"] == 413 and not app.scopes
    assert json.loads(sent[1]["body"])["error"]["type"] == "RequestTooLargeError"


def test_one_that_says_so_is_413_unread() -> None:
    response = ask(guarded(App(), max_body_bytes=6), method="POST", content=b"1234567")
    assert "more than 6 bytes" in check_error(response, 413, "RequestTooLargeError")


def test_one_that_never_ends_is_408() -> None:
    sent = asyncio.run(drive(guarded(App(), body_timeout_s=0.05), piece(b"1"), piece(b"2")))
    assert sent[0]["status"] == 408


def test_after_the_body_there_is_no_time_limit() -> None:
    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(await receive())

    async def run() -> list[Message]:
        bodies, sent = [piece(b"", False)], list[Message]()

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await asyncio.sleep(0.1)  # a client that stays
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await guarded(wait, body_timeout_s=0.05)(scope, receive, send)
        return sent

    assert asyncio.run(run()) == [{"type": "http.disconnect"}]


def test_a_client_that_leaves_in_its_body_gets_nothing() -> None:
    app = App()
    assert asyncio.run(drive(guarded(app), piece(b"1"), {"type": "http.disconnect"})) == []
    assert not app.scopes


# Types of content


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/vnd.api+json",
        "application/json ;x=y",
    ],
)
def test_json_is_taken(kind: str) -> None:
    headers = {"content-type": kind}
    assert ask(guarded(App()), method="POST", content=b"{}", headers=headers).text == "{}"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/no/such", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "kind",
    [None, "", "text/plain", "multipart/form-data; boundary=x", "application/jsonp", "text/x+json"],
)
def test_nothing_else_is_where_json_belongs(path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = ask(guarded(App()), path, "POST", content=b"{}", headers=headers)
    assert "application/json" in check_error(response, 415, "UnsupportedMediaTypeError")


def test_without_a_body_or_elsewhere_any_type_is() -> None:
    guard, headers = guarded(App()), {"content-type": "text/plain"}
    assert ask(guard, method="POST", headers=headers).status_code == 200
    assert ask(guard, "/reset_prefix_cache", "POST", content=b"x").status_code == 200
    assert ask(guard, "/v1/x", "PUT", content=b"x").status_code == 200


# Errors


def test_an_exception_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a secret")

    response = ask(guarded(App(fail)), headers={"X-Request-Id": "mine"})
    message = check_error(response, 500, "InternalServerError")
    assert "mine" in message and "secret" not in response.text
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "mine" in record.getMessage() and record.exc_info is not None


def test_an_exception_within_the_response_goes_on_to_the_server() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        ask(guarded(fail))


def test_errors_of_the_engine_have_a_status_each() -> None:
    assert error_reply(InvalidRequestError("n", 0, "must be 1")) == (
        400,
        {
            "error": {
                "message": "n=0: must be 1",
                "type": "BadRequestError",
                "param": "n",
                "code": 400,
            }
        },
    )
    assert error_reply(EngineDeadError("dead"))[0] == 503
    assert error_reply(RequestFailedError("failed"))[0] == 500


def test_every_status_has_a_type() -> None:
    assert [error_type(code) for code in (400, 404, 418, 500, 599)] == [
        "BadRequestError",
        "NotFoundError",
        "BadRequestError",
        "InternalServerError",
        "InternalServerError",
    ]
    assert json.loads(error_json("\ud83d", 400, "x"))["error"]["message"] == "\ud83d"


# What is no HTTP request


def test_websockets_are_refused_and_the_lifespan_passes() -> None:
    passed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope["type"])

    async def run() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        guard = guarded(app, state=ServerState(), api_keys=KEYS)
        await guard({"type": "websocket", "path": "/health", "headers": []}, receive, send)
        await guard({"type": "lifespan"}, receive, send)
        return sent

    assert asyncio.run(run()) == [{"type": "websocket.close", "code": 1008}]
    assert passed == ["lifespan"]


# The log


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.levelno == logging.INFO]


def test_one_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm.server")
    headers = {"X-Request-Id": "mine", "Authorization": "Bearer first-key", **JSON}
    guard = guarded(App(), api_keys=KEYS)
    ask(guard, "/v1/x?prompt=secret", "POST", content=b"secret", headers=headers)
    ask(guard, "/v1/x%0A2")
    [line, refused] = lines_of(caplog)
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line.pop("duration_ms") >= 0
    assert line == {
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/x",
        "status": 200,
        "client": "127.0.0.1",
    }
    assert (refused["status"], refused["path"]) == (401, "/v1/x\n2")
    assert "secret" not in caplog.text and "first-key" not in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_failures_and_those_who_left_are_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm.server")
    ask(guarded(App(lambda: 1 / 0)))
    asyncio.run(drive(guarded(App()), {"type": "http.disconnect"}))
    assert [line["status"] for line in lines_of(caplog)] == [500, None]


@pytest.mark.parametrize("value", [TRACEPARENT, "x", "", TRACEPARENT + "x", "\u00e9"])
def test_a_trace_is_taken_up(value: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nanovllm.server")
    ask(guarded(App()), headers={b"traceparent": value.encode()})
    expected = {TRACE} if value == TRACEPARENT else set()
    assert {line["trace_id"] for line in lines_of(caplog) if "trace_id" in line} == expected


def test_opentelemetry_sees_the_clients_span() -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    seen = []

    def look() -> None:
        seen.append(trace.format_trace_id(trace.get_current_span().get_span_context().trace_id))

    async def run() -> None:
        async with client_of(guarded(App(look))) as client:
            await client.get("/v1/x", headers={"traceparent": TRACEPARENT})
            look()
            await client.get("/v1/x")

    asyncio.run(run())
    assert seen == [TRACE, "0" * 32, "0" * 32]
