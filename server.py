"""What both servers share of HTTP: requests in, responses out, probes, connections.

Rules kept here: every answer carries the request's id and never the software's name; whatever happens, what the HTTP
parser refuses included, becomes an answer; little is made anew for each request; no client can keep others out, or
hold what it does not use.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time  # not documented, but made only once a second

import logs
import metrics
import responses
from responses import Answer, Problem

VERSION = "0.1.0"

KEEPALIVE_TIMEOUT = 75.0  # seconds; longer than the 60 for which an AWS load balancer keeps an idle connection
HALF_CLOSED_TIME = 1.0  # seconds in which a client that has ended its sending side still gets its answer
HALF_CLOSED_LOOKS = 0.01  # seconds between two looks at whether it has got it
LINGERING_TIME = 1.0  # seconds that the rest of a request's body is read and thrown away after the answer
SEND_TIMEOUT = 10.0  # seconds in which a client has to read enough for the next answer to be sent
LAST_REQUESTS = 0.2  # seconds that a connection accepted last has to show its request

REQUEST: ContextVar[web.BaseRequest] = ContextVar("request")
REQUEST_ID = web.RequestKey("request_id", str)

Route = Callable[[], Awaitable[Answer]]
"""Answers GET, for the request in `REQUEST`. Raises `Problem` for errors that it expects."""


def always(answer: Answer) -> Route:
    """A route whose answer never changes."""

    async def route() -> Answer:
        return answer

    return route


READY = Answer(HTTPStatus.OK, "application/json", b'{"status": "ready"}')
ALIVE = Answer(HTTPStatus.OK, "application/json", b'{"status": "alive"}')

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch

_Handler = Callable[[Any], Awaitable[web.StreamResponse]]


class Server(web.Server):
    """Routes requests, and turns whatever happens into an answer.

    A table of fixed paths on aiohttp's low-level server: an `Application` would take longer to find the same routes,
    and could not answer what is no HTTP itself.
    """

    def __init__(self, routes: Mapping[str, Route], access_log: str, max_connections: int) -> None:
        # A handler is cancelled when its client leaves: nobody is left to wait for the answer.
        super().__init__(_instrumented(self._answer), handler_cancellation=True)
        self.draining = False
        self._ready = routes.get("/readyz", always(READY))
        self._routes = {**routes, "/healthz": always(ALIVE), "/readyz": self._readyz, "/metrics": metrics.answer}
        self._access_log = access_log
        self._max_connections = max_connections
        self._open: dict[web.RequestHandler, None] = {}  # connections, in the order of their arrival
        self._failures = logs.RepeatLog()
        self._in_flight: set[web.RequestHandler] = set()  # connections with a request in hand
        self._ids = map(f"{secrets.token_hex(6)}-{{:x}}".format, itertools.count(1))
        metrics.ACTIVE_REQUESTS.set_function(lambda: len(self._in_flight))

    def __call__(self) -> web.RequestHandler:
        return _Connection(
            self,
            loop=asyncio.get_running_loop(),
            access_log=None,
            keepalive_timeout=KEEPALIVE_TIMEOUT,
            lingering_time=LINGERING_TIME,
            auto_decompress=False,  # bodies are thrown away: unpacking them would cost time, and fail with a traceback
        )

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._open) >= self._max_connections:
            self._make_room()
        if len(self._open) < self._max_connections:
            self._open[handler] = None
        else:
            transport.abort()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._open.pop(handler, None)

    def _make_room(self) -> None:
        """Close some of the oldest that are idle: who only holds connections keeps nobody out, probes included."""
        limit = self._max_connections
        self._failures.write("full", logging.WARNING, "too many connections: closing the oldest idle ones", limit=limit)
        idle = [connection for connection in self._open if self.is_idle(connection)]
        for connection in idle[: limit // 64 + 1]:  # not one at a time, since looking at all of them takes a while
            connection.force_close()
            del self._open[connection]

    def is_idle(self, connection: web.RequestHandler) -> bool:
        return connection not in self._in_flight

    async def _readyz(self) -> Answer:
        if self.draining:
            raise responses.not_ready("This server is about to stop.")
        return await self._ready()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        started = time.perf_counter()
        request[REQUEST_ID] = self._request_id(request)
        REQUEST.set(request)
        self._in_flight.add(request.protocol)
        failure = None
        try:
            answer = await self._route(request)()
        except Problem as problem:
            failure = problem
        except Exception as error:
            failure = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "This server made a mistake.", cause=repr(error))
            failure.__cause__ = error
        finally:
            self._in_flight.discard(request.protocol)
        if failure:
            answer = failure.answer(request[REQUEST_ID])
        response = self._response(request, answer)
        seconds = time.perf_counter() - started
        path = request.path if request.path in self._routes else None
        metrics.observe_request(request.method, path, response.status, seconds)
        if failure or self._access_log == "all":
            self._log(request, path, response.status, seconds, failure)
        return response

    def _request_id(self, request: web.BaseRequest) -> str:
        sent = request.headers.get("X-Request-ID")
        return sent if sent and _VALID_REQUEST_ID(sent) else next(self._ids)

    def _route(self, request: web.BaseRequest) -> Route:
        route = self._routes.get(request.path)
        if route is None:
            raise Problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.")
        if request.method not in ("GET", "HEAD"):
            allowed = {"Allow": "GET, HEAD"}
            raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD work here.", headers=allowed)
        return route

    def _response(self, request: web.BaseRequest, answer: Answer) -> "_Response":
        """Add what differs between those who ask."""
        status, head, body = answer.status, answer.head, answer.body
        if_none_match = request.headers.get(hdrs.IF_NONE_MATCH)
        if if_none_match and answer.is_known(if_none_match):
            status, head, body = HTTPStatus.NOT_MODIFIED, answer.not_modified_head, b""
        elif request.method == "HEAD":
            body = b""
        http_1_0 = request.version < (1, 1)
        keep_alive = (
            request.keep_alive
            and not self.draining
            and hdrs.UPGRADE not in request.headers  # aiohttp's parser loses what follows one that nobody takes up
            and not (http_1_0 and hdrs.TRANSFER_ENCODING in request.headers)  # RFC 9112, 6.1
        )
        own = f"X-Request-ID: {request[REQUEST_ID]}\r\nDate: {rfc822_formatted_time()}\r\n"
        if not keep_alive:
            own += "Connection: close\r\n"
        elif http_1_0:
            own += "Connection: keep-alive\r\n"
        return _Response(status, b"%b%b\r\n%b" % (head, own.encode(), body), keep_alive)

    def _log(
        self, request: web.BaseRequest, path: str | None, status: int, seconds: float, failure: Problem | None
    ) -> None:
        """One line: always for failures of ours (5xx), for others as ACCESS_LOG says."""
        ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if self._access_log == "off" and not ours:
            return
        level, message = (logging.ERROR if ours else logging.INFO), "request"
        fields: dict[str, Any] = {
            "request_id": request[REQUEST_ID],
            "method": request.method,
            "path": request.path,
            "status": status,
            "duration_ms": round(seconds * 1000, 3),
        }
        if failure:
            message = failure.detail
            fields["cause"] = failure.cause
            if failure.downstream_request_id != request[REQUEST_ID]:
                fields["downstream_request_id"] = failure.downstream_request_id
            if status == HTTPStatus.INTERNAL_SERVER_ERROR:
                fields["exception"] = failure.__cause__
        if self._access_log == "all":
            logs.log(level, message, **fields)
        else:
            self._failures.write((status, path, message), level, message, **fields)

    def refuse(self, request: web.BaseRequest, problem: Problem) -> web.StreamResponse:
        """The answer where there was none of a route."""
        request[REQUEST_ID] = request.get(REQUEST_ID) or next(self._ids)
        metrics.observe_request("_OTHER", None, problem.status, 0)
        self._log(request, None, problem.status, 0, problem)
        return self._response(request, problem.answer(request[REQUEST_ID]))

    async def finish(self, hurry: asyncio.Event, timeout: float) -> None:
        """End all connections: idle ones now, others after their answer, at the latest in `timeout` seconds.

        To be called when no more connections are accepted. `hurry` ends the waiting.
        """
        deadline = time.monotonic() + timeout
        grace = time.monotonic() + min(timeout, LAST_REQUESTS)
        while self.connections and time.monotonic() < grace and not hurry.is_set():
            await wait_for_event(hurry, 0.01)
        self.pre_shutdown()
        while self._busy() and time.monotonic() < deadline and not hurry.is_set():
            await wait_for_event(hurry, 0.01)
        # aiohttp waits twice as long as it is told here, and for ever for 0. All waiting has been done above.
        await self.shutdown(0.01)

    def _busy(self) -> bool:
        """Whether a request is in flight, or an answer not yet with the kernel."""
        return bool(self._in_flight) or any(
            connection.transport and connection.transport.get_write_buffer_size() for connection in self.connections
        )


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, but not longer than this."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _instrumented(handler: _Handler) -> _Handler:
    """The handler inside the middlewares that an `Application` made now would have: none, unless somebody has put them
    into `web.Application` from outside, as OpenTelemetry's zero-code instrumentation does. Nothing is added to a
    request where there are none.
    """
    for middleware in reversed(web.Application().middlewares):
        handler = functools.partial(middleware, handler=handler)
    return handler


class _Response(web.StreamResponse):
    """Sends bytes that are ready: composing the same header fields for each request takes a third of its time."""

    def __init__(self, status: int, data: bytes, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._data = data
        self._keep = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._keep

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(self._data)
        if request.protocol.writing_paused:
            try:
                async with asyncio.timeout(SEND_TIMEOUT):
                    await request.writer.drain()
            except TimeoutError:  # the client does not read, and what it does not read is memory
                transport.abort()
                raise ConnectionResetError("the client does not read") from None
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


class _Connection(web.RequestHandler):
    """Answers what the parser refuses as a problem; middlewares and signals would not see it."""

    __slots__ = ("_server",)

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp says None, asyncio what is here
        """Let answers under way still go out; asyncio would close at once.

        A client that has only ended its sending side (`nc -N`) looks like one that has left, for whom nothing should
        go on for long: hence the time limit.
        """
        loop = asyncio.get_running_loop()
        loop.call_later(HALF_CLOSED_LOOKS, self._close_when_idle, loop.time() + HALF_CLOSED_TIME, False)
        return True

    def _close_when_idle(self, deadline: float, was_idle: bool) -> None:
        """Idle is who is so twice in a row: the next of several requests may be about to be taken in hand."""
        if self.transport is None:
            return
        loop = asyncio.get_running_loop()
        idle = self._server.is_idle(self)
        if (idle and was_idle) or loop.time() >= deadline:
            self.transport.close()
        else:
            loop.call_later(HALF_CLOSED_LOOKS, self._close_when_idle, deadline, idle)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status == HTTPStatus.BAD_REQUEST:
            # The parser's message goes on with what the client sent, which may be a secret.
            cause = (message or repr(exc)).partition(":")[0][:100]
            problem = Problem(HTTPStatus.BAD_REQUEST, "This is not a well-formed HTTP request.", cause=cause)
        else:  # such as no memory for the answer
            problem = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "This server made a mistake.", cause=repr(exc))
            problem.__cause__ = exc
        return self._server.refuse(request, problem)
