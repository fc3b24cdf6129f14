"""What is not shared, in applications of the test's own: calls of another service, and transactions.

Whatever fails, a write's failure says whether it may have been carried out, and it is sent once. The example's tests
try the same through both of its servers, and look what is stored.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import psycopg2
import pytest
from aiohttp import web
from conftest import MakePeer, MakeProxy, Serve
from kit import eventually
from kit.client import Answer, connection, get
from kit.network import reset, response, says_nothing
from kit.postgres import Database

from chassis import client, database, metrics, settings
from chassis.client import Service
from chassis.responses import Problem

PROBLEM = "urn:problem-type:"
SERVICE = web.AppKey("service", Service)
DATABASE = web.AppKey("database", database.Database)
WRITES = ["POST", "PUT", "PATCH", "DELETE"]


class Value(msgspec.Struct):
    value: int


def read(answer: client.Answer) -> int:
    return answer.json(Value).value


async def call(request: web.Request) -> web.Response:
    """Pass the request on with its method: `/call/{name}`."""
    path = f"things/{request.match_info['name']}/parts"
    options: dict[str, Any] = {"headers": {"X-Of-Its-Own": "sent"}}
    if request.method in WRITES:
        options["json"] = {"sent": "x" * 1000}
    return web.json_response(await request.app[SERVICE].call(request, request.method, path, read, **options))


async def share(request: web.Request) -> web.Response:
    return web.json_response(
        await request.app[SERVICE].shared(request, f"things/{request.match_info['name']}/parts", read)
    )


Behind = Callable[..., Any]


@pytest.fixture
async def behind(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Behind:
    """Serves an application in front of a service: `await behind(url)`."""
    monkeypatch.setattr(client, "PATIENCE", 10)  # or a busy machine would add calls that nothing here asks for

    async def begin(downstream_url: str, downstream_timeout: float = 2) -> str:
        variables = {"DOWNSTREAM_URL": downstream_url, "DOWNSTREAM_TIMEOUT": str(downstream_timeout)}
        options = settings.read(client.Settings, variables)
        app = web.Application()

        async def service(app: web.Application) -> AsyncIterator[None]:
            async with Service("other", options, "test") as app[SERVICE]:
                yield

        app.cleanup_ctx.append(service)
        app.add_routes([web.route(method, "/call/{name}", call) for method in ["GET", *WRITES]])
        app.add_routes([web.get("/shared/{name}", share), web.get("/metrics", metrics.metrics)])
        return await serve(app)

    return begin


async def ask(url: str, method: str = "POST", path: str = "/call/a") -> Answer:
    async with asyncio.timeout(10), connection(url) as connected:
        return await connected.get(path, method)


def problem(status: int, kind: str, **more: Any) -> bytes:
    """A problem as the service sends it."""
    body = {"type": PROBLEM + kind, "title": "t", "status": status, "detail": "The detail.", **more}
    return response(json.dumps(body), f"{status} T", "application/problem+json")


async def failures(url: str) -> str:
    """The samples that count the failures of what is behind."""
    text = (await get(url + "/metrics")).body.decode()
    return "\n".join(line for line in text.splitlines() if line.startswith("dependency_errors_total{"))


@pytest.mark.parametrize("status", [404, 409, 410, 422])
async def test_an_answer_that_says_no_travels_as_it_is(behind: Behind, make_peer: MakePeer, status: int) -> None:
    """To a shared read, another read and each write: after one request, and counted as no failure."""
    peer = await make_peer(problem(status, "of-its-own"))
    url = await behind(peer.url)
    before = await failures(url)
    requests = [("GET", "/shared/a"), ("GET", "/call/a"), *[(method, "/call/a") for method in WRITES]]
    for number, (method, path) in enumerate(requests, 1):
        answer = await ask(url, method, path)
        found = answer.json()
        assert (answer.status, found["type"], found["detail"]) == (status, PROBLEM + "of-its-own", "The detail.")
        assert len(peer.requests) == number
    assert await failures(url) == before


async def test_a_call_has_header_fields_of_its_own(behind: Behind, make_peer: MakePeer) -> None:
    """Whether it reads or writes."""
    peer = await make_peer(response('{"value": 1}'))
    url = await behind(peer.url)
    for method in ("GET", *WRITES):
        assert (await ask(url, method)).body == b"1"
        assert "\r\nX-Of-Its-Own: sent\r\n" in peer.requests[-1]


async def reads_and_leaves(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.readuntil(b'"}')


async def resets(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    reset(writer)


async def endless_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await writer.drain()


OUTCOMES = {
    "closed with no answer": (b"", 502, "outcome-unknown"),
    "closed after the whole request": (reads_and_leaves, 502, "outcome-unknown"),
    "reset": (resets, 502, "outcome-unknown"),
    "silent": (says_nothing, 504, "outcome-unknown"),
    "closed in the head": (b"HTTP/1.1 200 OK\r\nContent-Le", 502, "outcome-unknown"),
    "closed in the body": (response('{"value": 1}')[:-3], 502, "outcome-unknown"),
    "no HTTP": (b"garbage\r\n\r\n", 502, "outcome-unknown"),
    "an answer that breaks the contract": (response('{"other": 1}'), 502, "outcome-unknown"),
    "an answer without an end": (endless_body, 502, "outcome-unknown"),
    "500": (problem(500, "other"), 502, "outcome-unknown"),
    "503 of somebody else": (response("<html>", "503 T", "text/html"), 502, "outcome-unknown"),
    "504, as for a read": (problem(504, "timeout", part="database"), 504, "outcome-unknown"),
    "it does not know": (problem(504, "outcome-unknown", part="database"), 504, "outcome-unknown"),
    "surely not": (problem(503, "unavailable", part="database"), 503, "unavailable"),
}


@pytest.mark.parametrize("name", OUTCOMES)
async def test_a_write_is_sent_once(behind: Behind, make_peer: MakePeer, name: str) -> None:
    """Whatever its method; and the client is told whether it may have been carried out."""
    script, status, kind = OUTCOMES[name]
    peer = await make_peer(script)
    url = await behind(peer.url, 1 if script is says_nothing else 30)
    for number, method in enumerate(WRITES, 1):
        answer = await ask(url, method)
        assert (answer.status, answer.json()["type"]) == (status, PROBLEM + kind)
        assert ("Retry-After" in answer.headers) == (kind == "unavailable")
        assert [request.split()[0] for request in peer.requests] == WRITES[:number]


async def test_a_kept_connection_that_was_closed_costs_no_write(
    behind: Behind, make_peer: MakePeer, make_proxy: MakeProxy
) -> None:
    """Reads have left connections that the other side has closed: each write succeeds, after one request."""
    peer = await make_peer(response('{"value": 1}'), keep_alive=True)
    proxy = await make_proxy(peer.port)
    url = await behind(proxy.url)
    for end in (proxy.cut, proxy.forget):
        for method in WRITES:
            assert (await ask(url, "GET")).status == 200
            end()
            before = len(peer.requests)
            answer = await ask(url, method)
            assert (answer.status, len(peer.requests) - before) == (200, 1)


async def test_a_write_waits_for_its_turn_within_its_time(behind: Behind, make_peer: MakePeer) -> None:
    """When all calls that may be in flight are stuck, one that was never sent was surely not carried out."""
    peer = await make_peer(says_nothing)
    url, asked = await behind(peer.url, 1), 3 * client.MAX_CALLS
    answers = await asyncio.gather(*(ask(url) for _ in range(asked)))
    told = sorted(answer.json()["type"] for answer in answers)
    sent = len(peer.requests)
    assert told == [PROBLEM + "outcome-unknown"] * sent + [PROBLEM + "unavailable"] * (asked - sent)
    assert 0 < sent < asked


# ---- paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["SHARED", "GET", "DELETE"])
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("..", None),
        ("%2E%2e", None),
        (".", None),
        ("a%2Fb", None),
        ("%2F", None),
        ("..%2F..%2Freadyz", None),
        ("a%3Fb%26c", "/base/things/a%3Fb%26c/parts"),
        ("a%23b", "/base/things/a%23b/parts"),
        ("a%252Fb", "/base/things/a%252Fb/parts"),
        ("a%5Cb", "/base/things/a%5Cb/parts"),
        ("%C3%BC%20+;", "/base/things/%C3%BC%20%2B%3B/parts"),
        ("...", "/base/things/.../parts"),
        ("a%0D%0Ab", "/base/things/a%0D%0Ab/parts"),
        ("a%00b", "/base/things/a%00b/parts"),
        ("", None),
    ],
)
async def test_a_parameter_cannot_leave_its_place(
    behind: Behind, make_peer: MakePeer, method: str, name: str, target: str | None
) -> None:
    """Whatever a client puts into a path, it stays one segment of it, or there is nothing there."""
    peer = await make_peer(response('{"value": 1}'))
    url = await behind(peer.url + "/base")
    path, method = (f"/shared/{name}", "GET") if method == "SHARED" else (f"/call/{name}", method)
    answer = await ask(url, method, path)
    targets = [request.split()[1] for request in peer.requests]
    if target:
        assert (answer.status, targets) == (200, [target])
    else:
        assert (answer.status, targets) == (404, [])


# ---- transactions ----------------------------------------------------------------------------------------------


async def fail(request: web.Request) -> web.Response:
    """Insert a row, then do what the query says."""
    kind = request.query["how"]
    async with request.app[DATABASE].transaction() as transaction:
        await transaction.execute("INSERT INTO kept VALUES (%s)", 1)
        if kind == "problem":
            raise Problem(409, "No.", kind="no")
        if kind == "mistake":
            raise LookupError(kind)
        if kind == "swallowed":
            with contextlib.suppress(psycopg2.Error):
                await transaction.execute("SELECT 1 / 0")
        if kind == "nul":
            await transaction.execute("INSERT INTO kept VALUES (%s)", "a\0b")
        if kind in ("twice", "type"):
            try:
                await transaction.execute("INSERT INTO kept VALUES (%s)", 1 if kind == "twice" else "x")
            except (psycopg2.IntegrityError, psycopg2.DataError) as error:
                raise Problem(422, type(error).__name__) from None
    return web.json_response("committed")


async def locked(request: web.Request) -> web.Response:
    """Read the table, or change it."""
    if request.query["how"] == "fetch":
        return web.json_response(await request.app[DATABASE].fetch("SELECT value FROM kept", read=len))
    async with request.app[DATABASE].transaction() as transaction:
        await transaction.execute("UPDATE kept SET value = 1")
    return web.json_response("changed")


async def hot(request: web.Request) -> web.Response:
    return web.json_response(await request.app[DATABASE].shared("SELECT 1", read=len))


async def write_as_a_read(request: web.Request) -> web.Response:
    return web.json_response(await request.app[DATABASE].fetch("INSERT INTO kept VALUES (1)", read=len))


@pytest.fixture
async def url(serve: Serve, empty_database: Database) -> str:
    """An application with a database, which has one table."""
    empty_database.sql("CREATE TABLE kept (value integer PRIMARY KEY)")
    variables = {name: str(value) for name, value in empty_database.settings(DB_TIMEOUT=10).items()}
    options = settings.read(database.Settings, variables)
    app = web.Application()

    async def connections(app: web.Application) -> AsyncIterator[None]:
        async with database.Database(options, "test") as app[DATABASE]:
            yield

    app.cleanup_ctx.append(connections)
    app.add_routes([web.post("/fail", fail), web.get("/locked", locked), web.get("/hot", hot)])
    app.add_routes([web.post("/read", write_as_a_read)])
    return await serve(app)


@pytest.mark.parametrize(
    ("how", "status", "rows"),
    [
        ("nothing", 200, 1),
        ("problem", 409, 0),
        ("mistake", 500, 0),
        ("swallowed", 500, 0),
        ("nul", 422, 0),
        ("twice", 422, 0),
        ("type", 422, 0),
    ],
)
async def test_a_transaction_is_all_or_nothing(
    url: str, empty_database: Database, how: str, status: int, rows: int
) -> None:
    """It is committed if its block ends; whatever the block raises reaches the handler's caller, and undoes it all."""
    answer = await ask(url, "POST", f"/fail?how={how}")
    assert answer.status == status, answer.body
    assert empty_database.sql("SELECT count(*) FROM kept") == [(rows,)]
    assert (await get(url + "/hot")).status == 200  # on the same connection, with no transaction left in it


async def test_a_read_changes_nothing(url: str, empty_database: Database) -> None:
    """A statement that changes something fails as a read, since a read may be repeated."""
    assert (await ask(url, "POST", "/read")).status >= 500
    assert empty_database.sql("SELECT count(*) FROM kept") == [(0,)]


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


@pytest.mark.parametrize("how", ["fetch", "transaction"])
async def test_what_is_not_shared_leaves_connections_for_others(url: str, empty_database: Database, how: str) -> None:
    """While a hundred requests of one kind wait for a locked table, those of another kind are answered."""
    holder = empty_database.connect()
    holder.cursor().execute("LOCK TABLE kept")
    waiting = [asyncio.create_task(get(f"{url}/locked?how={how}")) for _ in range(100)]
    await eventually(lambda: empty_database.sql(WAITING) == [(3,)])  # of four connections
    for _ in range(20):
        assert (await get(url + "/hot")).status == 200
    assert not any(task.done() for task in waiting)
    holder.close()
    assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
