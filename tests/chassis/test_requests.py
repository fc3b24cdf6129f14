"""What a client sends, in an application of the test's own: whatever it is, the handler gets its type, or nothing."""

import asyncio
from typing import Annotated

import msgspec
import pytest
from aiohttp import web
from conftest import Serve
from kit.client import Answer, connection, exchange

from chassis import requests


class Thing(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, requests.text(1, 5)]
    count: Annotated[int, msgspec.Meta(ge=0, le=9)] = 0


class Filter(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, requests.text(1, 5)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=9)] = 5


async def add(request: web.Request) -> web.Response:
    return web.json_response(msgspec.to_builtins(await requests.body(request, Thing)))


async def look(request: web.Request) -> web.Response:
    version = requests.header(request, "Version", "[0-9]{1,3}")
    return web.json_response({**msgspec.to_builtins(requests.query(request, Filter)), "version": version})


@pytest.fixture
async def url(serve: Serve) -> str:
    app = web.Application()
    app.add_routes([web.post("/", add), web.get("/", look)])
    return await serve(app)


async def post(url: str, body: bytes, content_type: str = "application/json", **headers: str) -> Answer:
    async with connection(url) as client:
        fields = {"Content-Type": content_type, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return await client.get("/", "POST", fields, body)


async def test_a_body_becomes_its_type(url: str) -> None:
    """With the defaults of what is left out; any text that a database can store."""
    assert (await post(url, b'{"name": "a"}')).json() == {"name": "a", "count": 0}
    answer = await post(url, '{"count": 9, "name": "ü\\n\\ud83d\\ude00"}'.encode(), "application/json; charset=utf-8")
    assert answer.json() == {"name": "ü\n😀", "count": 9}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b'{"name": "a"}x', "byte 14"),
        (b'{"name": "a"', "body"),
        (b"[]", "array"),
        (b"null", "null"),
        (b"{}", "`name`"),
        (b'{"name": 1}', "$.name"),
        (b'{"name": ""}', "$.name"),
        (b'{"name": "abcdef"}', "$.name"),
        (b'{"name": "a", "count": 10}', "$.count"),
        (b'{"name": "a", "count": true}', "$.count"),
        (b'{"name": "a", "count": 1.5}', "$.count"),
        (b'{"name": "a", "count": ' + b"9" * 5000 + b"}", "$.count"),
        (b'{"name": "a", "count": NaN}', "byte"),
        (b'{"name": "a\\u0000"}', "$.name"),
        (b'{"name": "a\0"}', "byte"),
        (b'{"name": "\\ud800"}', "body"),
        (b'{"name": "\xed\xa0\x80"}', "position"),
        (b'{"name": "\xff"}', "position"),
        (b'\xef\xbb\xbf{"name": "a"}', "byte 0"),
        ('{"name": "a"}'.encode("utf-16"), "byte 0"),
        (b"[" * 100_000, "array"),
        (b'{"name": ' + b"[" * 100_000, "$.name"),
        (b'{"name": "a", "more": ' + b"[" * 100_000, "more"),
        (b'{"' + b"x" * 1_000_000 + b'": 1}', "xxx"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_wrong_body_is_refused(url: str, body: bytes, place: str) -> None:
    """422 with the place, in few words; and the connection can be used again."""
    answer = await post(url, body)
    problem = answer.json()
    assert (answer.status, problem["type"], answer.headers.get("Connection")) == (422, "urn:problem-type:invalid", None)
    assert place in problem["detail"]
    assert len(problem["detail"]) <= requests.MAX_DETAIL


async def test_a_body_of_brackets_only_is_refused_wherever_anything_is_allowed(serve: Serve) -> None:
    """Too deep a nesting is a 422, too, not a failure."""

    async def anything(request: web.Request) -> web.Response:
        return web.json_response(await requests.body(request, list))

    app = web.Application()
    app.add_routes([web.post("/", anything)])
    url = await serve(app)
    answer = await post(url, b"[" * 100_000)
    assert (answer.status, "recursion" in answer.json()["detail"]) == (422, True)


async def test_a_body_that_is_too_long(url: str) -> None:
    """413, whether its length is given or not."""
    too_long = b'{"name": "' + b"x" * 2**20 + b'"}'
    assert (await post(url, too_long)).status == 413
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    assert (await exchange(url, head + chunk * 2 + b"0\r\n\r\n")).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"content_type": ""},
        {"Content_Encoding": "gzip"},
    ],
    ids=str,
)
async def test_a_body_of_another_kind_is_refused(url: str, headers: dict[str, str]) -> None:
    """415, before anybody tries to read it."""
    answer = await post(url, b'{"name": "a"}', **headers)
    assert (answer.status, answer.headers["Content-Type"]) == (415, "application/problem+json")


async def test_a_body_that_breaks_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """408 in the end, for one that does not come or goes on as no HTTP; 400 if that is seen at once."""
    monkeypatch.setattr(requests, "BODY_TIMEOUT", 0.2)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    broken = await exchange(url, head + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n{}\r\n")
    assert broken.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
    for framing, rest in ((b"Content-Length: 10", b"{"), (b"Transfer-Encoding: chunked", b"nonsense\r\n")):
        async with asyncio.timeout(8), connection(url) as client:
            client.writer.write(head + framing + b"\r\n\r\n")
            await asyncio.sleep(0.01)  # so that the rest comes by itself
            client.writer.write(rest)
            answer = await client.receive()
            assert (answer.status, answer.json()["detail"]) == (408, "The body did not arrive in time.")
            assert await client.reader.read() == b""


async def test_the_query_becomes_its_type(url: str) -> None:
    """Numbers are numbers, and text stays text."""
    async with connection(url) as client:
        for query, name, limit in (
            ("", None, 5),
            ("?limit=9&name=%C3%BC%26", "ü&", 9),
            ("?name=null", "null", 5),
            ("?name=5", "5", 5),
        ):
            assert (await client.get("/" + query)).json() == {"name": name, "limit": limit, "version": None}


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("limit=", "$.limit"),
        ("limit=0", "$.limit"),
        ("limit=10", "$.limit"),
        ("limit=x", "$.limit"),
        ("limit=%D9%A5", "$.limit"),
        ("limit=+5", "$.limit"),
        ("limit=1_0", "$.limit"),
        ("limit=null", "$.limit"),
        ("limit=nan", "$.limit"),
        ("limit=" + "9" * 5000, "$.limit"),
        ("limit=" + "%D9%A5" * 1000, "$.limit"),
        ("limit=1&limit=1", "limit"),
        ("name=", "$.name"),
        ("name=%00", "$.name"),
        ("more=1", "more"),
        ("&".join(f"{'x' * 3}{number}" for number in range(2000)), "xxx"),
        ("&".join(["x"] * 7000), "x"),
    ],
    ids=lambda value: value[:20],
)
async def test_a_wrong_query_is_refused(url: str, query: str, place: str) -> None:
    """422 with the place, at once."""
    async with asyncio.timeout(2), connection(url) as client:
        answer = await client.get(f"/?{query}")
    assert (answer.status, place in answer.json()["detail"]) == (422, True), answer.body


async def test_a_header_field_matches_or_is_refused(url: str) -> None:
    """None if it is not there; 422 if it is anything else, or there twice."""
    async with connection(url) as client:
        assert (await client.get("/", headers={"version": "12"})).json()["version"] == "12"
        for wrong in ("", "x", "1234", "1\xff", "1, 2"):
            refused = await client.get("/", headers={"Version": wrong})
            assert (refused.status, "Version" in refused.json()["detail"]) == (422, True), wrong
    twice = await exchange(url, b"GET / HTTP/1.1\r\nHost: x\r\nVersion: 1\r\nVersion: 2\r\nConnection: close\r\n\r\n")
    assert twice.startswith(b"HTTP/1.1 422 ")
