"""Representations, sent as ready bytes, and problems: the part of a response that does not depend on the client.

Rules kept here: a representation is made once and can be sent to many clients; what a middleware adds to a response
reaches the client; every error is a problem (RFC 9457), whose public part tells a client what it can act on, and
nothing about the system's internals; every failure of a dependency becomes a problem here. Tests:
tests/chassis/test_responses.py.
"""

import errno
import functools
import hashlib
import http.client
import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus

import msgspec
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time  # undocumented, but it formats the time only once a second

from chassis import logs

REQUEST_ID = web.RequestKey("request_id", str)

_NONE: Mapping[str, str] = {}


class Representation:
    """What a resource looks like (RFC 9110, 3.2): its body and the header fields that describe it, as ready bytes."""

    __slots__ = ("body", "etag", "head", "status")

    def __init__(
        self, content_type: str, body: bytes, headers: Mapping[str, str] = _NONE, status: int = HTTPStatus.OK
    ) -> None:
        self.status = status
        self.body = body
        self.etag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"' if status == HTTPStatus.OK else ""
        head = _fixed_lines(status, content_type)
        for name, value in headers.items():
            head += f"{name}: {value}\r\n"
        if self.etag:
            head += f"ETag: {self.etag}\r\n"
        self.head = f"{head}Content-Length: {len(body)}\r\n".encode()

    def is_known(self, fields: Iterable[str]) -> bool:
        """Whether the fields `If-None-Match` of a request name this representation, or `*`: RFC 9110, 13.1.2."""
        # In a well-formed field, only a tag can look like this one. Splitting fields would take milliseconds.
        return any(self.etag in field or field.strip() == "*" for field in fields)


def json_representation(
    value: object, headers: Mapping[str, str] = _NONE, status: int = HTTPStatus.OK
) -> Representation:
    """The representation of a JSON value, which may hold a `msgspec.Struct`.

    Raises `UnicodeEncodeError` for a lone surrogate, which is no text.
    """
    return Representation(
        "application/json", msgspec.json.format(msgspec.json.encode(value), indent=0), headers, status
    )


@functools.cache
def _fixed_lines(status: int, content_type: str) -> str:
    caching = "no-cache" if status == HTTPStatus.OK else "no-store"
    return (
        f"{_status_line(status)}\r\nCache-Control: {caching}\r\nContent-Type: {content_type}\r\n"
        "X-Content-Type-Options: nosniff\r\n"
    )


def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"


def end_connection(response: web.StreamResponse) -> None:
    """Make a response the last one on its connection, even if aiohttp has already prepared its header fields."""
    response.force_close()
    response.headers[hdrs.CONNECTION] = "close"


class RepresentationResponse(web.StreamResponse):
    """Sends a representation, or 304 to a client that already has it.

    It writes the ready bytes, and whatever others have added to `headers` and `cookies`: an ordinary `web.Response`
    composes all header fields for each request, which takes longer. An added field replaces the
    representation's own.
    """

    def __init__(self, request: web.BaseRequest, representation: Representation) -> None:
        status, sent = representation.status, request.headers
        if hdrs.IF_NONE_MATCH in sent and representation.etag and representation.is_known(sent.getall("If-None-Match")):
            status = HTTPStatus.NOT_MODIFIED
        super().__init__(status=status)
        self._representation = representation

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it. Raises ConnectionResetError if the client has left, ValueError for a field with a line break."""
        if self._eof_sent:  # aiohttp's own mark
            return request.writer
        # aiohttp's own mark, too: None if no application was asked. If one was, its signals must see this response.
        if (match_info := request._match_info) is not None:  # type: ignore[attr-defined]  # it is a `web.Request`
            for app in match_info.apps:
                for receiver in app.on_response_prepare:
                    await receiver(request, self)
        self._keep_alive = self._keep_alive is not False and request.keep_alive
        self._eof_sent = True
        protocol = request.protocol
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(self._bytes(request))
        if protocol.writing_paused:
            await request.writer.drain()
        return request.writer

    def _bytes(self, request: web.BaseRequest) -> bytes:
        representation, added = self._representation, self.headers
        head, body = representation.head, representation.body
        own = "" if added and hdrs.DATE in added else f"Date: {rfc822_formatted_time()}\r\n"
        own += f"X-Request-ID: {request.get(REQUEST_ID, '')}\r\n"
        if not self._keep_alive:
            own += "" if hdrs.CONNECTION in added else "Connection: close\r\n"
        elif request.version < (1, 1):
            own += "Connection: keep-alive\r\n"
        for name, value in added.items():
            if "\r" in value or "\n" in value:
                raise ValueError(f"a line end in the header field {name}")
            if name.lower() != "x-request-id":  # the log has the one above
                own += f"{name}: {value}\r\n"
        if self._cookies:  # `cookies` would make an empty one, which takes longer than the rest of this
            own += "".join([f"{cookie.output()}\r\n" for cookie in self._cookies.values()])
        if added or self.status != representation.status:
            left_out = {name.lower() for name in added}
            if self.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):  # RFC 9110, 15.3.5 and 15.4.5
                left_out |= {"content-type", "content-length"}
                body = b""
            _, *lines = head.decode().split("\r\n")
            kept = [line for line in lines if line.partition(":")[0].lower() not in left_out]
            head = "\r\n".join([_status_line(self.status), *kept]).encode()
        if request.method == hdrs.METH_HEAD:
            body = b""
        return b"%b%b\r\n%b" % (head, own.encode(), body)

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


class Problem(web.HTTPException):
    """An error as a client sees it, and as the log reports it.

    `detail` and `part` are public; `cause` is for the log only. `kind` is the last segment of the problem's type, or a
    whole URI. `part` is the part of the system that failed behind this server, for programs, which should not parse
    `detail` (RFC 9457, 3.1.4). `shared_with` is the id of the request whose call failed.
    """

    shared_with: str | None = None

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str = "about:blank",
        headers: Mapping[str, str] = _NONE,
        part: str | None = None,
        cause: str | None = None,
    ) -> None:
        self.status_code = status
        self.detail = detail
        self.kind = kind
        self.part = part
        self.cause = cause
        self._fields = headers
        super().__init__(headers=headers, text=detail)

    def copy(self) -> "Problem":
        """The same problem for another request, since middlewares may add header fields to an exception."""
        copy = Problem(self.status, self.detail, kind=self.kind, headers=self._fields, part=self.part, cause=self.cause)
        copy.shared_with = self.shared_with
        return copy

    def representation(self, request_id: str) -> Representation:
        """The document that describes it to a client (RFC 9457, 3)."""
        members = {
            "type": self.kind if ":" in self.kind else f"{TYPE_PREFIX}{self.kind}",
            "title": http.client.responses.get(self.status, self.reason),
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
            **({"part": self.part} if self.part else {}),
        }
        body = json.dumps(members, ensure_ascii=False).encode(errors="replace")
        return Representation("application/problem+json", body, status=self.status)


TYPE_PREFIX = "urn:problem-type:"
UNAVAILABLE, TIMEOUT, BAD_DOWNSTREAM, OUTCOME_UNKNOWN = "unavailable", "timeout", "bad-downstream", "outcome-unknown"


def invalid(detail: str) -> Problem:
    """422: the client has sent what cannot be right."""
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, kind="invalid")


def bad_downstream(part: str, cause: str) -> Problem:
    """502: a service broke its contract."""
    detail = f"The {part.replace('_', ' ')} sent an answer that makes no sense."
    return Problem(HTTPStatus.BAD_GATEWAY, detail, kind=BAD_DOWNSTREAM, part=part, cause=cause)


def not_ready(detail: str, cause: str | None = None) -> Problem:
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, kind="not-ready", cause=cause)


def problem_of_failure(
    part: str, error: Exception, *, is_write: bool = False, outcome_unknown: bool = False
) -> Problem:
    """The problem that a client gets when a part of the system behind this server fails.

    A write that was not carried out (`is_write`) is `unavailable`, even if the time was up; one that may have been is
    of unknown outcome (`outcome_unknown`).
    """
    if isinstance(error, Problem):
        cause, late = error.cause, error.status == HTTPStatus.GATEWAY_TIMEOUT
    else:
        cause = logs.describe(error)
        late = isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno == errno.ETIMEDOUT)
    name = part.replace("_", " ")
    if outcome_unknown:
        detail = f"The {name} gave no answer: it may have carried this out. Look before you try again."
        status = HTTPStatus.GATEWAY_TIMEOUT if late else HTTPStatus.BAD_GATEWAY
        return Problem(status, detail, kind=OUTCOME_UNKNOWN, part=part, cause=cause)
    if late and not is_write:
        detail = f"The {name} did not answer in time."
        return Problem(HTTPStatus.GATEWAY_TIMEOUT, detail, kind=TIMEOUT, part=part, cause=cause)
    detail = f"The {name} is not available."
    headers = {"Retry-After": "1"}
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, kind=UNAVAILABLE, headers=headers, part=part, cause=cause)


def problem_of(error: web.HTTPException) -> Problem:
    """The problem that an exception of aiohttp or of a middleware stands for, with its header fields and cookies."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, web.HTTPNotFound):
        detail = "There is nothing at this path."
    elif isinstance(error, web.HTTPMethodNotAllowed):
        detail = f"Only {' and '.join(sorted(error.allowed_methods))} work here."
    else:
        known = error.status in HTTPStatus._value2member_map_
        detail = (known and HTTPStatus(error.status).description) or error.reason
    if error.text and error.text != f"{error.status}: {error.reason}":  # a text from the code that raised it
        detail = error.text
    problem = Problem(error.status, detail)
    problem.set_status(error.status, error.reason)
    problem.headers.update(error.headers)
    problem.cookies.update(error.cookies)
    return problem


def mistake(error: BaseException) -> Problem:
    """The problem that a client sees after a defect; the log has the details."""
    problem = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "This server made a mistake.", cause=logs.describe(error))
    problem.__cause__ = error
    return problem
