"""Writes, through both servers: whatever fails, what the client is told is true, and nothing is there twice.

201: it is there, once. `unavailable`: surely not, now or later. `outcome-unknown`, or no answer: it may be. The same
key again, and the order is there, once. And the stock plus the orders of an item stays what it was.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Start, close_all
from kit import eventually, reserve_port
from kit.client import Answer, connection
from kit.network import Proxy, Trap, unanswered_port
from kit.pooler import PROGRAM, Pooler
from kit.postgres import Cluster, Database, Provider, make_folder
from kit.processes import Server, wait_listening
from orders import PROBLEM, Orders

SERVICE, GATEWAY = "examples.orders.order_service", "examples.orders.gateway"
LIMITS: dict[str, Any] = {"DB_TIMEOUT": 1, "DOWNSTREAM_TIMEOUT": 2}
KEY = "5e0f7c1f"
UNAVAILABLE, UNKNOWN = PROBLEM + "unavailable", PROBLEM + "outcome-unknown"
BUSY = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND backend_type = 'client backend' AND state <> 'idle'"
)


async def order(orders: Orders) -> Answer | None:
    """Order something with the key; None if the connection ends without an answer."""
    try:
        return await orders.order(Idempotency_Key=KEY)
    except (OSError, asyncio.IncompleteReadError):
        return None


async def agrees(orders: Orders, answer: Answer | None) -> int:
    """Assert that what the client was told is true, and stays true; return how many orders are there."""
    await eventually(lambda: not orders.database.sql(BUSY), within=10)  # nothing that may still be carried out
    rows = orders.rows()
    assert orders.in_all() == 1000
    if answer is None:
        assert rows in (0, 1)
    elif answer.status == 201:
        assert rows == 1
    else:
        kind = answer.json()["type"]
        assert (answer.status, kind) in {(503, UNAVAILABLE), (502, UNKNOWN), (504, UNKNOWN)}
        assert ("Retry-After" in answer.headers) == (kind == UNAVAILABLE)
        assert rows in ((0,) if kind == UNAVAILABLE else (0, 1))
    return rows


async def succeeds_now(orders: Orders) -> None:
    """The same key again, and the order is there, once."""

    async def again() -> bool:
        answer = await order(orders)
        return answer is not None and answer.status == 201

    await eventually(again, within=10)
    assert (orders.rows(), orders.in_all()) == (1, 1000)


# ---- the connections between the parts end -----------------------------------------------------------------------


@dataclass
class Links:
    """The proxies in front of the service and the database."""

    to_service: Proxy
    to_database: Proxy


@pytest.fixture(scope="module")
def linked(provider: Provider) -> Iterator[Orders]:
    """Both servers; each test brings the proxies between the parts."""
    database = provider.create()
    with reserve_port() as first, reserve_port() as second:
        to_service, to_database = first.getsockname()[1], second.getsockname()[1]
        settings = database.settings(DB_PORT=to_database)
        service = Server("order_service", "-m", SERVICE, **settings, **LIMITS)
        url = f"http://127.0.0.1:{to_service}"
        gateway = Server("gateway", "-m", GATEWAY, DOWNSTREAM_URL=url, DOWNSTREAM_TIMEOUT=2, PORT=0)
        yield Orders(wait_listening(gateway), wait_listening(service), database)
        close_all([service, gateway])
    provider.take_back(database)


@pytest.fixture
async def links(linked: Orders) -> AsyncIterator[Links]:
    """The proxies; with no order, and a connection to the database that is kept."""
    to_service = Proxy(linked.service.port, port=port_in(linked.gateway, "DOWNSTREAM_URL"))
    to_database = Proxy(linked.database.port, port=port_in(linked.service, "DB_PORT"))
    await to_service.accept()
    await to_database.accept()
    linked.forget()
    await eventually(lambda: has_stock(linked))
    yield Links(to_service, to_database)
    await to_service.close()
    await to_database.close()


def port_in(server: Server, variable: str) -> int:
    """The port that a setting of a server names."""
    environment = Path(f"/proc/{server.pid}/environ").read_text().split("\0")
    (value,) = [line.partition("=")[2] for line in environment if line.startswith(f"{variable}=")]
    return int(value.rpartition(":")[2])


async def has_stock(orders: Orders) -> bool:
    return (await orders.ask("GET", "/api/stock/tea")).status == 200


async def test_refused(linked: Orders, links: Links) -> None:
    """The service refuses connections: surely not."""
    links.to_service.refuse()
    answer = await order(linked)
    assert (answer and answer.json()["type"], await agrees(linked, answer)) == (UNAVAILABLE, 0)
    await links.to_service.accept()
    await succeeds_now(linked)


async def test_the_database_refuses(linked: Orders, links: Links) -> None:
    """Surely not."""
    links.to_database.refuse()
    links.to_database.cut()
    answer = await order(linked)
    assert (answer and answer.json()["type"], await agrees(linked, answer)) == (UNAVAILABLE, 0)
    await links.to_database.accept()
    await succeeds_now(linked)


async def test_no_answer_to_a_connection(linked: Orders, start: Start) -> None:
    """The service's host says nothing at all: surely not, when the time is up."""
    linked.forget()
    with unanswered_port() as port:
        gateway = await start(GATEWAY, DOWNSTREAM_URL=f"http://127.0.0.1:{port}", DOWNSTREAM_TIMEOUT=0.5)
        answer = await order(Orders(gateway, linked.service, linked.database))
    assert (answer and answer.json()["type"], await agrees(linked, answer)) == (UNAVAILABLE, 0)


def breaks(quick: str, moments: dict[str, tuple[bytes, float, float]]) -> pytest.MarkDecorator:
    """Each way to break at each moment. Silence lasts until the time is up, so only for `quick` in the quick tests."""
    return pytest.mark.parametrize(
        ("how", "trigger", "passed", "answered"),
        [
            pytest.param(
                how,
                *moment,
                id=f"{how} {name}",
                marks=[pytest.mark.matrix] if how == "silent" and name != quick else [],
            )
            for how in ("closed", "reset", "silent")
            for name, moment in moments.items()
        ],
    )


@breaks(
    "before the answer",
    {
        "before anything is sent": (b"POST", 0, 0),
        "in the head": (b"POST", 0.2, 0),
        "in the body": (b'"customer"', 0.9, 0),
        "before the answer": (b'"customer"', 1, 0),
        "in the answer": (b'"customer"', 1, 0.5),
    },
)
async def test_the_service_is_lost(
    linked: Orders, links: Links, how: str, trigger: bytes, passed: float, answered: float
) -> None:
    """Once connected, it may have been carried out; it is sent once."""
    links.to_service.trap = Trap(trigger, how, passed, answered)
    before = links.to_service.accepted
    answer = await order(linked)
    assert links.to_service.trap.sprung
    assert links.to_service.accepted == before + 1
    told = answer and (answer.status, answer.json()["type"])
    assert (told, await agrees(linked, answer)) == ((504 if how == "silent" else 502, UNKNOWN), int(passed == 1))
    await succeeds_now(linked)


async def test_the_service_is_lost_while_it_deletes(linked: Orders, links: Links) -> None:
    """It is sent once: a second one would be told that there is no such order."""
    path = (await linked.order()).headers["Location"]
    links.to_service.trap = Trap(b"DELETE")
    before = links.to_service.accepted
    answer = await linked.ask("DELETE", path)
    assert (answer.status, answer.json()["type"], links.to_service.accepted) == (502, UNKNOWN, before + 1)
    assert (linked.rows(), linked.in_all()) == (0, 1000)


@breaks(
    "before COMMIT",
    {
        f"{when} {statement}": (statement.encode(), passed, 0)
        for statement in ("BEGIN", "INSERT", "UPDATE", "COMMIT")
        for passed, when in ((0, "before"), (0.5, "in"), (1, "after"))
    },
)
async def test_the_database_is_lost(
    linked: Orders, links: Links, how: str, trigger: bytes, passed: float, answered: float
) -> None:
    """Before the COMMIT is sent: surely not, and a transaction that has not begun finds another connection. Then: it
    may have been carried out.
    """
    links.to_database.trap = Trap(trigger, how, passed, answered)
    answer = await order(linked)
    assert links.to_database.trap.sprung
    committed = int(trigger == b"COMMIT" and passed == 1)
    if trigger == b"BEGIN" and how != "silent":
        status, kind, committed = 201, None, 1
    elif trigger == b"COMMIT":
        status, kind = (504 if how == "silent" else 502), UNKNOWN
    else:
        status, kind = 503, UNAVAILABLE
    assert answer
    assert (answer.status, answer.json().get("type"), await agrees(linked, answer)) == (status, kind, committed)
    await succeeds_now(linked)


@pytest.mark.parametrize("how", ["terminated", "forgotten"])
async def test_a_kept_connection_that_the_database_has_closed(linked: Orders, links: Links, how: str) -> None:
    """Nobody notices."""
    if how == "terminated":
        linked.database.terminate_backends()
    else:
        links.to_database.forget()
    links.to_service.cut()
    answer = await order(linked)
    assert (answer and answer.status, await agrees(linked, answer)) == (201, 1)


# ---- the time is up ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(database: Database, table: str = "stock") -> Iterator[None]:
    """Inside, nobody can change the table."""
    holder = database.connect()
    holder.cursor().execute(f"LOCK TABLE {table} IN SHARE MODE")
    try:
        yield
    finally:
        holder.close()


def waits(database: Database) -> bool:
    """Whether a statement waits for the lock."""
    return bool(database.sql(f"{BUSY} AND wait_event_type = 'Lock'"))


async def test_the_time_is_up_in_the_transaction(linked: Orders, links: Links) -> None:
    """At the database's deadline it is rolled back: surely not, even when the lock is gone."""
    with locked(linked.database):
        answer = await order(linked)
    assert (answer and answer.json()["type"], await agrees(linked, answer)) == (UNAVAILABLE, 0)
    assert links.to_database.accepted
    await succeeds_now(linked)


async def test_the_time_is_up_at_the_gateway(linked: Orders, links: Links, start: Start) -> None:
    """It may have been carried out; here, the service rolls back since the gateway has left."""
    gateway = await start(GATEWAY, DOWNSTREAM_URL=links.to_service.url, DOWNSTREAM_TIMEOUT=0.3)
    orders = Orders(gateway, linked.service, linked.database)
    with locked(linked.database):
        answer = await order(orders)
        await eventually(lambda: not waits(linked.database))
    assert (answer and answer.json()["type"], await agrees(orders, answer)) == (UNKNOWN, 0)
    await succeeds_now(linked)


# ---- a server ends, a client leaves ------------------------------------------------------------------------------


@pytest.fixture
async def own(start: Start, database: Database) -> Orders:
    """Both servers, for this test alone."""
    service = await start(SERVICE, **database.settings(), **LIMITS, SHUTDOWN_SECONDS=0.2)
    gateway = await start(GATEWAY, DOWNSTREAM_URL=service.url, DOWNSTREAM_TIMEOUT=2, SHUTDOWN_SECONDS=0.2)
    return Orders(gateway, service, database)


@pytest.mark.parametrize("server", ["gateway", "service"])
@pytest.mark.parametrize("how", ["terminate", "kill"])
async def test_a_server_ends_in_the_transaction(own: Orders, how: str, server: str) -> None:
    """By SIGKILL, or by SIGTERM when its time for requests in flight is over: it is rolled back."""
    with locked(own.database):
        waiting = asyncio.create_task(order(own))
        await eventually(lambda: waits(own.database))
        await asyncio.to_thread(getattr(getattr(own, server), how))
        answer = await waiting
        await eventually(lambda: not waits(own.database))
    assert (answer and answer.json()["type"]) == (None if server == "gateway" else UNKNOWN)
    assert await agrees(own, answer) == 0


@pytest.mark.parametrize("server", ["gateway", "service"])
async def test_sigterm_lets_a_write_finish(start: Start, database: Database, server: str) -> None:
    """With time for requests in flight, it is carried out, and the client is told so."""
    service = await start(SERVICE, **database.settings())
    gateway = await start(GATEWAY, DOWNSTREAM_URL=service.url)
    own = Orders(gateway, service, database)
    with locked(database):
        waiting = asyncio.create_task(order(own))
        await eventually(lambda: waits(database))
        ending: Server = getattr(own, server)
        ending.terminate()
        await ending.wait_for_log(message="draining")
    answer = await waiting
    assert (answer and answer.status, await agrees(own, answer)) == (201, 1)
    assert await ending.exit_status() == 0


@pytest.mark.parametrize("server", ["gateway", "service"])
async def test_a_client_that_leaves_takes_its_write_with_it(linked: Orders, links: Links, server: str) -> None:
    """The open transaction is rolled back, and holds no lock any longer."""
    body = b'{"customer": "Ada", "item": "tea", "quantity": 2}'
    with locked(linked.database):
        async with connection(getattr(linked, server).url) as client:
            await client.send("/api/orders", "POST", {"Content-Type": "application/json"}, body)
            await eventually(lambda: waits(linked.database))
        await eventually(lambda: not waits(linked.database))
    assert await agrees(linked, None) == 0
    assert links.to_service.accepted
    await succeeds_now(linked)


@pytest.mark.skipif(not PROGRAM, reason="there is no PgBouncer")
@pytest.mark.parametrize("mode", ["transaction", pytest.param("session", marks=pytest.mark.matrix)])
async def test_a_pooler_restarts(cluster: Cluster, session_folder: Path, start: Start, mode: str) -> None:
    """In the transaction: surely not. Between two: nobody notices."""
    pooler = Pooler(make_folder("pooler-", session_folder), cluster, pool_mode=mode)
    try:
        service = await start(SERVICE, **pooler.database().settings(), **LIMITS)
        gateway = await start(GATEWAY, DOWNSTREAM_URL=service.url)
        own = Orders(gateway, service, cluster.database())
        with locked(own.database):
            waiting = asyncio.create_task(order(own))
            await eventually(lambda: waits(own.database))
            await asyncio.to_thread(pooler.restart)
            answer = await waiting
        assert (answer and answer.json()["type"], await agrees(own, answer)) == (UNAVAILABLE, 0)
        await succeeds_now(own)
        await asyncio.to_thread(pooler.restart)
        deleted = await own.ask("DELETE", "/api/orders/" + str(own.database.sql("SELECT id FROM orders")[0][0]))
        assert (deleted.status, own.rows(), own.in_all()) == (204, 0, 1000)
    finally:
        pooler.close()
