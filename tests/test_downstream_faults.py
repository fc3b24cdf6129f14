"""What the gateway's client sees of a message service that is away, silent, or violates its contract."""

import asyncio
import gzip
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conftest import MakePeer, MakeProxy, Start, System
from kit import eventually, memory, open_sockets, reserve_port
from kit.client import Answer, get
from kit.network import reset, response, unanswered_port
from kit.postgres import Database

from gateway import MAX_CALLS

GOOD = response('{"message": "ok"}')
PROBLEM = "application/problem+json"


def problem(status: int, kind: str) -> bytes:
    """A problem as the message service sends it."""
    body = {"type": f"urn:problem-type:messages:{kind}", "title": "t", "status": status, "detail": "d"}
    return response(json.dumps(body), f"{status} T", PROBLEM)


async def endless_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await writer.drain()


async def endless_header(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def says_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def drips(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for byte in GOOD:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.1)


async def resets(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    reset(writer)


BOMB = gzip.compress(json.dumps({"message": "0" * 50_000_000}).encode(), 1)

ANSWERS: dict[int, dict[str, bytes | object]] = {
    404: {"the table is empty": problem(404, "no-message")},
    502: {
        "no HTTP": b"garbage\r\n\r\n",
        "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
        "invalid JSON": response('{"message": '),
        "empty body": response(""),
        "invalid UTF-8": response(b'{"message": "\xff"}'),
        "lone surrogate": response('{"message": "\\ud800"}'),
        "nested too deeply": response("[" * 100_000),
        "wrong key": response('{"result": "ok"}'),
        "a number": response('{"message": 1}'),
        "null": response('{"message": null}'),
        "a list": response('["message"]'),
        "a string": response('"message"'),
        "HTML": response("<html>", content_type="text/html"),
        "JSON called text": response('{"message": "ok"}', content_type="text/plain"),
        "204": b"HTTP/1.1 204 No Content\r\n\r\n",
        "201": response('{"message": "ok"}', "201 Created"),
        "206": response('{"message": "ok"}', "206 Partial Content"),
        "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
        "404 of somebody else": response("<html>", "404 Not Found", "text/html"),
        "404 of another problem": problem(404, "other"),
        "401": response("{}", "401 Unauthorized"),
        "500 in HTML": response("<html>", "500 Internal Server Error", "text/html"),
        "500 as a problem": problem(500, "other"),
        "problem that is a list": response("[]", "503 T", PROBLEM),
        "more than 1 MiB": response(json.dumps({"message": "x" * 1024 * 1024})),
        "says more than 1 MiB": response('{"message": "ok"}', Content_Length="9999999999") + b" " * 2_000_000,
        "endless body": endless_body,
        "endless header": endless_header,
        "compressed bomb": response(BOMB, Content_Encoding="gzip"),
    },
    503: {
        "it has no database": problem(503, "unavailable"),
        "closed with no answer": b"",
        "closed in the header": b"HTTP/1.1 200 OK\r\nContent-Le",
        "closed in the body": GOOD[:-3],
        "reset": resets,
    },
    504: {"its database is slow": problem(504, "timeout"), "says nothing": says_nothing, "drips": drips},
}
KINDS = {404: "no-message", 502: "bad-downstream", 503: "unavailable", 504: "timeout"}


@pytest.fixture
def database(system: System) -> Database:
    """The shared one, since it is only read here."""
    return system.database


async def test_whatever_it_says_the_client_gets_a_clear_answer(start: Start, make_peer: MakePeer) -> None:
    """The contract's status within the time limit, a good answer right after it, and no leak."""
    cases = [(status, name, script) for status, answers in ANSWERS.items() for name, script in answers.items()]

    async def check(cases: list[tuple[int, str, Any]]) -> None:
        peer = await make_peer(GOOD)
        gateway = await start("gateway", DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=1)
        url = gateway.url + "/api/string"
        assert (await get(url)).status == 200
        sockets = open_sockets(gateway.pid)
        for status, name, script in cases:
            peer.script = script
            answer = await get(url, within=2)
            found = answer.status, answer.json()["type"], "Retry-After" in answer.headers
            assert found == (status, f"urn:problem-type:messages:{KINDS[status]}", status == 503), name
            peer.script = GOOD
            assert (await get(url)).json() == {"result": "ok"}, f"after {name}"
        await eventually(lambda: open_sockets(gateway.pid) <= sockets)
        assert memory(gateway.pid) < 150 * 1024 * 1024

    await asyncio.gather(*(check(cases[part::4]) for part in range(4)))  # most of the time is waiting


async def test_a_redirect_is_not_followed(start: Start, make_peer: MakePeer) -> None:
    """The message service cannot send the gateway elsewhere."""
    elsewhere = await make_peer(GOOD)
    peer = await make_peer(response("", "302 Found", Location=elsewhere.url + "/api/message"))
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url)
    assert (await get(gateway.url + "/api/string")).status == 502
    assert elsewhere.requests == []


async def test_it_is_away(start: Start) -> None:
    """Refused or silent: a clear answer in time."""

    async def ask(url: str) -> Answer:
        gateway = await start("gateway", DOWNSTREAM_URL=url, DOWNSTREAM_TIMEOUT=1)
        return await get(gateway.url + "/api/string", within=2)

    with reserve_port() as refused:
        assert (await ask(f"http://127.0.0.1:{refused.getsockname()[1]}")).status == 503
    with unanswered_port() as port:
        assert (await ask(f"http://127.0.0.1:{port}")).status == 504


async def test_its_restart_is_not_noticed(start: Start, database: Database) -> None:
    """Connections to the old process cost no request; while it is away, the answer is 503."""
    with reserve_port() as port:
        settings = database.settings() | {"PORT": port.getsockname()[1]}
        service = await start("message_service", **settings)
        gateway = await start("gateway", DOWNSTREAM_URL=service.url)
        url = gateway.url + "/api/string"
        assert {a.status for a in await asyncio.gather(*(get(url) for _ in range(20)))} == {200}
        service.terminate()
        await service.exit_status()
        assert (await get(url)).status == 503
        assert (await get(gateway.url + "/readyz")).status == 200
        service = await start("message_service", **settings)
        assert (await get(url)).status == 200
        service.kill()
        await start("message_service", **settings)
        assert (await get(url)).status == 200


async def test_it_is_frozen_and_goes_on(start: Start, database: Database) -> None:
    """504 while it lasts, for later requests, too; a good answer right after it."""
    service = await start("message_service", **database.settings())
    gateway = await start("gateway", DOWNSTREAM_URL=service.url, DOWNSTREAM_TIMEOUT=1)
    url = gateway.url + "/api/string"
    assert (await get(url)).status == 200
    service.freeze()
    for _ in range(2):
        assert {a.status for a in await asyncio.gather(*(get(url, within=2) for _ in range(20)))} == {504}
    service.resume()
    assert (await get(url, within=1)).status == 200


async def test_connections_that_died_silently_cost_nobody_a_request(
    start: Start, make_peer: MakePeer, make_proxy: MakeProxy
) -> None:
    """After a firewall has dropped their state, the next request is answered on a new connection."""
    peer = await make_peer(GOOD, keep_alive=True)
    proxy = await make_proxy(peer.port)
    gateway = await start("gateway", DOWNSTREAM_URL=proxy.url)
    url = gateway.url + "/api/string"
    assert (await get(url)).status == 200
    proxy.freeze(new=False)
    for _ in range(5):
        assert (await get(url)).status == 200
    assert proxy.accepted >= 2  # more if the machine is busy, and the new one late


async def test_a_stuck_call_holds_up_nobody(start: Start, make_peer: MakePeer) -> None:
    """While one call is stuck, later requests are answered, and their answer also settles the stuck one."""
    peer = await make_peer(says_nothing)
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url)
    stuck = asyncio.create_task(get(gateway.url + "/api/string"))
    await eventually(lambda: peer.requests)
    peer.script = GOOD
    for _ in range(5):
        assert (await get(gateway.url + "/api/string")).status == 200
    assert (await stuck).status == 200


@pytest.mark.parametrize("script", [problem(503, "unavailable"), response("<html>", "500 No"), response("garbage")])
async def test_a_connection_to_a_replica_that_is_not_well_is_not_used_again(
    start: Start, make_peer: MakePeer, script: bytes
) -> None:
    """Even though the replica keeps it open: the next call can reach another one."""
    peer = await make_peer(script, keep_alive=True)
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url)
    asked = asyncio.create_task(get(gateway.url + "/api/string"))
    await eventually(lambda: len(peer.requests) >= 4)
    assert peer.accepted == len(peer.requests)
    peer.script = GOOD
    assert (await asked).status == 200


async def test_a_connection_is_not_kept_for_ever(start: Start, make_peer: MakePeer) -> None:
    """So that replicas share the calls again, some time after one of them was away."""
    peer = await make_peer(GOOD, keep_alive=True)
    program = "import gateway, lifecycle; gateway.REBALANCE_INTERVAL = 0.5; "
    program += "lifecycle.main('gateway', '', gateway.Settings, gateway.application)"
    gateway = await start("gateway", program=("-c", program), DOWNSTREAM_URL=peer.url)

    async def connections() -> int:
        assert (await get(gateway.url + "/api/string")).status == 200
        return peer.accepted

    assert await connections() == 1
    await eventually(lambda: connections_are(connections, 3), within=5)
    assert len(peer.requests) > 10


async def connections_are(connections: Callable[[], Awaitable[int]], number: int) -> bool:
    return await connections() == number


async def test_a_long_outage_costs_no_more_calls_than_there_are_requests(start: Start, make_peer: MakePeer) -> None:
    """A call is repeated eight times in the first two seconds; then errors come at once, until there is an answer."""
    peer = await make_peer(b"")
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url)
    url = gateway.url + "/api/string"
    first = await get(url)
    metrics = (await get(gateway.url + "/metrics")).body.decode()
    late = re.findall(r'^coalescing_run_callers_count{.*reason="late"} (.*)', metrics, re.MULTILINE)
    assert first.status == 503
    assert 8 <= len(peer.requests) <= 8 + sum(map(float, late))  # on a busy machine, some calls get company
    assert 1 < first.seconds < 4
    await eventually(lambda: fails_at_once(url))
    before = len(peer.requests)
    for _ in range(20):
        assert (await get(url)).status == 503
    assert len(peer.requests) == before + 20
    peer.script = GOOD
    assert (await get(url)).status == 200


async def fails_at_once(url: str) -> bool:
    return (await get(url)).seconds < 0.01


async def test_a_long_silence_costs_no_more_calls_than_can_be_in_flight(start: Start, make_peer: MakePeer) -> None:
    """A service that never answers gets no more calls because of that."""
    peer = await make_peer(says_nothing)
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=1)
    url = gateway.url + "/api/string"

    async def ask_for(seconds: float) -> int:
        before = len(peer.requests)
        end = asyncio.get_running_loop().time() + seconds
        asked = []
        while asyncio.get_running_loop().time() < end:
            asked.append(asyncio.create_task(get(url)))
            await asyncio.sleep(0.01)
        assert {answer.status for answer in await asyncio.gather(*asked)} == {504}
        return len(peer.requests) - before

    await ask_for(2.5)
    assert await ask_for(4) <= MAX_CALLS * (4 + 1 + 1)  # in each second of waiting, and in those at both ends
