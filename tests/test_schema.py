"""`--apply-schema`: safe to run at any time, by any number at once, with only the rights that it needs."""

import asyncio
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess
from typing import Any

import pytest
from conftest import MakeCluster, MakeProxy, Start
from kit import eventually
from kit.client import get
from kit.postgres import Cluster, Database, Provider
from kit.processes import run

READER_PASSWORD = "the reader's own"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def apply(**settings: Any) -> CompletedProcess[str]:
    """Run it to its end."""
    ended = run("-m", "message_service", "--apply-schema", **settings, within=60)
    assert "Traceback" not in ended.stderr
    return ended


@pytest.fixture
def reader(provider: Provider, database: Database) -> Iterator[Database]:
    """The database for a role that can only read the messages."""
    name = f"reader_{uuid.uuid4().hex[:12]}"
    database.sql(f"CREATE ROLE {name} LOGIN PASSWORD %s", READER_PASSWORD)
    database.sql(f"GRANT SELECT ON messages TO {name}")
    yield Database(database.name, name, READER_PASSWORD, database.host, database.port)
    provider.take_back(database)
    provider.maintenance.sql(f"DROP ROLE {name}")


async def test_the_schema_is_applied_once_by_four_at_a_time(empty_database: Database) -> None:
    """All exit 0, and the samples are there once; a message changed since then is kept."""

    # Each is held where it is about to create the table, so that all four would, if they did not wait for each other.
    together = empty_database.connect()
    together.cursor().execute("LOCK TABLE pg_class IN SHARE MODE")
    with ThreadPoolExecutor(4) as threads:
        applying = [threads.submit(apply, **empty_database.settings()) for _ in range(4)]
        try:
            await eventually(lambda: empty_database.sql(WAITING) == [(4,)], within=30)
        finally:
            together.close()
    assert [each.result().returncode for each in applying] == [0] * 4
    (first,) = empty_database.sql("SELECT content FROM messages ORDER BY id LIMIT 1")[0]
    assert first.startswith("Hello from PostgreSQL!")
    assert empty_database.sql("SELECT count(*) FROM messages") == [(3,)]
    empty_database.set_message("mine")
    assert apply(**empty_database.settings()).returncode == 0
    assert empty_database.sql("SELECT content FROM messages ORDER BY id LIMIT 1") == [("mine",)]


async def test_a_schema_that_cannot_be_applied_is_one_line(empty_database: Database) -> None:
    """And exit status 1: in this test, because the database does not exist."""
    ended = apply(**empty_database.settings(DB_NAME="nowhere"))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
    assert "nowhere" in ended.stderr


def test_to_read_is_right_enough_where_the_table_is(reader: Database) -> None:
    """Exit status 0, and a line that says why nothing was changed."""
    ended = apply(**reader.settings())
    assert ended.returncode == 0, ended.stderr
    assert f"{reader.user} can read the table" in ended.stdout


def test_a_database_that_cannot_be_written_is_no_fault(reader: Database, database: Database) -> None:
    """A replica, or one that an administrator has made read-only; for the owner, too, with or without a new role."""
    database.sql(f'ALTER DATABASE "{database.name}" SET default_transaction_read_only = on')
    owner = {"DB_OWNER": database.user, "DB_OWNER_PASSWORD": database.password}
    for settings in (database.settings(), reader.settings(), reader.settings(**owner)):
        ended = apply(**settings)
        assert ended.returncode == 0, ended.stderr


def test_a_role_that_cannot_even_read_is_told_so(reader: Database, database: Database) -> None:
    """Exit status 1 and one line: it can neither create the table nor use it."""
    database.sql(f"REVOKE SELECT ON messages FROM {reader.user}")
    ended = apply(**reader.settings())
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert "permission denied" in ended.stderr


@pytest.mark.parametrize("wrong", ["DB_PASSWORD", "DB_NAME", "DB_SSLMODE"])
def test_what_does_not_pass_is_not_waited_for(database: Database, wrong: str) -> None:
    """A wrong password, a missing database, TLS that the server does not speak: reported at once."""
    value = {"DB_PASSWORD": "wrong", "DB_NAME": "nowhere", "DB_SSLMODE": "require"}[wrong]
    ended = run("-m", "message_service", "--apply-schema", **database.settings() | {wrong: value}, within=15)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)


async def test_a_database_that_is_away_is_waited_for(cluster: Cluster, make_proxy: MakeProxy) -> None:
    """In Compose and on Kubernetes everything starts at once: the step waits for the database's start."""
    proxy = await make_proxy(cluster.port)
    cluster.stop()
    applying = asyncio.create_task(asyncio.to_thread(apply, **cluster.database().settings(DB_PORT=proxy.port)))
    await eventually(lambda: proxy.accepted >= 2, within=15)
    assert not applying.done()
    cluster.start()
    assert (await applying).returncode == 0


async def test_the_owner_makes_a_role_that_may_only_read(make_cluster: MakeCluster, start: Start) -> None:
    """By several at once; the services log in as it. Its password can change, and is in no server log."""
    cluster = make_cluster(log_statement="all")
    database = cluster.database()
    database.sql("DROP TABLE messages")
    owner = {"DB_OWNER": database.user, "DB_OWNER_PASSWORD": database.password, "DB_USER": 'me "and" you'}
    for password in ("first", "se\"c'ond \\"):
        settings = database.settings(**owner, DB_PASSWORD=password)
        # Each is held just before it creates or changes the role, so that all would do so if they did not wait in turn.
        together = database.connect()
        together.cursor().execute("LOCK TABLE pg_authid IN SHARE MODE")
        applying = [asyncio.create_task(asyncio.to_thread(apply, **settings)) for _ in range(2)]
        try:
            await eventually(lambda: database.sql(WAITING) == [(2,)], within=15)
        finally:
            together.close()
        for ended in await asyncio.gather(*applying):
            assert (ended.returncode, ended.stdout) == (0, "applied schema.sql\n"), ended.stderr
        service = await start("message_service", **settings)
        assert (await get(service.url + "/api/message")).status == 200
        assert password not in (cluster.folder / "log").read_text()
