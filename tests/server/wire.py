"""A lean HTTP client for many streams at once, which sees when a response is cut short."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

DONE = "[DONE]"


class CutError(Exception):
    """The connection ended before the response did."""


@dataclass
class Response:
    """The head of a response; its body is read with Connection.pieces."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


class Connection:
    """One connection for one request.

    connection = await Connection.open(url)
    response = await connection.ask("/v1/completions", {...})
    async for event in connection.events(): ...
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.response = Response(0)

    @classmethod
    async def open(cls, url: str) -> Self:
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    def send(self, path: str, body: Any, request_id: str = "") -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"X-Request-Id: {request_id}\r\n" if request_id else ""
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.writer.write(head.encode() + data)

    async def read_head(self) -> Response:
        try:
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise CutError("no response") from error
        pairs = (line.partition(": ") for line in lines if line)
        headers = {name.lower(): value for name, _, value in pairs}
        self.response = Response(int(first.split()[1]), headers)
        return self.response

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it comes.

        Raises:
            CutError: it ends before its end.
        """
        headers = self.response.headers
        try:
            if "content-length" in headers:
                yield await self.reader.readexactly(int(headers["content-length"]))
                return
            assert headers["transfer-encoding"] == "chunked"
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise CutError("the body is cut short") from error

    async def events(self) -> AsyncGenerator[str]:
        """The data of server-sent events; the last is DONE if all is well."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                yield event.decode().removeprefix("data: ")
        assert not rest, rest

    def leave(self) -> None:
        """Be gone, without a goodbye."""
        self.writer.transport.abort()
