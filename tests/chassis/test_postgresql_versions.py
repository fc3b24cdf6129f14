"""The oldest and the newest supported PostgreSQL; all other tests run on only one version.

Here is what depends on PostgreSQL's version: what a session is set to, and what its errors are called.
"""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from conftest import Start
from kit import eventually
from kit.application import PAIR
from kit.client import get
from kit.postgres import PASSWORD, SUPPORTED, Cluster, Database, Provider, make_folder, named_server, programs_of
from kit.processes import run

from chassis import database as chassis_database
from chassis import settings
from chassis.responses import Problem


@pytest.fixture(scope="module", params=SUPPORTED, ids="PostgreSQL {}".format)
def provider(request: pytest.FixtureRequest, session_folder: Path) -> Iterator[Provider]:
    """Databases of this version: of the server that DB_HOST names, or of a cluster."""
    version, named, cluster = request.param, named_server(), None
    if named is None or named.version() != version:
        folder = programs_of(version, session_folder)
        if not folder:
            pytest.skip(f"needs PostgreSQL {version}, in /usr/lib/postgresql or as the server that DB_HOST names")
        cluster = Cluster(make_folder(f"version-{version}-", session_folder), session_folder, folder)
        named = cluster.database("postgres")
        assert named.version() == version
    provider = Provider(named)
    yield provider
    provider.close()
    if cluster:
        cluster.close()


@pytest.fixture
def reader(database: Database) -> Iterator[Database]:
    """The database for a role without any right."""
    name = f"reader_{uuid.uuid4().hex[:12]}"
    database.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
    yield Database(database.name, name, PASSWORD, database.host, database.port)
    database.terminate_backends()
    database.sql(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_the_schema_step(reader: Database, database: Database) -> None:
    """It lets the role read; then it only reads, without the owner; it fails once the right has been revoked."""

    def apply(**settings: Any) -> tuple[int, str]:
        ended = run("-m", PAIR.service, "--apply-schema", **reader.settings(**settings))
        return ended.returncode, ended.stdout + ended.stderr

    status, words = apply(DB_OWNER=database.user, DB_OWNER_PASSWORD=database.password)
    assert (status, words.partition(" ")[0]) == (0, "applied")
    status, words = apply()
    assert (status, "had been applied" in words) == (0, True), words
    database.sql(f"REVOKE SELECT ON {PAIR.table} FROM {reader.user}")
    status, words = apply()
    assert (status, "permission denied" in words) == (1, True), words


async def test_what_administrators_do_costs_no_request(database: Database, start: Start) -> None:
    """The first request after each change gets 200, although sessions have prepared the query before, or are gone."""
    service = await start(PAIR.service, **database.settings())
    table = PAIR.table
    for change in (
        "SELECT",
        f"ALTER TABLE {table} ALTER COLUMN {PAIR.column} TYPE {PAIR.other_type}",
        f"CREATE TABLE new (LIKE {table} INCLUDING ALL); INSERT INTO new OVERRIDING SYSTEM VALUE SELECT * FROM {table};"
        f" DROP TABLE {table} CASCADE; ALTER TABLE new RENAME TO {table}",
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    ):
        database.sql(change)
        answer = await get(service.url + PAIR.service_path)
        assert (answer.status, answer.json()[PAIR.service_key]) == (200, PAIR.sample), change


async def test_a_revoked_right_is_an_outage(reader: Database, database: Database, start: Start) -> None:
    """503 on the session that there is, and 200 on the same one as soon as the right is back."""
    database.sql(f"GRANT SELECT ON {PAIR.table} TO {reader.user}")
    service = await start(PAIR.service, **reader.settings(), DB_POOL_SIZE=1)
    url = service.url + PAIR.service_path
    assert (await get(url)).status == 200
    before = database.backends()
    database.sql(f"REVOKE SELECT ON {PAIR.table} FROM {reader.user}")
    assert (await get(url)).status == 503
    database.sql(f"GRANT SELECT ON {PAIR.table} TO {reader.user}")
    assert (await get(url)).status == 200
    assert database.backends() == before


async def test_a_late_query_ends_on_the_server_too(database: Database, start: Start) -> None:
    """504 while the table is locked, and soon after no session waits for the lock."""
    service = await start(PAIR.service, **database.settings(), DB_TIMEOUT=0.5)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with database.locked():
        assert (await get(service.url + PAIR.service_path)).status == 504
        await eventually(lambda: database.sql(waiting) == [(0,)], within=4)
    assert (await get(service.url + PAIR.service_path)).status == 200


async def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    """What it did is there after its end; after a violated constraint nothing is; and a read changes nothing."""
    database.sql("CREATE TABLE numbers (number integer PRIMARY KEY)")
    variables = {name: str(value) for name, value in database.settings().items()}
    options = settings.read(chassis_database.Settings, variables)
    insert = "INSERT INTO numbers VALUES (%s) RETURNING number"
    async with chassis_database.Database(options, "test") as chassis:
        async with chassis.transaction() as transaction:
            assert await transaction.execute(insert, 1) == [(1,)]
        with pytest.raises(psycopg2.IntegrityError):  # noqa: PT012  # the second statement raises it
            async with chassis.transaction() as transaction:
                await transaction.execute(insert, 2)
                await transaction.execute(insert, 1)
        with pytest.raises(Problem) as refused:
            await chassis.fetch(insert, 3, read=list)
        assert "ReadOnlySqlTransaction" in str(refused.value.cause)
        assert await chassis.shared("SELECT number FROM numbers", read=list) == [(1,)]
