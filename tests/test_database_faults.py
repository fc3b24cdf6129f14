"""What a client sees, through both services, of a broken database, and after its recovery.

Each pitfall of aiopg and psycopg2 in asynchronous mode has a test.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import psycopg2
import pytest
from conftest import MakeProxy, Start
from kit import eventually, open_sockets
from kit.client import connection, get
from kit.postgres import PASSWORD, SCHEMA, Cluster, Database
from kit.processes import Server

NO_MESSAGE, UNAVAILABLE, TIMEOUT = (f"urn:problem-type:messages:{t}" for t in ("no-message", "unavailable", "timeout"))


@contextlib.contextmanager
def stopped(cluster: Cluster) -> Iterator[None]:
    cluster.stop()
    yield
    cluster.start()


@contextlib.contextmanager
def killed(cluster: Cluster) -> Iterator[None]:
    cluster.kill()
    yield
    cluster.start()


@contextlib.contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    cluster.freeze()
    yield
    cluster.resume()


@contextlib.contextmanager
def login_refused(cluster: Cluster) -> Iterator[None]:
    cluster.database().sql("ALTER ROLE postgres PASSWORD 'another'")
    cluster.database().terminate_backends()
    yield
    cluster.database().sql(f"ALTER ROLE postgres PASSWORD '{PASSWORD}'")


@contextlib.contextmanager
def database_missing(cluster: Cluster) -> Iterator[None]:
    cluster.database("postgres").sql("DROP DATABASE mydb WITH (FORCE)")
    yield
    cluster.database("postgres").sql("CREATE DATABASE mydb")
    cluster.database().sql(SCHEMA)


@contextlib.contextmanager
def connections_exhausted(cluster: Cluster) -> Iterator[None]:
    cluster.database().terminate_backends()
    others = cluster.database("postgres")
    with contextlib.suppress(psycopg2.OperationalError):
        while True:
            others.connect()
    yield
    others.close()


@contextlib.contextmanager
def table_missing(cluster: Cluster) -> Iterator[None]:
    cluster.database().sql("ALTER TABLE messages RENAME TO elsewhere")
    yield
    cluster.database().sql("ALTER TABLE elsewhere RENAME TO messages")


@contextlib.contextmanager
def table_empty(cluster: Cluster) -> Iterator[None]:
    cluster.database().sql("DELETE FROM messages")
    yield
    cluster.database().sql(SCHEMA)


def table_locked(cluster: Cluster) -> AbstractContextManager[None]:
    return cluster.database().locked()


Fault = Callable[[Cluster], AbstractContextManager[None]]

FAULTS: list[tuple[Fault, int, str]] = [
    (stopped, 503, UNAVAILABLE),
    (killed, 503, UNAVAILABLE),
    (frozen, 504, TIMEOUT),
    (login_refused, 503, UNAVAILABLE),
    (database_missing, 503, UNAVAILABLE),
    (connections_exhausted, 503, UNAVAILABLE),
    (table_missing, 503, UNAVAILABLE),
    (table_empty, 404, NO_MESSAGE),
    (table_locked, 504, TIMEOUT),
]
QUICK = (stopped, table_missing, table_empty)


async def answers_well(url: str) -> bool:
    """Whether a request is answered with 200."""
    return (await get(url)).status == 200


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        pytest.param(*fault, id=fault[0].__name__, marks=[] if fault[0] in QUICK else pytest.mark.matrix)
        for fault in FAULTS
    ],
)
async def test_a_fault_gets_its_answer_and_heals(
    cluster: Cluster, start: Start, fault: Fault, status: int, kind: str
) -> None:
    """A clear answer in time from both services while it lasts; a good one within a second after; no leak."""
    service = await start("message_service", **cluster.database().settings(), DB_TIMEOUT=1)
    gateway = await start("gateway", DOWNSTREAM_URL=service.url, DOWNSTREAM_TIMEOUT=3)
    urls = [gateway.url + "/api/string", service.url + "/api/message"]
    for url in urls:
        assert await answers_well(url)
    sockets = open_sockets(service.pid)

    with fault(cluster):
        # The gateway tries again for two seconds, or until its limit.
        for answer in await asyncio.gather(*(get(url, within=3.5) for url in urls * 5)):
            problem = answer.json()
            assert (answer.status, problem["type"], problem["status"]) == (status, kind, status)
            assert problem["request_id"] == answer.request_id
            assert ("Retry-After" in answer.headers) == (status == 503)
            for secret in (PASSWORD, "127.0.0.1", "mydb", "postgres", "SELECT", "Error", "psycopg2"):
                assert secret not in str(problem)
        await asyncio.sleep(1.1)  # how long /readyz reuses a good answer
        readiness = await get(service.url + "/readyz", within=2)
        assert readiness.status == (200 if status == 404 else 503)
        assert (await get(gateway.url + "/readyz")).status == 200
        for server in (gateway, service):
            assert (await get(server.url + "/healthz", within=2)).status == 200

    await eventually(lambda: answers_well(urls[0]), within=1)
    await eventually(lambda: answers_well(service.url + "/readyz"), within=1.5)
    assert len(cluster.database().backends()) <= 4
    await eventually(lambda: open_sockets(service.pid) <= sockets + 3 + 3)  # pool and gateway may use all of theirs


@pytest.fixture
async def service(start: Start, database: Database) -> Server:
    """A message service with its own database."""
    return await start("message_service", **database.settings(), DB_TIMEOUT=1)


async def open_all_connections(service: Server, database: Database) -> None:
    """Make the service open its whole pool, then leave it idle."""
    with database.locked():
        waiting = []
        while len(database.backends()) < 1 + 4:
            waiting.append(asyncio.create_task(get(service.url + "/api/message")))
            await asyncio.sleep(0.02)
    for answer in await asyncio.gather(*waiting):
        assert answer.status == 200


def terminate(database: Database) -> None:
    database.terminate_backends()


def make_the_table_again(database: Database) -> None:
    database.sql("DROP TABLE messages")
    database.sql(SCHEMA)


def alter_the_column(database: Database) -> None:
    database.sql("ALTER TABLE messages ALTER COLUMN content TYPE varchar(5000)")


@pytest.mark.parametrize("change", [terminate, make_the_table_again, alter_the_column])
async def test_nobody_notices_a_change_between_requests(
    service: Server, database: Database, change: Callable[[Database], None]
) -> None:
    """Connections that died or went stale while idle cost no request, however many there are."""
    await open_all_connections(service, database)
    change(database)
    for answer in await asyncio.gather(*(get(service.url + "/api/message") for _ in range(5))):
        assert answer.status == 200
    assert (await get(service.url + "/readyz")).status == 200


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_nobody_notices_a_restart_between_requests(cluster: Cluster, start: Start, mode: str) -> None:
    """The first request after it succeeds."""
    service = await start("message_service", **cluster.database().settings())
    assert await answers_well(service.url + "/api/message")
    cluster.restart(mode)
    assert await answers_well(service.url + "/api/message")


async def test_a_query_cancelled_on_the_server_gets_an_answer(service: Server, database: Database) -> None:
    """aiopg raises CancelledError then, which a server would take for a client that left, and not answer."""
    with database.locked():
        waiting = asyncio.create_task(get(service.url + "/api/message"))
        cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"

        def is_answered() -> bool:
            database.sql(cancel, database.name)  # repeatedly, since a late query gets company
            return waiting.done()

        await eventually(is_answered)
        assert (await waiting).status == 503
    assert await answers_well(service.url + "/api/message")


async def test_a_statement_timeout_on_the_server_gets_an_answer(start: Start, database: Database) -> None:
    """Even if an administrator has set a shorter one than ours."""
    database.sql(f'ALTER DATABASE "{database.name}" SET lock_timeout = 100')
    database.sql(f'ALTER DATABASE "{database.name}" SET statement_timeout = 100')
    service = await start("message_service", **database.settings(), DB_TIMEOUT=1)
    with database.locked():
        assert (await get(service.url + "/api/message", within=2)).status in (503, 504)
    assert await answers_well(service.url + "/api/message")


async def test_what_nobody_waits_for_ends_on_the_server_too(service: Server, database: Database) -> None:
    """After a 504, no statement keeps waiting for the lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
    with database.locked():
        assert (await get(service.url + "/api/message", within=2)).status == 504
        await eventually(lambda: database.sql(waiting, database.name) == [(0,)], within=3)


async def test_a_client_that_leaves_ends_its_query(service: Server, database: Database) -> None:
    """Many clients that ask and leave at once leave nothing behind, and delay no other."""
    assert await answers_well(service.url + "/api/message")
    sockets = open_sockets(service.pid)
    with database.locked():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                client = await stack.enter_async_context(connection(service.url))
                await client.send("/api/message")
            # One fewer: the connection of the first request may have been counted, and be closed by now.
            await eventually(lambda: open_sockets(service.pid) >= sockets + 19)
    assert await answers_well(service.url + "/api/message")
    await eventually(lambda: open_sockets(service.pid) <= sockets + 4)
    assert len(database.backends()) <= 4


async def test_many_clients_need_few_connections(start: Start, database: Database) -> None:
    """A hundred requests to a locked table use no more than the pool; all get answers once it is free.

    Late queries are repeated, yet the database never runs more of them at a time than there are connections.
    """
    service = await start("message_service", **database.settings(), DB_TIMEOUT=5)
    running = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    watching = database.connect()
    watching.autocommit = True
    cursor = watching.cursor()
    counts = []
    with database.locked():
        waiting = []
        for _ in range(75):
            waiting += [asyncio.create_task(get(service.url + "/api/message")) for _ in range(2)]
            await asyncio.sleep(0.02)
            cursor.execute(running, (database.name,))
            counts += cursor.fetchone()
    assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
    assert max(counts) == 4
    samples = (await get(service.url + "/metrics")).body.decode()
    assert 'coalescing_run_callers_count{outcome="cancelled",reason="asked"}' in samples


async def test_terminated_backends_hold_up_nobody(service: Server, database: Database) -> None:
    """Callers that wait for dead connections get answers in time, although aiopg wakes none of them."""
    await open_all_connections(service, database)
    with database.locked():
        waiting = [asyncio.create_task(get(service.url + "/api/message", within=2)) for _ in range(50)]
        await eventually(lambda: database.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        database.sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
    assert {answer.status for answer in await asyncio.gather(*waiting)} <= {200, 503}
    assert await answers_well(service.url + "/api/message")


async def test_a_slow_connect_holds_up_nobody(start: Start, database: Database, make_proxy: MakeProxy) -> None:
    """While a new connection is slow to open, all requests are answered on the live one."""
    proxy = await make_proxy(database.port)
    service = await start("message_service", **database.settings(DB_PORT=proxy.port), DB_TIMEOUT=3)
    url = service.url + "/api/message"
    assert await answers_well(url)
    proxy.freeze(established=False)
    with database.locked():
        waiting = [asyncio.create_task(get(url))]
        await eventually(lambda: database.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        waiting.append(asyncio.create_task(get(url)))
        await eventually(lambda: proxy.accepted >= 2)
    for answer in await asyncio.gather(*waiting):
        assert (answer.status, answer.seconds < 2) == (200, True)
    for _ in range(5):
        assert (await get(url, within=1)).status == 200


async def test_a_connection_that_died_silently_costs_nobody_a_request(
    start: Start, database: Database, make_proxy: MakeProxy
) -> None:
    """After a firewall has dropped the connections' state, each request is still answered, on a new one."""
    proxy = await make_proxy(database.port)
    service = await start("message_service", **database.settings(DB_PORT=proxy.port))
    url = service.url + "/api/message"
    assert await answers_well(url)
    before = proxy.accepted
    proxy.freeze(new=False)
    for _ in range(5):
        assert await answers_well(url)
    assert proxy.accepted > before


async def test_a_host_that_was_restarted_costs_no_request(
    start: Start, database: Database, make_proxy: MakeProxy
) -> None:
    """A connection that looks alive is reset when used: the query is repeated on a new one."""
    proxy = await make_proxy(database.port)
    service = await start("message_service", **database.settings(DB_PORT=proxy.port), DB_TIMEOUT=1)
    assert await answers_well(service.url + "/api/message")
    before = proxy.accepted
    proxy.forget()
    assert await answers_well(service.url + "/api/message")
    assert proxy.accepted > before


async def test_a_socket_folder_is_a_host(cluster: Cluster, start: Start) -> None:
    """A DB_HOST that begins with / connects to the Unix socket in that folder."""
    settings = cluster.database().settings(DB_HOST=cluster.folder, DB_PASSWORD=None)
    service = await start("message_service", **settings)
    assert await answers_well(service.url + "/api/message")
