"""Fixtures: they start what a test asks for, and end it afterwards, whatever state the test left it in.

If DB_HOST (and DB_PORT, DB_USER, DB_PASSWORD) is set, tests that only need a database get one on that server; tests
that break the server always use their own cluster.
"""

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit import ROOT
from kit.faults import (  # noqa: F401  # fixtures and hooks for tests/faults/
    chain,
    make_chain,
    network_if_permitted,
    note,
    observed,
    own_network,
    pytest_runtest_setup,
    pytest_terminal_summary,
)
from kit.network import Peer, Proxy, Script
from kit.postgres import Cluster, Database, Provider, make_folder
from kit.processes import Server, wait_listening
from xdist.scheduler import LoadFileScheduling

Start = Callable[..., Awaitable[Server]]
MakeCluster = Callable[..., Cluster]
MakeProxy = Callable[..., Awaitable[Proxy]]
MakePeer = Callable[..., Awaitable[Peer]]


class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist declares no types
    """Like `--dist loadfile`: tests of a file run in one process and share what it has started.

    The browser's tests share Docker's process: Docker changes the machine's network, and Chromium then drops requests.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "tests/test_docker.py" if file == "tests/test_page.py" else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def session_folder() -> Iterator[Path]:
    """Belongs to PostgreSQL's user; removed at the end."""
    folder = make_folder("messages-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def provider(request: pytest.FixtureRequest) -> Iterator[Provider]:
    """Where databases come from: the server that DB_HOST names, or a cluster for the whole session."""
    environ = os.environ
    if host := environ.get("DB_HOST"):
        user, password = environ.get("DB_USER", "postgres"), environ.get("DB_PASSWORD")
        maintenance = Database("postgres", user, password, host, int(environ.get("DB_PORT", "5432")))
        cluster = None
    else:
        session_folder = request.getfixturevalue("session_folder")
        cluster = Cluster(make_folder("shared-", session_folder), session_folder)
        maintenance = cluster.database("postgres")
    provider = Provider(maintenance)
    yield provider
    provider.close()
    if cluster:
        cluster.close()


@pytest.fixture
def database(provider: Provider) -> Iterator[Database]:
    """A fresh database with the sample messages."""
    database = provider.create()
    yield database
    provider.take_back(database)


@pytest.fixture
def empty_database(provider: Provider) -> Iterator[Database]:
    """A fresh database to which schema.sql was not applied."""
    database = provider.create(empty=True)
    yield database
    provider.take_back(database)


@pytest.fixture
def make_cluster(session_folder: Path) -> Iterator[MakeCluster]:
    """Starts clusters of the test's own; the arguments are settings of postgresql.conf."""
    clusters = []

    def make(**settings: str) -> Cluster:
        clusters.append(Cluster(make_folder("own-", session_folder), session_folder, None, **settings))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """A cluster that the test may break; its database `mydb` has the sample messages."""
    return make_cluster()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server and returns when it listens: `await start("gateway", DOWNSTREAM_URL=…)`."""
    servers: list[Server] = []

    async def start(
        name: str, *, program: Sequence[str] = (), wrapper: Sequence[str] = (), cwd: Path = ROOT, **settings: Any
    ) -> Server:
        servers.append(Server(name, *(program or ("-m", name)), wrapper=wrapper, cwd=cwd, **settings))
        return await servers[-1].listening()

    yield start
    close_all(servers)


def close_all(servers: list[Server]) -> None:
    """Close each one, the last started first, then report the first fault."""
    for server in reversed(servers):
        server.stop()
    faults = []
    for server in reversed(servers):
        try:
            server.close()
        except AssertionError as fault:
            faults.append(fault)
    if faults:
        raise faults[0]


@dataclass
class System:
    """Both services with their default settings, and their database."""

    gateway: Server
    service: Server
    database: Database


@pytest.fixture(scope="session")
def shared_system(provider: Provider) -> Iterator[System]:
    """Both services for the whole session, for tests that break nothing."""
    database = provider.create()
    service = Server("message_service", "-m", "message_service", **database.settings())
    gateway = Server("gateway", "-m", "gateway", DOWNSTREAM_URL=wait_listening(service).url)
    yield System(wait_listening(gateway), service, database)
    close_all([service, gateway])
    provider.take_back(database)


@pytest.fixture
def system(shared_system: System) -> Iterator[System]:
    """The shared system; when the test ends, the message is restored."""
    before = shared_system.database.sql("SELECT content FROM messages ORDER BY id LIMIT 1")[0][0]
    yield shared_system
    shared_system.database.set_message(before)


@pytest.fixture
async def make_proxy() -> AsyncIterator[MakeProxy]:
    """Starts proxies: `await make_proxy(port)`."""
    proxies = []

    async def make(target_port: int, host: str = "127.0.0.1", port: int = 0) -> Proxy:
        proxies.append(Proxy(target_port, host, port))
        return await proxies[-1].accept()

    yield make
    for proxy in proxies:
        await proxy.close()


@pytest.fixture
async def make_peer() -> AsyncIterator[MakePeer]:
    """Starts HTTP servers that send what the test specifies: `await make_peer(b"HTTP/1.1 200 OK…")`."""
    peers = []

    async def make(script: bytes | Script, *, keep_alive: bool = False) -> Peer:
        peers.append(Peer(script, keep_alive=keep_alive))
        return await peers[-1].start()

    yield make
    for peer in peers:
        await peer.close()
