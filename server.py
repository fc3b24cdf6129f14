"""The server around an application: everything that applies to every request, whatever the application's routes.

Rules kept here: every response carries the request's id and never the software's name; every failure becomes a
response, and every error a problem, including those of aiohttp's router, `Expect` handling and parser; no client can
lock others out, or hold resources that it does not use.
"""

import asyncio
import contextlib
import itertools
import logging
import re
import secrets
import select
import socket
import time
from http import HTTPStatus
from typing import Any, Self

from aiohttp import HttpVersion10, hdrs, web
from aiohttp.http_exceptions import LineTooLong

import logs
import metrics
import responses
from responses import REQUEST_ID, Problem, Representation, RepresentationResponse

VERSION = "0.1.0"

KEEPALIVE_TIMEOUT = 75.0  # seconds; longer than the 60 for which an AWS load balancer keeps an idle connection
HALF_CLOSED_TIME = 1.0  # seconds in which requests are still answered on a connection that the client has half closed
IDLE_TURNS = 5  # of the event loop, after which no request is left: between two pipelined ones there are fewer
LINGERING_TIME = 1.0  # seconds for which the rest of a request's body is read and discarded after the response
SEND_TIMEOUT = 10.0  # seconds in which a client must read most of what it has been sent
LAST_REQUESTS = 0.2  # seconds in which the last connections accepted must send their requests
MAX_FIELD = 16_384  # bytes of a header field; a load balancer passes on as many
MAX_TARGET = 16_000  # bytes of a request's target; differs from MAX_FIELD, since aiohttp's error names only the limit
MAX_FIELDS = 256

DRAINING = web.AppKey("draining", asyncio.Event)

_READY = Representation("application/json", b'{"status": "ready"}')
_ALIVE = Representation("application/json", b'{"status": "alive"}')

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch


async def alive(request: web.Request) -> web.StreamResponse:
    """`/healthz`: this process can answer, whatever the state of its dependencies."""
    return RepresentationResponse(request, _ALIVE)


async def ready(request: web.Request) -> web.StreamResponse:
    """`/readyz`: this server should get requests. Raises `Problem` while it drains."""
    draining = request.app.get(DRAINING)
    if draining and draining.is_set():
        raise responses.not_ready("This server is about to stop.")
    return RepresentationResponse(request, _READY)


class Server(web.Server):
    """Serves an application: a context manager that starts and ends it. Call it to get a protocol for a socket, as
    `loop.create_server` does.

    It stands around the application, since middlewares and signals never see the answers of aiohttp's router and
    parser.
    """

    def __init__(self, app: web.Application, access_log: str = "errors", max_connections: int = 1000) -> None:
        # Cancels a handler when its client leaves, since nobody then waits for the response.
        super().__init__(self._respond, handler_cancellation=True)
        self.draining = app[DRAINING] = asyncio.Event()
        app.on_response_prepare.append(self._complete)
        self._app = app
        self._runner = web.AppRunner(app)
        self._access_log = access_log
        self._max_connections = max_connections
        self._open: dict[web.RequestHandler, None] = {}  # connections, in order of arrival
        self._in_flight: set[web.RequestHandler] = set()  # connections with a request in flight
        self._failures = logs.RepeatLog()
        self._ids = map(f"{secrets.token_hex(6)}-{{:x}}".format, itertools.count(1))
        metrics.ACTIVE_REQUESTS.set_function(lambda: len(self._in_flight))

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        inner = self._runner.server
        assert inner is not None  # noqa: S101  # set up above
        self._handle = inner.request_handler
        self.request_factory = inner.request_factory
        return self

    async def __aexit__(self, *_: object) -> None:
        # aiohttp waits twice this long, and for ever for 0. Any waiting is up to `finish`, before this.
        await self.shutdown(0.01)
        await self._runner.cleanup()

    # ---- requests ----------------------------------------------------------------------------------------------

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        """Let the application answer. Raises a `web.HTTPException` that is not an error, such as a redirect."""
        started = time.perf_counter()
        if request.version < HttpVersion10:
            return self.refuse(request, Problem(HTTPStatus.BAD_REQUEST, "HTTP before 1.0 is not spoken here."))
        if not request.headers.get(hdrs.EXPECT, "").isascii():  # aiohttp would fail on it
            return self.refuse(request, Problem(HTTPStatus.EXPECTATION_FAILED, "This server expects no such thing."))
        sent_id = request.headers.get("X-Request-ID")
        request[REQUEST_ID] = sent_id if sent_id and _VALID_REQUEST_ID(sent_id) else next(self._ids)
        self._in_flight.add(request.protocol)
        problem = raised = None
        try:
            response = await self._handle(request)
        except web.HTTPException as error:
            if not request.path and request.method != hdrs.METH_CONNECT:  # `http://host` has the path `/`
                return await self._respond(request.clone(rel_url=request.rel_url.with_path("/", keep_query=True)))
            response = raised = error
            if isinstance(error, web.HTTPMethodNotAllowed) and request.method == hdrs.METH_OPTIONS:
                response = raised = web.HTTPNoContent(headers={hdrs.ALLOW: error.headers[hdrs.ALLOW]})
            elif error.status >= HTTPStatus.BAD_REQUEST:
                problem = responses.problem_of(error)
        except Exception as error:
            problem = mistake(error)
        finally:
            self._in_flight.discard(request.protocol)
        if problem:
            response = self._problem_response(request, problem)
        seconds = time.perf_counter() - started
        resource = request.match_info.route.resource  # type: ignore[attr-defined]  # the application's are `web.Request`
        route = resource.canonical if resource else await self._refusing_route(request)
        metrics.observe_request(request.method, route, response.status, seconds)
        # The start of the drain is logged already, so probes that see it are not.
        expected = problem and problem.kind == "not-ready" and self.draining.is_set()
        if (problem and not expected) or self._access_log == "all":
            self._log(request, route, response.status, seconds, problem)
        if raised and not problem:
            raise raised
        return response

    async def _refusing_route(self, request: web.BaseRequest) -> str | None:
        """The route with the request's path but not its method; None if there is none."""
        for resource in self._app.router.resources():
            _, allowed_methods = await resource.resolve(request)  # type: ignore[arg-type]
            if allowed_methods:
                return resource.canonical
        return None

    async def _complete(self, request: web.Request, response: web.StreamResponse) -> None:
        """Called before a response is sent (signal `on_response_prepare`), whether or not its handler sends it."""
        if not isinstance(response, RepresentationResponse):  # which itself writes the id, and no name
            response.headers["X-Request-ID"] = request[REQUEST_ID]
            response.headers[hdrs.SERVER] = ""  # instead of aiohttp's name
        misframed = request.version < (1, 1) and hdrs.TRANSFER_ENCODING in request.headers  # RFC 9112, 6.1
        # aiohttp's parser loses whatever follows an Upgrade (h2c, say) that no handler accepts.
        upgrade_declined = hdrs.UPGRADE in request.headers and response.status != HTTPStatus.SWITCHING_PROTOCOLS
        if self.draining.is_set() or misframed or upgrade_declined:
            responses.end_connection(response)

    def refuse(self, request: web.BaseRequest, problem: Problem) -> web.StreamResponse:
        """The response if the application was not asked, or its own response could not be sent."""
        request[REQUEST_ID] = request.get(REQUEST_ID) or next(self._ids)
        metrics.observe_request("_OTHER", None, problem.status, 0)
        self._log(request, None, problem.status, 0, problem)
        response = self._problem_response(request, problem, routed=False)
        response.force_close()
        return response

    def _problem_response(
        self, request: web.BaseRequest, problem: Problem, *, routed: bool = True
    ) -> RepresentationResponse:
        document = responses.problem_representation(problem, request[REQUEST_ID])
        response = RepresentationResponse(request, document, routed=routed)
        for name, value in problem.headers.items():  # such as Allow, and fields that middlewares have added
            if name not in (hdrs.CONTENT_TYPE, hdrs.CONTENT_LENGTH):
                response.headers.add(name, value)
        response.cookies.update(problem.cookies)
        return response

    def _log(
        self, request: web.BaseRequest, route: str | None, status: int, seconds: float, problem: Problem | None
    ) -> None:
        """Write one line: always for our own failures (5xx), for other responses according to ACCESS_LOG."""
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
        if problem:
            message = problem.detail
            fields["cause"] = problem.cause
            if problem.downstream_request_id != request[REQUEST_ID]:
                fields["downstream_request_id"] = problem.downstream_request_id
            if status == HTTPStatus.INTERNAL_SERVER_ERROR:
                fields["exception"] = problem.__cause__
        if self._access_log == "all":
            logs.log(level, message, **fields)
        else:
            self._failures.write((status, route, message), level, message, **fields)

    # ---- connections -------------------------------------------------------------------------------------------

    def __call__(self) -> web.RequestHandler:
        return _Connection(
            self,
            loop=asyncio.get_running_loop(),
            access_log=None,
            keepalive_timeout=KEEPALIVE_TIMEOUT,
            lingering_time=LINGERING_TIME,
            max_line_size=MAX_TARGET,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
            auto_decompress=False,  # decompressing an unread body would cost time, or fail with a traceback
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
        """Close some of the oldest idle connections: clients that hold many must not lock out others, or probes."""
        limit = self._max_connections
        self._failures.write("full", logging.WARNING, "too many connections: closing the oldest idle ones", limit=limit)
        idle = [connection for connection in self._open if self.is_idle(connection)]
        for connection in idle[: limit // 64 + 1]:  # several at once, since looking at all of them takes a while
            connection.force_close()
            del self._open[connection]

    def is_idle(self, connection: web.RequestHandler) -> bool:
        return connection not in self._in_flight

    async def finish(self, hurry: asyncio.Event, timeout: float) -> None:
        """Close idle connections, and wait for the responses on the others, for at most `timeout` seconds.

        Call it when no more connections are accepted. `hurry` ends the waiting.
        """
        deadline = time.monotonic() + timeout
        grace = time.monotonic() + min(timeout, LAST_REQUESTS)
        while self.connections and not hurry.is_set():
            now = time.monotonic()
            if now > deadline or (now > grace and not is_readable(*self._sockets())):
                break
            await wait_for_event(hurry, 0.01)
        self.pre_shutdown()
        while self._busy() and time.monotonic() < deadline and not hurry.is_set():
            await wait_for_event(hurry, 0.01)

    def _sockets(self) -> list[socket.socket]:
        transports = [connection.transport for connection in self.connections]
        return [transport.get_extra_info("socket") for transport in transports if transport]

    def _busy(self) -> bool:
        """Whether a request is in flight, or a response has not yet reached the kernel."""
        return bool(self._in_flight) or any(
            connection.transport and connection.transport.get_write_buffer_size() for connection in self.connections
        )


def is_readable(*sockets: socket.socket) -> bool:
    """Whether the kernel holds unread data, or an unaccepted connection, for one of these."""
    poll = select.poll()
    for each in sockets:
        poll.register(each, select.POLLIN)
    return bool(poll.poll(0))


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, but at most this long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def mistake(error: BaseException) -> Problem:
    """The problem that a client sees after a defect; the log has the details."""
    cause = logs.describe(error)
    problem = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "This server made a mistake.", cause=cause)
    problem.__cause__ = error
    return problem


class _Connection(web.RequestHandler):
    """Answers with a problem what the parser refuses, and ends a connection if its client does not read or has left."""

    __slots__ = ("_server", "_stalled")

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._stalled: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Limit how long a client that does not read can occupy memory."""
        super().pause_writing()
        if self.transport:
            self._stalled = asyncio.get_running_loop().call_later(SEND_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._stalled:
            self._stalled.cancel()

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp declares None, asyncio the type here
        """Still send responses in progress to a client that has only closed its sending side (`nc -N`).

        For a second: it looks like a client that has left, and work for that one should not go on for long.
        """
        self._close_when_idle(asyncio.get_running_loop().time() + HALF_CLOSED_TIME)
        return True

    def _close_when_idle(self, deadline: float, idle_turns: int = 0) -> None:
        loop = asyncio.get_running_loop()
        if idle_turns == IDLE_TURNS or loop.time() > deadline:
            self.force_close()
        elif self._server.is_idle(self):
            loop.call_soon(self._close_when_idle, deadline, idle_turns + 1)
        else:
            loop.call_later(0.01, self._close_when_idle, deadline)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that the parser refuses, or whose response cannot be sent."""
        # After the colon, the parser's message quotes what the client sent, which may be a secret.
        cause = (message or "").partition(":")[0][:100]
        if isinstance(exc, LineTooLong) and exc.args[1] == MAX_TARGET:
            problem = Problem(HTTPStatus.REQUEST_URI_TOO_LONG, f"The target has more than {MAX_TARGET} bytes.")
        elif isinstance(exc, LineTooLong):
            detail = f"A header field has more than {MAX_FIELD} bytes."
            problem = Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)
        elif cause.startswith("Too many headers"):
            detail = f"There are more than {MAX_FIELDS} header fields."
            problem = Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)
        elif status == HTTPStatus.BAD_REQUEST:
            problem = Problem(status, "This is not a well-formed HTTP request.", cause=cause)
        else:  # such as too little memory for the response
            problem = mistake(exc or RuntimeError(message))
        return self._server.refuse(request, problem)
