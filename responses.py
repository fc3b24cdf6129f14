"""Representations, sent as ready bytes, and problems: the part of a response that does not depend on the client.

Rules kept here: a representation is made once and can be sent to many clients; what a middleware adds to a response
reaches the client; every error is a problem (RFC 9457), whose public part tells a client what it can act on, and
nothing about the system's internals.
"""

import functools
import hashlib
import http.client
import json
from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time  # undocumented, but it formats the time only once a second
from multidict import CIMultiDict

MESSAGE_SERVICE = "message_service"
DATABASE = "database"
NO_MESSAGE = "urn:problem-type:messages:no-message"

REQUEST_ID = web.RequestKey("request_id", str)

_NONE: Mapping[str, str] = {}


class Representation:
    """What a resource looks like (RFC 9110, 3.2): its body and the header fields that describe it, as ready bytes."""

    __slots__ = ("body", "etag", "fields", "head", "status")

    def __init__(
        self, content_type: str, body: bytes, headers: Mapping[str, str] = _NONE, status: int = HTTPStatus.OK
    ) -> None:
        self.status = status
        self.body = body
        self.etag = _etag(body) if status == HTTPStatus.OK else ""
        caching = {"Cache-Control": "no-cache", "ETag": self.etag} if self.etag else {"Cache-Control": "no-store"}
        self.fields = {**caching, **headers, "Content-Type": content_type, "Content-Length": str(len(body))}
        self.head = _head(status, self.fields)

    def is_known(self, if_none_match: str) -> bool:
        """Whether the client already has it: RFC 9110, 13.1.2, weak comparison with a list or `*`."""
        tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
        return bool(self.etag) and (if_none_match.strip() == "*" or self.etag in tags)


def json_representation(name: str, content: str, headers: Mapping[str, str] = _NONE) -> Representation:
    """The representation `{"name": "content"}`."""
    return Representation("application/json", _json(name, content), headers)


# Most runs read what the last one read. Keeping what depends on the content alone saves a tenth of a run's CPU time.
@functools.lru_cache(maxsize=2)
def _json(name: str, content: str) -> bytes:
    return json.dumps({name: content}, ensure_ascii=False).encode()


@functools.lru_cache(maxsize=2)
def _etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:24]}"'


def _head(status: int, fields: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} {http.client.responses.get(status, '')}\r\n{lines}".encode()


def end_connection(response: web.StreamResponse) -> None:
    """Make a response the last one on its connection, even if aiohttp has already prepared its header fields."""
    response.force_close()
    response.headers[hdrs.CONNECTION] = "close"


class RepresentationResponse(web.StreamResponse):
    """Sends a representation, or 304 to a client that already has it.

    It writes the ready bytes, and whatever others have added to `headers` and `cookies`: an ordinary `web.Response`
    composes all header fields for each request, which takes some 15 µs longer. An added field replaces the
    representation's own.
    """

    def __init__(self, request: web.BaseRequest, representation: Representation, *, routed: bool = True) -> None:
        """`routed`: an application handled the request, so its signals must see this response."""
        if_none_match = request.headers.get(hdrs.IF_NONE_MATCH)
        known = if_none_match is not None and representation.is_known(if_none_match)
        super().__init__(status=HTTPStatus.NOT_MODIFIED if known else representation.status)
        self._representation = representation
        self._routed = routed
        self._sent = False
        self._keeps_connection = False

    @property
    def prepared(self) -> bool:
        return self._sent

    @property
    def keep_alive(self) -> bool | None:
        return self._keeps_connection if self._sent else super().keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it. Raises ConnectionResetError if the client has left, ValueError for a field with a line break."""
        if self._sent:
            return request.writer
        if self._routed:
            for app in request.match_info.apps:  # type: ignore[attr-defined]  # an application's are `web.Request`
                for receiver in app.on_response_prepare:
                    await receiver(request, self)
        self._keeps_connection = super().keep_alive is not False and request.keep_alive
        self._sent = True
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(self._bytes(request))
        if request.protocol.writing_paused:
            await request.writer.drain()
        return request.writer

    def _bytes(self, request: web.BaseRequest) -> bytes:
        representation, added = self._representation, self.headers
        head, body = representation.head, representation.body
        own = f"Date: {rfc822_formatted_time()}\r\nX-Request-ID: {request.get(REQUEST_ID, '')}\r\n"
        if not self._keeps_connection:
            own += "" if hdrs.CONNECTION in added else "Connection: close\r\n"
        elif request.version < (1, 1):
            own += "Connection: keep-alive\r\n"
        for name, value in added.items():
            if "\r" in value or "\n" in value:
                raise ValueError(f"a line end in the header field {name}")
            own += f"{name}: {value}\r\n"
        for cookie in self.cookies.values():
            own += f"{cookie.output()}\r\n"
        if added or self.status != representation.status:
            fields = CIMultiDict(representation.fields)
            for name in added:
                fields.popall(name, None)
            if self.status == HTTPStatus.NOT_MODIFIED:  # RFC 9110, 15.4.5
                del fields[hdrs.CONTENT_TYPE], fields[hdrs.CONTENT_LENGTH]
                body = b""
            head = _head(self.status, fields)
        if request.method == hdrs.METH_HEAD:
            body = b""
        return b"%b%b\r\n%b" % (head, own.encode(), body)

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


class Problem(web.HTTPException):
    """An error as a client sees it, and as the log reports it.

    `detail` and `part` are public; `cause` and `downstream_request_id` are for the log only. `kind` is the last segment
    of the problem's type; None if the status says enough. `part` is the part of the system that failed behind this
    server, `MESSAGE_SERVICE` or `DATABASE`, for programs, which should not parse `detail` (RFC 9457, 3.1.4).
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        headers: Mapping[str, str] = _NONE,
        part: str | None = None,
        cause: str | None = None,
    ) -> None:
        self.status_code = status
        self.detail = detail
        self.kind = kind
        self.part = part
        self.cause = cause
        self.downstream_request_id: str | None = None
        self._fields = headers
        super().__init__(headers=headers, text=detail)

    def copy(self) -> "Problem":
        """The same problem for another request, since middlewares may add header fields to an exception."""
        copy = Problem(self.status, self.detail, kind=self.kind, headers=self._fields, part=self.part, cause=self.cause)
        copy.downstream_request_id = self.downstream_request_id
        return copy


def problem_of(error: web.HTTPException) -> Problem:
    """The problem that an exception of aiohttp or of a middleware stands for, with its header fields and cookies."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, web.HTTPNotFound):
        detail = "There is nothing at this path."
    elif isinstance(error, web.HTTPMethodNotAllowed):
        detail = f"Only {' and '.join(sorted(error.allowed_methods))} work here."
    else:
        detail = HTTPStatus(error.status).description
    if error.text and error.text != f"{error.status}: {error.reason}":  # a text from the code that raised it
        detail = error.text
    problem = Problem(error.status, detail)
    problem.headers.update(error.headers)
    problem.cookies.update(error.cookies)
    return problem


def problem_representation(problem: Problem, request_id: str) -> Representation:
    """The document that describes a problem to a client (RFC 9457, 3)."""
    members = {
        "type": f"urn:problem-type:messages:{problem.kind}" if problem.kind else "about:blank",
        "title": http.client.responses.get(problem.status, problem.reason),
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
        **({"part": problem.part} if problem.part else {}),
    }
    body = json.dumps(members, ensure_ascii=False).encode()
    return Representation("application/problem+json", body, status=problem.status)


def no_message() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "There is no message at the moment.", kind="no-message")


def unavailable(part: str, detail: str, cause: str) -> Problem:
    headers = {"Retry-After": "1"}
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, kind="unavailable", headers=headers, part=part, cause=cause)


def timed_out(part: str, detail: str, cause: str) -> Problem:
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, detail, kind="timeout", part=part, cause=cause)


def not_ready(detail: str, cause: str | None = None) -> Problem:
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, kind="not-ready", cause=cause)
