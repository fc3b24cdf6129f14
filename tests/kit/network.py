"""What stands between the parts: a misbehaving TCP proxy, HTTP peers that send garbage, our own DNS."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kit import reserve_port


class Proxy:
    """A TCP proxy in front of PostgreSQL or a server, which always keeps its port.

    `accepted` counts all connections so far, `open` the present ones.
    """

    def __init__(self, target_port: int, host: str = "127.0.0.1", port: int = 0):
        self.target_port = target_port
        self.host = host
        self.reservation = reserve_port(host, port)
        self.port: int = self.reservation.getsockname()[1]
        self.delay = 0.0  # seconds that each chunk is held
        self.drip = 0.0  # seconds between single bytes
        self.trap: Trap | None = None
        self.accepted = 0
        self._listener: asyncio.Server | None = None
        self._holds_new = False
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    @property
    def url(self) -> str:
        """Base URL, for a proxy in front of an HTTP server."""
        return f"http://{self.host}:{self.port}"

    @property
    def open(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def accept(self) -> "Proxy":
        """Listen (again)."""
        self._listener = await asyncio.start_server(self._serve, self.host, self.port)
        return self

    def refuse(self) -> None:
        """Stop listening: new connections are refused, open ones stay."""
        if self._listener:
            self._listener.close()
            self._listener = None

    def cut(self) -> None:
        """Reset every open connection."""
        for task, connection in self._connections.items():
            connection.reset()
            task.cancel()

    def freeze(self, *, established: bool = True, new: bool = True) -> None:
        """Hold all bytes silently: connections stay open, new ones are accepted, nothing passes.

        Only `established`: as a firewall that has lost its connections' state. Only `new`: slow connecting.
        """
        self._holds_new = new
        if established:
            for connection in self._connections.values():
                connection.flowing.clear()

    def resume(self) -> None:
        """Pass the held bytes, and everything that follows."""
        self._holds_new = False
        for connection in self._connections.values():
            connection.flowing.set()

    def forget(self) -> None:
        """Act as a restarted host: connections look open until a reset answers a client's next byte."""
        for connection in self._connections.values():
            connection.forgotten = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task
        connection = self._connections[task] = _Connection(writer)
        if not self._holds_new:
            connection.flowing.set()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                await connection.flowing.wait()
                onward = await asyncio.open_connection("127.0.0.1", self.target_port)
                connection.writers.append(onward[1])
                await asyncio.gather(
                    self._pump(reader, onward[1], connection), self._pump(onward[0], writer, connection)
                )
            finally:
                del self._connections[task]
                for each in connection.writers:
                    each.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: "_Connection"
    ) -> None:
        while chunk := await reader.read(65536):
            if connection.forgotten:
                connection.reset()
                return
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.trap and not self.trap.sprung:
                chunk = self.trap.catch(chunk, connection, upwards=writer is not connection.writers[0])
            step = 1 if self.drip else len(chunk) or 1
            for start in range(0, len(chunk), step):
                await connection.flowing.wait()
                writer.write(chunk[start : start + step])
                await writer.drain()
                await asyncio.sleep(self.drip)
            if self.trap and self.trap.sprung and self.trap.connection is connection:
                self.trap.end()
                return
        if writer.can_write_eof():
            writer.write_eof()

    async def close(self) -> None:
        """End it."""
        self.refuse()
        tasks = list(self._connections)
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.reservation.close()


class Forwarder(Proxy):
    """A proxy that gives each new connection to one of several ports."""

    targets: list[int]

    @property
    def target_port(self) -> int:
        return random.choice(self.targets)

    @target_port.setter
    def target_port(self, port: int) -> None:
        self.targets = [port]


class _Connection:
    """The proxy's state of one client: both sides of its connection, and how it is treated."""

    def __init__(self, writer: asyncio.StreamWriter):
        self.writers = [writer]
        self.flowing = asyncio.Event()
        self.forgotten = False

    def reset(self) -> None:
        for writer in self.writers:
            reset(writer)


@dataclass
class Trap:
    """Ends one of a proxy's connections at a moment of an exchange: when the client sends `trigger`.

    Of the chunk that holds it, the share `passed` gets through. If that is all, the end comes with the answer, of which
    the share `answered` gets through. `how`: "closed", "reset" or "silent".
    """

    trigger: bytes
    how: str = "closed"
    passed: float = 1
    answered: float = 0
    connection: _Connection | None = None
    sprung: bool = False

    def catch(self, chunk: bytes, connection: _Connection, *, upwards: bool) -> bytes:
        """What gets through of a chunk."""
        if upwards and self.connection is None and self.trigger in chunk:
            self.connection = connection
            self.sprung = self.passed < 1
            return chunk[: int(len(chunk) * self.passed)]
        if not upwards and self.connection is connection:
            self.sprung = True
            return chunk[: int(len(chunk) * self.answered)]
        return chunk

    def end(self) -> None:
        """Do as `how` says to the connection."""
        assert self.connection
        if self.how == "silent":
            self.connection.flowing.clear()
        elif self.how == "reset":
            self.connection.reset()
        else:
            for writer in self.connection.writers:
                writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset, as when a process crashes."""
    if writer.is_closing():
        return
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]


class Peer:
    """An HTTP server that sends what the test specifies: bytes, or the output of a coroutine function.

    It reads each request's head (kept in `requests`), runs the script, then closes the connection, unless told to keep
    it. `accepted` counts the connections.
    """

    def __init__(self, script: bytes | Script, *, keep_alive: bool = False):
        self.script, self.keep_alive = script, keep_alive
        self.requests: list[str] = []
        self.accepted = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> "Peer":
        """Listen."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._listener.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            try:
                while True:
                    self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
                    if isinstance(self.script, bytes):
                        writer.write(self.script)
                    else:
                        await self.script(reader, writer)
                    await writer.drain()
                    if not self.keep_alive or "\r\nconnection: close\r\n" in self.requests[-1].lower():
                        break
            finally:
                writer.close()
        self._tasks.discard(task)

    async def close(self) -> None:
        """End it."""
        self._listener.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def response(
    body: bytes | str, status: str = "200 OK", content_type: str = "application/json", **headers: str
) -> bytes:
    """A whole HTTP/1.1 response, for a Peer; `headers` with _ for -."""
    data = body.encode() if isinstance(body, str) else body
    fields = {"Content-Type": content_type, "Content-Length": str(len(data))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + data


async def says_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """A script for a Peer: it reads until the client leaves."""
    await reader.read()


@contextlib.contextmanager
def unanswered_port(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port of a vanished host: the kernel drops each attempt to connect. Yields the number."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((host, port))
        full.listen(0)
        for _ in range(2):  # a queue that is full
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield full.getsockname()[1]


class NameServer(asyncio.DatagramProtocol):
    """A DNS server (RFC 1035) on port 53 of a loopback address: `names` maps each name to its IPv4 addresses.

    It answers while `answering` is set, including earlier questions; for an unknown name it answers NXDOMAIN.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.answering = asyncio.Event()
        self.answering.set()
        self.questions: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: Any) -> None:
        """Keep the transport for answers."""
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        """Answer, now or later."""
        task = asyncio.create_task(self._answer(data, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, query: bytes, address: Any) -> None:
        end = query.index(0, 12)
        labels, position = [], 12
        while position < end:
            length = query[position]
            labels.append(query[position + 1 : position + 1 + length].decode())
            position += 1 + length
        name, kind = ".".join(labels), query[end + 1 : end + 3]
        self.questions.append(name)
        await self.answering.wait()
        known = self.names.get(name)
        answers = b""
        if known and kind == b"\0\x01":  # A; every other kind has no record
            for each in known.split():
                answers += b"\xc0\x0c\0\x01\0\x01" + struct.pack(">IH", 0, 4) + socket.inet_aton(each)
        flags = b"\x81\x80" if known else b"\x81\x83"  # recursion available; NXDOMAIN
        header = query[:2] + flags + struct.pack(">HHHH", 1, len(answers) // 16, 0, 0)
        self.transport.sendto(header + query[12 : end + 5] + answers, address)


@contextlib.asynccontextmanager
async def name_server(address: str) -> AsyncIterator[NameServer]:
    """A DNS server at `address`; PermissionError without the right to use port 53."""
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(NameServer, local_addr=(address, 53))
    try:
        yield server
    finally:
        server.answering.set()
        transport.close()
