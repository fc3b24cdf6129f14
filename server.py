"""What both servers share: answers, problems (RFC 9457), routing, probes, and the life of a server.

Rules kept here: every answer carries the request's id and never the software's name; every error is a problem, the
HTTP parser's own included; what differs between two requests is all that is made for each of them; and a server
ends by itself within its time, whatever its clients do.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, NoReturn

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

import logs
import settings
from settings import setting

VERSION = "0.1.0"

KEEPALIVE_TIMEOUT = 75.0  # seconds; longer than the 60 that an AWS load balancer keeps an idle connection
LINGERING_TIME = 1.0  # seconds that a request's body is read and thrown away after the answer
SEND_TIMEOUT = 10.0  # seconds in which a client has to read enough for the next answer to be sent
LAST_REQUESTS = 0.2  # seconds in which a connection that was just accepted has to show its request, at the end
BACKLOG = 4096  # connections that wait for being accepted; the kernel's own bound is usually the same

REQUEST: ContextVar[web.BaseRequest] = ContextVar("request")
REQUEST_ID = web.RequestKey("request_id", str)

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch
_X_REQUEST_ID = "X-Request-ID"


# ---- answers ---------------------------------------------------------------------------------------------------


class Answer:
    """All of a response that does not depend on who asks: made once, sent to many."""

    __slots__ = ("body", "etag", "head", "not_modified_head", "status")

    def __init__(self, status: int, content_type: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.body = body
        self.etag = ""
        fields = {"Cache-Control": "no-store"} if status != HTTPStatus.OK else {}
        if status == HTTPStatus.OK:
            self.etag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
            fields = {"Cache-Control": "no-cache", "ETag": self.etag}
        fields.update(headers or {})
        self.not_modified_head = _head(HTTPStatus.NOT_MODIFIED, fields)
        self.head = _head(status, fields | {"Content-Type": content_type, "Content-Length": str(len(body))})


def _head(status: int, fields: Mapping[str, str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        *(f"{name}: {fields[name]}" for name in fields),
    ]
    return "".join(line + "\r\n" for line in lines).encode("latin-1")


def json_answer(name: str, content: str, headers: Mapping[str, str]) -> Answer:
    """The answer `{"name": "content"}`. Raises `UnicodeEncodeError` for what is no Unicode text (lone surrogates)."""
    body = json.dumps({name: content}, ensure_ascii=False).encode()
    return Answer(HTTPStatus.OK, "application/json", body, headers)


class Response(web.StreamResponse):
    """Sends an `Answer` to one client in one piece.

    Sending ready bytes takes some ten microseconds less than composing the header fields anew for each request.
    """

    def __init__(self, answer: Answer, request_id: str, server: "Server") -> None:
        super().__init__(status=answer.status)
        self._answer = answer
        self._request_id = request_id
        self._server = server
        self._keep = False

    @property
    def keep_alive(self) -> bool:
        return self._keep

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        answer = self._answer
        head, body = answer.head, answer.body
        if answer.etag and (known := request.headers.get(hdrs.IF_NONE_MATCH)) and _matches(known, answer.etag):
            head, body = answer.not_modified_head, b""
            self.set_status(HTTPStatus.NOT_MODIFIED)
        elif request.method == hdrs.METH_HEAD:
            body = b""
        self._keep = request.keep_alive and not self._server.draining
        connection = b"\r\n"
        if not self._keep:
            connection = b"Connection: close\r\n\r\n"
        elif request.version < (1, 1):
            connection = b"Connection: keep-alive\r\n\r\n"
        transport.write(
            b"%bX-Request-ID: %b\r\nDate: %b\r\n%b%b"
            % (head, self._request_id.encode(), self._server.date(), connection, body)
        )
        if transport.get_write_buffer_size():
            await _drain(request, transport)
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


def _matches(if_none_match: str, etag: str) -> bool:
    """RFC 9110, 13.1.2: the weak comparison, against a list or `*`."""
    return if_none_match.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))


async def _drain(request: web.BaseRequest, transport: asyncio.Transport) -> None:
    """Wait while a client reads too slowly; let it go when it does not read at all, and with it its memory."""
    try:
        async with asyncio.timeout(SEND_TIMEOUT):
            await request.writer.drain()
    except TimeoutError:
        transport.abort()
        raise ConnectionResetError("the client does not read") from None


# ---- problems --------------------------------------------------------------------------------------------------


class Problem(Exception):
    """An error as a client sees it (RFC 9457), and as the log tells it.

    `detail` is public: it says what a client can act on, and nothing of what is behind the server. `cause` and
    `downstream_request_id` are for the log only.
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        *,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
        cause: str | None = None,
        downstream_request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.type = f"urn:problem-type:messages:{kind}" if kind else "about:blank"
        self.headers = headers or {}
        self.cause = cause
        self.downstream_request_id = downstream_request_id

    def answer(self, request_id: str) -> Answer:
        members = {
            "type": self.type,
            "title": self.status.phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        return Answer(self.status, "application/problem+json", json.dumps(members).encode(), self.headers)


NO_MESSAGE = "urn:problem-type:messages:no-message"


def no_message() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "There is no message at the moment.", kind="no-message")


def unavailable(detail: str, cause: str) -> Problem:
    return Problem(
        HTTPStatus.SERVICE_UNAVAILABLE, detail, kind="unavailable", headers={"Retry-After": "1"}, cause=cause
    )


def timed_out(detail: str, cause: str) -> Problem:
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, detail, kind="timeout", cause=cause)


def not_ready(reason: Problem) -> Problem:
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, reason.detail, kind="not-ready", cause=reason.cause)


# ---- routing ---------------------------------------------------------------------------------------------------

Route = Callable[[], Awaitable[Answer]]
"""Answers GET; finds the request in `REQUEST` where it needs it. Raises `Problem` for errors that it expects."""


def always(answer: Answer) -> Route:
    """A route whose answer never changes."""

    async def route() -> Answer:
        return answer

    return route


READY = Answer(HTTPStatus.OK, "application/json", b'{"status": "ready"}')
ALIVE = Answer(HTTPStatus.OK, "application/json", b'{"status": "alive"}')


class Server(web.Server):
    """Routes requests, and turns whatever happens into an answer.

    A table of fixed paths on aiohttp's low-level server: an `Application` would find the same routes at a third of
    the whole cost of a request, and could not answer malformed HTTP itself.
    """

    def __init__(self, routes: Mapping[str, Route], access_log: str) -> None:
        # A handler is cancelled when its client leaves: nobody is left to wait for the answer.
        super().__init__(self._answer, handler_cancellation=True)
        self.draining = False
        self._routes = {**routes, "/healthz": always(ALIVE), "/readyz": self._readyz}
        self._ready = routes.get("/readyz")
        self._access_log = access_log
        self._failures = logs.RepeatLog()
        self._loop = asyncio.get_running_loop()
        self._in_flight = 0
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(6)
        self._date = (0, b"")

    def __call__(self) -> web.RequestHandler:
        return _Connection(
            self,
            loop=self._loop,
            access_log=None,
            keepalive_timeout=KEEPALIVE_TIMEOUT,
            lingering_time=LINGERING_TIME,
        )

    async def _readyz(self) -> Answer:
        if self.draining:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "This server is about to stop.", kind="not-ready")
        return await self._ready() if self._ready else READY

    async def _answer(self, request: web.BaseRequest) -> Response:
        started = time.perf_counter()
        self._in_flight += 1
        request_id = request[REQUEST_ID] = self._request_id(request)
        REQUEST.set(request)
        failure: Problem | None = None
        try:
            answer = await self._route(request)()
        except Problem as problem:
            failure = problem
        except Exception as error:
            failure = Problem(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "This server failed; trying again may help.",
                cause=repr(error),
            )
            failure.__cause__ = error
        finally:
            self._in_flight -= 1
        if failure:
            answer = failure.answer(request_id)
        if failure or self._access_log == "all":
            self._log(request, answer.status, time.perf_counter() - started, failure)
        return Response(answer, request_id, self)

    def _request_id(self, request: web.BaseRequest) -> str:
        sent = request.headers.get(_X_REQUEST_ID)
        return sent if sent and _VALID_REQUEST_ID(sent) else f"{self._id_prefix}-{next(self._ids):x}"

    def _route(self, request: web.BaseRequest) -> Route:
        route = self._routes.get(request.path)
        if route is None:
            raise Problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.")
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD work here.", headers={"Allow": "GET, HEAD"})
        return route

    def _log(self, request: web.BaseRequest, status: int, seconds: float, failure: Problem | None) -> None:
        """One line: always for a failure of ours (5xx), for others as ACCESS_LOG says."""
        if status < HTTPStatus.INTERNAL_SERVER_ERROR and self._access_log == "off":
            return
        fields: dict[str, Any] = {
            "request_id": request[REQUEST_ID],
            "method": request.method,
            "path": request.path,
            "status": status,
            "duration_ms": round(seconds * 1000, 3),
        }
        level, message = logging.INFO, "request"
        if failure:
            message = failure.detail
            fields["cause"] = failure.cause
            if failure.downstream_request_id != request[REQUEST_ID]:
                fields["downstream_request_id"] = failure.downstream_request_id
            fields["exception"] = failure.__cause__ if status == HTTPStatus.INTERNAL_SERVER_ERROR else None
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                level = logging.ERROR
        if self._access_log == "all":
            logs.log(level, message, **fields)
        else:
            path = request.path if request.path in self._routes else None
            self._failures.write((status, path, message), level, message, **fields)

    def malformed(self, request: web.BaseRequest, cause: str) -> Response:
        """The answer to what is no HTTP."""
        problem = Problem(HTTPStatus.BAD_REQUEST, "This is not a well-formed HTTP request.", cause=cause)
        request_id = request[REQUEST_ID] = self._request_id(request)
        self._log(request, problem.status, 0, problem)
        return Response(problem.answer(request_id), request_id, self)

    def date(self) -> bytes:
        """The Date field's value (RFC 9110, 6.6.1), made once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = now, formatdate(now, usegmt=True).encode()
        return self._date[1]

    def _busy(self) -> bool:
        """Whether a request is in flight, or an answer not yet with the kernel."""
        return self._in_flight > 0 or any(
            connection.transport and connection.transport.get_write_buffer_size() for connection in self.connections
        )

    async def finish(self, hurry: asyncio.Event, timeout: float) -> None:
        """End all connections: idle ones at once, others after their answer, but at most `timeout` seconds from now.

        To be called when no new connection is accepted. `hurry` ends the waiting.
        """
        deadline = time.monotonic() + timeout
        grace = min(deadline, time.monotonic() + LAST_REQUESTS)
        while self.connections and not hurry.is_set() and time.monotonic() < grace:
            await _pause(hurry)
        self.pre_shutdown()
        while self._busy() and not hurry.is_set() and time.monotonic() < deadline:
            await _pause(hurry)
        # aiohttp waits twice for what it is given here, and for ever for 0. All waiting has been done above.
        await self.shutdown(0.01)


async def _pause(hurry: asyncio.Event) -> None:
    await _wait(hurry, 0.01)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class _Connection(web.RequestHandler):
    """Answers what the parser refuses as a problem; signals and middlewares never see it."""

    __slots__ = ("_server",)

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002  # aiohttp's own; what the parser refuses is a 400
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> Response:
        return self._server.malformed(request, message or repr(exc))


# ---- the life of a server --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CommonSettings:
    host: str = setting("", settings.TEXT, "address to listen on", shown="all, IPv4 and IPv6")
    port: int = setting(0, settings.PORT, "where to listen")
    log_level: str = setting("info", settings.one_of("debug", "info", "warning", "error"), "least level to log")
    log_format: str | None = setting(
        None, settings.one_of("json", "text"), "form of a log line", shown="text on a terminal"
    )
    access_log: str = setting("errors", settings.one_of("all", "errors", "off"), "requests to log")
    drain_seconds: float = setting(0.0, settings.seconds(zero=True), "after SIGTERM: unready but still accepting")
    shutdown_seconds: float = setting(10.0, settings.seconds(zero=True), "then: time for requests in flight")


Start = Callable[[Any], contextlib.AbstractAsyncContextManager[Mapping[str, Route]]]
"""Opens what a server needs for its routes, and closes it at the end. Must not wait for any other part."""


async def serve(start: Start, options: CommonSettings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and end step by step; a second signal skips the waiting."""
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.set_exception_handler(_log_stray_error)

    async with start(options) as routes:
        server = Server(routes, options.access_log)
        acceptor = await loop.create_server(server, sock=listener, backlog=BACKLOG)
        host, port = listener.getsockname()[:2]
        logs.log(logging.INFO, "listening", host=host, port=port, version=VERSION)
        await stop.wait()

        # 1. Unready, but still accepting: load balancers need their time to look elsewhere.
        server.draining = True
        logs.log(logging.INFO, "draining", drain_s=options.drain_seconds)
        await _wait(hurry, options.drain_seconds)
        # 2. No new connections.
        acceptor.close()
        # 3. What is in flight is finished.
        await server.finish(hurry, options.shutdown_seconds)
        # 4. The session or the pool is closed, by leaving the context.
    # 5. The end.
    logs.log(logging.INFO, "stopped")


def _log_stray_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An error that no request waits for: the libraries' own, or a defect of ours. Never silent."""
    error = context.get("exception")
    logs.log(logging.ERROR, context["message"], cause=repr(error) if error else None, exception=error)


def listen(host: str, port: int) -> socket.socket:
    """Bind at once, so that an address in use is known before anything else starts. Raises `OSError`."""
    if host:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 is switched off, or the port is taken: the next line tells
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


def main(
    name: str,
    description: str,
    declaration: type[CommonSettings],
    start: Start,
    actions: Mapping[str, tuple[Callable[[Any], str], str]] | None = None,
) -> NoReturn:
    """The command line of a server: run it, or one of `actions` (option: function of the settings, help)."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        epilog=f"Settings are environment variables:\n{settings.table(declaration)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{name} {VERSION}")
    for option, (function, meaning) in (actions or {}).items():
        parser.add_argument(option, action="store_const", const=function, dest="chosen", help=meaning)
    action = getattr(parser.parse_args(), "chosen", None)
    try:
        options = settings.read(declaration, os.environ)
    except settings.SettingsError as error:
        _exit(name, 2, *error.problems)
    if action:
        try:
            print(action(options))
        except Exception as error:
            _exit(name, 1, str(error).strip().replace("\n", "; "))
        sys.exit(0)
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        _exit(
            name,
            1,
            f"cannot listen on {options.host or 'any address'}, port {options.port}: {error.strerror}",
        )
    logs.configure(name, options.log_level, options.log_format)
    with listener:
        asyncio.run(serve(start, options, listener))
    logging.shutdown()
    sys.exit(0)


def _exit(name: str, status: int, *lines: str) -> NoReturn:
    for line in lines:
        print(f"{name}: {line}", file=sys.stderr)
    sys.exit(status)
