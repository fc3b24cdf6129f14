"""Clients that hold connections, send byte by byte, or do not read their answers."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator

import pytest
import uvloop
from aiohttp import web
from conftest import MakePeer, Start, System
from kit import eventually, memory, reserve_port
from kit.application import PAIR
from kit.client import PATIENCE, Connection, connection, get
from kit.faults import RowOf, StartObserved, back_to, footprint, open_files
from kit.network import response, says_nothing
from kit.postgres import Database

from chassis import lifecycle
from chassis.server import Server

GOOD = response(PAIR.good)
HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Clients", fault, sees)


@contextlib.asynccontextmanager
async def many(url: str, count: int) -> AsyncIterator[list[Connection]]:
    """Open this many connections, some at a time."""
    async with contextlib.AsyncExitStack() as stack:
        connections: list[Connection] = []
        while len(connections) < count:
            some = min(200, count - len(connections))
            new = [stack.enter_async_context(connection(url)) for _ in range(some)]
            connections += [await each for each in new]
        yield connections


async def closed(client: Connection) -> bool:
    """Whether the server has closed it; earlier output is discarded."""
    with contextlib.suppress(ConnectionError):
        while not client.reader.at_eof():
            try:
                async with asyncio.timeout(0.05):
                    await client.reader.read(2**20)
            except TimeoutError:
                return False
    return True


def test_clients_that_come_at_once_do_not_wait_for_each_other() -> None:
    """Fifty are accepted in a few turns of the event loop, however long each takes: `create_server` needs fifty."""

    async def serve() -> int:
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(Server(web.Application()))
            listener = stack.enter_context(lifecycle.listen("127.0.0.1", 0))
            for _ in range(50):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            lifecycle.accept_connections(listener, server)
            turns = 0
            while len(server.connections) < 50 and turns < 100:
                turns += 1
                await asyncio.sleep(0)
            asyncio.get_running_loop().remove_reader(listener)
        return turns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(serve()) < 10


@pytest.mark.matrix
@row("10,000 idle connections", "200")
async def test_ten_thousand_idle_connections(observed: StartObserved, make_peer: MakePeer, note: RowOf) -> None:
    """Other clients are answered meanwhile, and nothing is left when these have gone. Each takes less than 16 kB."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 10_300:
        pytest.skip("needs a hard limit of 10,300 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (10_300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    peer = await make_peer(GOOD, keep_alive=True)
    wrapper = ["prlimit", "--nofile=1024:10300"]  # the usual soft limit
    gateway = await observed(PAIR.gateway, wrapper=wrapper, DOWNSTREAM_URL=peer.url)
    assert (await get(gateway.url + PAIR.read_path)).status == 200
    before = await footprint(gateway)
    async with many(gateway.url, 10_000) as clients:
        for client in clients:
            assert (await client.get("/healthz")).status == 200
        for _ in range(10):
            assert (await get(gateway.url + PAIR.read_path, within=1)).status == 200
        assert (await footprint(gateway)).tasks > 10_000
        grown = memory(gateway.pid) - before.memory
        assert grown < 10_000 * 16_000
    before.memory = memory(gateway.pid)  # Python keeps it for the next ones
    await back_to(gateway, before, spare=1)
    note("-")


@pytest.mark.matrix
@row("all open files taken by idle connections (`ulimit -n 64`)", "200; idle ones are closed")
async def test_idle_connections_keep_nobody_out(observed: StartObserved, system: System, note: RowOf) -> None:
    """Each newcomer is answered, even if this needs a new connection to the next part; one log line says why."""
    wrapper = ["prlimit", "--nofile=64:64"]
    server = await observed(PAIR.gateway, wrapper=wrapper, DOWNSTREAM_URL=system.service.url)
    before = await footprint(server)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            for _ in range(10):  # no more at once than there are spare files
                await stack.enter_async_context(connection(server.url))
            assert (await get(server.url + PAIR.read_path, within=1)).status == 200
        assert (await footprint(server)).files < 64
        line = await server.wait_for_log(message="too many connections: closing idle ones")
        assert (line["level"], line["limit"]) == ("warning", 32)
    await back_to(server, before, spare=5)
    assert len([line for line in server.log if line["level"] != "info"]) < 10
    note("-")


@pytest.mark.parametrize("used", [False, True])
async def test_long_lived_connections_stay(start: Start, used: bool) -> None:
    """A client that makes requests keeps its connection, though others hold as many as they get, used once or never."""
    server = await start(PAIR.gateway, wrapper=["prlimit", "--nofile=64:64"])
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(connection(server.url))
        for _ in range(10):
            assert (await client.get("/healthz")).status == 200
            for _ in range(10):
                other = await stack.enter_async_context(connection(server.url))
                if used:
                    assert (await other.get("/healthz")).status == 200
            assert (await get(server.url + "/healthz", within=1)).status == 200
        assert server.logged(message="too many connections: closing idle ones")


@row("1,100 idle connections to the service, and no database", "503, not 504")
async def test_idle_connections_and_no_database(observed: StartObserved, database: Database, note: RowOf) -> None:
    """The database's refusal is reported at once, however many connections other clients hold."""
    with reserve_port() as refuses:
        settings = {**database.settings(), "DB_HOST": "127.0.0.1", "DB_PORT": refuses.getsockname()[1]}
        service = await observed(PAIR.service, wrapper=["prlimit", "--nofile=4096:4096"], **settings)
        async with many(service.url, 1100):
            assert (await get(service.url + PAIR.service_path, within=1)).status == 503
            assert open_files(service.pid) > 880  # no more were closed than necessary
    note("-")


@pytest.mark.matrix
@row("all open files taken by requests in flight (`ulimit -n 64`)", "a close for those without room")
async def test_too_many_requests_at_once(observed: StartObserved, make_peer: MakePeer, note: RowOf) -> None:
    """Earlier requests are answered; there is room again as soon as one of their clients has left."""

    peer = await make_peer(says_nothing)
    wrapper = ["prlimit", "--nofile=64:64"]
    gateway = await observed(PAIR.gateway, wrapper=wrapper, DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=3)
    before = await footprint(gateway)
    async with many(gateway.url, 32) as clients:
        for client in clients:
            await client.send(PAIR.read_path)
        await eventually(lambda: peer.requests)
        await asyncio.sleep(0.1)
        with pytest.raises((ConnectionError, EOFError)):
            await get(gateway.url + "/healthz", within=1)
        await clients[0].close()
        await eventually(lambda: answers(gateway.url), within=1.5)  # one whose client has left goes on for a second
        for client in clients[1:]:
            async with asyncio.timeout(PATIENCE):
                assert (await client.receive()).status == 504
    await back_to(gateway, before, spare=1)
    note("≤ 1 s")


async def answers(url: str) -> bool:
    try:
        return (await get(url + "/healthz")).status == 200
    except (ConnectionError, EOFError):
        return False


@pytest.mark.matrix
@row("1,000 send their header byte by byte", "200 for others; a close when idle for too long")
async def test_dripping_headers(observed: StartObserved, note: RowOf) -> None:
    """In first requests and later ones: another byte never extends the time."""
    server = await observed(PAIR.service, "from chassis import connections; connections.HEAD_TIMEOUT = 3")
    before = await footprint(server)
    async with many(server.url, 1000) as clients:
        for client in clients[500:]:  # of the others, some of the oldest may have been closed
            assert (await client.get("/healthz")).status == 200

        async def drip(client: Connection) -> None:
            with contextlib.suppress(ConnectionError):
                for byte in HEAD * 100:
                    client.writer.write(bytes([byte]))
                    await asyncio.sleep(0.5)

        dripping = [asyncio.create_task(drip(client)) for client in clients]
        for _ in range(10):
            assert (await get(server.url + "/healthz", within=1)).status == 200
        await eventually(lambda: only_mine(server.url, before.tasks), within=6)
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)
    await back_to(server, before)
    note("-")


async def only_mine(url: str, tasks: int) -> bool:
    return int((await get(url + "/tasks")).body) <= tasks


@pytest.mark.matrix
@row("200 send their body byte by byte", "200 at once; a close after a second")
async def test_dripping_bodies(observed: StartObserved, note: RowOf) -> None:
    """The server does not wait for a body that it does not read."""
    server = await observed(PAIR.service)
    before = await footprint(server)
    async with many(server.url, 200) as clients:
        for client in clients:
            client.writer.write(HEAD + b"Content-Length: 1000000\r\n\r\n")
        async with asyncio.timeout(2):
            for client in clients:
                assert (await client.receive()).status == 200

        async def drip(client: Connection) -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    client.writer.write(b"x")
                    await asyncio.sleep(0.2)

        dripping = [asyncio.create_task(drip(client)) for client in clients]
        await eventually(lambda: only_mine(server.url, before.tasks), within=3)
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)
    await back_to(server, before)
    note("-")


@pytest.mark.matrix
@row("pipeline without reading the answers (10 of them)", "a reset after `SEND_TIMEOUT`")
async def test_a_client_that_does_not_read(observed: StartObserved, make_peer: MakePeer, note: RowOf) -> None:
    """Unread answers occupy memory, so they are kept neither for long nor in large amounts."""
    peer = await make_peer(response(PAIR.body("x" * 900_000)), keep_alive=True)
    gateway = await observed(
        PAIR.gateway, "from chassis import connections; connections.SEND_TIMEOUT = 2", DOWNSTREAM_URL=peer.url
    )
    assert (await get(gateway.url + PAIR.read_path)).status == 200
    before = await footprint(gateway)
    async with many(gateway.url, 10) as clients:
        for client in clients:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(100):
                client.writer.write(f"GET {PAIR.read_path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await asyncio.sleep(1)
        assert memory(gateway.pid) - before.memory < 100 * 1024 * 1024
        assert (await get(gateway.url + PAIR.read_path, within=1)).status == 200
        await eventually(lambda: only_mine(gateway.url, before.tasks), within=5)
    before.memory += 30 * 1024 * 1024
    await back_to(gateway, before, spare=4)
    note("-")
