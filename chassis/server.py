"""The server around an application: everything that applies to every request, whatever the application's routes.

Rules kept here: every response carries the request's id and never the software's name; every failure becomes a
response, and every error a problem, including those of aiohttp's router, `Expect` handling and parser; no request
decides how long the event loop is busy, what the log says outside fields, or which failures count as equal.
Tests: tests/chassis/test_server.py, tests/chassis/test_hostile_input.py.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from aiohttp import HttpVersion11, StreamReader, hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy, istr
from yarl import URL

from chassis import logs, metrics
from chassis.connections import Connection, Connections
from chassis.responses import (
    REQUEST_ID,
    Problem,
    Representation,
    RepresentationResponse,
    end_connection,
    mistake,
    not_ready,
    problem_of,
)

_PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"]
VERSION: str = _PROJECT["version"]

MAX_SEGMENTS = 32  # of a path, since aiohttp's router looks up each path that it begins with

DRAINING = web.AppKey("draining", asyncio.Event)
# What an application asks its dependencies before it calls itself ready; raises `Problem` if it is not.
CHECK: web.AppKey[Callable[[web.Request], Awaitable[object]]] = web.AppKey("check")

_PROBLEM = web.ResponseKey("problem", Problem)
_READY = Representation("application/json", b'{"status": "ready"}')
_ALIVE = Representation("application/json", b'{"status": "alive"}')

_X_REQUEST_ID = istr("X-Request-ID")  # multidict would put a `str` into lower case for each search
_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch
_HOST = re.compile(r"(?:[\w.~!$&'()*+,;=%-]*+|\[[\w.~!$&'()*+,;=:-]++\])(?::\d*+)?", re.ASCII)  # RFC 3986, 3.2.2
_is_host = functools.lru_cache(maxsize=100)(_HOST.fullmatch)  # most requests name the same
_NO_HOST = CIMultiDictProxy(CIMultiDict({hdrs.HOST: "//"}))  # for a target whose host is none


async def alive(request: web.Request) -> web.StreamResponse:
    """`/healthz`: this process can answer, whatever the state of its dependencies."""
    return RepresentationResponse(request, _ALIVE)


async def ready(request: web.Request) -> web.StreamResponse:
    """`/readyz`: this server should get requests. Raises `Problem` while it drains, or if its `CHECK` does."""
    config = request.config_dict  # of a sub-application, too
    draining = config.get(DRAINING)
    if draining and draining.is_set():
        raise not_ready("This server is about to stop.")
    if check := config.get(CHECK):
        try:
            await check(request)
        except Problem as problem:
            raise not_ready(problem.detail, problem.cause) from problem
    return RepresentationResponse(request, _READY)


async def end_failed_connection(_request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: end a connection after a 5xx, so that the next call can reach another replica.

    Kubernetes balances connections, not requests. This is for servers whose clients are services. One for browsers
    keeps its connections: an outage must not cost each of them a new one, which would not lead elsewhere behind a load
    balancer.
    """
    if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        end_connection(response)


class Server(web.Server):
    """Serves an application: a context manager that starts and ends it. Call it to get a protocol for a socket, as
    `loop.create_server` does.

    It stands around the application, since middlewares and signals never see the answers of aiohttp's router and
    parser.
    """

    def __init__(self, app: web.Application, access_log: str = "errors", max_connections: int = 1000) -> None:
        # Cancels a handler when its client leaves, since nobody then waits for the response.
        super().__init__(self._respond, request_factory=self._make_safely, handler_cancellation=True)
        self.draining = app[DRAINING] = asyncio.Event()
        app.on_response_prepare.append(self._complete)
        self._app = app
        self._runner = web.AppRunner(app)
        self._access_log = access_log
        self._open = Connections(max_connections)
        self._failures = logs.RepeatLog()
        self._ids = map(f"{secrets.token_hex(6)}-{{:x}}".format, itertools.count(1))
        metrics.ACTIVE_REQUESTS.set_function(lambda: sum(each.in_flight_since > 0 for each in self._open.open))

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        inner = self._runner.server
        assert inner is not None  # noqa: S101  # set up above
        self._handle = inner.request_handler
        self._make = inner.request_factory
        return self

    async def __aexit__(self, *_: object) -> None:
        # aiohttp waits twice this long, and for ever for 0. Any waiting is up to `finish`, before this.
        await self.shutdown(0.01)
        await self._app.cleanup()

    # ---- requests ----------------------------------------------------------------------------------------------

    def _make_safely(
        self, message: Any, body: StreamReader, connection: Any, writer: Any, task: Any
    ) -> web.BaseRequest:
        """Make a request. aiohttp answers nothing if this raises, and leaves the connection open."""
        connection.in_flight_since = connection.answered_at = time.perf_counter()
        connection.body = body
        if message.upgrade:
            came_alone = connection.came_alone
            connection.data_received(b"")  # aiohttp sets itself to an upgrade after each pause, and there was none
            if not (came_alone or connection.upgraded):
                # aiohttp has lost what came behind it, so that the client has to send that again.
                message = message._replace(should_close=True)
        if message.chunked and message.version < HttpVersion11:  # RFC 9112, 6.1
            message = message._replace(should_close=True)
        if not message.url.raw_path and message.method != hdrs.METH_CONNECT:  # `http://host` has the path `/`
            message = message._replace(url=message.url.with_path("/", keep_query=True))
        try:
            return self._make(message, body, connection, writer, task)
        except ValueError:  # yarl's, such as for `http://xn--a/`
            message = message._replace(url=URL("/"), headers=_NO_HOST)
            return self._make(message, body, connection, writer, task)

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request. Raises a `web.HTTPException` that is no error, such as a redirect."""
        if refusal := _refusal(request):
            return self.refuse(request, refusal)
        sent_id = request.headers.get(_X_REQUEST_ID)
        request[REQUEST_ID] = sent_id if sent_id and _VALID_REQUEST_ID(sent_id) else next(self._ids)
        try:
            response = await self._handle(request)
            if not isinstance(response, web.StreamResponse):
                raise TypeError(f"the handler returned {type(response).__name__}, which is no response")
            return response
        except Exception as error:
            if isinstance(error, ConnectionError) and (not request.transport or request.transport.is_closing()):
                raise asyncio.CancelledError from error  # the client has left, which aiohttp says in this way
            if request.writer.output_size:  # a response has begun, and nothing else may follow it on its connection
                request.protocol.force_close()
                response = web.Response(status=HTTPStatus.INTERNAL_SERVER_ERROR)
                response[_PROBLEM] = mistake(error)
                return response
            if isinstance(error, web.HTTPException) and error.status < HTTPStatus.BAD_REQUEST:
                raise
            if isinstance(error, web.HTTPMethodNotAllowed) and request.method == hdrs.METH_OPTIONS:
                return web.Response(status=HTTPStatus.NO_CONTENT, headers={hdrs.ALLOW: error.headers[hdrs.ALLOW]})
            problem = problem_of(error) if isinstance(error, web.HTTPException) else mistake(error)
            return self._problem_response(request, problem)
        finally:
            # Not when the client has taken the answer, which is up to the client.
            request.protocol.answered_at = time.perf_counter()  # type: ignore[attr-defined]  # it is a `Connection`

    async def _complete(self, request: web.Request, response: web.StreamResponse) -> None:
        """Called before a response is sent (signal `on_response_prepare`), whether or not its handler sends it."""
        if not isinstance(response, RepresentationResponse):  # which itself writes the id, and no name
            response.headers[_X_REQUEST_ID] = request[REQUEST_ID]
            response.headers.pop(hdrs.SERVER, None)  # aiohttp's name
        if self.draining.is_set():
            end_connection(response)

    def refuse(self, request: web.BaseRequest, problem: Problem) -> web.StreamResponse:
        """The response if the application was not asked, or none could be made of what it did."""
        request[REQUEST_ID] = request.get(REQUEST_ID) or next(self._ids)
        response = self._problem_response(request, problem)
        response.force_close()
        return response

    def _problem_response(self, request: web.BaseRequest, problem: Problem) -> RepresentationResponse:
        response = RepresentationResponse(request, problem.representation(request[REQUEST_ID]))
        response[_PROBLEM] = problem
        for name, value in problem.headers.items():  # such as Allow, and fields that middlewares have added
            if name not in (hdrs.CONTENT_TYPE, hdrs.CONTENT_LENGTH):
                response.headers.add(name, value)
        response.cookies.update(problem.cookies)
        return response

    def _account(self, request: web.BaseRequest, response: web.StreamResponse, seconds: float) -> None:
        """Count a request. Log our own failures (5xx) always, others according to ACCESS_LOG."""
        status = response.status
        problem = response.get(_PROBLEM) if status >= HTTPStatus.BAD_REQUEST else None
        match_info = request._match_info  # type: ignore[attr-defined]  # aiohttp's own: None if no application was asked
        resource = None if match_info is None else match_info.route.resource
        route = resource.canonical if resource else None
        metrics.observe_request(request.method, route, status, seconds)
        if self._access_log != "all":
            if not problem or (problem.kind == "not-ready" and self.draining.is_set()):
                return  # the start of the drain is logged already, so probes that see it are not
            if self._access_log == "off" and status < HTTPStatus.INTERNAL_SERVER_ERROR:
                return
        ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR
        level, message = (logging.ERROR if ours else logging.INFO), "request failed" if problem else "request"
        fields: dict[str, Any] = {
            "request_id": request[REQUEST_ID],
            "method": request.method,
            "path": request.path,
            "status": status,
            "duration_ms": round(seconds * 1000, 3),
        }
        if problem:
            fields["detail"] = problem.detail  # a field, since a client or a dependency may have written it
            fields["cause"] = problem.cause
            if problem.shared_with != request[REQUEST_ID]:
                fields["shared_with"] = problem.shared_with
            if status == HTTPStatus.INTERNAL_SERVER_ERROR:
                fields["exception"] = problem.__cause__
        if self._access_log == "all":
            logs.log(level, message, **fields)
        else:
            self._failures.write((status, route), level, message, **fields)

    # ---- connections -------------------------------------------------------------------------------------------

    def __call__(self) -> web.RequestHandler:
        return Connection(self, self._open, self.refuse, self._account)

    async def finish(self, hurry: asyncio.Event, timeout: float) -> None:
        """Close idle connections, and wait for the responses on the others, for at most `timeout` seconds.

        Call it when no more connections are accepted. `hurry` ends the waiting. Before it waits, it sends the
        application's signal `on_shutdown`, which ends WebSockets and the like.
        """
        deadline = time.monotonic() + timeout
        self.pre_shutdown()
        signal = asyncio.create_task(self._app.shutdown())
        while (self._busy() or not signal.done()) and time.monotonic() < deadline and not hurry.is_set():
            await wait_for_event(hurry, 0.01)
        signal.cancel()

    def _busy(self) -> bool:
        """Whether a request is in flight, or a response has not yet reached the kernel."""
        return any(
            each.in_flight_since or (each.transport and each.transport.get_write_buffer_size())
            for each in self._open.open
        )


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, but at most this long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _refusal(request: web.BaseRequest) -> Problem | None:
    """Why a request is none for the application, if so."""
    headers = request.headers
    if not _is_host(headers.get(hdrs.HOST, "")):  # RFC 9112, 3.2
        return Problem(HTTPStatus.BAD_REQUEST, "The target or the field Host names what can be no host.")
    # aiohttp's own check repeats the field to the client and in the log, and fails if it is no text.
    if hdrs.EXPECT in headers and headers[hdrs.EXPECT].lower() != "100-continue":
        return Problem(HTTPStatus.EXPECTATION_FAILED, "This server expects no such thing.")
    if request.rel_url.raw_path.count("/") > MAX_SEGMENTS:
        return Problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.")
    return None
