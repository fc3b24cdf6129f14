"""The database breaks while clients keep asking the gateway."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest
from conftest import MakeCluster, MakeProxy
from kit import eventually
from kit.faults import Chain, MakeChain
from kit.network import Script
from kit.postgres import SCHEMA, Cluster, Database
from test_database_faults import FAULTS, Fault, connections_exhausted

pytestmark = pytest.mark.matrix

TITLES = {
    "stopped": "stopped (fast shutdown) and started",
    "killed": "every process SIGKILLed, then crash recovery",
    "frozen": "every process SIGSTOPped, then SIGCONT",
    "login_refused": "login refused",
    "database_missing": "database dropped and recreated",
    "table_missing": "table renamed away and back",
    "table_empty": "table empty",
    "table_locked": "table locked exclusively",
}


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Database", fault, sees)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        pytest.param(fault, status, marks=row(TITLES[fault.__name__], str(status)), id=fault.__name__)
        for fault, status, _ in FAULTS
        if fault is not connections_exhausted  # the clients here would win the connections back
    ],
)
async def test_outage_under_load(chain: Chain, cluster: Cluster, fault: Fault, status: int) -> None:
    """Each request meanwhile gets the clear answer in time, and a good one within a second after."""
    others = {503, 504} if status != 404 else {503}  # requests in flight when it began, or while it ended
    async with chain.endures(status, *others) as clients:
        breaking = fault(cluster)
        await asyncio.to_thread(breaking.__enter__)
        await clients.see(status)
        await asyncio.to_thread(breaking.__exit__, None, None, None)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("fast", marks=row("restarted under load (fast)", "503 while it is away")),
        pytest.param("immediate", marks=row("restarted under load (immediate)", "503 while it is away")),
    ],
)
async def test_restart_under_load(chain: Chain, cluster: Cluster, mode: str) -> None:
    """Requests while it is away get 503."""
    async with chain.endures(503):
        await asyncio.to_thread(cluster.restart, mode)


def terminate_one_by_one(database: Database) -> None:
    for pid in database.backends():
        database.sql("SELECT pg_terminate_backend(%s, 5000)", pid)


def terminate_all(database: Database) -> None:
    for _ in range(20):
        database.terminate_backends()


def make_the_table_again(database: Database) -> None:
    for _ in range(20):
        database.sql("BEGIN; DROP TABLE messages; " + SCHEMA.replace("BEGIN;", "").replace("COMMIT;", "") + "; COMMIT")


def alter_the_column(database: Database) -> None:
    for kind in ["varchar(5000)", "text"] * 10:
        database.sql(f"ALTER TABLE messages ALTER COLUMN content TYPE {kind}")


def rewrite_the_table(database: Database) -> None:
    for _ in range(5):
        database.sql("VACUUM FULL messages")


@pytest.mark.parametrize(
    ("change", "statuses"),
    [
        pytest.param(terminate_one_by_one, [503], marks=row("backends terminated one by one", "200, a few 503")),
        pytest.param(terminate_all, [503], marks=row("all backends terminated, 20 times", "200, a few 503")),
        pytest.param(make_the_table_again, [503], marks=row("table recreated (new oid), 20 times", "200, a few 503")),
        pytest.param(alter_the_column, [503], marks=row("column altered, 20 times", "200, a few 503")),
        pytest.param(rewrite_the_table, [], marks=row("table rewritten (VACUUM FULL)", "200")),
    ],
)
async def test_changes_under_load(
    chain: Chain, cluster: Cluster, change: Callable[[Database], None], statuses: list[int]
) -> None:
    """At most the requests in flight at that moment get 503."""
    async with chain.endures(*statuses) as clients:
        await asyncio.to_thread(change, cluster.database())
        await clients.see(200)


@row("row changed 200 times while it is read", "200, the old or the new text, never a mix")
async def test_a_row_that_changes(chain: Chain, cluster: Cluster) -> None:
    """No client sees an error."""

    def write() -> None:
        for number in range(200):
            cluster.database().set_message(f"{number} " * 2000)

    async with chain.endures():
        await asyncio.to_thread(write)


BROKEN_READS = {
    "disk_full": ("disk full (SQLSTATE 53100) on each read", "RAISE EXCEPTION 'no space' USING ERRCODE = '53100'", 503),
    "slow": ("a view that takes longer than the limit", "PERFORM pg_sleep(30)", 504),
    "bad_type": ("column of another type", "", 503),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=row(title, str(status))) for name, (title, _, status) in BROKEN_READS.items()]
)
async def test_a_read_that_fails(chain: Chain, cluster: Cluster, name: str) -> None:
    """Whatever becomes of the table, the answer is clear and in time."""
    database = cluster.database()
    _, body, status = BROKEN_READS[name]
    column = "1" if name == "bad_type" else "broken()"
    breaking = f"""
        CREATE FUNCTION broken() RETURNS text LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN 'x'; END $$;
        ALTER TABLE messages RENAME TO kept;
        CREATE VIEW messages AS SELECT id, {column} AS content FROM kept;
    """.replace("BEGIN ;", "BEGIN NULL;")
    async with chain.endures(status, 503, 504) as clients:
        await asyncio.to_thread(database.sql, breaking)
        await clients.see(status)
        await asyncio.to_thread(database.sql, "DROP VIEW messages; ALTER TABLE kept RENAME TO messages")


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


async def says_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def says_garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)


async def endless_error(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A PostgreSQL error message whose length never ends."""
    writer.write(b"E\x3f\xff\xff\xff")
    while True:
        writer.write(b"SFATAL" * 10_000)
        await writer.drain()


@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param(says_nothing, 504, marks=row("accepts connections, never answers", "504")),
        pytest.param(says_garbage, 503, marks=row("sends garbage", "503")),
        pytest.param(endless_error, 503, marks=row("sends an endless error", "503")),
    ],
)
async def test_another_server_on_its_port(
    make_chain: MakeChain,
    make_proxy: MakeProxy,
    cluster: Cluster,
    script: Script,
    status: int,
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

    async with chain.endures(status, 503, 504) as clients:
        proxy.refuse()
        proxy.cut()
        other = await asyncio.start_server(serve, proxy.host, proxy.port)
        await clients.see(status)
        other.close()
        for writer in connected:
            writer.transport.abort()
        await proxy.accept()


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
        theirs = "FROM pg_stat_activity WHERE datname = 'mydb'"
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


HBA = "pg_hba.conf"


@row("TLS required", "503")
async def test_tls_required(chain: Chain, cluster: Cluster) -> None:
    """For clients that do not use it."""
    file = cluster.data / HBA
    before = file.read_text()
    database = cluster.database()
    async with chain.endures(503) as clients:
        file.write_text("local all all trust\nhostnossl all all all reject\n")
        await asyncio.to_thread(database.sql, "SELECT pg_reload_conf()")
        await eventually(lambda: asyncio.to_thread(gone, database))
        await clients.see(503)
        file.write_text(before)
        await asyncio.to_thread(database.sql, "SELECT pg_reload_conf()")


def gone(database: Database) -> bool:
    """Whether all connections to the database have gone, after they were ended."""
    database.terminate_backends()
    return not database.backends()


class TLS:
    """Speaks TLS as PostgreSQL does (SSLRequest, one byte back) and forwards what it reads, or refuses TLS."""

    def __init__(self, folder: Path, target_port: int):
        key, crt = folder / "key", folder / "crt"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        subprocess.run([*command, "-keyout", key, "-out", crt], check=True, capture_output=True)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(crt, key)
        self.target_port = target_port
        self.refuses = False
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            await reader.readexactly(8)
            writer.write(b"N" if self.refuses else b"S")
            if not self.refuses:
                await writer.start_tls(self.context)
                onward = await asyncio.open_connection("127.0.0.1", self.target_port)
                await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))
        writer.transport.abort()  # closing would wait for TLS's farewell, longer than the test lasts

    def cut(self) -> None:
        for task in self.tasks:
            task.cancel()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.transport.abort()


@row("TLS refused, though `DB_SSLMODE=require`", "503")
async def test_tls_refused(cluster: Cluster, make_chain: MakeChain, tmp_path: Path) -> None:
    """Nothing is sent unencrypted meanwhile."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    tls = TLS(tmp_path, cluster.port)
    async with await asyncio.start_server(tls.serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        chain = await make_chain(**cluster.database().settings(DB_PORT=port), DB_SSLMODE="require")
        async with chain.endures(503) as clients:
            tls.refuses = True
            tls.cut()
            await clients.see(503)
            tls.refuses = False
        tls.cut()
        await asyncio.gather(*tls.tasks, return_exceptions=True)
        await asyncio.sleep(0)  # for the connections to be closed
