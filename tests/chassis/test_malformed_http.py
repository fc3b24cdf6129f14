"""Input that is not clean HTTP/1.1, or that a proxy in front would take for one request, but is two (smuggling)."""

import asyncio
import random
import re
from collections.abc import Callable, Iterable

import pytest
from conftest import System
from kit.application import PAIR
from kit.client import PATIENCE, connection, exchange, get
from kit.faults import RowOf, StartObserved, back_to, footprint


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Clients", fault, sees)


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
LAST = GET + b"X-Request-ID: last\r\nConnection: close\r\n\r\n"  # tells whether the server took it for a request
CHUNKED = GET + b"Transfer-Encoding: chunked\r\n\r\n"

# Bytes to send, and the statuses that must come back before the connection closes. `LAST` follows if the question is
# whether the server still knows where a request ends: it gets 200 only if that is beyond doubt.
REFUSED = {
    "conflicting Content-Length": GET + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nhello" + LAST,
    "list of Content-Length": GET + b"Content-Length: 5, 5\r\n\r\nhello" + LAST,
    "negative Content-Length": GET + b"Content-Length: -1\r\n\r\n" + LAST,
    "Content-Length and chunked": GET + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + LAST,
    "unknown Transfer-Encoding": GET + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + LAST,
    "chunked not last": GET + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + LAST,
    "space before the colon": GET + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + LAST,
    "hexadecimal chunk": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n" + LAST,
    "chunk with bare LF": CHUNKED + b"5\nhello\n0\n\n" + LAST,
    "LF in a chunk extension": CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n" + LAST,
    "bare LF": b"GET /healthz HTTP/1.1\nHost: x\n\n" + LAST,
    "bare CR": GET + b"A: b\rContent-Length: 80\r\n\r\n" + LAST,
    "obs-fold": GET + b"A: b\r\n c\r\n\r\n" + LAST,
    "NUL in a value": GET + b"A: b\0c\r\n\r\n" + LAST,
    "header without a colon": GET + b"A\r\n\r\n" + LAST,
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n" + LAST,
    "two Hosts": GET + b"Host: y\r\n\r\n" + LAST,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "asterisk-form with GET": b"GET * HTTP/1.1\r\nHost: x\r\n\r\n" + LAST,
    "absolute-form with a bad port": b"GET http://x:99999999/healthz HTTP/1.1\r\nHost: x\r\n\r\n" + LAST,
    "bytes beyond ASCII in the path": "GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode() + LAST,
    "enormous method": b"A" * 9000 + b" /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n",
}
ANSWERED: dict[str, tuple[bytes, list[int]]] = {
    "HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n\r\n", [200]),
    "HTTP/1.0 kept alive": (b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + LAST, [200, 200]),
    "HTTP/1.0 and chunked": (  # faulty framing: answered and closed (RFC 9112, 6.1)
        b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + LAST,
        [200],
    ),
    "absolute-form": (b"GET http://x/healthz HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [200, 200]),
    "asterisk-form": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [404, 200]),
    "authority-form": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [404, 200]),
    "long query": (b"GET /healthz?" + b"a" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [200, 200]),
    "malformed escapes": (b"GET /%zz%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [404, 200]),
    "body on a GET": (GET + b"Content-Length: 5\r\n\r\nhello" + LAST, [200, 200]),
    "chunked body on a GET": (CHUNKED + b"5;a=b\r\nhello\r\n0\r\n\r\n" + LAST, [200, 200]),
    "a body that looks like a request": (GET + b"Content-Length: %d\r\n\r\n" % len(LAST) + LAST + LAST, [200, 200]),
    "a body that never comes": (GET + b"Content-Length: 5\r\n\r\n", [200]),
    "a compressed body that is none": (
        GET + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello" + LAST,
        [200, 200],
    ),
    "Expect: 100-continue": (GET + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n", [100, 200]),
    "Expect: anything": (GET + b"Expect: anything\r\n\r\n" + LAST, [417]),
    "Expect: what is no text": (GET + b"Expect: \xd4\r\n\r\n" + LAST, [417]),
    "empty lines first": (b"\r\n\r\n" + LAST, [200]),
    "pipelining of 100": (b"".join(GET + b"\r\n" for _ in range(99)) + LAST, [200] * 100),
    "pipelining, then garbage": (GET + b"\r\n" + GET + b"\r\n" + b"garbage\r\n\r\n" + LAST, [200, 200, 400]),
}


def statuses(raw: bytes) -> list[int]:
    """The statuses of all responses in it."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", raw)]


@row("malformed or ambiguous requests (of a smuggling corpus)", "400, then a close")
async def test_what_could_be_two_requests_is_refused(system: System, note: RowOf) -> None:
    """400, or 414 or 431 if it is too long, as a problem; nothing behind it is taken for a request."""
    url = system.gateway.url
    resets = []
    for name, request in REFUSED.items():
        try:
            raw = await exchange(url, request, within=5)
        except ConnectionError:  # it closed before reading everything, so the reset can overtake its answer
            resets.append(name)
            continue
        assert statuses(raw) in [[400], [414], [431]], name
        assert b"X-Request-ID: last" not in raw, name
        assert b"application/problem+json" in raw or statuses(raw) == [200], name
    assert len(resets) < 5, resets
    assert (await get(url + "/healthz")).status == 200
    note("at once")


@row("HTTP/1.0, absolute-form, Expect, CONNECT, pipelining of 100, bodies on GET", "200, 404")
async def test_what_is_unusual_is_answered(system: System, note: RowOf) -> None:
    """Each request once, in order; nothing hangs."""
    url = system.gateway.url
    for name, (request, expected) in ANSWERED.items():
        raw = await exchange(url, request, within=5)
        assert statuses(raw) == expected, name
    note("-")


def no_secret(lines: Iterable[object]) -> bool:
    return "hunter2" not in str(list(lines))


async def test_a_malformed_header_is_not_logged(system: System) -> None:
    """It may hold a password."""
    server = system.gateway
    for field in (b"Authorization: Basic hunter2\0", b"Authorization : hunter2", b"hunter2", b"A: hunter2" * 2000):
        raw = await exchange(server.url, GET + field + b"\r\n\r\n")
        assert statuses(raw) in ([400], [431])
        assert b"hunter2" not in raw
    await server.wait_for_log(status=400)
    assert no_secret(server.log)


# ---- the fuzzer ------------------------------------------------------------------------------------------------

TOKENS = [b"GET", b"/healthz", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b" ", b":", b"\0", b"Host", b"Content-Length"]
TOKENS += [b"Transfer-Encoding", b"chunked", b"5", b"0", b"-1", b"Upgrade", b"Connection", b"close", b"keep-alive"]
TOKENS += [b"hello", b"\xff", b"%00", b"Expect", b"100-continue", b"PRI * HTTP/2.0", b"HTTP/0.9", b"\t", b";", b","]


def random_bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, 200)) + b"\r\n\r\n"


def random_tokens(chance: random.Random) -> bytes:
    return b"".join(chance.choices(TOKENS, k=chance.randrange(1, 40))) + b"\r\n\r\n"


def mutated(chance: random.Random) -> bytes:
    corpus = list(REFUSED.values()) + [request for request, _ in ANSWERED.values()]
    request = bytearray(chance.choice(corpus)[:2000])
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(request))
        match chance.randrange(3):
            case 0:
                request[place] = chance.randrange(256)
            case 1:
                request[place:place] = chance.choice(TOKENS)
            case _:
                del request[place : place + chance.randrange(1, 10)]
                request += b"\r"
    return bytes(request)


KINDS: list[Callable[[random.Random], bytes]] = [random_bytes, random_tokens, mutated]


@pytest.mark.matrix
@row("20,000 random requests (seeded)", "4xx or a close")
async def test_random_requests(observed: StartObserved, note: RowOf) -> None:
    """No 5xx, crash, leaked task or growing process; other clients are served meanwhile."""
    server = await observed(PAIR.service, DB_HOST="127.0.0.1", DB_PORT=1)
    chance = random.Random(8)
    before, seen = None, set()

    async def some(requests: int) -> None:
        for _ in range(requests):
            request = chance.choice(KINDS)(chance)
            try:
                async with asyncio.timeout(PATIENCE), connection(server.url) as client:
                    client.writer.write(request)
                    client.writer.write_eof()  # so that a request that needs more gets a close
                    seen.update(statuses(await client.reader.read()))
            except ConnectionError:  # a reset is a close
                continue

    for part in range(10):
        await asyncio.gather(*(some(100) for _ in range(20)))
        if part == 0:
            before = await footprint(server)
        assert (await get(server.url + "/healthz", within=1)).status == 200
    assert before
    await back_to(server, before)
    assert {status for status in seen if status >= 500} == set()
    assert 400 in seen
    for line in server.log:
        assert line.get("status", 400) < 500, line
    note("-")
