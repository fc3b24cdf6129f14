"""HTTP as a client sees it, with nothing between the test and the bytes.

No HTTP library: libraries retry, follow redirects, pool connections and refuse to send nonsense, and so hide what a
server does.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from multidict import CIMultiDict

Headers = Mapping[str, str]
NONE: Headers = {}
PATIENCE = 20  # seconds after which a test gives up: far beyond every time limit of the servers


@dataclass
class Answer:
    """A whole HTTP response, and the seconds from the start of its connection to its end."""

    status: int
    headers: CIMultiDict[str]
    body: bytes
    seconds: float = 0.0

    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)

    @property
    def request_id(self) -> str:
        """The server's id for this request."""
        return self.headers["X-Request-ID"]


class Connection:
    """A connection that stays open between requests, for as long as the server lets it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str):
        self.reader, self.writer, self.host = reader, writer, host

    async def send(self, path: str, method: str = "GET", headers: Headers = NONE, body: bytes = b"") -> None:
        """Write a request."""
        fields = {"Host": self.host, **headers}
        if body:
            fields["Content-Length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        await self.writer.drain()

    async def receive(self, method: str = "GET") -> Answer:
        """Read the next response; IncompleteReadError when the server closes before its end."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.strip().split("\r\n")
        headers = CIMultiDict((name, value.strip()) for name, value in (line.split(":", 1) for line in lines))
        status = int(status_line.split()[1])
        length = 0 if method == "HEAD" or status in (204, 304) else int(headers.get("Content-Length", "0"))
        return Answer(status, headers, await self.reader.readexactly(length))

    async def get(self, path: str, method: str = "GET", headers: Headers = NONE, body: bytes = b"") -> Answer:
        """Send a request and read its response."""
        await self.send(path, method, headers, body)
        return await self.receive(method)

    async def close(self) -> None:
        """Close it, whatever state it is in."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def connection(url: str, buffer: int = 2**24) -> AsyncIterator[Connection]:
    """A Connection to the server at this URL, which buffers about `buffer` bytes before they are read."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=buffer)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connected = Connection(reader, writer, parts.netloc)
    try:
        yield connected
    finally:
        await connected.close()


async def get(url: str, method: str = "GET", headers: Headers = NONE, within: float = PATIENCE) -> Answer:
    """One request on a connection of its own; TimeoutError when there is no whole response in time."""
    start = time.monotonic()
    parts = urlsplit(url)
    async with asyncio.timeout(within), connection(url) as connected:
        target = parts._replace(scheme="", netloc="").geturl() or "/"
        answer = await connected.get(target, method, headers)
    answer.seconds = time.monotonic() - start
    return answer


async def exchange(url: str, request: bytes, within: float = PATIENCE) -> bytes:
    """Send these bytes and return all that comes back until the server closes."""
    async with asyncio.timeout(within), connection(url) as connected:
        connected.writer.write(request)
        with contextlib.suppress(ConnectionError):  # closed while we wrote; its answer may be there
            await connected.writer.drain()
        return await connected.reader.read(-1)
