"""Clients' connections: how many there are, and what each may hold and for how long.

Rules kept here: a connection holds a bounded amount of memory, whether its client reads or not, and so do the
unfinished requests of all together; every request is answered, or its connection is closed in time; no client can lock
others out. Tests: tests/chassis/test_connections.py, test_malformed_http.py, test_hostile_input.py.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import EMPTY_PAYLOAD, StreamReader, web, web_protocol
from aiohttp.http_exceptions import InvalidURLError, LineTooLong

from chassis import logs
from chassis.responses import Problem, mistake

KEEPALIVE_TIMEOUT = 75.0  # seconds; longer than the 60 for which an AWS load balancer keeps an idle connection
LINGERING_TIME = 1.0  # seconds for which the rest of a request is read and discarded after the response
HEAD_TIMEOUT = 10.0  # seconds for a request's head, from its first byte to its last
SEND_TIMEOUT = 30.0  # seconds in which a client must take what it has been sent
MAX_FIELD = 16_384  # bytes of a header field; a load balancer passes on as many
MAX_TARGET = 16_000  # bytes of a request's target; differs from MAX_FIELD, since aiohttp's error names only the limit
MAX_FIELDS = 256
MAX_HEAD = 65_536  # bytes of them in all, with the target; a load balancer passes on as many
MAX_HEADS = 8 * 1024 * 1024  # bytes of unfinished ones on all connections together
MAX_UNSENT = 16_384  # bytes of answers beside what the kernel holds; with more, no further request is made

# aiohttp reads one request ahead of the one that it handles. With more, as many times MAX_HEAD would wait, and when its
# parser refuses one, it would drop those before it.
web_protocol.MAX_MSG_QUEUE_SIZE = 1

_END = b"\r\n\r\n"  # of a head
_END_SIZE = len(_END)


class Connections:
    """The open connections."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lines = logs.RepeatLog()
        # In the order of their last responses, or of their arrival.
        self.open: OrderedDict[Connection, None] = OrderedDict()
        self.head_bytes = 0  # of their unfinished heads

    def opened(self, connection: "Connection") -> None:
        """Close the one that has been idle longest if there are too many: nobody can lock out others, or probes."""
        self.open[connection] = None
        if len(self.open) > self._limit:
            self._lines.write("full", logging.WARNING, "too many connections: closing idle ones", limit=self._limit)
            next(each for each in self.open if not each.in_flight_since).abort()

    def closed(self, connection: "Connection") -> None:
        self.open.pop(connection, None)
        self.head_bytes -= connection.head_bytes
        connection.head_bytes = 0

    def shed_heads(self) -> None:
        """Close the connections that hold most of the heads."""
        self._lines.write("heads", logging.WARNING, "too many unfinished requests: closing the longest")
        connections = sorted(self.open, key=lambda connection: connection.head_bytes)
        while connections and self.head_bytes > MAX_HEADS // 2:
            connections.pop().abort()


class Connection(web.RequestHandler):
    """One of them. `refuse` answers what the parser refuses; `account` gets each response and how long it took."""

    def __init__(
        self,
        manager: web.Server,
        connections: Connections,
        refuse: Callable[[web.BaseRequest, Problem], web.StreamResponse],
        account: Callable[[web.BaseRequest, web.StreamResponse, float], None],
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
        self._account = account
        # When aiohttp has taken a request from its queue, by `time.perf_counter`; 0 when the response has been sent.
        self.in_flight_since = 0.0
        self.answered_at = 0.0  # when the application answered it
        self.head_bytes = 0  # received of an unfinished head
        self.came_alone = True  # the last request: in one piece, with nothing else in it
        self.body: StreamReader = EMPTY_PAYLOAD  # of the last request that aiohttp has taken from its queue
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

    @property
    def upgraded(self) -> bool:
        """Whether what comes next is not HTTP, unless the upgrade is declined."""
        return self._upgraded

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
        if self._parser is None:  # it has refused a request
            return
        if not (self.head_bytes or self._messages) and 0 <= data.find(_END) == len(data) - _END_SIZE < MAX_HEAD:
            # One request, as most come. Nothing follows it, so reading goes on: pausing would take two system calls.
            self.came_alone, self._max_msg_queue_size = True, 2
            super().data_received(data)
            return
        self.came_alone, self._max_msg_queue_size = False, 1
        room = max(0, MAX_HEAD - self.head_bytes)
        self._feed(data[:room])
        if len(data) <= room:
            return
        if self.head_bytes >= MAX_HEAD:
            self._too_long = True
            self._feed(b"\0")  # which the parser refuses anywhere in a head
        else:
            self._feed(data[room:])

    def _feed(self, piece: bytes) -> None:
        """Feed the parser, which stops behind each request."""
        queued, size = len(self._messages), len(piece)
        body = self._messages[-1][1] if queued else self.body
        if body.is_eof():
            super().data_received(piece)
        else:
            read = body.total_bytes
            super().data_received(piece)
            if body.is_eof():
                super().data_received(b"")  # aiohttp does so only after a request that came in one piece
                size = 0 if piece.endswith(_END) else size - (body.total_bytes - read)  # the end of chunks
        if len(self._messages) > queued:
            body = self._messages[-1][1]
            if piece:  # else it comes from an earlier one, which also holds what is behind it
                end = piece.find(_END) + _END_SIZE
                behind = 0 if piece.endswith(_END) or not body.is_eof() else len(piece) - end - body.total_bytes
                self._hold(max(0, behind))
        elif size and body.is_eof() and not self._upgraded:
            self._hold(self.head_bytes + size)

    def _hold(self, size: int) -> None:
        """Note how many bytes of an unfinished head there are."""
        self._connections.head_bytes += size - self.head_bytes
        self.head_bytes = size
        if size and not self._late:
            self._late = self._loop.call_later(HEAD_TIMEOUT, self._give_up)
        elif self._late and not size:
            self._late.cancel()
            self._late = None
        if self._connections.head_bytes > MAX_HEADS:
            self._connections.shed_heads()

    def _give_up(self) -> None:
        """The rest of a head has not come in time."""
        if self.in_flight_since:
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

    def log_access(self, request: web.BaseRequest, response: web.StreamResponse, _: float | None) -> None:
        """Called when a response has been sent, or its client has left."""
        self._account(request, response, self.answered_at - self.in_flight_since)
        self.in_flight_since = 0.0
        if self._parser is None and self.transport and not self.transport.is_closing():
            self._linger(self.transport)
        if self in self._connections.open:  # else it is closed
            self._connections.open.move_to_end(self)

    def _linger(self, transport: asyncio.Transport) -> None:
        """Close it when what still comes has been read: otherwise it is reset, and its client may lose the answer.

        RFC 9112, 9.6.
        """
        self._force_close = True  # otherwise aiohttp would close it now
        transport.write_eof()
        self._loop.call_later(LINGERING_TIME, transport.close)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that the parser refuses, or for which no response could be made."""
        self._parser = None  # which holds what it has read; the rest is not parsed
        # The parser's message may quote what the client sent, such as a password: all of it, or after a colon.
        cause = None if isinstance(exc, InvalidURLError) else (message or "").partition(":")[0][:100]
        too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        if self._too_long:
            problem = Problem(too_large, f"There are more than {MAX_HEAD} bytes of header fields.")
        elif isinstance(exc, LineTooLong) and exc.args[1] == MAX_TARGET:
            problem = Problem(HTTPStatus.REQUEST_URI_TOO_LONG, f"The target has more than {MAX_TARGET} bytes.")
        elif isinstance(exc, LineTooLong):
            problem = Problem(too_large, f"A header field has more than {MAX_FIELD} bytes.")
        elif cause and cause.startswith("Too many headers"):
            problem = Problem(too_large, f"There are more than {MAX_FIELDS} header fields.")
        elif status == HTTPStatus.BAD_REQUEST:
            problem = Problem(status, "This is not a well-formed HTTP request.", cause=cause)
        else:  # such as too little memory for a response
            problem = mistake(exc or RuntimeError(message))
        return self._refuse(request, problem)
