"""Service 1, the gateway: answers `/api/string` with what the message service says.

Rules kept here: whatever the message service does, the client gets a clear answer in time; nothing that is not the
message service's contract gets through; the gateway stays ready when the message service is down.
"""

import base64
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import re
import socket
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import uvloop
from aiohttp import hdrs, web
from yarl import URL

import lifecycle
import logs
import metrics
import responses
import server
import settings
import threads
from coalescing import Coalescer, RunTimeoutError
from responses import DATABASE, MESSAGE_SERVICE, NO_MESSAGE, Answer, Problem
from server import REQUEST, REQUEST_ID, Route
from settings import setting

MAX_CALLS = 4  # calls to the message service in flight: enough to pass by one that is stuck
MAX_BODY = 1024 * 1024  # bytes of an answer of the message service
KEEPALIVE_TIMEOUT = 15.0  # seconds; below the message service's 75, so that it is not the one to close first
SILENCE = (  # the kernel gives up a host that acknowledges nothing; one that is only slow to answer does not notice
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 1),  # seconds without a packet, after which it is asked
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),  # seconds
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1500),  # milliseconds; past TCP's first repeat of a SYN, at one second
)

_TRACE = "-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"  # its id, the parent's id, flags
_VALID_TRACEPARENT = re.compile(  # W3C Trace Context, 3.2: what versions after 00 add is passed on as it is
    f"00{_TRACE}|(?!00|ff)[0-9a-f]{{2}}{_TRACE}(-[!-~]{{0,200}})?"
).fullmatch
_VALID_SERVER_TIMING = re.compile(r'[\w;=., "-]{1,200}', re.ASCII).fullmatch


@dataclasses.dataclass(frozen=True)
class Settings(lifecycle.CommonSettings):
    port: int = setting(8000, settings.PORT, "where to listen")
    downstream_url: URL = setting(URL("http://localhost:8001"), settings.BASE_URL, "the message service")
    downstream_timeout: float = setting(5.0, settings.seconds(), "for the whole call of the message service")


class MessageService:
    """The message service as the gateway sees it."""

    def __init__(self, session: aiohttp.ClientSession, base_url: URL) -> None:
        self._session = session
        self._url = base_url / "api/message"
        self._outage = logs.Outage("the message service")

    async def ask(self) -> Answer:
        """Ask once, in the name of the request in `REQUEST`, for what the gateway answers. Raises `Problem`."""
        started = time.perf_counter()
        request = REQUEST.get()
        headers = {"X-Request-ID": request[REQUEST_ID]}
        traceparent = request.headers.get("traceparent")
        if traceparent and _VALID_TRACEPARENT(traceparent):
            headers["traceparent"] = traceparent
        try:
            async with self._session.get(self._url, headers=headers, allow_redirects=False) as response:
                content = read_content(response.status, _media_type(response), await _read_body(response))
        except (aiohttp.ClientError, OSError, Problem) as error:
            raise self.failed(to_problem(error), request) from error
        self._outage.succeeded()
        timing = f"gateway;dur={(time.perf_counter() - started) * 1000:.2f}"
        behind = response.headers.get("Server-Timing", "")
        if _VALID_SERVER_TIMING(behind):
            timing += f", {behind}"
        return responses.json_answer("result", content, {"Server-Timing": timing})

    def failed(self, problem: Problem, request: web.BaseRequest) -> Problem:
        """Remember a failure of the call that was made in the name of this request, and return it."""
        if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._outage.failed()
            metrics.DEPENDENCY_ERRORS.labels(problem.kind).inc()
        problem.downstream_request_id = request[REQUEST_ID]
        return problem


async def _refuse_second_connection(_session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
    """Called before aiohttp connects for a request.

    When a connection is closed instead of an answer, aiohttp sends the request once more. That is right for one that
    was kept from before, but a service that closes new ones would only see each request twice.
    """
    if getattr(context, "has_connected", False):
        raise aiohttp.ClientConnectionError("a new connection ended without an answer")
    context.has_connected = True


def _make_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for one call, which notices that the message service's host is gone.

    Without it all calls that may be in flight can wait for a host that is gone, or for TCP's ever rarer repeats, while
    a network that is whole again would have an answer for others.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    for level, name, value in SILENCE:
        if hasattr(socket, name):  # not every system has all of them
            made.setsockopt(level, getattr(socket, name), value)
    return made


def _media_type(response: aiohttp.ClientResponse) -> str:
    """The media type of a body that can be read as it is; none for one that is compressed, which nobody asked for."""
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


def read_content(status: int, media_type: str, body: bytes) -> str:
    """The message in an answer of the message service. Raises `Problem` when it says one, or breaks its contract."""
    try:
        members = json.loads(body)
        if status == HTTPStatus.OK and media_type == "application/json":
            content = members["message"]
            content.encode()  # a lone surrogate is valid in JSON, but no text
            return str(content)
        if media_type == "application/problem+json":
            if status == HTTPStatus.NOT_FOUND and members["type"] == NO_MESSAGE:
                raise responses.no_message()
            cause = f"it said {members['detail']}"
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                raise responses.unavailable(DATABASE, "The message service has no database.", cause)
            if status == HTTPStatus.GATEWAY_TIMEOUT:
                raise responses.timed_out(DATABASE, "The database did not answer in time.", cause)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise bad_answer(f"status {status}, {media_type or 'no readable type'}: {error!r}") from error
    raise bad_answer(f"status {status}, {media_type or 'no readable type'}")


def to_problem(error: Exception) -> Problem:
    """What the gateway's client sees of a failed call."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, aiohttp.ClientResponseError):  # what it sent is no HTTP
        return bad_answer(repr(error))
    if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:  # see `SILENCE`
        return responses.timed_out(MESSAGE_SERVICE, "The message service did not answer in time.", repr(error))
    return responses.unavailable(MESSAGE_SERVICE, "The message service can not be reached.", repr(error))


def bad_answer(cause: str) -> Problem:
    return Problem(
        HTTPStatus.BAD_GATEWAY,
        "The message service sent an answer that makes no sense.",
        kind="bad-downstream",
        part=MESSAGE_SERVICE,
        cause=cause,
    )


def content_security_policy(page: bytes) -> str:
    """Allow the page's own inline script and style, by their hashes, and requests to where it came from; no more."""
    allowed = {b"script": "", b"style": ""}
    for element, content in re.findall(rb"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        allowed[element] += f" 'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src{allowed[b'script']}; style-src{allowed[b'style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page_answer() -> Answer:
    """index.html, with the headers that keep anything else out of it. Raises `OSError`."""
    page = Path(__file__).with_name("index.html").read_bytes()
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Answer(HTTPStatus.OK, "text/html; charset=utf-8", page, headers)


def description_answer() -> Answer:
    """openapi.yaml. Raises `OSError`."""
    return Answer(HTTPStatus.OK, "application/yaml", Path(__file__).with_name("openapi.yaml").read_bytes())


@contextlib.asynccontextmanager
async def start(options: Settings) -> AsyncIterator[Mapping[str, Route]]:
    connections = aiohttp.TraceConfig()
    connections.on_connection_create_start.append(_refuse_second_connection)
    session = aiohttp.ClientSession(
        trace_configs=[connections],
        # New connections find a changed address at once; nobody waits for a connection, since calls are limited.
        connector=aiohttp.TCPConnector(
            resolver=threads.Resolver(),
            use_dns_cache=False,
            limit=0,
            keepalive_timeout=KEEPALIVE_TIMEOUT,
            socket_factory=_make_socket,
        ),
        timeout=aiohttp.ClientTimeout(),  # none: a call ends when nobody waits for it any more, see `coalescing`
        headers={"Accept-Encoding": "identity", "User-Agent": f"gateway/{server.VERSION}"},
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    async with session:
        message_service = MessageService(session, options.downstream_url)
        ask = Coalescer(
            message_service.ask, limit=MAX_CALLS, timeout=options.downstream_timeout, observe=metrics.observe_run
        )

        async def string() -> Answer:
            try:
                return await ask()
            except RunTimeoutError as error:
                detail = "The message service did not answer in time."
                problem = responses.timed_out(MESSAGE_SERVICE, detail, "no answer")
                raise message_service.failed(problem, error.context[REQUEST]) from error

        yield {
            "/api/string": string,
            "/": server.always(page_answer()),
            "/openapi.yaml": server.always(description_answer()),
        }


if __name__ == "__main__":
    lifecycle.main(
        "gateway",
        "Answers /api/string with what the message service says.",
        Settings,
        start,
        # A sixth less CPU for each request here; the message service gains little, and aiopg breaks on it (aiopg #909).
        loop_factory=uvloop.new_event_loop,
    )
