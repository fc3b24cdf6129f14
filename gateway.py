"""Service 1, the gateway: answers `/api/string` with what the message service says.

Rules kept here: whatever the message service does, the client gets a clear answer in time; nothing that breaks the
message service's contract gets through; the gateway stays ready when the message service is down.
"""

import asyncio
import base64
import dataclasses
import errno
import functools
import hashlib
import json
import math
import re
import socket
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import aiohttp
from aiohttp import hdrs, web
from aiohttp.connector import Connection
from yarl import URL

import lifecycle
import logs
import metrics
import responses
import server
import settings
import threads
from coalescing import Coalescer, RunTimeoutError
from responses import DATABASE, MESSAGE_SERVICE, NO_MESSAGE, REQUEST_ID, Problem, Representation, RepresentationResponse
from settings import setting

MAX_CALLS = 4  # calls to the message service in flight: enough to get past stuck ones
PATIENCE = 0.1  # seconds without an answer after which the message service is called once more
MAX_BODY = 1024 * 1024  # bytes of an answer of the message service
REBALANCE_INTERVAL = 10.0  # seconds between two calls that end their connection: the next may reach another replica
KEEPALIVE_TIMEOUT = 15.0  # seconds; below the message service's 75, so that it is not the one to close first
TCP_OPTIONS = (  # the kernel gives up on a host that acknowledges nothing; a slow answer makes no difference to it
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 1),  # seconds without a packet before the first probe
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),  # seconds between probes
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1500),  # milliseconds; a SYN is first repeated after one second
)

T = TypeVar("T")
Read = Callable[[int, str, bytes], T]  # reads an answer's status, media type and body; raises `Problem`

_REQUEST: ContextVar[web.Request] = ContextVar("request")

_TRACE = "-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"  # its id, the parent's id, flags
_VALID_TRACEPARENT = re.compile(  # W3C Trace Context, 3.2: versions after 00 may add fields, which are passed on
    f"00{_TRACE}|(?!00|ff)[0-9a-f]{{2}}{_TRACE}(-[!-~]{{0,200}})?"
).fullmatch
_VALID_SERVER_TIMING = re.compile(r'[\w;=., "-]{1,200}', re.ASCII).fullmatch


@dataclasses.dataclass(frozen=True)
class Settings(lifecycle.CommonSettings):
    port: int = setting(8000, settings.PORT, "port to listen on")
    downstream_url: URL = setting(URL("http://localhost:8001"), settings.BASE_URL, "the message service")
    downstream_timeout: float = setting(5.0, settings.seconds(), "for the whole call to the message service")


class _Response(aiohttp.ClientResponse):
    """Remembers its connection, which is back in the pool before a small answer's status can be read."""

    _proven: ClassVar[weakref.WeakSet[object]] = weakref.WeakSet()  # connections that have brought an answer

    async def start(self, connection: Connection) -> "_Response":
        """Wait for the answer. Raises `aiohttp.ClientError`.

        aiohttp repeats a request whose connection is closed instead of an answer (ServerDisconnectedError). That is
        right for a connection kept from before, but a service that closes new ones would see each request twice.
        """
        self._used = connection.protocol
        try:
            await super().start(connection)
        except aiohttp.ClientConnectionError as error:
            if self._used in self._proven:
                raise
            raise aiohttp.ClientConnectionError("a new connection ended without an answer") from error
        self._proven.add(self._used)
        return self

    def end_connection(self) -> None:
        """Let no other call use the connection: it leads to a replica that has failed."""
        if self._used is not None:  # as a queue of messages it is false when it is empty
            self._used.close()


class MessageService:
    """The message service: a context that holds the session, and the coalesced call."""

    def __init__(self, settings: Settings) -> None:
        self._base_url = settings.downstream_url
        self._message_url = settings.downstream_url / "api/message"
        self._timeout = settings.downstream_timeout
        self._rebalance_at = time.perf_counter() + REBALANCE_INTERVAL
        self._dependency = metrics.Dependency("the message service")
        self._shared_call = Coalescer(
            self._call_for_message,
            limit=MAX_CALLS,
            timeout=settings.downstream_timeout,
            patience=PATIENCE,
            repeat=lambda error: isinstance(error, Problem),  # another replica may do better
            observe=self._dependency.observe_run,
        )

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # New connections use a changed address at once. Calls are limited, so connections need no limit.
            connector=aiohttp.TCPConnector(
                resolver=threads.Resolver(),
                use_dns_cache=False,
                limit=0,
                keepalive_timeout=KEEPALIVE_TIMEOUT,
                socket_factory=_make_socket,
            ),
            timeout=aiohttp.ClientTimeout(),  # none: calls end when nobody waits for them, see `coalescing`
            headers={"Accept-Encoding": "identity", "User-Agent": f"gateway/{server.VERSION}"},
            auto_decompress=False,
            response_class=_Response,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def result(self, request: web.Request) -> Representation:
        """The message as the gateway sends it, from a call that starts after this one. Raises `Problem`."""
        # A run executes in the context of the caller that it was started for, and so finds that caller's request.
        _REQUEST.set(request)
        try:
            representation = await self._shared_call()
        except RunTimeoutError as error:
            raise self._timed_out(error.context[_REQUEST]) from error
        except Problem as problem:
            self._dependency.reached_client(problem)
            raise problem.copy() from problem.__cause__
        if representation is None:
            raise responses.no_message()
        return representation

    async def get(self, request: web.Request, path: str, read: Read[T], **query: str) -> T:
        """Return what `read` makes of the answer to a call of this request's own. Raises `Problem`."""
        try:
            async with asyncio.timeout(self._timeout):
                return (await self._call(request, (self._base_url / path).with_query(query), read))[0]
        except TimeoutError as error:
            raise self._timed_out(request) from error
        except Problem as problem:
            self._dependency.failed(problem)
            raise

    def _timed_out(self, request: web.Request) -> Problem:
        problem = responses.timed_out(MESSAGE_SERVICE, "The message service did not answer in time.", "no answer")
        problem.downstream_request_id = request.get(REQUEST_ID)
        self._dependency.failed(problem)
        return problem

    async def _call_for_message(self) -> Representation | None:
        started = time.perf_counter()
        content, behind = await self._call(_REQUEST.get(), self._message_url, read_content)
        if content is None:
            return None
        timing = f"gateway;dur={(time.perf_counter() - started) * 1000:.2f}"
        if _VALID_SERVER_TIMING(behind):
            timing += f", {behind}"
        return responses.json_representation("result", content, {"Server-Timing": timing})

    async def _call(self, request: web.Request, url: URL, read: Read[T]) -> tuple[T, str]:
        """Call once on behalf of a request; return what `read` makes of the answer, and the answer's Server-Timing.

        Raises `Problem`.
        """
        headers = {"X-Request-ID": request.get(REQUEST_ID, "")}
        traceparent = request.headers.get("traceparent")
        if traceparent and _VALID_TRACEPARENT(traceparent):
            headers["traceparent"] = traceparent
        now = time.perf_counter()
        if now > self._rebalance_at:
            self._rebalance_at = now + REBALANCE_INTERVAL
            headers["Connection"] = "close"
        response = None
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                result = read(response.status, _media_type(response), await _read_body(response))
                return result, response.headers.get("Server-Timing", "")
        except (aiohttp.ClientError, OSError, Problem) as error:
            if isinstance(response, _Response):
                response.end_connection()
            problem = to_problem(error)
            problem.downstream_request_id = request.get(REQUEST_ID)
            raise problem from error


def _make_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that notices when the message service's host is gone.

    Without this, all calls that may be in flight can wait for such a host, or for TCP's ever rarer repeats, long after
    the network works again.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    for level, name, value in TCP_OPTIONS:
        if hasattr(socket, name):  # not every system has all of them
            made.setsockopt(level, getattr(socket, name), value)
    return made


def _media_type(response: aiohttp.ClientResponse) -> str:
    """The media type of the body; "" if it is compressed, which the gateway did not ask for."""
    return "" if hdrs.CONTENT_ENCODING in response.headers else response.content_type


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    if (response.content_length or math.inf) <= MAX_BODY:
        return await response.read()
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            raise bad_answer(f"its body has more than {MAX_BODY} bytes")
    return bytes(body)


@functools.lru_cache(maxsize=2)  # most answers are the same as the last one
def read_content(status: int, media_type: str, body: bytes) -> str | None:
    """The message in an answer of the message service, None if there is none.

    Raises `Problem` when the answer is one, or breaks the contract.
    """
    try:
        members = json.loads(body)
        if status == HTTPStatus.OK and media_type == "application/json":
            content = members["message"]
            content.encode()  # a lone surrogate is valid in JSON, but no text
            return str(content)
        if media_type == "application/problem+json":
            if status == HTTPStatus.NOT_FOUND and members["type"] == NO_MESSAGE:
                return None
            cause = f"it said {members['detail']}"
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                raise responses.unavailable(DATABASE, "The message service has no database.", cause)
            if status == HTTPStatus.GATEWAY_TIMEOUT:
                raise responses.timed_out(DATABASE, "The database did not answer in time.", cause)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise bad_answer(f"status {status}, {media_type or 'no readable type'}: {logs.describe(error)}") from error
    raise bad_answer(f"status {status}, {media_type or 'no readable type'}")


def to_problem(error: Exception) -> Problem:
    """The problem that a client gets when a call fails."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, aiohttp.ClientResponseError):  # it sent something that is not HTTP
        return bad_answer(logs.describe(error))
    if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:  # see `TCP_OPTIONS`
        return responses.timed_out(MESSAGE_SERVICE, "The message service did not answer in time.", logs.describe(error))
    return responses.unavailable(MESSAGE_SERVICE, "The message service cannot be reached.", logs.describe(error))


def bad_answer(cause: str) -> Problem:
    return Problem(
        HTTPStatus.BAD_GATEWAY,
        "The message service sent an answer that makes no sense.",
        kind="bad-downstream",
        part=MESSAGE_SERVICE,
        cause=cause,
    )


def content_security_policy(page: bytes) -> str:
    """Allow only the page's own inline script and style, by hash, and requests to its own origin."""
    allowed = {b"script": "", b"style": ""}
    for element, content in re.findall(rb"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        allowed[element] += f" 'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src{allowed[b'script']}; style-src{allowed[b'style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _page() -> Representation:
    """index.html, with header fields that keep anything else out of it. Raises `OSError`."""
    page = Path(__file__).with_name("index.html").read_text("utf-8").encode()  # without CR, as browsers hash it
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Representation("text/html; charset=utf-8", page, headers)


def _description() -> Representation:
    """openapi.yaml. Raises `OSError`."""
    return Representation("application/yaml", Path(__file__).with_name("openapi.yaml").read_bytes())


# ---- the application -------------------------------------------------------------------------------------------

PAGE = web.AppKey("page", Representation)
DESCRIPTION = web.AppKey("description", Representation)
SERVICE = web.AppKey("message_service", MessageService)


async def string(request: web.Request) -> web.StreamResponse:
    """`GET /api/string`: the message."""
    return RepresentationResponse(request, await request.app[SERVICE].result(request))


async def page(request: web.Request) -> web.StreamResponse:
    """`GET /`: a page that shows the system at work."""
    return RepresentationResponse(request, request.app[PAGE])


async def description(request: web.Request) -> web.StreamResponse:
    """`GET /openapi.yaml`: the description of this API."""
    return RepresentationResponse(request, request.app[DESCRIPTION])


def application(settings: Settings) -> web.Application:
    app = web.Application()
    app[PAGE], app[DESCRIPTION] = _page(), _description()

    async def message_service(app: web.Application) -> AsyncIterator[None]:
        async with MessageService(settings) as app[SERVICE]:
            yield

    app.cleanup_ctx.append(message_service)
    app.add_routes(
        [
            web.get("/", page),
            web.get("/openapi.yaml", description),
            web.get("/api/string", string),
            web.get("/healthz", server.alive),
            web.get("/readyz", server.ready),
            web.get("/metrics", metrics.metrics),
        ]
    )
    return app


if __name__ == "__main__":
    lifecycle.main("gateway", "Answers /api/string with what the message service says.", Settings, application)
