"""Another service over HTTP: reads that are shared, and calls that are not.

Rules kept here: whatever the other service does, a call ends in time, with its answer or with a problem; an answer
that says no (`ANSWERS_NO`) is passed on as it is; nothing that breaks the service's contract gets through; a read may
be tried again, a write never, and its failure says whether it may have been carried out. Tests:
tests/chassis/test_client.py.
"""

import asyncio
import dataclasses
import functools
import socket
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from http import HTTPStatus
from typing import Any, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from chassis import logs, metrics, settings, threads
from chassis.coalescing import Coalescer
from chassis.responses import (
    BAD_DOWNSTREAM,
    OUTCOME_UNKNOWN,
    REQUEST_ID,
    TIMEOUT,
    TYPE_PREFIX,
    UNAVAILABLE,
    Problem,
    bad_downstream,
    problem_of_failure,
)
from chassis.settings import setting

MAX_CALLS = 100  # in flight: more would only wait in the other service, which accepts some hundred connections
PATIENCE = 0.1  # seconds without an answer after which a read is tried once more
MAX_BODY = 1024 * 1024  # bytes of an answer
MAX_INTERIM = 10  # responses (1xx) before the answer
MAX_TEXT = 1000  # characters of a problem's detail, and of a trace's header fields, that are passed on
REBALANCE_INTERVAL = 10.0  # seconds between two calls that end their connection: the next may reach another replica
KEEPALIVE_TIMEOUT = 15.0  # seconds; below the other service's 75, so that it is not the one to close first
TCP_OPTIONS = (  # the kernel gives up on a host that acknowledges nothing; a slow answer makes no difference to it
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.SOL_SOCKET, "SO_RCVBUF", 65_536),  # bytes, of which the kernel makes twice as many: read in one turn
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 1),  # seconds without a packet before the first probe
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),  # seconds between probes
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1500),  # milliseconds; a SYN is first repeated after one second
)
# Not 206: nobody asks for a part.
ANSWERS_YES = {HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.ACCEPTED, HTTPStatus.NO_CONTENT}
ANSWERS_NO = {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.GONE, HTTPStatus.UNPROCESSABLE_ENTITY}
READS = {hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS}

T = TypeVar("T")
Fields = Mapping[str, str]
_NONE: Fields = {}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a server that calls another service."""

    downstream_url: URL = setting(URL("http://localhost:8001"), settings.BASE_URL, "the service behind this one")
    downstream_timeout: float = setting(5.0, settings.seconds(), "for the whole call to it")


class Answer:
    """What the other service sent, whole. `timing` is a `Server-Timing` field for the answer made of it."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes, milliseconds: float) -> None:
        self.status = response.status
        self.media_type = "" if hdrs.CONTENT_ENCODING in response.headers else response.content_type
        self.body = body
        self.headers = response.headers
        timing, behind = f"gateway;dur={milliseconds:.2f}", response.headers.get("Server-Timing")
        if behind and _is_passed_on(behind) and not behind.count('"') % 2 and "\\" not in behind:  # no open quotes
            timing += f", {behind}"
        self.timing = {"Server-Timing": timing}

    def json(self, kind: type[T], media_type: str = "application/json") -> T:
        """The body's value, checked and made a `kind`. Raises `ValueError` or `msgspec.DecodeError`."""
        if self.media_type != media_type:
            raise ValueError(f"not {media_type} but {self.media_type or 'no readable type'}")
        return msgspec.json.decode(self.body, type=kind)


class _Document(msgspec.Struct):
    """A problem as another service sends it (RFC 9457, 3)."""

    type: str
    detail: str
    part: str | None = None


Read = Callable[[Answer], T]
"""Makes something of an answer in `ANSWERS_YES`. Whatever it raises means that the answer breaks the contract."""


class Service:
    """Another service: a context that holds the sessions.

    `part` is its name in problems, `user_agent` this server's name for it.
    """

    def __init__(self, part: str, options: Settings, user_agent: str) -> None:
        self._part = part
        self._base_url = options.downstream_url
        self._timeout = options.downstream_timeout
        self._headers = {"Accept-Encoding": "identity", "User-Agent": user_agent}
        self._rebalance_at = time.perf_counter() + REBALANCE_INTERVAL
        self._dependency = metrics.Dependency(part)
        self._coalescer = Coalescer(
            limit=MAX_CALLS,
            timeout=self._timeout,
            patience=PATIENCE,
            is_failure=lambda error: not isinstance(error, Problem) or error.status not in ANSWERS_NO,
            repeats=True,  # another replica may do better
            observe=self._dependency.observe_run,
        )

    async def __aenter__(self) -> Self:
        self._reads = self._session(keepalive_timeout=KEEPALIVE_TIMEOUT)
        # A write gets a connection of its own: on a kept one, the other side's closing could cross it on its way, and
        # its outcome would be unknown.
        connected = aiohttp.TraceConfig()
        connected.on_connection_create_end.append(_mark_as_sent)
        self._writes = self._session([connected], force_close=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._reads.close()
        await self._writes.close()

    def _session(self, traces: list[aiohttp.TraceConfig] | None = None, **options: Any) -> aiohttp.ClientSession:
        # New connections use a changed address at once. Calls are limited, so connections need no limit.
        connector = aiohttp.TCPConnector(
            resolver=threads.Resolver(), use_dns_cache=False, limit=0, socket_factory=_make_socket, **options
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(),  # none: calls end when nobody waits for them
            headers=self._headers,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            response_class=_Response,
            trace_configs=traces,
        )

    def shared(self, request: web.Request, path: str, read: Read[T], **query: str) -> Awaitable[T]:
        """Return what `read` makes of the answer to `GET path`, from a call that starts after this one.

        Requests for the same path, query and `read` share calls (see `coalescing`). Characters of `path` that mean
        something in a URL are escaped; the client's own parameters must not hold a slash. Raises `Problem`.
        """
        key = (path, read, *query.items()) if query else (path, read)
        return self._read(key, request, hdrs.METH_GET, path, read, query)

    async def call(
        self, request: web.Request, method: str, path: str, read: Read[T], *, query: Fields = _NONE, **options: Any
    ) -> T:
        """Return what `read` makes of the answer to a call of this request's own.

        `options` are aiohttp's `json` and `headers`. A method that only reads may be tried again. Any other never is.
        Raises `Problem`: `unavailable` for a write that was surely not carried out, `outcome-unknown` for one that may
        have been.
        """
        if method in READS:
            return await self._read(object(), request, method, path, read, query, **options)
        _refuse_slashes(request.match_info)
        kind, sent = request.match_info.route, asyncio.Event()
        options["trace_request_ctx"] = sent
        try:
            async with asyncio.timeout(self._timeout):
                await self._coalescer.turn(kind)
                try:
                    result = await self._exchange(self._writes, request, method, path, read, query, **options)
                finally:
                    self._coalescer.end_turn(kind)
        except (Problem, TimeoutError) as error:
            if isinstance(error, Problem) and error.__cause__ is None and error.kind not in (TIMEOUT, BAD_DOWNSTREAM):
                raise  # the other service says what happened
            problem = problem_of_failure(self._part, error, is_write=True, outcome_unknown=sent.is_set())
            self._dependency.failed(kind, problem.kind)
            raise problem from error
        self._dependency.answered(kind)
        return result

    async def _read(
        self,
        key: Hashable,
        request: web.Request,
        method: str,
        path: str,
        read: Read[T],
        query: Fields,
        **options: Any,
    ) -> T:
        match_info = request.match_info
        if match_info:
            _refuse_slashes(match_info)
        run = functools.partial(self._exchange, self._reads, request, method, path, read, query, **options)
        try:
            return await self._coalescer(key, run, match_info.route)
        except TimeoutError as error:
            raise problem_of_failure(self._part, error) from error
        except Problem as problem:
            raise problem.copy() from problem.__cause__

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        request: web.Request,
        method: str,
        path: str,
        read: Read[T],
        query: Fields,
        headers: Fields = _NONE,
        **options: Any,
    ) -> T:
        """Call once, on behalf of a request. Raises `Problem`."""
        started = time.perf_counter()
        own = {**self._own_headers(request), **headers}
        if started > self._rebalance_at:
            self._rebalance_at = started + REBALANCE_INTERVAL
            own["Connection"] = "close"
        options |= {"headers": own, "params": query or None, "allow_redirects": False}
        try:
            async with session.request(method, _join(self._base_url, path), **options) as response:
                answer = Answer(response, await self._body(response), (time.perf_counter() - started) * 1000)
            return self._result(answer, read)
        except (aiohttp.ClientError, OSError, Problem) as error:
            if isinstance(error, aiohttp.ClientResponseError):  # it sent something that is not HTTP
                problem = bad_downstream(self._part, logs.describe(error))
            else:
                problem = error if isinstance(error, Problem) else problem_of_failure(self._part, error)
            problem.shared_with = request.get(REQUEST_ID)
            if problem is error:
                raise
            raise problem from error

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_BODY:
                raise bad_downstream(self._part, f"its body has more than {MAX_BODY} bytes")
        return bytes(body)

    @staticmethod
    def _own_headers(request: web.Request) -> dict[str, str]:
        headers = {"X-Request-ID": request.get(REQUEST_ID, "")}
        if "traceparent" in request.headers:  # W3C Trace Context, which lets a server pass on what it cannot read
            for name in ("traceparent", "tracestate"):
                value = request.headers.get(name, "")
                if value and _is_passed_on(value):
                    headers[name] = value
        return headers

    # ---- answers -----------------------------------------------------------------------------------------------

    def _result(self, answer: Answer, read: Read[T]) -> T:
        try:
            if answer.status in ANSWERS_YES:
                return read(answer)
            problem = self._problem_in(answer)
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            raise bad_downstream(self._part, f"status {answer.status}: {logs.describe(error)}") from error
        raise problem

    def _problem_in(self, answer: Answer) -> Problem:
        """The problem that an answer describes. Raises `ValueError` or `msgspec.DecodeError` if it is none."""
        document, status = answer.json(_Document, "application/problem+json"), answer.status
        kind, detail, part = document.type.removeprefix(TYPE_PREFIX), document.detail[:MAX_TEXT], document.part
        if kind != OUTCOME_UNKNOWN:
            if status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT):
                kind = UNAVAILABLE if status == HTTPStatus.SERVICE_UNAVAILABLE else TIMEOUT
                part = part or self._part
            elif status not in ANSWERS_NO or (status == HTTPStatus.NOT_FOUND and kind == "about:blank"):
                raise ValueError(f"it said {detail}")  # such as its router: this server asks for the wrong thing
        headers = {"Retry-After": "1"} if kind == UNAVAILABLE else _NONE
        cause = f"it said {detail}"
        return Problem(status, detail, kind=kind, headers=headers, part=part, cause=cause)


def _is_passed_on(value: str) -> bool:
    """Whether a header field that this server does not read can break nothing where it goes."""
    return len(value) <= MAX_TEXT and value.isascii() and value.isprintable()


def _refuse_slashes(parameters: Mapping[str, str]) -> None:
    """Raise `Problem` if a client has escaped a slash in a parameter: in another path, it would be a separator."""
    for value in parameters.values():
        if "/" in value:
            raise Problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.")


@functools.lru_cache(maxsize=256)  # most paths are constants
def _join(base_url: URL, path: str) -> URL:
    """The address of a path that may hold what a client has sent. Raises `Problem` if it would lead elsewhere."""
    try:
        if not {"", ".", ".."}.isdisjoint(path.split("/")):
            raise ValueError(path)
        return base_url.with_path(f"{base_url.raw_path.rstrip('/')}/{quote(path)}", encoded=True)
    except ValueError:  # a lone surrogate, which is no text, too
        raise Problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.") from None


class _Response(aiohttp.ClientResponse):
    """Fails where aiohttp would repeat a call by itself, as it does with PUT and DELETE among others, and gives up on
    interim responses without end, which aiohttp would read without a pause for anything else.
    """

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        protocol, left = connection.protocol, MAX_INTERIM

        def read() -> Any:
            nonlocal left
            if left < 0:
                raise HttpProcessingError(message=f"more than {MAX_INTERIM} interim responses")
            left -= 1
            return type(protocol).read(protocol)

        protocol.read = read
        try:
            return await super().start(connection)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            raise aiohttp.ClientConnectionError(logs.describe(error)) from error


async def _mark_as_sent(_session: aiohttp.ClientSession, context: Any, _params: object) -> None:
    """From the moment of its connection on, a call may be carried out."""
    context.trace_request_ctx.set()


def _make_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that notices when the other service's host is gone.

    Without this, all calls that may be in flight can wait for such a host, or for TCP's ever rarer repeats, long after
    the network works again.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    for level, name, value in TCP_OPTIONS:
        if hasattr(socket, name):  # not every system has all of them
            made.setsockopt(level, getattr(socket, name), value)
    return made
