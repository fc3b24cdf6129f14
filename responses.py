"""Answers and problems: all of a response that does not depend on who asks.

Rules kept here: an answer is made once and can be sent to many; every error is a problem (RFC 9457), whose public
part says what a client can act on and nothing of what is behind the server.
"""

import hashlib
import json
from collections.abc import Mapping
from http import HTTPStatus

_STATUS_LINES = {status: f"HTTP/1.1 {status} {status.phrase}\r\n" for status in HTTPStatus}

MESSAGE_SERVICE = "message_service"
DATABASE = "database"
NO_MESSAGE = "urn:problem-type:messages:no-message"


class Answer:
    """Status, header fields and body, as the bytes that are sent."""

    __slots__ = ("_shared", "body", "etag", "head", "status")

    def __init__(
        self, status: HTTPStatus, content_type: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status = status
        self.body = body
        self.etag = ""
        shared = "Cache-Control: no-store\r\n"
        if status == HTTPStatus.OK:
            self.etag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
            shared = f"Cache-Control: no-cache\r\nETag: {self.etag}\r\n"
        for name, value in (headers or {}).items():
            shared += f"{name}: {value}\r\n"
        self._shared = shared
        own = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        self.head = (_STATUS_LINES[status] + shared + own).encode("latin-1")

    @property
    def not_modified_head(self) -> bytes:
        """What a client gets that has the body already (RFC 9110, 15.4.5)."""
        return (_STATUS_LINES[HTTPStatus.NOT_MODIFIED] + self._shared).encode("latin-1")

    def is_known(self, if_none_match: str) -> bool:
        """Whether the client has it already: RFC 9110, 13.1.2, the weak comparison against a list or `*`."""
        tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
        return bool(self.etag) and (if_none_match.strip() == "*" or self.etag in tags)


def json_answer(name: str, content: str, headers: Mapping[str, str]) -> Answer:
    """The answer `{"name": "content"}`."""
    body = json.dumps({name: content}, ensure_ascii=False).encode()
    return Answer(HTTPStatus.OK, "application/json", body, headers)


class Problem(Exception):
    """An error as a client sees it, and as the log tells it.

    `detail` and `part` are public; `cause` and `downstream_request_id` are for the log only. `kind` is the last part
    of the problem's type; without it the status says all. `part` is which part of the system behind this server
    failed, `MESSAGE_SERVICE` or `DATABASE`, for programs, which are not to read it out of `detail` (RFC 9457, 3.1.4).
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        *,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
        part: str | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.kind = kind or "other"
        self.type = f"urn:problem-type:messages:{kind}" if kind else "about:blank"
        self.headers = headers or {}
        self.part = part
        self.cause = cause
        self.downstream_request_id: str | None = None

    def answer(self, request_id: str) -> Answer:
        members = {
            "type": self.type,
            "title": self.status.phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
            **({"part": self.part} if self.part else {}),
        }
        return Answer(self.status, "application/problem+json", json.dumps(members).encode(), self.headers)


def no_message() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "There is no message at the moment.", kind="no-message")


def unavailable(part: str, detail: str, cause: str) -> Problem:
    headers = {"Retry-After": "1"}
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, kind="unavailable", headers=headers, part=part, cause=cause)


def timed_out(part: str, detail: str, cause: str) -> Problem:
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, detail, kind="timeout", part=part, cause=cause)


def not_ready(detail: str, cause: str | None = None) -> Problem:
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, kind="not-ready", cause=cause)
