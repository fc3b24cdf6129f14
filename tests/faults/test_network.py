"""The network to the message service, or the message service itself, breaks while clients keep asking."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from conftest import MakePeer, MakeProxy, System
from kit import eventually, reserve_port
from kit.client import get
from kit.faults import Chain, MakeChain, RowOf, StartObserved
from kit.network import response
from kit.postgres import Database
from kit.processes import Server

GOOD = response('{"message": "ok"}')


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Network and downstream", fault, sees)


@pytest.fixture
async def chain(database: Database, make_chain: MakeChain) -> AsyncIterator[Chain]:
    """A chain whose message service keeps its port."""
    with reserve_port() as port:
        yield await make_chain(**database.settings(), PORT=port.getsockname()[1])


@pytest.mark.matrix
@pytest.mark.parametrize(
    "end",
    [
        pytest.param(Server.terminate, marks=row("message service restarted under load (SIGTERM)", "503 while away")),
        pytest.param(Server.kill, marks=row("message service SIGKILLed and started again", "503 while away")),
    ],
)
async def test_it_restarts(
    chain: Chain, database: Database, observed: StartObserved, end: Callable[[Server], None]
) -> None:
    """Requests while it is away get 503; none waits longer than it is away."""
    service = chain.servers.pop()
    port = service.port
    async with chain.endures(503) as clients:
        await asyncio.to_thread(end, service)
        await clients.see(503)
        await observed("message_service", **database.settings(), PORT=port)


@pytest.mark.matrix
@row("message service SIGSTOPped, then SIGCONT", "504")
async def test_it_is_frozen(chain: Chain) -> None:
    """The most calls that may be in flight are stuck when it resumes."""
    async with chain.endures(504) as clients:
        chain.service.freeze()
        await clients.see(504)
        chain.service.resume()


@pytest.mark.matrix
@row("packets between the two dropped silently, no FIN", "504")
async def test_silence(
    own_network: Callable[..., None], observed: StartObserved, make_peer: MakePeer, note: RowOf
) -> None:
    """With the default time limit: once packets pass, no request waits for a TCP retransmission or a dead connection.

    All calls that may be in flight are stuck at that moment.
    """
    peer = await make_peer(GOOD, keep_alive=True)
    gateway = await observed("gateway", DOWNSTREAM_URL=peer.url)
    chain = Chain(gateway, gateway, 5, note)
    drop = [("INPUT", "-p", "tcp", f"--{side}", str(peer.port), "-j", "DROP") for side in ("sport", "dport")]
    async with chain.endures(504) as clients:
        for rule in drop:
            own_network("-A", *rule)
        await clients.see(504)
        await asyncio.sleep(1.1)  # past TCP's first retransmission of a SYN, so that the second would be next
        for rule in drop:
            own_network("-D", *rule)


@pytest.mark.matrix
@row("its host vanishes with all calls in flight, another takes over", "503")
async def test_a_host_that_is_gone(
    own_network: Callable[..., None], observed: StartObserved, make_peer: MakePeer, note: RowOf
) -> None:
    """Requests that it has acknowledged do not wait for it: the kernel gives up, on their repeats, too."""

    async def says_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    peer = await make_peer(says_nothing, keep_alive=True)
    gateway = await observed("gateway", DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=20)
    waiting = []

    async def call() -> None:
        waiting.append(asyncio.create_task(get(gateway.url + "/api/string")))
        await eventually(lambda: len(peer.requests) == len(waiting))

    for _ in range(4):
        await call()
    # Its connections are forgotten, as if another host now had its address; new ones are accepted, but get no data.
    own_network("-A", "INPUT", "-p", "tcp", "--dport", str(peer.port), "-m", "state", "--state", "NEW", "-j", "ACCEPT")
    own_network("-A", "INPUT", "-p", "tcp", "--dport", str(peer.port), "-j", "DROP")
    answers = await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert {answer.status for answer in answers} == {503}
    note(f"given up after {max(answer.seconds for answer in answers):.1f} s")


@row("many connections go stale at once", "200")
async def test_stale_connections(system: System, observed: StartObserved, make_proxy: MakeProxy, note: RowOf) -> None:
    """Kept connections that were reset while idle cost no request."""
    proxy = await make_proxy(system.service.port)
    gateway = await observed("gateway", DOWNSTREAM_URL=proxy.url)
    for _ in range(5):
        answers = await asyncio.gather(*(get(gateway.url + "/api/string") for _ in range(50)))
        assert {answer.status for answer in answers} == {200}
        proxy.cut()
    note("at once")
