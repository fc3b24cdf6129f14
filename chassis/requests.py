"""What clients send: bodies, query parameters and header fields, as values of the types that a handler declares.

Rules kept here: what a handler gets is of the declared type and within its limits; anything else is a problem that
names the place, whatever the client sends. Types are declared with msgspec, mostly as a `msgspec.Struct`. Tests:
tests/chassis/test_requests.py.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web

from chassis.responses import Problem, invalid

BODY_TIMEOUT = 10.0  # seconds in which a body has to arrive; aiohttp waits for ever, even after a malformed chunk
MAX_DETAIL = 300  # characters: an unknown member's name may be as long as the body

T = TypeVar("T")


def text(low: int, high: int) -> msgspec.Meta:
    """For `Annotated[str, text(1, 200)]`: so many characters, none of them NUL, which PostgreSQL cannot store."""
    return msgspec.Meta(min_length=low, max_length=high, pattern="^[^\0]*$")


async def body(request: web.Request, declared: type[T]) -> T:
    """A JSON body. Raises `Problem`, or `web.HTTPRequestEntityTooLarge`: see `client_max_size` of an application."""
    if request.content_type != "application/json" or hdrs.CONTENT_ENCODING in request.headers:
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body has to be application/json, and not compressed.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            content = await request.read()
    except TimeoutError:
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, "The body did not arrive in time.") from None
    return _declared("body", lambda: msgspec.json.decode(content, type=declared))


def query(request: web.Request, declared: type[T]) -> T:
    """The parameters of the query, each given at most once. Raises `Problem`."""
    for name, count in Counter(name for name, _ in request.query.items()).most_common(1):
        if count > 1:
            raise invalid(f"The query is invalid: it repeats `{name}`"[:MAX_DETAIL])
    return _declared("query", lambda: msgspec.convert(dict(request.query), declared, strict=False))


def header(request: web.Request, name: str, pattern: str) -> str | None:
    """A header field, None if it is not there. Raises `Problem` if it does not match the pattern."""
    if name not in request.headers:
        return None
    value = ", ".join(request.headers.getall(name))  # RFC 9110, 5.3
    if not re.fullmatch(pattern, value):
        raise invalid(f"The header field {name} is invalid: it has to match {pattern}")
    return value


def _declared(place: str, convert: Callable[[], T]) -> T:
    try:
        return convert()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"The {place} is invalid: {error}"[:MAX_DETAIL]) from None
