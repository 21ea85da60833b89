"""A client of a server that speaks OpenAI's API: blocking, and nothing but the standard library."""

import json
import os
from collections.abc import Generator, Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from nanovllm.errors import ConfigError, InvalidRequestError, RequestFailedError

DEFAULT_URL = "http://127.0.0.1:8000"


class Client:
    """Each request has a connection of its own, which ends with it.

    Args:
        url: of the server; a /v1 at its end is left out.
        api_key: None takes that of the environment, if there is one.
        headers: sent with each request.

    Raises:
        ConfigError: the URL is none of a server.
    """

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json", **authorization(api_key), **headers}
        try:
            parts = urlsplit(self.url)
            self.host, self.port, self.root = parts.hostname or "", parts.port, parts.path
        except ValueError:
            self.host = ""
        if not self.host or parts.scheme not in ("http", "https"):
            raise ConfigError("url", url, f"must be like {DEFAULT_URL}")
        self.kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection

    def first_model(self) -> str:
        """The name under which the server answers to its first model.

        Raises:
            RequestFailedError: there is no server, or none that has a model.
        """
        with closing(self.kind(self.host, self.port)) as connection:
            try:
                with self.send(connection, "GET", "/v1/models", None) as response:
                    name = json.load(response)["data"][0]["id"]
            except (ValueError, LookupError, TypeError):
                name = None
        if not isinstance(name, str):
            raise RequestFailedError(f"{self.url}/v1/models names no model")
        return name

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of an answer as they come. Closing the iterator closes the connection, at
        which a server drops the request.

        Args:
            path: /v1/completions or /v1/chat/completions. body: of the request, as JSON.

        Raises:
            InvalidRequestError: the server refuses a field of the body.
            RequestFailedError: there is no server, or no whole answer.
        """
        sent = {**body, "stream": True}
        with (
            closing(self.kind(self.host, self.port)) as connection,
            self.send(connection, "POST", path, sent) as response,
        ):
            try:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        chunk = json.loads(data)
                        if chunk.get("error"):
                            raise RequestFailedError(server_message(data))
                        yield chunk
            except (OSError, HTTPException, ValueError) as error:
                raise RequestFailedError(f"the answer broke off: {error}") from error
            raise RequestFailedError("the answer broke off")

    def send(
        self, connection: HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None
    ) -> HTTPResponse:
        """Send a request, and take the head of the answer if it is no error."""
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self.root + path, data, self.headers)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            why = getattr(error, "strerror", None) or error
            remedy = "is one running? `nanovllm serve` starts one"
            raise RequestFailedError(
                f"no server answers at {self.url} ({why}); {remedy}"
            ) from error
        if response.status == 200:
            return response
        with response:
            data = response.read()
        message = server_message(data) or response.reason
        field = refused_field(data)
        if field and body and field in body:
            remedy = message.partition(": ")[2] if message.startswith(f"{field}=") else message
            raise InvalidRequestError(field, body[field], remedy)
        raise RequestFailedError(f"HTTP {response.status}: {message}")


def authorization(api_key: str | None = None) -> dict[str, str]:
    """The header that shows a key, or that of the environment variable OPENAI_API_KEY."""
    key = api_key or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def server_message(data: bytes) -> str:
    """What the body of an error says, whether as OpenAI's servers, FastAPI or nobody does."""
    try:
        found = json.loads(data)
        error = found.get("error") or found.get("detail") or found.get("message")
        return str(error.get("message") if isinstance(error, dict) else error or found)
    except (ValueError, AttributeError):
        return data.decode(errors="replace").strip()[:200]


def refused_field(data: bytes) -> str | None:
    """The field of the request that the body of an error names."""
    try:
        param = json.loads(data)["error"]["param"]
    except (ValueError, LookupError, TypeError):
        return None
    return param if isinstance(param, str) else None
