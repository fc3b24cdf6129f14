"""Fixtures: they start what a test asks for, and end it afterwards, whatever state the test left it in.

If DB_HOST (and DB_PORT, DB_USER, DB_PASSWORD) is set, tests that only need a database get one on that server; tests
that break the server always use their own cluster.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kit import ROOT
from kit.application import PAIR, PAIRS, Pair
from kit.faults import (  # noqa: F401  # fixtures and hooks of every fault's test
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
from kit.postgres import Cluster, Database, Provider, make_folder, named_server
from kit.processes import Server, wait_listening
from xdist.scheduler import LoadFileScheduling

from chassis.server import Server as ApplicationServer

Serve = Callable[[web.Application], Awaitable[str]]
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
        return "tests/deployment/test_docker.py" if file == "tests/gateway/test_page.py" else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the other pairs to `make faults`, except in tests that are marked `every_pair`."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("pair", PAIR) is not PAIR and not item.get_closest_marker("every_pair"):
            item.add_marker("matrix")


@pytest.fixture(params=PAIRS, ids=lambda pair: pair.name)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Each gateway with its service, for faults that their shared read has to survive."""
    pair: Pair = request.param
    return pair


@pytest.fixture(scope="session")
def session_folder() -> Iterator[Path]:
    """Belongs to PostgreSQL's user; removed at the end."""
    folder = make_folder("tests-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def provider(request: pytest.FixtureRequest) -> Iterator[Provider]:
    """Where databases come from: the server that DB_HOST names, or a cluster for the whole session."""
    maintenance, cluster = named_server(), None
    if not maintenance:
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
    """A fresh database with the application's tables."""
    database = provider.create()
    yield database
    provider.take_back(database)


@pytest.fixture
def empty_database(provider: Provider) -> Iterator[Database]:
    """A fresh database without any table."""
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
    """A cluster that the test may break; its database has the application's tables."""
    return make_cluster()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server and returns when it listens: `await start(pair.gateway, DOWNSTREAM_URL=…)`."""
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
    service = Server(PAIR.service, "-m", PAIR.service, **database.settings())
    gateway = Server(PAIR.gateway, "-m", PAIR.gateway, DOWNSTREAM_URL=wait_listening(service).url)
    yield System(wait_listening(gateway), service, database)
    close_all([service, gateway])
    provider.take_back(database)


@pytest.fixture
def system(shared_system: System) -> Iterator[System]:
    """The shared system; when the test ends, its value is restored."""
    before = shared_system.database.sql(PAIR.statement)[0][0]
    yield shared_system
    shared_system.database.store(before)


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


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves an application of the test's own as `lifecycle.main` does, in this process, and returns its URL."""
    async with AsyncExitStack() as stack:

        async def serve(app: web.Application) -> str:
            made = await stack.enter_async_context(ApplicationServer(app))
            acceptor = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
            stack.callback(acceptor.close)
            return f"http://127.0.0.1:{acceptor.sockets[0].getsockname()[1]}"

        yield serve
