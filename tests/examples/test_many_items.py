"""Hundreds of clients that ask for thousands of items: what they see when the table is locked, or a replica breaks."""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import AsyncIterator

import pytest
from conftest import MakeProxy, Start
from kit import open_sockets
from kit.application import PAIRS
from kit.client import connection, get
from kit.network import Forwarder
from kit.postgres import Database
from kit.processes import Server

ORDERS = next(pair for pair in PAIRS if pair.name == "orders")
ITEMS, CLIENTS = 2000, 500
MAX_CALLS = 100  # of a gateway, in flight
OTHERS = 30  # sockets that a server has open besides
LIMIT = 5.0  # seconds: DOWNSTREAM_TIMEOUT


class Load:
    """Clients that keep asking for one item after the other, and what they got."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.replies: list[tuple[float, float, int]] = []  # began, ended, status; 0 for a connection that was closed
        self._ends = False

    async def _keep_asking(self, seed: int) -> None:
        items = random.Random(seed)
        while not self._ends:
            began = time.monotonic()
            try:
                async with connection(self.url) as client:
                    while not self._ends:
                        began = time.monotonic()
                        answer = await client.get(f"/api/stock/item-{items.randrange(ITEMS)}")
                        self.replies.append((began, time.monotonic(), answer.status))
            except (OSError, EOFError):
                self.replies.append((began, time.monotonic(), 0))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._keep_asking(seed)) for seed in range(CLIENTS)]
        yield
        self._ends = True
        await asyncio.gather(*tasks)

    def bad(self, since: float = 0) -> list[tuple[float, float, int]]:
        return [reply for reply in self.replies if reply[2] != 200 and reply[0] >= since]

    def slowest(self) -> float:
        return max(ended - began for began, ended, _ in self.replies)


async def runs(server: Server) -> float:
    """How many runs a server has made."""
    text = (await get(server.url + "/metrics")).body.decode()
    return sum(map(float, re.findall(r"^coalescing_run_callers_count{.*} (.*)", text, re.MULTILINE)))


@pytest.fixture
def stocked(database: Database) -> Database:
    """A database with many items."""
    items = f"SELECT 'item-' || n, 1000 FROM generate_series(0, {ITEMS - 1}) AS n"
    database.sql(f"INSERT INTO stock (item, quantity) {items}")
    return database


async def test_a_locked_table_costs_nothing_once_it_is_free(start: Start, stocked: Database) -> None:
    """Who asks after the lock has gone is answered; meanwhile both servers are alive, and few connections are open."""
    service = await start(ORDERS.service, **stocked.settings())
    gateway = await start(ORDERS.gateway, DOWNSTREAM_URL=service.url)
    load, sockets, health = Load(gateway.url), [0], []

    async def watch() -> None:
        while True:
            sockets.append(open_sockets(service.pid))
            for server in (service, gateway):
                health.append((await get(server.url + "/healthz", within=1)).status)
                assert (await get(server.url + "/readyz", within=LIMIT)).status in (200, 503)
            await asyncio.sleep(0.1)

    async with load.running():
        watching = asyncio.create_task(watch())
        with contextlib.closing(stocked.connect()) as holder:
            holder.cursor().execute("LOCK TABLE stock IN ACCESS EXCLUSIVE MODE")
            await asyncio.sleep(3)
        free = time.monotonic()
        await asyncio.sleep(2)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    assert not load.bad(since=free), load.bad(since=free)[:3]
    assert {status for _, _, status in load.replies} <= {200, 503, 504}
    assert load.slowest() < LIMIT + 0.5
    assert set(health) == {200}
    assert max(sockets) <= MAX_CALLS + OTHERS
    asked = len(load.replies)
    assert asked > CLIENTS
    assert await runs(gateway) <= 1.2 * asked
    assert await runs(service) <= 1.2 * asked


@pytest.mark.matrix
@pytest.mark.parametrize("fault", ["killed", "frozen", "silent"])
async def test_one_of_two_services_breaks(start: Start, stocked: Database, make_proxy: MakeProxy, fault: str) -> None:
    """No request fails, whichever way it breaks."""
    services = [await start(ORDERS.service, **stocked.settings()) for _ in range(2)]
    silent = await make_proxy(services[0].port)
    forwarder = Forwarder(0)
    forwarder.targets = [silent.port, services[1].port]
    await forwarder.accept()
    gateway = await start(ORDERS.gateway, DOWNSTREAM_URL=forwarder.url)
    load = Load(gateway.url)
    try:
        async with load.running():
            await asyncio.sleep(2)
            match fault:
                case "killed":
                    services[0].kill()
                case "frozen":
                    services[0].freeze()
                case "silent":
                    silent.freeze()
            await asyncio.sleep(6)
    finally:
        await forwarder.close()
    assert len(load.replies) > CLIENTS
    assert not load.bad(), (len(load.bad()), len(load.replies), load.bad()[:3])
