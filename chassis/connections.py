"""Clients' connections: how many there are, and what each may hold and for how long.

Rules kept here: a connection holds a bounded amount of memory, whether its client reads or not, and so do the
unfinished requests of all together; every request is answered, or its connection is closed in time; no client can lock
others out. Tests: tests/chassis/test_connections.py, tests/chassis/test_malformed_http.py.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import EMPTY_PAYLOAD, StreamReader, web
from aiohttp.http_exceptions import InvalidURLError, LineTooLong

from chassis import logs
from chassis.responses import Problem, mistake

KEEPALIVE_TIMEOUT = 75.0  # seconds; longer than the 60 for which an AWS load balancer keeps an idle connection
LINGERING_TIME = 1.0  # seconds for which the rest of a request's body is read and discarded after the response
HEAD_TIMEOUT = 10.0  # seconds for a request's head, from its first byte to its last
SEND_TIMEOUT = 30.0  # seconds in which a client must take what it has been sent
MAX_FIELD = 16_384  # bytes of a header field; a load balancer passes on as many
MAX_TARGET = 16_000  # bytes of a request's target; differs from MAX_FIELD, since aiohttp's error names only the limit
MAX_FIELDS = 256
MAX_HEAD = 65_536  # bytes of heads that a connection is ahead of its requests; a load balancer passes on as many
SMALL_HEAD = 4096  # bytes of a head that need not be counted
MAX_HEADS = 8 * 1024 * 1024  # bytes of them on all connections together
MAX_UNSENT = 16_384  # bytes of answers beside what the kernel holds; with more, no further request is made
MAX_PIECES = 32  # requests that aiohttp reads ahead

_END = b"\r\n\r\n"  # of a head


class Connections:
    """The open connections."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._new: dict[Connection, None] = {}  # that have had no response yet, in the order of their arrival
        self._used: dict[Connection, None] = {}  # the others, in the order of their last response
        self._lines = logs.RepeatLog()
        self.in_flight: set[Connection] = set()  # that have a request in flight, until its response has been sent
        self.head_bytes = 0  # of their heads, as `Connection.head_bytes`

    def opened(self, connection: "Connection") -> None:
        self._new[connection] = None
        if len(self._new) + len(self._used) > self._limit:
            self._make_room()

    def answered(self, connection: "Connection") -> None:
        self.in_flight.discard(connection)
        self._new.pop(connection, None)
        self._used.pop(connection, None)
        self._used[connection] = None

    def closed(self, connection: "Connection") -> None:
        self.in_flight.discard(connection)
        self._new.pop(connection, None)
        self._used.pop(connection, None)
        self.head_bytes -= connection.head_bytes
        connection.head_bytes = 0

    def _make_room(self) -> None:
        """Close some idle connections: clients that hold many must not lock out others, or probes.

        If most have never had a response, the oldest of these. Otherwise those that have been idle longest.
        """
        self._lines.write("full", logging.WARNING, "too many connections: closing idle ones", limit=self._limit)
        *new, newest = self._new
        order = [*new, *self._used] if len(new) > self._limit // 2 else [*self._used, *new]
        idle = [connection for connection in [*order, newest] if connection not in self.in_flight]
        for connection in idle[: self._limit // 64 + 1]:  # several at once, since looking at all of them takes a while
            connection.abort()

    def shed_heads(self) -> None:
        """Close the connections that hold most of the heads."""
        self._lines.write("heads", logging.WARNING, "too many unfinished requests: closing the longest")
        connections = sorted([*self._new, *self._used], key=lambda connection: connection.head_bytes)
        while connections and self.head_bytes > MAX_HEADS // 2:
            connections.pop().abort()


class Connection(web.RequestHandler):
    """One of them. It answers with a problem what the parser refuses, by means of `refuse`."""

    __slots__ = ("_body", "_connections", "_late", "_parsed_bytes", "_refuse", "_stuck", "_too_long", "head_bytes")

    def __init__(
        self,
        manager: web.Server,
        connections: Connections,
        refuse: Callable[[web.BaseRequest, Problem], web.StreamResponse],
    ) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=KEEPALIVE_TIMEOUT,
            lingering_time=LINGERING_TIME,
            max_line_size=MAX_TARGET,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
            auto_decompress=False,  # decompressing an unread body would cost time, or fail with a traceback
        )
        self._connections = connections
        self._refuse = refuse
        self.head_bytes = 0  # received of heads of which no request has been made yet
        self._parsed_bytes = 0  # of them, up to the last end of a head
        self._body: StreamReader = EMPTY_PAYLOAD  # behind that head
        self._too_long = False
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport:
            self.transport.set_write_buffer_limits(high=MAX_UNSENT)
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._connections.closed(self)
        for timer in (self._late, self._stuck):
            if timer:
                timer.cancel()

    def abort(self) -> None:
        """Close it at once: what the client has not taken is not kept for it, neither here nor in the kernel."""
        self._connections.closed(self)
        if self.transport:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()

    # ---- what the client sends ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Feed the parser head by head, since it drops what it has understood of a piece if it refuses the rest."""
        size = len(data)
        if size <= SMALL_HEAD and data.find(_END) == size - len(_END) and not self.head_bytes and self._body.is_eof():
            super().data_received(data)  # one short head, as most requests come: few are read ahead, so none is counted
            if self._messages:
                self._body = self._messages[-1][1]
            return
        for _ in range(MAX_PIECES):
            end = data.find(_END) + len(_END)
            if end < len(_END) or end == len(data):
                break
            self._feed(data[:end])
            data = data[end:]
        self._feed(data)

    def _feed(self, piece: bytes) -> None:
        """Feed the parser the end of a body, or a head, or the start of one."""
        body, queued, head_bytes = self._body, len(self._messages), len(piece)
        if body.is_eof():
            if self.head_bytes + head_bytes > MAX_HEAD:
                piece, self._too_long = b"\0", True  # which the parser refuses anywhere in a head
            super().data_received(piece)
        else:
            before = body.total_bytes
            super().data_received(piece)
            head_bytes = max(0, head_bytes - (body.total_bytes - before)) if body.is_eof() else 0
        self.head_bytes += head_bytes
        self._connections.head_bytes += head_bytes
        if len(self._messages) > queued:
            self._body = self._messages[-1][1]
            self._parsed_bytes = self.head_bytes
            if self._late:
                self._late.cancel()
                self._late = None
        elif self.head_bytes > self._parsed_bytes and not self._late:
            self._late = self._loop.call_later(HEAD_TIMEOUT, self._give_up)
        if self._connections.head_bytes > MAX_HEADS:
            self._connections.shed_heads()

    def request_made(self) -> None:
        """Called when aiohttp takes the next request from its queue."""
        if self._parsed_bytes and not self._messages:
            self.head_bytes -= self._parsed_bytes
            self._connections.head_bytes -= self._parsed_bytes
            self._parsed_bytes = 0

    def _give_up(self) -> None:
        """The rest of a head has not come in time."""
        if self in self._connections.in_flight:
            self.close()  # after the response
        else:
            self.force_close()

    # ---- what the client gets ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self._loop.call_later(SEND_TIMEOUT, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck:
            self._stuck.cancel()

    def log_access(self, *_: object) -> None:
        """Called when a response has been sent."""
        self._connections.answered(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that the parser refuses, or whose response cannot be sent."""
        # The parser's message may quote what the client sent, such as a password: all of it, or after a colon.
        cause = None if isinstance(exc, InvalidURLError) else (message or "").partition(":")[0][:100]
        too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        if self._too_long:
            problem = Problem(too_large, f"There are more than {MAX_HEAD} bytes ahead of the next answer.")
        elif isinstance(exc, LineTooLong) and exc.args[1] == MAX_TARGET:
            problem = Problem(HTTPStatus.REQUEST_URI_TOO_LONG, f"The target has more than {MAX_TARGET} bytes.")
        elif isinstance(exc, LineTooLong):
            problem = Problem(too_large, f"A header field has more than {MAX_FIELD} bytes.")
        elif cause and cause.startswith("Too many headers"):
            problem = Problem(too_large, f"There are more than {MAX_FIELDS} header fields.")
        elif status == HTTPStatus.BAD_REQUEST:
            problem = Problem(status, "This is not a well-formed HTTP request.", cause=cause)
        else:  # such as too little memory for the response
            problem = mistake(exc or RuntimeError(message))
        return self._refuse(request, problem)
