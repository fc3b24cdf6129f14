"""Behind PgBouncer, in each of its modes: the service shares its sessions and its backends with others."""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from kit import ROOT, eventually
from kit.application import PAIR
from kit.client import get
from kit.pooler import PROGRAM, Pooler
from kit.postgres import PASSWORD, Cluster, make_folder
from kit.processes import Server, run

MODES = ("session", "transaction")
MakePooler = Callable[..., Pooler]


@pytest.fixture(scope="module")
def cluster(session_folder: Path) -> Iterator[Cluster]:
    """A cluster for all tests here; it logs every statement."""
    cluster = Cluster(make_folder("pooled-", session_folder), session_folder, log_statement="all")
    yield cluster
    cluster.close()


def statements(cluster: Cluster) -> list[str]:
    """All statements that the server has received so far, in order."""
    return re.findall(r"LOG:  statement: (.*)", (cluster.folder / "log").read_text())


@pytest.fixture
def make_pooler(cluster: Cluster, session_folder: Path) -> Iterator[MakePooler]:
    """Starts poolers in front of the cluster; the arguments are settings of pgbouncer.ini."""
    if not PROGRAM:
        pytest.skip("needs PgBouncer (Debian: apt-get install pgbouncer)")
    poolers = []

    def make(**settings: Any) -> Pooler:
        poolers.append(Pooler(make_folder("pooler-", session_folder), cluster, **settings))
        return poolers[-1]

    yield make
    for pooler in poolers:
        pooler.close()


async def all_answer(*services: Server) -> bool:
    """Whether each service answers all of several simultaneous requests."""
    urls = [f"{service.url}{PAIR.service_path}" for service in services] * 8
    answers = [*await asyncio.gather(*(get(url) for url in urls)), *[await get(url) for url in urls]]
    assert {answer.status for answer in answers} == {200}, [answer.body for answer in answers if answer.status != 200]
    return True


@pytest.mark.parametrize("reset", [0, pytest.param(1, marks=pytest.mark.matrix)], ids=["kept", "reset"])
@pytest.mark.parametrize(
    "ignored", ["", pytest.param("options", marks=pytest.mark.matrix)], ids=["defaults", "options ignored"]
)
@pytest.mark.parametrize("mode", MODES)
async def test_two_services_behind_a_pooler(
    make_pooler: MakePooler, cluster: Cluster, start: Start, mode: str, ignored: str, reset: int
) -> None:
    """Both answer from the first request on, and after a restart of one, of the pooler, or of the database."""
    settings = {"ignore_startup_parameters": ignored} if ignored else {}
    backends = 2 if mode == "transaction" else 20  # few, so that the services share them
    pooler = make_pooler(pool_mode=mode, server_reset_query_always=reset, default_pool_size=backends, **settings)
    database = pooler.database().settings()
    first, second = await asyncio.gather(*(start(PAIR.service, **database) for _ in range(2)))
    assert await all_answer(first, second)
    first.terminate()
    assert await first.exit_status() == 0
    first = await start(PAIR.service, **database)
    assert await all_answer(first, second)
    pooler.restart()
    assert await all_answer(first, second)
    cluster.restart()
    assert await all_answer(first, second)
    assert [(await get(service.url + "/readyz")).status for service in (first, second)] == [200, 200]


async def test_a_pooler_that_was_away_is_found_again(make_pooler: MakePooler, start: Start) -> None:
    """503 while it is down, for the readiness probe, too; 200 as soon as it is back."""
    pooler = make_pooler(pool_mode="transaction")
    service = await start(PAIR.service, **pooler.database().settings())
    assert await all_answer(service)
    pooler.stop()
    assert await has_status(service.url + PAIR.service_path, 503)
    assert await has_status(service.url + "/readyz", 503)
    pooler.start()
    await eventually(lambda: has_status(service.url + PAIR.service_path, 200), within=1)


async def has_status(url: str, status: int) -> bool:
    """Whether a request gets this status."""
    return (await get(url)).status == status


async def test_a_statement_of_others_is_never_executed(make_pooler: MakePooler, cluster: Cluster, start: Start) -> None:
    """Other clients' statements under every name that a service may use change no answer."""
    before = len(statements(cluster))
    direct = await start(PAIR.service, **cluster.database().settings())
    assert await all_answer(direct)
    direct.kill()
    names = {statement.split()[1] for statement in statements(cluster)[before:] if statement.startswith("PREPARE")}
    assert len(names) == 1
    pooler = make_pooler(pool_mode="transaction", default_pool_size=1)
    other = pooler.database().connect()
    other.autocommit = True
    for name in names:
        other.cursor().execute(f"PREPARE {name} AS SELECT 'wrong'")
    service = await start(PAIR.service, **pooler.database().settings())
    for _ in range(3):
        answer = await get(service.url + PAIR.service_path)
        assert answer.json()[PAIR.service_key] == PAIR.sample
    other.close()


@pytest.mark.parametrize("mode", MODES)
async def test_nothing_stays_behind_in_a_backend(
    make_pooler: MakePooler, cluster: Cluster, start: Start, mode: str
) -> None:
    """Other clients on the backends of the service or of `--apply-schema` meet no leftover limit or statement."""
    pooler = make_pooler(pool_mode=mode, default_pool_size=1, server_reset_query="")
    applied = await asyncio.to_thread(run, "-m", PAIR.service, "--apply-schema", **pooler.database().settings())
    assert applied.returncode == 0, applied.stderr
    service = await start(PAIR.service, **pooler.database().settings(DB_POOL_SIZE=1))
    assert await all_answer(service)
    service.kill()
    for setting in ("statement_timeout", "client_connection_check_interval"):
        assert pooler.database().sql(f"SHOW {setting}") == [("0",)]
    assert pooler.database().sql("SELECT name FROM pg_prepared_statements") == []
    await eventually(lambda: len(cluster.database().backends()) == 1)  # so all of that was on the same one


@pytest.mark.parametrize("mode", MODES)
async def test_the_schema_is_applied_through_a_pooler(
    make_pooler: MakePooler, cluster: Cluster, start: Start, mode: str
) -> None:
    """By several at once, with the role as which the service then logs in, although the pooler has seen it fail."""
    cluster.database().sql(f"DROP TABLE {PAIR.table} CASCADE; DROP TABLE IF EXISTS applied_schemas")
    # Seconds in which it refuses, without asking, a login that has failed: 15 by default.
    pooler = make_pooler(pool_mode=mode, server_login_retry=4)
    role, password = f"reader_{mode}", "its password"
    pooler.let_in(role, password)
    pooler.restart()
    settings = pooler.database(role, password).settings(DB_OWNER="postgres", DB_OWNER_PASSWORD=PASSWORD)
    for applied in await asyncio.gather(
        *(asyncio.to_thread(run, "-m", PAIR.service, "--apply-schema", **settings) for _ in range(3))
    ):
        assert applied.returncode == 0, applied.stderr
    service = await start(PAIR.service, **settings)
    assert await all_answer(service)


async def test_what_the_page_says_to_set_on_the_role_counts(
    make_pooler: MakePooler, cluster: Cluster, start: Start
) -> None:
    """docs/containers.md, "Behind a pooler": the server, too, then ends an abandoned query."""
    database = cluster.database()
    database.sql("CREATE ROLE limited LOGIN PASSWORD 'its password'")
    database.sql(f"GRANT SELECT ON {PAIR.table} TO limited")
    page = (ROOT / "docs/containers.md").read_text()
    limits = re.findall(r"^ALTER ROLE \w+ (SET .*?);", page, re.MULTILINE)
    assert len(limits) == 2
    for limit in limits:
        database.sql(f"ALTER ROLE limited {limit}")
    pooler = make_pooler(pool_mode="transaction")
    pooler.let_in("limited", "its password")
    pooler.restart()
    settings = pooler.database("limited", "its password").settings()
    service = await start(PAIR.service, **settings, DB_TIMEOUT=1)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'limited'"
    with database.locked():
        assert (await get(service.url + PAIR.service_path)).status == 504
        await eventually(lambda: database.sql(waiting) == [(0,)], within=2)
    assert await all_answer(service)


async def test_a_direct_connection_prepares_its_query_once(cluster: Cluster, start: Start) -> None:
    """Three statements on a new connection, then one execution for each query; all have a time limit."""
    one = {"DB_POOL_SIZE": 1}  # so that no query that is late gets company on another
    service = await start(PAIR.service, **cluster.database().settings(), **one, DB_TIMEOUT=2)
    before = len(statements(cluster))
    for _ in range(5):
        assert (await get(service.url + PAIR.service_path)).status == 200
    begin, prepare, *executions = statements(cluster)[before:]
    assert "'statement_timeout', '3.0s'" in begin
    prepared = re.fullmatch(r"PREPARE (\w+) AS (.*)", prepare)
    assert prepared
    name, text = prepared.groups()
    assert hashlib.sha256(text.encode()).hexdigest().startswith(name.rpartition("_")[2])  # so never another's text
    assert executions == [f"EXECUTE {name}"] * 5
