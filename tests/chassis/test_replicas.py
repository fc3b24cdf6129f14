"""Two replicas of each server; when one of them, or the database, breaks, no client's request fails.

The services share one address that gives each new connection to one of them at random, as a Kubernetes Service
does: with iptables if the test may create a network namespace, else with a small forwarder. The load is an open loop:
100 requests a second, half to each gateway, whatever the fate of earlier ones.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from conftest import MakePeer, MakeProxy, Start
from kit import eventually
from kit.application import Pair
from kit.faults import IPTables, RowOf
from kit.load import OpenLoop
from kit.network import Forwarder, Proxy, response
from kit.postgres import Cluster
from kit.processes import Server

AWAY = 6.0  # seconds


def row(fault: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("One of two replicas", fault, "200, none lost")


class Service:
    """One address for several ports."""

    def __init__(self, iptables: IPTables | None):
        self._iptables = iptables
        self._forwarder = Forwarder(0)
        self.url = self._forwarder.url

    async def start(self, *ports: int) -> None:
        """Spread connections over these ports."""
        if not self._iptables:
            await self._forwarder.accept()
        else:
            to_this = ["-p", "tcp", "-d", "127.0.0.1", "--dport", str(self._forwarder.port)]
            self._iptables("-t", "nat", "-N", "SERVICE")
            self._iptables("-t", "nat", "-A", "OUTPUT", *to_this, "-j", "SERVICE")
        self.spread(*ports)

    def spread(self, *ports: int) -> None:
        """From now on, new connections go to these; open ones stay."""
        self._forwarder.targets = list(ports)
        if self._iptables:
            self._iptables("-t", "nat", "-F", "SERVICE")
            for left, port in zip(range(len(ports), 0, -1), ports, strict=True):
                share = ["-m", "statistic", "--mode", "random", "--probability", str(1 / left)]
                target = ["-j", "DNAT", "--to-destination", f"127.0.0.1:{port}"]
                self._iptables("-t", "nat", "-A", "SERVICE", "-p", "tcp", *share, *target)

    async def close(self) -> None:
        """End it."""
        await self._forwarder.close()


class Replicas:
    """Two gateways, the services' address, and two of those, each with its own connection to the database."""

    def __init__(self, pair: Pair, service: Service, start: Start, note: RowOf):
        self.pair, self.service, self._start, self._note = pair, service, start, note
        self.gateways: list[Server] = []
        self.ports: tuple[int, ...] = ()

    async def serve(self, *ports: int) -> None:
        """Start gateways, and let them call these ports."""
        self.ports = ports
        await self.service.start(*ports)
        for _ in range(2):
            self.gateways.append(await self._start(self.pair.gateway, DOWNSTREAM_URL=self.service.url))

    @asynccontextmanager
    async def lose_nothing(self, seconds: float = 4) -> AsyncIterator[OpenLoop]:
        """Inside, break something; the load continues for this time. No request may fail.

        Until then all connections lead to the first replica, so that it is in use when it breaks.
        """
        self.service.spread(self.ports[0])
        async with OpenLoop(*(gateway.url + self.pair.read_path for gateway in self.gateways)) as load:
            await asyncio.sleep(1)
            self.service.spread(*self.ports)
            yield load
            await asyncio.sleep(seconds)
        failed = load.failed()
        assert not failed, f"{len(failed)} of {len(load.replies)} failed: {failed[:3]}"
        assert load.slowest() < 5  # DOWNSTREAM_TIMEOUT
        self._note(f"all {len(load.replies)} answered, the slowest after {load.slowest():.2f} s")


@pytest.fixture
async def replicas(
    network_if_permitted: IPTables | None, pair: Pair, start: Start, note: RowOf
) -> AsyncIterator[Replicas]:
    """Without services yet."""
    service = Service(network_if_permitted)
    yield Replicas(pair, service, start, note)
    await service.close()


class Services:
    """The two services, and the proxies between each of them and the database."""

    def __init__(self, both: list[Server], databases: list[Proxy]):
        self.both, self.databases = both, databases


@pytest.fixture
async def services(replicas: Replicas, cluster: Cluster, start: Start, make_proxy: MakeProxy) -> Services:
    """Real ones, behind the address."""
    databases = [await make_proxy(cluster.port) for _ in range(2)]
    started = [
        await start(replicas.pair.service, **cluster.database().settings(DB_PORT=database.port), DRAIN_SECONDS=2)
        for database in databases
    ]
    await replicas.serve(*(service.port for service in started))
    return Services(started, databases)


async def taken_out(replicas: Replicas, services: Services, after: float) -> None:
    """The first service gets no more new connections, as when its readiness probes have failed."""
    await asyncio.sleep(after)
    replicas.service.spread(services.both[1].port)


@row("SIGKILLed, and taken out of the Service after 3 s")
async def test_one_is_killed(replicas: Replicas, services: Services) -> None:
    """Its requests in flight are sent again, to the other."""
    async with replicas.lose_nothing():
        services.both[0].kill()
        await taken_out(replicas, services, after=3)


@row("frozen (SIGSTOP) for 6 s, never taken out, and then back")
async def test_one_is_frozen(replicas: Replicas, services: Services) -> None:
    """Connections to it look open, and nothing comes; its return goes unnoticed, too."""
    async with replicas.lose_nothing(seconds=2):
        services.both[0].freeze()
        await asyncio.sleep(AWAY)
        services.both[0].resume()


@pytest.mark.matrix
@row("packets to and from it dropped silently")
async def test_one_is_cut_off(network_if_permitted: IPTables | None, replicas: Replicas, services: Services) -> None:
    """Neither an answer nor a refusal comes, on open connections and new ones."""
    if not network_if_permitted:
        pytest.skip("needs root's right to make a network namespace, ip and iptables")
    async with replicas.lose_nothing():
        for side in ("sport", "dport"):
            port = str(services.both[0].port)
            network_if_permitted("-A", "INPUT", "-p", "tcp", f"--{side}", port, "-j", "DROP")


@pytest.mark.matrix
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda proxy: (proxy.refuse(), proxy.cut()), marks=row("its database refuses"), id="refused"),
        pytest.param(lambda proxy: proxy.freeze(), marks=row("its database is silent"), id="silent"),
    ],
)
async def test_one_loses_its_database(replicas: Replicas, services: Services, cut: Callable[[Proxy], None]) -> None:
    """The other's works. Its readiness fails, so it is taken out after 3 s."""
    async with replicas.lose_nothing():
        cut(services.databases[0])
        await taken_out(replicas, services, after=3)


@pytest.mark.matrix
@row("terminated (SIGTERM) with `DRAIN_SECONDS=2`, and taken out a second later")
async def test_one_is_terminated(replicas: Replicas, services: Services) -> None:
    """Meanwhile it exits 0."""
    async with replicas.lose_nothing():
        services.both[0].terminate()
        await taken_out(replicas, services, after=1)
        assert await services.both[0].exit_status() == 0


@pytest.mark.matrix
@row("every answer from it 400 ms late")
async def test_one_is_slow(replicas: Replicas, services: Services, make_proxy: MakeProxy, note: RowOf) -> None:
    """99 of 100 requests are answered as fast as if the other were alone."""
    slow = await make_proxy(services.both[0].port)
    replicas.ports = slow.port, services.both[1].port
    async with replicas.lose_nothing(seconds=6) as load:
        slow.delay = 0.2  # seconds, each way
    assert load.slowest(0.99) < 0.3
    note(f"all {len(load.replies)} answered, 99 % within {load.slowest(0.99):.2f} s")


@pytest.mark.matrix
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            response("<html>", "500 Internal Server Error", "text/html"), marks=row("it answers 500"), id="500"
        ),
        pytest.param(b"", marks=row("it closes every connection"), id="closes"),
    ],
)
async def test_one_goes_mad(replicas: Replicas, make_peer: MakePeer, script: bytes) -> None:
    """It is never taken out; after an error it ends the connection, as every server on this chassis does."""
    peers = [await make_peer(response(replicas.pair.good), keep_alive=True) for _ in range(2)]
    await replicas.serve(*(peer.port for peer in peers))
    async with replicas.lose_nothing():
        peers[0].script = script
        peers[0].keep_alive = False


# ---- the database behind both --------------------------------------------------------------------------------


@asynccontextmanager
async def away(proxies: list[Proxy], seconds: float) -> AsyncIterator[None]:
    """New connections are refused for this long; the body decides what happens to open ones."""
    for proxy in proxies:
        proxy.refuse()
    yield
    await asyncio.sleep(seconds)
    for proxy in proxies:
        await proxy.accept()


@pytest.mark.matrix
@pytest.mark.parametrize(
    "end_old",
    [
        pytest.param(Proxy.cut, marks=row("the database fails over within 1 s, old connections reset"), id="reset"),
        pytest.param(
            lambda proxy: proxy.freeze(new=False),
            marks=row("the database fails over within 1 s, old connections silent"),
            id="silent",
        ),
    ],
)
async def test_the_database_fails_over(
    replicas: Replicas, services: Services, end_old: Callable[[Proxy], None]
) -> None:
    """Refused for most of a second; then new connections work, and old ones never again."""
    async with replicas.lose_nothing(), away(services.databases, seconds=0.7):
        for proxy in services.databases:
            end_old(proxy)


@pytest.mark.matrix
@row("all connections to the database terminated, twenty times")
@pytest.mark.usefixtures("services")
async def test_the_database_terminates_all(replicas: Replicas, cluster: Cluster) -> None:
    """Every query in flight is sent again."""
    async with replicas.lose_nothing():
        for _ in range(20):
            await asyncio.to_thread(cluster.database().terminate_backends)


@pytest.mark.matrix
@pytest.mark.usefixtures("services")
@row("each query takes 300 ms")
async def test_the_database_is_slow(replicas: Replicas, cluster: Cluster) -> None:
    """Slow is not broken; and it never runs more queries than the services have connections."""
    running = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    counts = []
    async with replicas.lose_nothing(seconds=0):
        database = cluster.database()
        pair = replicas.pair
        database.sql(
            f"BEGIN; ALTER TABLE {pair.table} RENAME TO elsewhere; CREATE VIEW {pair.table} AS"
            f" SELECT {pair.identity}, {pair.column} FROM elsewhere, (SELECT pg_sleep(0.3)) AS nap; COMMIT"
        )
        for _ in range(100):
            counts += await asyncio.to_thread(database.sql, running)
            await asyncio.sleep(0.03)
    assert max(counts) <= (8,)


# ---- everything is away ----------------------------------------------------------------------------------------


@pytest.mark.matrix
async def test_after_a_fault_both_get_calls_again(replicas: Replicas, make_peer: MakePeer) -> None:
    """Some time after one of them was away, they share the load again."""
    peers = [await make_peer(response(replicas.pair.good), keep_alive=True) for _ in range(2)]
    await replicas.serve(*(peer.port for peer in peers))
    async with replicas.lose_nothing(seconds=0):
        await eventually(lambda: len(peers[1].requests) > 100, within=60)
