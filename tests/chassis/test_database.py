"""What a client sees, through both servers, of a broken database, and after its recovery.

Each pitfall of aiopg and psycopg2 in asynchronous mode has a test.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import uvloop
from conftest import MakeCluster, MakePeer, MakeProxy, Start
from kit import eventually, open_sockets
from kit.application import DATABASE, PAIR, SCHEMA, Pair
from kit.client import connection, get
from kit.faults import Chain, MakeChain
from kit.metrics import scrape
from kit.network import Script
from kit.postgres import PASSWORD, USER, Cluster, Database, Provider, make_folder, programs_with_tls
from kit.processes import Server, run
from psycopg2 import errorcodes

import chassis.database
from chassis import settings
from chassis.responses import Problem

PROBLEM = "urn:problem-type:"
SHARE = 3  # connections that one statement may use, of the four that there are by default


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Database", fault, sees)


async def answers_well(url: str) -> bool:
    """Whether a request is answered with 200."""
    return (await get(url)).status == 200


# ---- it breaks while clients keep asking, and is repaired ------------------------------------------------------


@contextlib.contextmanager
def stopped(cluster: Cluster, _: Pair) -> Iterator[None]:
    cluster.stop()
    yield
    cluster.start()


@contextlib.contextmanager
def killed(cluster: Cluster, _: Pair) -> Iterator[None]:
    cluster.kill()
    yield
    cluster.start()


@contextlib.contextmanager
def frozen(cluster: Cluster, _: Pair) -> Iterator[None]:
    cluster.freeze()
    yield
    cluster.resume()


@contextlib.contextmanager
def login_refused(cluster: Cluster, _: Pair) -> Iterator[None]:
    cluster.database().sql("ALTER ROLE postgres PASSWORD 'another'")
    cluster.database().terminate_backends()
    yield
    cluster.database().sql(f"ALTER ROLE postgres PASSWORD '{PASSWORD}'")


@contextlib.contextmanager
def database_missing(cluster: Cluster, _: Pair) -> Iterator[None]:
    cluster.database("postgres").sql(f"DROP DATABASE {DATABASE} WITH (FORCE)")
    yield
    cluster.database("postgres").sql(f"CREATE DATABASE {DATABASE}")
    cluster.database().sql(SCHEMA)


@contextlib.contextmanager
def table_missing(cluster: Cluster, pair: Pair) -> Iterator[None]:
    cluster.database().sql(f"ALTER TABLE {pair.table} RENAME TO elsewhere")
    yield
    cluster.database().sql(f"ALTER TABLE elsewhere RENAME TO {pair.table}")


@contextlib.contextmanager
def table_empty(cluster: Cluster, pair: Pair) -> Iterator[None]:
    cluster.database().sql(f"CREATE TABLE kept AS TABLE {pair.table}; DELETE FROM {pair.table}")
    yield
    cluster.database().sql(pair.schema)


def table_locked(cluster: Cluster, pair: Pair) -> AbstractContextManager[None]:
    return cluster.database().locked(pair)


def broken(column: str) -> Callable[[Cluster, Pair], AbstractContextManager[None]]:
    """In place of the table, a view in which this is the column that is read; `fails()` is an error of the server."""

    @contextlib.contextmanager
    def breaking(cluster: Cluster, pair: Pair) -> Iterator[None]:
        cluster.database().sql(
            "CREATE FUNCTION fails() RETURNS bool LANGUAGE plpgsql"
            " AS $$ BEGIN RAISE EXCEPTION 'no space' USING ERRCODE = '53100'; END $$;"
            f"ALTER TABLE {pair.table} RENAME TO kept;"
            f"CREATE VIEW {pair.table} AS SELECT {pair.identity}, {column} AS {pair.column} FROM kept"
        )
        yield
        cluster.database().sql(f"DROP VIEW {pair.table}; ALTER TABLE kept RENAME TO {pair.table}")

    return breaking


Fault = Callable[[Cluster, Pair], AbstractContextManager[None]]
DISK_FULL, OTHER_TYPE = broken("CASE WHEN fails() THEN NULL END"), broken("ARRAY[1.5]")


def outage(fault: Fault, title: str, status: int, kind: str, *, quick: bool = False) -> object:
    """One of `test_an_outage`; `kind` is "" for the type that the application gives an empty table."""
    marks = [row(title, str(status)), *([] if quick else [pytest.mark.matrix])]
    return pytest.param(fault, status, kind, marks=marks, id=title.partition(" (")[0])


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        outage(stopped, "stopped (fast shutdown) and started", 503, "unavailable", quick=True),
        outage(killed, "every process SIGKILLed, then crash recovery", 503, "unavailable"),
        outage(frozen, "every process SIGSTOPped, then SIGCONT", 504, "timeout"),
        outage(login_refused, "login refused", 503, "unavailable"),
        outage(database_missing, "database dropped and recreated", 503, "unavailable"),
        outage(table_missing, "table renamed away and back", 503, "unavailable"),
        outage(table_empty, "table empty", 404, "", quick=True),
        outage(table_locked, "table locked exclusively", 504, "timeout"),
        outage(DISK_FULL, "disk full (SQLSTATE 53100) on each read", 503, "unavailable"),
        outage(OTHER_TYPE, "column of another type", 503, "unavailable"),
    ],
)
async def test_an_outage(pair: Pair, chain: Chain, cluster: Cluster, fault: Fault, status: int, kind: str) -> None:
    """Under load, each request gets the clear answer in time, from both servers; within a second after, a good one."""
    others = {503, 504} if status != 404 else {503}  # requests in flight when it began, or while it ended
    service = chain.service.url
    async with chain.endures(status, *others) as clients:
        breaking = fault(cluster, pair)
        await asyncio.to_thread(breaking.__enter__)
        await clients.see(status)
        for url in (chain.gateway.url + pair.read_path, service + pair.service_path):
            answer = await get(url)
            problem = answer.json()
            found = answer.status, problem["type"], problem["status"], problem["request_id"]
            assert found == (status, PROBLEM + (kind or pair.missing), status, answer.request_id)
            assert ("Retry-After" in answer.headers) == (status == 503)
            for secret in (PASSWORD, "127.0.0.1", DATABASE, "postgres", "SELECT", "Error", "psycopg2"):
                assert secret not in str(problem)
        if pair is PAIR or fault not in (DISK_FULL, OTHER_TYPE):  # another pair's probe may not read that row
            assert (await get(service + "/readyz")).status == (200 if status == 404 else 503)
        for url in (chain.gateway.url + "/readyz", chain.gateway.url + "/healthz", service + "/healthz"):
            assert (await get(url, within=1)).status == 200
        await asyncio.to_thread(breaking.__exit__, None, None, None)
    await eventually(lambda: answers_well(service + "/readyz"), within=1.5)
    assert len(cluster.database().backends()) <= 4


def terminate_all(database: Database, _: Pair) -> None:
    for _number in range(20):
        database.terminate_backends()


def make_the_table_again(database: Database, pair: Pair) -> None:
    again = pair.schema.replace("BEGIN;", "").replace("COMMIT;", "")
    for _ in range(20):
        database.sql(f"BEGIN; DROP TABLE {pair.table} CASCADE; {again}; COMMIT")


@pytest.mark.matrix
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(terminate_all, marks=row("all backends terminated, 20 times", "200, a few 503")),
        pytest.param(make_the_table_again, marks=row("table recreated (new oid), 20 times", "200, a few 503")),
    ],
)
async def test_changes_under_load(
    pair: Pair, chain: Chain, cluster: Cluster, change: Callable[[Database, Pair], None]
) -> None:
    """At most the requests in flight at that moment get 503."""
    async with chain.endures(503) as clients:
        await asyncio.to_thread(change, cluster.database(), pair)
        await clients.see(200)


@pytest.mark.matrix
@row("becomes a read-only standby", "503 while it restarts")
async def test_a_read_only_standby(chain: Chain, cluster: Cluster) -> None:
    """Reading is enough."""
    signal = cluster.data / "standby.signal"

    def become_standby() -> None:
        cluster.stop()
        signal.touch()
        cluster.start()

    cluster.settings |= {"hot_standby": "on"}
    async with chain.endures(503) as clients:
        await asyncio.to_thread(become_standby)
        await clients.see(200)
        assert cluster.database().sql("SELECT pg_is_in_recovery()") == [(True,)]


async def says_garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)


async def endless_error(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A PostgreSQL error message whose length never ends."""
    writer.write(b"E\x3f\xff\xff\xff")
    while True:
        writer.write(b"SFATAL" * 10_000)
        await writer.drain()


@pytest.mark.matrix
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(says_garbage, marks=row("sends garbage", "503")),
        pytest.param(endless_error, marks=row("sends an endless error", "503")),
    ],
)
async def test_another_server_on_its_port(
    make_chain: MakeChain, make_proxy: MakeProxy, cluster: Cluster, script: Script
) -> None:
    """As when its address has been given to another server."""
    proxy = await make_proxy(cluster.port)
    chain = await make_chain(**cluster.database().settings(DB_PORT=proxy.port))
    connected: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.add(writer)
        with contextlib.suppress(OSError):
            await script(reader, writer)
        writer.close()

    async with chain.endures(503, 504) as clients:
        proxy.refuse()
        proxy.cut()
        other = await asyncio.start_server(serve, proxy.host, proxy.port)
        await clients.see(503)
        other.close()
        for writer in connected:
            writer.transport.abort()
        await proxy.accept()


@pytest.mark.matrix
@row("packets dropped silently, no FIN (all connections)", "504")
async def test_a_half_open_connection(
    own_network: Callable[..., None], cluster: Cluster, make_chain: MakeChain
) -> None:
    """Once packets pass, no request waits for a TCP retransmission or a dead connection, whatever the limits."""
    chain = await make_chain(**cluster.database().settings(), DB_TIMEOUT=8, DOWNSTREAM_TIMEOUT=9)
    drop = [("INPUT", "-p", "tcp", f"--{side}", str(cluster.port), "-j", "DROP") for side in ("sport", "dport")]
    async with chain.endures(503, 504) as clients:
        for rule in drop:
            own_network("-A", *rule)
        await clients.see(504)
        await asyncio.sleep(1.1)  # past TCP's first retransmission, so that the second would be next
        for rule in drop:
            own_network("-D", *rule)


@pytest.mark.matrix
@row("`max_connections` used up by others", "503")
async def test_no_connection_left(make_cluster: MakeCluster, make_chain: MakeChain) -> None:
    """Until another client disconnects."""
    cluster = make_cluster(max_connections="16")
    chain = await make_chain(**cluster.database().settings())
    others = cluster.database("postgres")
    administrator = others.connect()
    administrator.autocommit = True
    cursor = administrator.cursor()

    def use_up() -> bool:
        theirs = f"FROM pg_stat_activity WHERE datname = '{DATABASE}'"
        cursor.execute(f"SELECT count(pg_terminate_backend(pid)) {theirs}")
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                others.connect()
        cursor.execute(f"SELECT count(*) {theirs}")
        return bool(cursor.fetchone() == (0,))

    async with chain.endures(503) as clients:
        chain.service.freeze()  # for a moment, or it would win its connections back
        await eventually(lambda: asyncio.to_thread(use_up))
        chain.service.resume()
        await clients.see(503)
        await asyncio.to_thread(others.close)


# ---- nobody notices --------------------------------------------------------------------------------------------


@pytest.fixture
async def service(pair: Pair, start: Start, database: Database) -> Server:
    """A service with its own database."""
    return await start(pair.service, **database.settings(), DB_TIMEOUT=1)


async def open_all_connections(pair: Pair, service: Server, database: Database) -> None:
    """Make the service open all connections that one statement may use, then leave them idle."""
    waiting = []

    async def all_are_open() -> bool:
        waiting.append(asyncio.create_task(get(service.url + pair.service_path)))
        return len(await asyncio.to_thread(database.backends)) == 1 + SHARE

    with database.locked(pair):
        await eventually(all_are_open)
    for answer in await asyncio.gather(*waiting):
        assert answer.status == 200


def terminate(database: Database, _: Pair) -> None:
    database.terminate_backends()


def make_the_table_anew(database: Database, pair: Pair) -> None:
    database.sql(f"DROP TABLE {pair.table} CASCADE")
    database.sql(pair.schema)


def alter_the_column(database: Database, pair: Pair) -> None:
    database.sql(f"ALTER TABLE {pair.table} ALTER COLUMN {pair.column} TYPE {pair.other_type}")


@pytest.mark.every_pair
@pytest.mark.parametrize("change", [terminate, make_the_table_anew, alter_the_column])
async def test_nobody_notices_a_change_between_requests(
    pair: Pair, service: Server, database: Database, change: Callable[[Database, Pair], None]
) -> None:
    """Connections that died or went stale while idle cost no request, however many there are."""
    await open_all_connections(pair, service, database)
    change(database, pair)
    for answer in await asyncio.gather(*(get(service.url + pair.service_path) for _ in range(5))):
        assert answer.status == 200
    assert (await get(service.url + "/readyz")).status == 200


async def test_nobody_notices_a_restart_between_requests(pair: Pair, cluster: Cluster, start: Start) -> None:
    """The first request after it succeeds."""
    service = await start(pair.service, **cluster.database().settings())
    assert await answers_well(service.url + pair.service_path)
    cluster.restart()
    assert await answers_well(service.url + pair.service_path)


async def test_a_query_cancelled_on_the_server_gets_an_answer(pair: Pair, service: Server, database: Database) -> None:
    """aiopg raises CancelledError then, which a server would take for a client that left, and not answer."""
    with database.locked(pair):
        waiting = asyncio.create_task(get(service.url + pair.service_path))
        cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"

        def is_answered() -> bool:
            database.sql(cancel, database.name)  # repeatedly, since a late query gets company
            return waiting.done()

        await eventually(is_answered)
        assert (await waiting).status == 503
    assert await answers_well(service.url + pair.service_path)


async def test_a_statement_timeout_on_the_server_gets_an_answer(pair: Pair, start: Start, database: Database) -> None:
    """Even if an administrator has set a shorter one than ours."""
    database.sql(f'ALTER DATABASE "{database.name}" SET lock_timeout = 100')
    database.sql(f'ALTER DATABASE "{database.name}" SET statement_timeout = 100')
    service = await start(pair.service, **database.settings(), DB_TIMEOUT=1)
    with database.locked(pair):
        assert (await get(service.url + pair.service_path, within=2)).status in (503, 504)
    assert await answers_well(service.url + pair.service_path)


async def test_what_nobody_waits_for_ends_on_the_server_too(pair: Pair, service: Server, database: Database) -> None:
    """After a 504, no statement keeps waiting for the lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
    with database.locked(pair):
        assert (await get(service.url + pair.service_path, within=2)).status == 504
        await eventually(lambda: database.sql(waiting, database.name) == [(0,)], within=3)


@pytest.mark.every_pair
async def test_a_client_that_leaves_ends_its_query(pair: Pair, service: Server, database: Database) -> None:
    """Many clients that ask and leave at once leave nothing behind, and delay no other."""
    assert await answers_well(service.url + pair.service_path)
    sockets = open_sockets(service.pid)
    with database.locked(pair):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                client = await stack.enter_async_context(connection(service.url))
                await client.send(pair.service_path)
            # One fewer: the connection of the first request may have been counted, and be closed by now.
            await eventually(lambda: open_sockets(service.pid) >= sockets + 19)
    assert await answers_well(service.url + pair.service_path)
    await eventually(lambda: open_sockets(service.pid) <= sockets + 4)
    assert len(database.backends()) <= 4


@pytest.mark.every_pair
async def test_many_clients_need_few_connections(pair: Pair, start: Start, database: Database) -> None:
    """A hundred requests to a locked table use no more than the pool; all get answers once it is free.

    Late queries are repeated, yet the database never runs more of them at a time than there are connections.
    """
    service = await start(pair.service, **database.settings(), DB_TIMEOUT=5)
    running = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    watching = database.connect()
    watching.autocommit = True
    cursor = watching.cursor()
    counts = []
    with database.locked(pair):
        waiting = []
        for _ in range(75):
            waiting += [asyncio.create_task(get(service.url + pair.service_path)) for _ in range(2)]
            await asyncio.sleep(0.02)
            cursor.execute(running, (database.name,))
            counts += cursor.fetchone()
    assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
    assert max(counts) == SHARE
    samples = (await get(service.url + "/metrics")).body.decode()
    assert 'coalescing_run_callers_count{outcome="cancelled",reason="asked"}' in samples


async def test_terminated_backends_hold_up_nobody(pair: Pair, service: Server, database: Database) -> None:
    """Callers that wait for dead connections get answers in time, although aiopg wakes none of them."""
    await open_all_connections(pair, service, database)
    with database.locked(pair):
        waiting = [asyncio.create_task(get(service.url + pair.service_path, within=2)) for _ in range(50)]
        await eventually(lambda: database.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        database.sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
    assert {answer.status for answer in await asyncio.gather(*waiting)} <= {200, 503}
    assert await answers_well(service.url + pair.service_path)


async def test_a_slow_connect_holds_up_nobody(
    pair: Pair, start: Start, database: Database, make_proxy: MakeProxy
) -> None:
    """While a new connection is slow to open, all requests are answered on the live one."""
    proxy = await make_proxy(database.port)
    service = await start(pair.service, **database.settings(DB_PORT=proxy.port), DB_TIMEOUT=3)
    url = service.url + pair.service_path
    assert await answers_well(url)
    before = proxy.accepted
    proxy.freeze(established=False)
    with database.locked(pair):
        waiting = [asyncio.create_task(get(url))]
        await eventually(lambda: database.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        waiting.append(asyncio.create_task(get(url)))
        await eventually(lambda: proxy.accepted > before)
    for answer in await asyncio.gather(*waiting):
        assert (answer.status, answer.seconds < 2) == (200, True)
    for _ in range(5):
        assert (await get(url, within=1)).status == 200
    assert await failed_connects(service) == 0  # the slow one was no longer needed


async def test_a_connection_that_died_silently_costs_nobody_a_request(
    pair: Pair, start: Start, database: Database, make_proxy: MakeProxy
) -> None:
    """After a firewall has dropped the connections' state, each request is still answered, on a new one."""
    proxy = await make_proxy(database.port)
    service = await start(pair.service, **database.settings(DB_PORT=proxy.port))
    url = service.url + pair.service_path
    assert await answers_well(url)
    before = proxy.accepted
    proxy.freeze(new=False)
    for _ in range(5):
        assert await answers_well(url)
    assert proxy.accepted > before


async def test_a_host_that_was_restarted_costs_no_request(
    pair: Pair, start: Start, database: Database, make_proxy: MakeProxy
) -> None:
    """A connection that looks alive is reset when used: the query is repeated on a new one."""
    proxy = await make_proxy(database.port)
    service = await start(pair.service, **database.settings(DB_PORT=proxy.port), DB_TIMEOUT=1)
    assert await answers_well(service.url + pair.service_path)
    before = proxy.accepted
    proxy.forget()
    assert await answers_well(service.url + pair.service_path)
    assert proxy.accepted > before


async def test_a_socket_folder_is_a_host(pair: Pair, cluster: Cluster, start: Start) -> None:
    """A DB_HOST that begins with / connects to the Unix socket in that folder."""
    settings = cluster.database().settings(DB_HOST=cluster.folder, DB_PASSWORD=None)
    service = await start(pair.service, **settings)
    assert await answers_well(service.url + pair.service_path)


# ---- what it says and what it holds ----------------------------------------------------------------------------


def installed_locales() -> list[str]:
    """The locales of this machine, by name."""
    found = subprocess.run(["locale", "-a"], capture_output=True, text=True, errors="replace", check=False)
    return found.stdout.split()


class ForeignCluster(Cluster):
    """It writes its texts in the language and the encoding of a locale, as with LC_ALL; of Debian's programs."""

    starting = False  # it stays in the state in which it refuses everybody, because it has not started yet

    def speak(self, name: str) -> None:
        """Start again, in another locale."""
        if self.process.poll() is None:
            self.stop()
        self.settings |= {"lc_messages": name}
        before = os.environ.get("LC_ALL")
        os.environ["LC_ALL"] = name  # the first part of the session has no other source for the encoding
        try:
            self.start()
        finally:
            del os.environ["LC_ALL"]
            if before is not None:
                os.environ["LC_ALL"] = before

    def _ready(self) -> bool:
        if not self.starting:
            return super()._ready()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False


@pytest.fixture(scope="module")
def foreign_cluster(session_folder: Path) -> Iterator[ForeignCluster]:
    """For all tests here; each chooses a locale."""
    folder = programs_with_tls()
    if not folder or "fr_FR" not in installed_locales():
        pytest.skip("needs PostgreSQL and all locales (Debian: apt-get install postgresql locales-all)")
    cluster = ForeignCluster(make_folder("foreign-", session_folder), session_folder, folder)
    yield cluster
    cluster.close()


async def failed_connects(service: Server) -> float:
    """The number of failed connects, according to its metrics."""
    return (await scrape(service.url))["db_client_connect_failures_total"]


async def refuses(service: Server, pair: Pair, words: str) -> None:
    """Assert that a request gets 503 at once, and that log and metrics tell why."""
    failures = await failed_connects(service)
    answer = await get(service.url + pair.service_path)
    assert (answer.status, answer.seconds < 5) == (503, True)  # of the 60 that it has
    line = await service.wait_for_log(request_id=answer.request_id)
    assert words in line["cause"]
    assert await failed_connects(service) > failures


async def test_a_login_refused_in_another_encoding(foreign_cluster: ForeignCluster, pair: Pair, start: Start) -> None:
    """Is 503 at once, with the server's words in the log; `--apply-schema` ends with them, too."""
    foreign_cluster.speak("fr_FR")  # in Latin-1
    settings = foreign_cluster.database().settings(DB_PASSWORD="wrong", DB_TIMEOUT=60)
    service = await start(pair.service, **settings)
    await refuses(service, pair, "authentification par mot de passe")
    ended = await asyncio.to_thread(run, "-m", pair.service, "--apply-schema", **settings)
    assert ended.returncode == 1
    assert "authentification par mot de passe" in ended.stderr


async def test_a_server_that_starts_up_in_another_encoding(
    foreign_cluster: ForeignCluster, pair: Pair, start: Start
) -> None:
    """503 at once while it starts up, with its words in the log; then 200."""
    signal = foreign_cluster.data / "standby.signal"
    signal.touch()
    if USER:
        shutil.chown(signal, USER)
    foreign_cluster.settings |= {"hot_standby": "off"}
    foreign_cluster.starting = True
    service = await start(pair.service, **foreign_cluster.database().settings(), DB_TIMEOUT=60)
    try:
        foreign_cluster.speak("fr_FR")
        await refuses(service, pair, "base")  # « le système de bases de données » …
    finally:
        signal.unlink()
        foreign_cluster.starting = False
        foreign_cluster.settings |= {"hot_standby": "on"}
        foreign_cluster.stop("immediate")
        foreign_cluster.speak("fr_FR")
    assert await answers_well(service.url + pair.service_path)


@pytest.mark.matrix
async def test_a_login_refused_in_every_locale(foreign_cluster: ForeignCluster, start: Start) -> None:
    """Whatever the encoding: 503 at once."""
    settings = foreign_cluster.database().settings(DB_PASSWORD="wrong", DB_TIMEOUT=60)
    service = await start(PAIR.service, **settings, ACCESS_LOG="all")
    for name in installed_locales():
        await asyncio.to_thread(foreign_cluster.speak, name)
        await refuses(service, PAIR, "postgres")


@contextlib.asynccontextmanager
async def opened(on: Database, **changes: Any) -> AsyncIterator[chassis.database.Database]:
    """The module under test by itself, for statements that no application has."""
    environ = {name: str(value) for name, value in on.settings(**changes).items()}
    async with chassis.database.Database(settings.read(chassis.database.Settings, environ), "tests") as db:
        yield db


async def failure(reading: Awaitable[object]) -> tuple[int, str | None, str]:
    """The problem that a read ends with: its status, its part, and its cause."""
    with pytest.raises(Problem) as caught:
        await reading
    return caught.value.status, caught.value.part, caught.value.cause or ""


CODES = sorted(  # every SQLSTATE that psycopg2 knows, except those of success
    code
    for name, code in vars(errorcodes).items()
    if name.isupper() and len(code) == 5 and code[:2] not in ("00", "01", "02")
)


async def test_every_error_of_a_statement(database: Database) -> None:
    """Each SQLSTATE is 503 `database` with its words as the cause, shared or not, and costs no connection."""
    database.sql(
        "CREATE FUNCTION fails(code text) RETURNS text LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE EXCEPTION 'as the test says' USING ERRCODE = code; END $$"
    )
    assert len(CODES) > 200
    async with opened(database, DB_POOL_SIZE=1) as db:
        await db.fetch("SELECT 1", read=list)
        before = database.backends()
        for code in CODES:
            for read in (db.shared, db.fetch):
                status, part, cause = await failure(read("SELECT fails(%s)", code, read=list))
                assert (status, part, "as the test says" in cause) == (503, "database", True), (code, cause)
        assert database.backends() == before


VALUES = (
    "date '20000-01-01'",
    "date '0044-03-15 BC'",
    "date 'infinity'",
    "timestamp '0044-03-15 12:00 BC'",
    "timestamp '294276-12-31'",
    "timestamptz '20000-01-01 UTC'",
    "timestamptz '-infinity'",
    "interval '178000000 years'",
    "interval '-178000000 years 2147483647 days 2562047788 hours'",
    "time '24:00'",
    "timetz '24:00 +15:59:59'",
    "numeric '1e131071'",
    "numeric 'NaN'",
    "float8 'Infinity'",
    "repeat('9', 5000)::numeric",
    "jsonb '{\"number\": 1e999}'",
    "(repeat('[', 5000) || repeat(']', 5000))::json",
    "(repeat('9', 5000))::json",
    "daterange '[0044-03-15 BC, 20000-01-01)'",
    "tstzrange 'empty'",
    "array[date '20000-01-01']",
    "array[array[1, 2], array[3, null]]",
    "'[0:1]={1,2}'::int[]",
    "bytea '\\x00ff'",
    "cash '12345.67'",
    "xml '<a/>'",
    "bit '101'",
    "inet '::1/64'",
    "point '(1, NaN)'",
    "row(1, date '20000-01-01')",
    "uuid '00000000-0000-0000-0000-000000000000'",
    "oidvector '1 2'",
)


async def test_every_value_of_a_column(database: Database) -> None:
    """Each is read, or is 503 `database`: what Python cannot hold is no mistake of the service."""
    wrong = []
    async with opened(database, DB_POOL_SIZE=1) as db:
        await db.fetch("SELECT 1", read=list)
        before = database.backends()
        for value in VALUES:
            for read in (db.shared, db.fetch):
                try:
                    await read(f"SELECT {value}", read=list)
                except Problem as problem:
                    wrong.append((value, problem.status, problem.part))
        assert database.backends() == before
    assert {(status, part) for _, status, part in wrong} == {(503, "database")}
    assert {"date '20000-01-01'", "timestamp '0044-03-15 12:00 BC'", "interval '178000000 years'"} <= {
        value for value, *_ in wrong
    }


HELD = {  # what a view can hold in place of a column, and what the log says of it
    "CASE WHEN 1 / (length('') * 1) > 0 THEN '' END": "division by zero",
    "checked('wrong')": "as the test says",
    "date '20000-01-01'": "year 20000 is out of range",
    "timestamp '0044-03-15 12:00 BC'": "year -44 is out of range",
    "interval '178000000 years'": "OverflowError",
    "time '24:00'": "time",
    "ARRAY[1.5]": "list",
}


async def test_what_the_database_holds_but_cannot_give(pair: Pair, start: Start, database: Database) -> None:
    """Is 503 `database` from both servers, with the cause in the log: neither is at fault, and it may be mended."""
    service = await start(pair.service, **database.settings(), ACCESS_LOG="all")
    gateway = await start(pair.gateway, DOWNSTREAM_URL=service.url)
    database.sql(
        "CREATE FUNCTION checked(text) RETURNS text LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE EXCEPTION 'as the test says' USING ERRCODE = '23514'; END $$;"
        f"ALTER TABLE {pair.table} RENAME TO kept"
    )
    for column, cause in HELD.items():
        database.sql(
            f"DROP VIEW IF EXISTS {pair.table};"
            f"CREATE VIEW {pair.table} AS SELECT {pair.identity}, {column} AS {pair.column} FROM kept"
        )
        for url in (service.url + pair.service_path, gateway.url + pair.read_path):
            answer = await get(url)
            assert (answer.status, answer.json()["part"]) == (503, "database"), column
        if pair is PAIR:  # another one's probe may not read that row
            assert (await get(service.url + "/readyz")).status == 503
        line = await service.wait_for_log(request_id=answer.request_id)
        assert cause in line["cause"], column
    database.sql(f"DROP VIEW {pair.table}; ALTER TABLE kept RENAME TO {pair.table}")
    assert await answers_well(gateway.url + pair.read_path)


async def test_bytes_that_are_no_text(start: Start, provider: Provider) -> None:
    """In a database without an encoding (SQL_ASCII): 503 `database`, with PostgreSQL's words in the log."""
    provider.maintenance.sql("CREATE DATABASE bytes TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    m = provider.maintenance
    database = Database("bytes", m.user, m.password, m.host, m.port, m.admin_host)
    try:
        database.sql(PAIR.schema)
        database.sql(f"ALTER TABLE {PAIR.table} ALTER COLUMN {PAIR.column} TYPE text")
        database.sql(f"UPDATE {PAIR.table} SET {PAIR.column} = convert_from('\\x47fc6e', 'SQL_ASCII')")
        service = await start(PAIR.service, **database.settings())
        for path in (PAIR.service_path, "/readyz"):
            assert (await get(service.url + path)).status == 503
        assert "invalid byte sequence" in (await service.wait_for_log(path=PAIR.service_path))["cause"]
    finally:
        provider.maintenance.sql("DROP DATABASE bytes WITH (FORCE)")


async def test_a_system_on_which_the_server_cannot_watch_its_clients(
    pair: Pair, start: Start, database: Database
) -> None:
    """There `client_connection_check_interval` is refused (22023): the service does without, and keeps its limit."""
    database.sql(
        "CREATE SCHEMA theirs;"
        "CREATE FUNCTION theirs.set_config(name text, value text, local bool) RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " IF name = 'client_connection_check_interval' THEN RAISE EXCEPTION 'as there' USING ERRCODE = '22023'; END IF;"
        " RETURN pg_catalog.set_config(name, value, local); END $$;"
        f'ALTER DATABASE "{database.name}" SET search_path = theirs, pg_catalog, public'
    )
    service = await start(pair.service, **database.settings(), DB_TIMEOUT=1)
    before = len(database.backends())
    for _ in range(3):
        assert await answers_well(service.url + pair.service_path)
    assert len(database.backends()) == before + 1
    assert await failed_connects(service) == 0
    with database.locked(pair):
        assert (await get(service.url + pair.service_path)).status == 504
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
        await eventually(lambda: database.sql(waiting, database.name) == [(0,)], within=4)


async def test_a_revoked_right_makes_no_new_sessions(pair: Pair, start: Start, database: Database) -> None:
    """Twenty requests fail on the session that there is; when the right is back, the next one succeeds on it."""
    role = f"reader_{uuid.uuid4().hex[:8]}"
    database.sql(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
    try:
        database.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        settings = database.settings(DB_USER=role, DB_PASSWORD=PASSWORD, DB_POOL_SIZE=1)
        service = await start(pair.service, **settings)
        assert await answers_well(service.url + pair.service_path)
        before = database.backends()
        database.sql(f"REVOKE SELECT ON ALL TABLES IN SCHEMA public FROM {role}")
        for _ in range(20):
            assert (await get(service.url + pair.service_path)).status == 503
        assert database.backends() == before
        database.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        assert await answers_well(service.url + pair.service_path)
        assert database.backends() == before
        assert await failed_connects(service) == 0
    finally:
        database.terminate_backends()
        database.sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_an_address_that_refuses_is_no_failed_connect(start: Start, database: Database, tmp_path: Path) -> None:
    """If the next one of the same name accepts, as when `localhost` is ::1 first; the alert must stay silent."""
    hosts = tmp_path / "hosts"
    hosts.write_text("::1 two.test\n127.0.0.1 two.test\n")
    wrapper = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
    if await asyncio.to_thread(subprocess.call, [*wrapper, "true"]):
        pytest.skip("needs root's right to mount a file")
    service = await start(PAIR.service, wrapper=wrapper, **database.settings(DB_HOST="two.test"))
    assert await answers_well(service.url + PAIR.service_path)
    assert await failed_connects(service) == 0


async def test_a_database_that_accepts_and_never_answers_counts(start: Start, make_peer: MakePeer) -> None:
    """Although it is the client's time-out that ends the attempt."""

    async def says_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.wait_closed()

    peer = await make_peer(says_nothing)
    service = await start(PAIR.service, DB_HOST="127.0.0.1", DB_PORT=peer.port, DB_TIMEOUT=0.3)
    assert (await get(service.url + PAIR.service_path)).status == 504

    async def counted() -> bool:
        return await failed_connects(service) > 0

    await eventually(counted)


# ---- what its libraries do -------------------------------------------------------------------------------------

RAISED = (
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    psycopg2.DataError,
    psycopg2.Warning,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    SystemError,
    MemoryError,
    TypeError,
)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("at", range(1, 8))
def test_whatever_poll_raises(
    database: Database, monkeypatch: pytest.MonkeyPatch, loop: Callable[[], asyncio.AbstractEventLoop], at: int
) -> None:
    """While connecting or in a query, it ends that connection, in one error: nothing calls it again and again."""
    polls: list[int] = []
    error: Exception

    class Raises(psycopg2.extensions.connection):  # type: ignore[misc]
        def poll(self) -> int:
            polls.append(self.fileno())
            if len(polls) >= at:
                raise error
            state: int = super().poll()
            return state

    class Connection(chassis.database.Connection, Raises):
        """The module's, on top of a psycopg2 that fails."""

    async def one_read() -> None:
        nonlocal error
        stray: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))
        for kind in RAISED:
            polls.clear()
            error = kind("as the test says")
            async with opened(database, DB_POOL_SIZE=1, DB_TIMEOUT=30) as db:
                status, part, cause = await failure(asyncio.wait_for(db.fetch("SELECT 1", read=list), 5))
                assert (status, part) == (503, "database")
                assert "as the test says" in cause, kind
                count = len(polls)
                await asyncio.sleep(0.01)
                assert len(polls) == count
        assert not stray

    monkeypatch.setattr(chassis.database, "Connection", Connection)
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(one_read())


async def test_a_read_ends_at_its_limit(database: Database, monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """Shared or not; not only when the server may have noticed that nobody waits any more."""
    monkeypatch.setattr(chassis.database, "CLIENT_CHECK_INTERVAL", 60)
    async with opened(database, DB_TIMEOUT=0.2) as db:
        with database.locked(pair):
            for read in (db.shared, db.fetch):
                reading = asyncio.wait_for(read(f"SELECT FROM {pair.table}", read=list), 10)
                assert (await failure(reading))[:2] == (504, "database")
