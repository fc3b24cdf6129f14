"""What a hostile client costs: time of the event loop, lines of the log, memory, and the other clients' patience."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from conftest import MakePeer, Serve, Start, System
from kit import eventually, memory
from kit.application import PAIR
from kit.client import connection, exchange, get
from kit.faults import RowOf, StartObserved
from kit.load import OpenLoop
from kit.network import response
from kit.postgres import Database
from kit.processes import Server

COUNT = 10  # requests of a kind, enough to measure what one costs
PACKETS = 340  # bytes that a client sends to open and close a connection
LONG = 16_000  # bytes, the most that one field or target may have


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Clients", fault, sees)


def cpu(server: Server) -> float:
    """Seconds of a processor that the server's threads have used."""
    tasks = Path(f"/proc/{server.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def cost(server: Server, request: bytes) -> float:
    """Seconds of a processor for one request of this kind, each on a connection of its own."""
    before = cpu(server)
    for _ in range(COUNT):
        with contextlib.suppress(ConnectionError):
            await exchange(server.url, request, within=5)
    return (cpu(server) - before) / COUNT


def request(target: bytes = b"/healthz", *fields: bytes, method: bytes = b"GET", host: bytes = b"Host: x") -> bytes:
    """One request, after which the server closes the connection."""
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", host, *fields, b"Connection: close", b"", b""])


# ---- every part of a request -----------------------------------------------------------------------------------

TARGETS = {
    "a path of slashes": b"/" * LONG,
    "a path of segments": b"/a" * (LONG // 2),
    "the longest segments that are looked up": (b"/" + b"a" * (LONG // 32 - 1)) * 32,
    "a path of dots": b"/.." * (LONG // 3),
    "a path of escaped slashes": b"/%2F" * (LONG // 4),
    "a path of bytes that are no text": b"/" + b"%ff" * (LONG // 3),
    "a path of malformed escapes": b"/" + b"%" * (LONG - 1),
    "a query of separators": b"/healthz?" + b"&" * (LONG - 9),
    "a query of escapes": b"/healthz?a=" + b"%c3%a9" * (LONG // 6 - 2),
    "a fragment": b"/healthz#" + b"#" * (LONG - 9),
    "another host": b"http://x" + b".x" * (LONG // 2 - 8) + b"/healthz",
    "a host that is none": b"http://xn--a/",
    "a host of dots": b"http://" + b"." * (LONG - 8) + b"/",
    "a user name": b"http://" + b"a" * (LONG - 20) + b"@x/healthz",
}
FIELDS = [
    "Accept",
    "Accept-Encoding",
    "Accept-Language",
    "Authorization",
    "Connection",
    "Content-Encoding",
    "Content-Length",
    "Content-Type",
    "Cookie",
    "Expect",
    "Forwarded",
    "Host",
    "If-Match",
    "If-Modified-Since",
    "If-None-Match",
    "If-Range",
    "If-Unmodified-Since",
    "Keep-Alive",
    "Origin",
    "Range",
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Version",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "User-Agent",
    "X-Forwarded-For",
    "X-Request-ID",
    "traceparent",
    "tracestate",
]
VALUES = {
    "long": b"a" * (LONG - 100),
    "commas": b"," * (LONG - 100),
    "quotes": b'"' * (LONG - 100),
    "pairs": b"a=b; " * (LONG // 5 - 20),
    "spaces": b"a" + b" " * (LONG - 100) + b"b",
    "not ASCII": b"\xff\xc3\xa9" * (LONG // 3 - 40),
    "control characters": b"\x01" * 100,
    "forged": b'x status=200 request_id=forged","status":200,"a":"',
}


def kinds(target: bytes) -> dict[str, bytes]:
    """Requests with one part that is as long, as often repeated, or as little valid as can be."""
    some = {name: request(other) for name, other in TARGETS.items()}
    some["a long method"] = request(target, method=b"A" * LONG)
    some["a method of no text"] = request(target, method=b"\xff" * 100)
    some["an authority to connect to"] = request(b"xn--a:80", method=b"CONNECT")
    for field in FIELDS:
        name = field.encode() + b": "
        for kind, value in VALUES.items():
            if field == "Host":
                some[f"Host, {kind}"] = request(target, host=name + value)
            else:
                some[f"{field}, {kind}"] = request(target, name + value)
        some[f"{field}, four times the longest"] = request(target, *[name + b"," * (LONG - 200)] * 4)
        some[f"{field}, repeated"] = request(target, *[name + b"a"] * 250)
    return some


def written_too_often(server: Server) -> list[str]:
    """The kinds of its lines, each time that two of a kind came within a second."""
    kinds = [f"{line['message']} {line.get('status')}" for line in server.log]
    moments = [datetime.fromisoformat(line["time"]).timestamp() for line in server.log]
    last: dict[str, float] = {}
    often = []
    for kind, moment in zip(kinds, moments, strict=True):
        if moment - last.get(kind, 0) < 0.99:  # the clock may be corrected meanwhile
            often.append(kind)
        last[kind] = moment
    return often


@pytest.mark.matrix
@pytest.mark.parametrize("path", ["/healthz", PAIR.read_path])
async def test_no_part_of_a_request_costs_much(system: System, start: Start, path: str) -> None:
    """Whatever is in it, it costs less than ten ordinary requests, at most one log line a second, and no memory."""
    server = await start(PAIR.gateway, DOWNSTREAM_URL=system.service.url)
    ordinary = min([await cost(server, request(path.encode())) for _ in range(5)])
    some, before, dear = kinds(path.encode()), 0, {}
    for _ in range(2):
        for name, each in some.items():
            seconds = await cost(server, each)
            if seconds > 10 * ordinary:  # or something else ran meanwhile
                seconds = min([await cost(server, each) for _ in range(3)])
            if seconds > 10 * ordinary:
                dear[name] = round(seconds / ordinary, 1)
        before = before or memory(server.pid)
    assert not dear
    assert memory(server.pid) < before + 4 * 1024 * 1024
    assert not written_too_often(server)
    assert not server.logged(request_id="forged")
    assert {line["message"] for line in server.log} <= {"listening", "request failed"}


@pytest.mark.parametrize("name", ["a path of slashes", "the longest segments that are looked up"])
async def test_a_long_path_costs_little(system: System, name: str) -> None:
    """404, at once: it costs less than ten ordinary requests."""
    server = system.gateway
    assert (await exchange(server.url, request(TARGETS[name]))).startswith(b"HTTP/1.1 404 ")
    ordinary = min([await cost(server, request()) for _ in range(3)])
    assert min([await cost(server, request(TARGETS[name])) for _ in range(3)]) < 10 * ordinary


async def test_many_tags_cost_little(system: System) -> None:
    """An `If-None-Match` with thousands of tags costs less than ten ordinary requests."""
    server = system.gateway
    many = request(b"/healthz", *[b"If-None-Match: " + b"," * (LONG - 200)] * 4)
    ordinary = min([await cost(server, request()) for _ in range(3)])
    assert min([await cost(server, many) for _ in range(3)]) < 10 * ordinary


@row("`Expect` with the client's words", "417")
async def test_expect_does_not_write_the_log(start: Start, note: RowOf) -> None:
    """A hundred different ones write at most a line a second, whose message is ours."""
    server = await start(PAIR.gateway)
    for number in range(100):
        raw = await exchange(server.url, request(b"/healthz", b"Expect: x status=200 request_id=forged%d" % number))
        assert raw.startswith(b"HTTP/1.1 417 ")
        assert b"forged" not in raw
    lines = [line for line in server.log if line["message"] != "listening"]
    assert lines
    assert not written_too_often(server)
    assert {line["message"] for line in lines} == {"request failed"}
    assert "forged" not in str(lines)
    note("at once")


@pytest.mark.parametrize("target", ["GET http://xn--a/", "CONNECT xn--a:80"])
async def test_a_target_that_no_library_can_read_is_answered(system: System, target: str) -> None:
    """400, and a close."""
    raw = await exchange(system.gateway.url, f"{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), within=5)
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in raw


HOSTS = {"a b": 400, "[::1": 400, "x:http": 400, "x\xe9": 400, "x/y": 400, "a@x": 400, "x:1:2": 400}
HOSTS |= {"": 200, "x": 200, "x:": 200, "127.0.0.1:80": 200, "[::1]:80": 200, "xn--bcher-kva.example": 200}


@pytest.mark.parametrize("host", HOSTS)
async def test_a_host_that_is_none_is_400(system: System, host: str) -> None:
    """As RFC 9112, 3.2 asks for; a valid one is answered, whatever it names."""
    raw = await exchange(system.gateway.url, request(host=b"Host: " + host.encode("latin-1")))
    assert int(raw.split()[1]) == HOSTS[host]


async def test_preconditions(system: System) -> None:
    """304 for a matching `If-None-Match` in any of its fields, else 200."""
    url = system.gateway.url
    tag = (await get(url + "/healthz")).headers["ETag"].encode()
    for status, *fields in (
        (304, b"If-None-Match: " + tag),
        (304, b'If-None-Match: "a", W/' + tag + b', "b"'),
        (304, b'If-None-Match: "a"', b"If-None-Match: " + tag),
        (304, b"If-None-Match: *"),
        (200, b'If-None-Match: "nope"'),
        (200, b"If-None-Match: " + tag.strip(b'"')),
        (200, b"If-None-Match: " + tag.replace(b'"', b'"x', 1)),
    ):
        raw = await exchange(url, request(b"/healthz", *fields))
        assert int(raw.split()[1]) == status, fields


async def test_options_names_no_software(system: System) -> None:
    """Not even with an empty field."""
    assert "Server" not in (await get(system.gateway.url + "/healthz", "OPTIONS")).headers


async def test_no_answer_is_sniffed(system: System) -> None:
    """A browser takes it for what its `Content-Type` says, be it an error."""
    for target in (b"/healthz", PAIR.read_path.encode(), b"/nothing", b"malformed"):
        raw = await exchange(system.gateway.url, request(target))
        assert b"\r\nX-Content-Type-Options: nosniff\r\n" in raw, target


@pytest.mark.parametrize("timing", ['b;desc="x', 'b;desc="x"y"', "b;dur=1\x0b", "b;dur=é", "b;dur=" + "x" * 5_000])
async def test_a_timing_that_is_none(start: Start, make_peer: MakePeer, timing: str) -> None:
    """What the next part sends in its place does not reach the client."""
    peer = await make_peer(response(PAIR.good, Server_Timing=timing))
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url)
    answer = await get(gateway.url + PAIR.read_path)
    assert answer.status == 200
    assert re.fullmatch(r"gateway;dur=[\d.]+", answer.headers["Server-Timing"])


# ---- memory ----------------------------------------------------------------------------------------------------


def unread(server: Server) -> int:
    """Bytes that the kernel holds for the server's clients."""
    port = f":{server.port:04X}"
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return sum(int(row[4].split(":")[0], 16) for row in rows if row[1].endswith(port))


@contextlib.asynccontextmanager
async def hold(server: Server, count: int, data: bytes) -> AsyncIterator[None]:
    """Send this on so many connections, as far as the server takes it, and read no answer."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            client = await stack.enter_async_context(connection(server.url, buffer=4096))
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            client.writer.write(data)
        await asyncio.sleep(1)  # in which the server takes what it takes
        yield


HUGE_HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: %b\r\n" % (i, b"x" * 15_900) for i in range(250))


@row("unfinished header fields on 60 connections", "431, or a close")
async def test_unfinished_heads_are_bounded(start: Start, note: RowOf) -> None:
    """They take less than 150 kB for each connection."""
    server = await start(PAIR.gateway)
    await get(server.url + "/healthz")
    before = memory(server.pid)
    async with hold(server, 60, HUGE_HEAD):
        assert memory(server.pid) - before < 60 * 150_000
        assert (await get(server.url + "/healthz", within=1)).status == 200
    note("at once")


async def test_unfinished_heads_are_bounded_together(start: Start) -> None:
    """600 connections with 60 kB each take less than 30 MB in all; others are served, in pieces, too."""
    server = await start(PAIR.gateway)
    await get(server.url + "/healthz")
    before = memory(server.pid)
    async with connection(server.url) as slow:
        slow.writer.write(b"GET /healthz HTTP/1.1\r\nHost:")
        async with hold(server, 600, HUGE_HEAD[:60_000]):
            assert memory(server.pid) - before < 30_000_000
            slow.writer.write(b" x\r\n\r\n")
            assert (await slow.receive()).status == 200
    assert len(server.logged(message="too many unfinished requests: closing the longest")) >= 1


@pytest.mark.parametrize("pieces", [1, 100])
async def test_a_head_that_is_too_long_in_all(system: System, pieces: int) -> None:
    """431, whether it arrives in one piece or in many; one of 50,000 bytes is accepted."""
    for fields, status in ((4, b"431"), (3, b"200")):
        head = request(b"/healthz", *[b"A: " + b"x" * 16_000] * fields, b"B: " + b"x" * 2_000)
        async with connection(system.gateway.url) as client:
            size = len(head) // pieces + 1
            for start_ in range(0, len(head), size):
                client.writer.write(head[start_ : start_ + size])
                await client.writer.drain()
                await asyncio.sleep(0.001)
            raw = await client.reader.read()
        assert raw.split()[1] == status
        assert (b"problem+json" in raw) == (status == b"431")


# Adds `POST /size`, which says how many bytes the body has.
SIZE = (
    "async def size(request): return web.json_response(len(await request.read()))",
    "add = web.Application.add_routes",
    'web.Application.add_routes = lambda app, routes: add(app, [*routes, web.post("/size", size)])',
)


async def test_a_large_body_is_no_head(observed: StartObserved) -> None:
    """Requests with large bodies, one after the other on one connection, are answered."""
    server = await observed(PAIR.gateway, *SIZE)
    async with connection(server.url) as client:
        for body in (b"x" * 500_000, b"\r\n\r\n" * 100_000, b"x" * 999_999):
            assert (await client.get("/size", "POST", body=body)).json() == len(body)
            chunks = b"".join(
                b"%x\r\n%b\r\n" % (len(body[i : i + 50_000]), body[i : i + 50_000]) for i in range(0, len(body), 50_000)
            )
            client.writer.write(
                b"POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
            )
            assert (await client.receive()).json() == len(body)


@pytest.mark.parametrize("reads", [True, False])
async def test_a_request_behind_a_body(observed: StartObserved, reads: bool) -> None:
    """It is answered, though it came together with the end of the body, whether or not anything reads that."""
    handler = (
        SIZE if reads else ("async def size(request): await asyncio.sleep(0.05); return web.Response()", *SIZE[1:])
    )
    server = await observed(PAIR.gateway, *handler)
    async with connection(server.url) as client, asyncio.timeout(10):
        for _ in range(10):
            client.writer.write(b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabcde")
            await asyncio.sleep(0.02)  # so that it arrives in two pieces
            client.writer.write(b"abcde" + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
            assert [(await client.receive()).status for _ in range(3)] == [200] * 3


LONG_HEAD = b"".join(b"X-%d: %b\r\n" % (number, b"x" * 16_364) for number in range(4))  # makes a head of 65,535 bytes
BODIES = {
    "length": [b"Content-Length: 4\r\n\r\nab", b"cd"],
    "behind the longest head": [LONG_HEAD, b"Content-Length: 4\r\n\r\nabcd"],
    "chunks": [b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", b"2\r\ncd\r\n0\r\n\r\n"],
}


@pytest.mark.parametrize("body", BODIES)
async def test_the_time_for_a_head_behind_a_body(observed: StartObserved, body: str) -> None:
    """It runs from the first byte behind the body: a connection without a next request stays."""
    server = await observed(PAIR.gateway, *SIZE, "from chassis import connections; connections.HEAD_TIMEOUT = 0.5")
    async with connection(server.url) as client:
        for _ in range(2):
            for piece in (b"POST /size HTTP/1.1\r\nHost: x\r\n", *BODIES[body]):
                client.writer.write(piece)
                await asyncio.sleep(0.02)  # so that it arrives in pieces
            assert (await client.receive()).json() == 4
            await asyncio.sleep(0.7)
        client.writer.write(b"POST /size HTTP/1.1\r\nHost: x\r\n" + BODIES[body][0])
        await asyncio.sleep(0.02)
        client.writer.write(BODIES[body][1] + b"GET /healthz HTTP/1.1\r\n")
        assert (await client.receive()).json() == 4
        async with asyncio.timeout(10):
            assert await client.reader.read() == b""


ONE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
IN_FRONT = {
    "a request": [ONE],
    "two": [ONE, ONE],
    "a body": [b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nabcd"],
}


@pytest.mark.parametrize("front", IN_FRONT)
async def test_the_time_for_a_head_that_came_with_others(observed: StartObserved, front: str) -> None:
    """It runs from the first byte of the piece, even if that holds whole requests, too."""
    server = await observed(PAIR.gateway, "from chassis import connections; connections.HEAD_TIMEOUT = 0.5")
    async with connection(server.url) as client:
        client.writer.write(b"".join(IN_FRONT[front]) + b"GET /healthz HTTP/1.1\r\n")
        for _ in IN_FRONT[front]:
            await client.receive()
        async with asyncio.timeout(10):
            assert await client.reader.read() == b""


async def test_a_web_socket(serve: Serve) -> None:
    """What comes through it is no head either, however much."""

    async def sizes(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(str(len(message.data)))
        return socket

    app = web.Application()
    app.add_routes([web.get("/socket", sizes)])
    async with ClientSession() as session, session.ws_connect(await serve(app) + "/socket") as client:
        for _ in range(20):
            await client.send_bytes(b"x" * 10_000)
            assert await client.receive_str(timeout=5) == "10000"


@row("88 pipelined requests whose answers nobody reads, on 20 connections", "a reset after `SEND_TIMEOUT`")
async def test_unread_answers_are_bounded(observed: StartObserved, note: RowOf) -> None:
    """They take less than 200 kB for each connection, and nothing some seconds later, even if the client has left."""
    server = await observed(PAIR.gateway, "from chassis import lifecycle; lifecycle.SEND_TIMEOUT = 1000")
    await get(server.url + "/")
    before = memory(server.pid)
    async with hold(server, 20, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 88):
        assert 0 < unread(server) + memory(server.pid) - before < 20 * 200_000
        await eventually(lambda: unread(server) == 0, within=6)
    note("-")


@row("readers that take some bytes now and then", "a reset after `SEND_TIMEOUT`")
async def test_dripping_readers(observed: StartObserved, make_peer: MakePeer, note: RowOf) -> None:
    """A client that takes too little of its answer loses its connection."""
    peer = await make_peer(response(PAIR.body("x" * 900_000)), keep_alive=True)
    changes = "from chassis import connections; connections.SEND_TIMEOUT = 1"
    server = await observed(PAIR.gateway, changes, DOWNSTREAM_URL=peer.url)
    before = int((await get(server.url + "/tasks")).body)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connection(server.url, buffer=4096)) for _ in range(5)]
        for client in clients:
            await client.send(PAIR.read_path)

        async def drip() -> bool:
            for client in clients:
                with contextlib.suppress(ConnectionError):
                    await client.reader.read(2000)
            return int((await get(server.url + "/tasks")).body) <= before

        await eventually(drip, within=4, every=0.1)
        assert unread(server) == 0  # nor does the kernel keep anything for them
    note("-")


@row("a service that sends interim responses for ever", "502")
async def test_endless_interim_responses(start: Start, make_peer: MakePeer, note: RowOf) -> None:
    """Other requests are answered at once meanwhile, and memory does not grow."""

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000)
            await writer.drain()

    peer = await make_peer(endless)
    server = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=3)
    await get(server.url + "/healthz")
    before = memory(server.pid)
    asked = [asyncio.create_task(get(server.url + PAIR.read_path)) for _ in range(5)]
    while not all(each.done() for each in asked):
        assert (await get(server.url + "/healthz")).seconds < 1
        await asyncio.sleep(0.05)
    assert {(await each).status for each in asked} == {502}
    assert memory(server.pid) - before < 40 * 1024 * 1024
    note("-")


def most_memory(server: Server) -> int:
    """Most resident memory that it has had, in bytes."""
    (line,) = [line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not isinstance(PAIR.sample, str), reason="this application serves no long texts")
@row("a row of 20 MB", "503")
async def test_a_huge_row(start: Start, database: Database, note: RowOf) -> None:
    """503 with the cause in the log; the service stays small, and serves again when the row is gone."""
    service = await start(PAIR.service, DB_TIMEOUT=10, **database.settings())
    assert (await get(service.url + PAIR.service_path)).status == 200
    before = memory(service.pid)
    database.store("x" * 20_000_000)
    answers = await asyncio.gather(*(get(service.url + PAIR.service_path) for _ in range(20)))
    assert {answer.status for answer in answers} == {503}
    assert "more than 1048576" in (await service.wait_for_log(status=503))["cause"]
    assert most_memory(service) < before + 150 * 1024 * 1024
    database.store(PAIR.other)
    assert (await get(service.url + PAIR.service_path)).status == 200
    note("at once")


# ---- the others' patience --------------------------------------------------------------------------------------

ATTACKS: dict[str, Callable[[int], bytes]] = {
    "paths of slashes": lambda _: request(b"/" * LONG).replace(b"Connection: close\r\n", b""),
    "Expect": lambda number: request(b"/healthz", b"Expect: %d" % number),
    "unfinished heads": lambda _: HUGE_HEAD[:60_000],
    "unread answers": lambda _: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 88,
    "targets that no library can read": lambda _: b"GET http://xn--a/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "garbage": lambda number: b"%d garbage\r\n\r\n" % number,
    "connections": lambda _: b"G",
    "tags": lambda _: request(b"/healthz", *[b"If-None-Match: " + b"," * (LONG - 200)] * 4),
}


async def ask(url: str, make: Callable[[int], bytes], rate: float) -> None:
    """Send such requests for ever, so many in a second, each on a connection of its own; read no answer."""
    began, number = time.monotonic(), 0
    async with contextlib.AsyncExitStack() as stack:
        while True:
            number += 1
            with contextlib.suppress(OSError):
                client = await stack.enter_async_context(connection(url, buffer=4096))
                client.reader._transport.pause_reading()  # type: ignore[attr-defined]
                client.writer.write(make(number))
            await asyncio.sleep(max(0, began + number / rate - time.monotonic()))


# A server that does nothing but answer. What its clients wait for, the machine and this test cost, not our servers.
BARE = """
import asyncio

async def answer(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
    await reader.read()
    writer.close()

async def serve():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(serve())
"""


@contextlib.asynccontextmanager
async def bare_server() -> AsyncIterator[str]:
    """The URL of one, in a process of its own."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", BARE, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}/"
    finally:
        process.kill()
        await process.wait()


@pytest.mark.matrix
@row("each hostile kind of requests at 1 Mbit/s", "200")
@pytest.mark.parametrize("kind", ATTACKS)
async def test_others_do_not_notice(system: System, start: Start, kind: str, note: RowOf) -> None:
    """At 1 Mbit/s of hostile requests, no request of others fails, and 99 of 100 take less than 0.1 s.

    That is, longer than 99 of 100 take that are made at the same time to a server that does nothing: on a machine that
    is busy with other things, both are late.
    """
    server = await start(PAIR.gateway, DOWNSTREAM_URL=system.service.url)
    make = ATTACKS[kind]
    rate = 125_000 / (len(make(1)) + PACKETS)
    async with (
        bare_server() as bare,
        OpenLoop(bare, rate=50) as noise,
        OpenLoop(server.url + "/healthz", server.url + PAIR.read_path) as load,
    ):
        hostile = asyncio.create_task(ask(server.url, make, rate))
        await asyncio.sleep(5)
        hostile.cancel()
        await asyncio.wait([hostile])
    assert not load.failed()
    took, own = load.slowest(0.99), noise.slowest(0.99)
    note(f"p99 {took * 1000:.0f} ms; {own * 1000:.0f} ms of a server that does nothing")
    assert took - own < 0.1
