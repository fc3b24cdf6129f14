"""`--apply-schema`: safe to run at any time, by any number at once, with only the rights that it needs."""

import asyncio
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psycopg2
import pytest
from conftest import MakeCluster, Start
from kit import eventually
from kit.application import PAIR, PAIRS, Pair
from kit.client import get
from kit.postgres import Database, Provider
from kit.processes import run

from chassis import database as chassis_database
from chassis import schema, settings

READER_PASSWORD = "the reader's own"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def apply(pair: Pair = PAIR, **variables: Any) -> CompletedProcess[str]:
    """Run it to its end."""
    ended = run("-m", pair.service, "--apply-schema", **variables, within=90)
    assert "Traceback" not in ended.stderr
    return ended


def succeeds(**variables: Any) -> str:
    """Run it; what it says to have done."""
    ended = apply(**variables)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def fails(**variables: Any) -> str:
    """Run it; the one line that says why it failed."""
    ended = apply(**variables)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
    return ended.stderr


def owner_of(database: Database) -> dict[str, Any]:
    """The settings of its owner, as which the tests' databases are known."""
    return {"DB_OWNER": database.user, "DB_OWNER_PASSWORD": database.password}


@pytest.fixture
def role(provider: Provider, database: Database) -> Iterator[Database]:
    """The database for a role that does not exist."""
    name = f"reader_{uuid.uuid4().hex[:12]}"
    yield Database(database.name, name, READER_PASSWORD, database.host, database.port)
    provider.take_back(database)
    if database.sql("SELECT FROM pg_roles WHERE rolname = %s", name):
        database.sql(f"DROP OWNED BY {name}")
        database.sql(f"DROP ROLE {name}")


@pytest.fixture
def reader(role: Database, database: Database) -> Database:
    """The database for a role that can only read the table."""
    succeeds(**role.settings(**owner_of(database)))
    return role


async def test_the_schema_is_applied_once_by_four_at_a_time(empty_database: Database, database: Database) -> None:
    """All exit 0, and the samples are there once; a row changed since then is kept."""

    # Each is held where it is about to create the table, so that all four would, if they did not wait for each other.
    together = empty_database.connect()
    together.cursor().execute("LOCK TABLE pg_class IN SHARE MODE")
    with ThreadPoolExecutor(4) as threads:
        applying = [threads.submit(apply, **empty_database.settings()) for _ in range(4)]
        try:
            await eventually(lambda: empty_database.sql(WAITING) > [(0,)], within=30)
        finally:
            together.close()
    assert [each.result().returncode for each in applying] == [0] * 4
    count = f"SELECT count(*) FROM {PAIR.table}"
    assert empty_database.sql(PAIR.statement) == [(PAIR.sample,)]
    assert empty_database.sql(count) == database.sql(count)
    empty_database.store(PAIR.other)
    assert apply(**empty_database.settings()).returncode == 0
    assert empty_database.sql(PAIR.statement) == [(PAIR.other,)]


@pytest.mark.parametrize(
    ("variable", "wrong"), [("DB_PASSWORD", "wrong"), ("DB_NAME", "nowhere"), ("DB_SSLMODE", "require"), ("DB_PORT", 1)]
)
def test_a_schema_that_cannot_be_applied_is_one_line(database: Database, variable: str, wrong: object) -> None:
    """Exit status 1 at once for a wrong password, a missing database, TLS that there is not, a server that is away."""
    ended = run("-m", PAIR.service, "--apply-schema", **database.settings() | {variable: wrong}, within=10)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr


# ---- what was applied before -----------------------------------------------------------------------------------


def test_to_read_is_right_enough_where_the_schema_was_applied(reader: Database) -> None:
    """Exit status 0, without any other right, and without the owner."""
    assert "had been applied" in succeeds(**reader.settings())


def test_a_database_that_cannot_be_written_is_no_fault(reader: Database, database: Database) -> None:
    """A replica, or one that an administrator has made read-only; for the owner, too, also if its password is old."""
    database.sql(f'ALTER DATABASE "{database.name}" SET default_transaction_read_only = on')
    owner = owner_of(database)
    for variables in (reader.settings(), reader.settings(**owner), reader.settings(**owner | {"DB_OWNER": "nobody"})):
        assert "had been applied" in succeeds(**variables)


def test_what_was_applied_waits_for_nobody(reader: Database, database: Database) -> None:
    """A pod starts while others change the schema or read: it writes nothing, and only reads what it looks at."""
    others = database.connect()
    others.cursor().execute("SELECT pg_advisory_xact_lock_shared(7236832837)")
    for table in ("pg_class", "pg_authid", "pg_database", PAIR.table, "applied_schemas"):
        others.cursor().execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE")  # which only readers get past
    assert "had been applied" in succeeds(**reader.settings(**owner_of(database)))


def test_a_new_schema_without_the_owner_is_told_so(reader: Database, database: Database) -> None:
    """Exit status 1 and one line that names what is missing, so that a rollout stops before its first new pod."""
    database.sql("UPDATE applied_schemas SET sha256 = 'that of the release before'")
    reason = fails(**reader.settings())
    assert "has not been applied" in reason
    assert "DB_OWNER" in reason
    assert "applied" in succeeds(**reader.settings(**owner_of(database)))
    assert "had been applied" in succeeds(**reader.settings())


def test_a_new_schema_for_a_database_that_cannot_be_written_is_told_so(reader: Database, database: Database) -> None:
    """Exit status 1 and one line, whoever logs in."""
    database.sql("DELETE FROM applied_schemas")
    database.sql(f'ALTER DATABASE "{database.name}" SET default_transaction_read_only = on')
    for variables in (database.settings(), reader.settings(**owner_of(database))):
        assert "read-only" in fails(**variables)


@pytest.mark.parametrize(
    "harm", ["REVOKE SELECT ON {table} FROM {reader}", "ALTER TABLE {table} DROP COLUMN {column} CASCADE"]
)
def test_what_the_service_cannot_execute_is_told(reader: Database, database: Database, harm: str) -> None:
    """Exit status 1 and one line if one of its statements would fail, although the schema was applied."""
    database.sql(harm.format(table=PAIR.table, column=PAIR.column, reader=reader.user))
    fails(**reader.settings())


def test_a_dropped_table_is_made_again(reader: Database, database: Database) -> None:
    """By the owner, although this schema was applied before."""
    database.sql(f"DROP TABLE {PAIR.table} CASCADE")
    fails(**reader.settings())
    succeeds(**reader.settings(**owner_of(database)))
    assert reader.sql(PAIR.statement) == [(PAIR.sample,)]


def test_a_person_can_apply_it(role: Database, database: Database) -> None:
    """`--print-schema` into psql counts as applied, and its second run changes nothing."""
    psql = shutil.which("psql")
    if not psql:
        pytest.skip("needs psql (Debian: apt-get install postgresql-client)")
    database.sql(f"DROP TABLE {PAIR.table} CASCADE")
    database.sql(f"CREATE ROLE {role.user} LOGIN PASSWORD '{READER_PASSWORD.replace(chr(39), chr(39) * 2)}'")
    printed = run("-m", PAIR.service, "--print-schema", **role.settings())
    assert printed.returncode == 0, printed.stderr
    url = f"host={database.admin_host} port={database.port} dbname={database.name} user={database.user}"
    for _ in range(2):
        done = subprocess.run(
            [psql, "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", url],
            input=printed.stdout,
            env={"PATH": "/usr/bin:/bin", "PGPASSWORD": database.password or ""},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
    assert "had been applied" in succeeds(**role.settings())
    assert role.sql(PAIR.statement) == [(PAIR.sample,)]


# ---- what keeps the service's role out -------------------------------------------------------------------------

SET_BEFORE = {
    "nothing may connect": 'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC',
    "nothing may use the schema": "REVOKE ALL ON SCHEMA public FROM PUBLIC",
    "a schema named like the owner": 'CREATE SCHEMA "{owner}"',
    "no login": "CREATE ROLE {reader} NOLOGIN PASSWORD '{password}'",
    "expired": "CREATE ROLE {reader} LOGIN PASSWORD '{password}' VALID UNTIL '2020-01-01'",
    "another password": "CREATE ROLE {reader} LOGIN PASSWORD 'another'",
    "no password": "CREATE ROLE {reader} LOGIN",
    "no rights": "CREATE ROLE {reader} LOGIN PASSWORD '{password}'",
    "everything": 'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC; REVOKE ALL ON SCHEMA public FROM PUBLIC;'
    "CREATE SCHEMA \"{owner}\"; CREATE ROLE {reader} NOLOGIN PASSWORD 'another' VALID UNTIL '2020-01-01'",
}


@pytest.mark.parametrize(
    "before", [name if name == "everything" else pytest.param(name, marks=pytest.mark.matrix) for name in SET_BEFORE]
)
def test_the_service_works_whatever_was_set_before(role: Database, database: Database, before: str) -> None:
    """Exit status 0 means that the service's role can log in and read: what it lacked, it has got from the owner."""
    database.sql(f"DROP TABLE {PAIR.table} CASCADE")
    names = {"database": database.name, "owner": database.user, "reader": role.user}
    try:
        database.sql(SET_BEFORE[before].format(**names, password=READER_PASSWORD.replace("'", "''")))
        succeeds(**role.settings(**owner_of(database)))
        assert role.sql(PAIR.statement) == [(PAIR.sample,)]
        assert "had been applied" in succeeds(**role.settings())
    finally:
        database.sql(f'DROP SCHEMA IF EXISTS "{database.user}" CASCADE')
        database.sql(f'GRANT CONNECT, TEMPORARY ON DATABASE "{database.name}" TO PUBLIC')


def test_the_owner_need_not_be_a_superuser(role: Database, database: Database) -> None:
    """To own the database, and to be allowed to create roles, is enough."""
    owner = f"owner_{role.user}"
    database.sql(f"DROP TABLE {PAIR.table} CASCADE")
    database.sql(f"CREATE ROLE {owner} LOGIN CREATEROLE PASSWORD 'its own'")
    database.sql(
        f'ALTER DATABASE "{database.name}" OWNER TO {owner}; REVOKE ALL ON DATABASE "{database.name}" FROM PUBLIC'
    )
    try:
        succeeds(**role.settings(DB_OWNER=owner, DB_OWNER_PASSWORD="its own"))
        assert role.sql(PAIR.statement) == [(PAIR.sample,)]
    finally:
        database.sql(f'ALTER DATABASE "{database.name}" OWNER TO "{database.user}"')
        database.sql(f'GRANT CONNECT, TEMPORARY ON DATABASE "{database.name}" TO PUBLIC')
        database.sql(f"DROP OWNED BY {owner}; DROP OWNED BY {role.user}; DROP ROLE {owner}")


async def test_the_owner_makes_a_role_that_may_only_read(make_cluster: MakeCluster, start: Start) -> None:
    """By several at once; the services log in as it. Its password can change, and is in no server log."""
    cluster = make_cluster(log_statement="all")
    database = cluster.database()
    database.sql(f"DROP TABLE {PAIR.table} CASCADE")
    owner = owner_of(database) | {"DB_USER": 'me "and" %s you'}
    for password in ("first", "se\"c'ond \\"):
        variables = database.settings(**owner, DB_PASSWORD=password)
        # Each is held just before it creates or changes the role, so that all would do so if they did not wait in turn.
        together = database.connect()
        together.cursor().execute("LOCK TABLE pg_authid IN SHARE MODE")
        applying = [asyncio.create_task(asyncio.to_thread(apply, **variables)) for _ in range(2)]
        try:
            await eventually(lambda: database.sql(WAITING) > [(0,)], within=15)
        finally:
            together.close()
        for ended in await asyncio.gather(*applying):
            assert ended.returncode == 0, ended.stderr
        service = await start(PAIR.service, **variables)
        assert (await get(service.url + PAIR.service_path)).status == 200
        assert password not in (cluster.folder / "log").read_text()


@pytest.mark.parametrize("encoding", ["LATIN1", pytest.param("WIN1252", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_database_of_another_encoding(provider: Provider, database: Database, pair: Pair, encoding: str) -> None:
    """The schema and its samples are applied to it like to any other."""
    name = f"{database.name}_{encoding.lower()}"
    provider.maintenance.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    try:
        assert apply(pair, **database.settings(DB_NAME=name)).returncode == 0
        other = Database(name, database.user, database.password, database.host, database.port, database.admin_host)
        assert other.sql(pair.statement) == [(pair.sample,)]
    finally:
        provider.maintenance.sql(f"DROP DATABASE {name} WITH (FORCE)")


# ---- one release after another, each with a schema of its own --------------------------------------------------

FIRST = "CREATE TABLE IF NOT EXISTS things (id int PRIMARY KEY, held text);\n"
SECOND = FIRST + "ALTER TABLE things ADD COLUMN IF NOT EXISTS kind text NOT NULL DEFAULT 'plain'"


class Releases:
    """Releases of a service, each with a schema and a statement, for the same database."""

    def __init__(self, folder: Path, reader: Database, owner: dict[str, Any]) -> None:
        self._file, self._reader, self._owner = folder / "schema.sql", reader, owner

    def apply(self, text: str, statement: str = "SELECT held FROM things WHERE id = %s", *, owner: bool = True) -> str:
        """Apply a schema in this process, for a service that executes `statement`. Raises `psycopg2.Error`."""
        self._file.write_text(text)
        variables = self._reader.settings(**self._owner if owner else {})
        options = settings.read(chassis_database.Settings, {name: str(value) for name, value in variables.items()})
        return schema.Schema(self._file, {"things": "SELECT"}, [statement]).apply(options)


@pytest.fixture
def releases(role: Database, database: Database, tmp_path: Path) -> Releases:
    """Releases of a service of which nothing is in the database."""
    return Releases(tmp_path, role, owner_of(database))


def test_an_older_release_is_content_with_a_newer_schema(releases: Releases) -> None:
    """A rollback needs no owner: what the older image brings was applied before, and its statements work."""
    assert "had been" not in releases.apply(FIRST)
    assert "had been" not in releases.apply(SECOND, "SELECT kind FROM things WHERE id = %s")
    assert "had been applied" in releases.apply(FIRST, owner=False)
    assert "had been applied" in releases.apply(SECOND, "SELECT '100%%', kind FROM things WHERE id = %s", owner=False)


def test_a_statement_that_needs_more_than_the_schema_is_seen(releases: Releases) -> None:
    """The rollout stops if somebody forgot the column in schema.sql, instead of ending in answers of 503."""
    with pytest.raises(psycopg2.Error, match="kind"):
        releases.apply(FIRST, "SELECT kind FROM things WHERE id = %s")


def test_a_schema_that_takes_long_is_ended(releases: Releases, role: Database, database: Database) -> None:
    """After a second, since all that needs the table would wait; nothing of it stays, nor is it recorded."""
    releases.apply(FIRST)
    started = time.monotonic()
    with pytest.raises(psycopg2.Error, match="QueryCanceled"):
        releases.apply(SECOND + "; SELECT pg_sleep(20)")
    assert time.monotonic() - started < 10
    assert database.sql("SELECT count(*) FROM applied_schemas WHERE applied_at > now() - interval '1 s'") == [(0,)]
    with pytest.raises(psycopg2.Error):
        role.sql("SELECT kind FROM things")


async def test_nobody_waits_long_behind_a_change_of_a_table_in_use(
    releases: Releases, role: Database, database: Database
) -> None:
    """While a report holds the table for seconds, and four pods try to add a column, every read is answered soon."""
    releases.apply(FIRST)
    report = database.connect()
    report.cursor().execute("SELECT count(*) FROM things")
    statement = "SELECT kind FROM things WHERE id = %s"
    applying = [asyncio.create_task(asyncio.to_thread(releases.apply, SECOND, statement)) for _ in range(4)]
    reading = role.connect()
    reading.autocommit = True
    longest, waited, ends = 0.0, False, time.monotonic() + 3
    while time.monotonic() < ends:
        started = time.monotonic()
        await asyncio.to_thread(reading.cursor().execute, "SELECT held FROM things")
        longest = max(longest, time.monotonic() - started)
        waited = waited or database.sql(WAITING) > [(0,)]
    assert waited
    assert longest < 1
    assert not any(each.done() for each in applying)
    report.close()
    await asyncio.wait_for(asyncio.gather(*applying), 20)
    assert role.sql("SELECT kind FROM things") == []


def test_a_lock_that_nobody_gives_back_is_told(
    releases: Releases, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up in the end, says why, and has changed nothing."""
    releases.apply(FIRST)
    monkeypatch.setattr(schema, "GIVE_UP", 1.0)
    database.connect().cursor().execute("SELECT count(*) FROM things")
    with pytest.raises(psycopg2.Error, match="LockNotAvailable"):
        releases.apply(SECOND)
    assert "had been applied" in releases.apply(FIRST, owner=False)
