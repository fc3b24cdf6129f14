"""The life of a server: it starts in any order with the others, drains, finishes requests in flight, and exits."""

import asyncio
import contextlib
import json
import signal
import time

import pytest
from conftest import MakePeer, Start, System
from kit import eventually, reserve_port
from kit.application import PAIR
from kit.client import Connection, connection, get
from kit.network import response, says_nothing
from kit.postgres import Cluster, Database
from kit.processes import Server, run


async def ready(server: Server) -> bool:
    """The readiness that a load balancer sees."""
    return (await get(server.url + "/readyz")).status == 200


async def refuses(server: Server) -> bool:
    """Whether it has stopped listening."""
    try:
        async with connection(server.url):
            return False
    except ConnectionError:
        return True


# ---- start -----------------------------------------------------------------------------------------------------


async def test_the_database_may_come_last(cluster: Cluster, start: Start) -> None:
    """Meanwhile the service is up but unready; it heals by itself within a second."""
    cluster.stop()
    service = await start(PAIR.service, **cluster.database().settings())
    assert (await get(service.url + "/healthz")).status == 200
    assert (await get(service.url + "/readyz")).status == 503
    assert (await get(service.url + PAIR.service_path)).status == 503
    cluster.start()
    assert (await get(service.url + PAIR.service_path)).status == 200
    await eventually(lambda: ready(service), within=1)


async def test_the_table_may_come_last(start: Start, empty_database: Database) -> None:
    """Unready without it, ready once it exists, even when it is empty."""
    service = await start(PAIR.service, **empty_database.settings())
    assert (await get(service.url + PAIR.service_path)).status == 503
    assert not await ready(service)
    empty_database.sql(PAIR.schema)
    assert (await get(service.url + PAIR.service_path)).status == 200
    await eventually(lambda: ready(service), within=1)


async def test_the_service_may_come_last(start: Start, database: Database) -> None:
    """Meanwhile the gateway is ready, so that clients get a clear answer."""
    with reserve_port() as port:
        number = port.getsockname()[1]
        gateway = await start(PAIR.gateway, DOWNSTREAM_URL=f"http://127.0.0.1:{number}")
        assert await ready(gateway)
        assert (await get(gateway.url + PAIR.read_path)).status == 503
        await start(PAIR.service, **database.settings(), PORT=number)
        assert (await get(gateway.url + PAIR.read_path)).status == 200


# ---- drain and end ---------------------------------------------------------------------------------------------


@pytest.fixture
async def server(request: pytest.FixtureRequest, start: Start, system: System) -> Server:
    """A server of the parameter's name (and settings), in a working system."""
    name, settings = request.param
    return await start(name, **system.database.settings(), DOWNSTREAM_URL=system.service.url, **settings)


def servers(*names: str, **settings: float) -> pytest.MarkDecorator:
    """Run a test with each of these."""
    return pytest.mark.parametrize("server", [(name, settings) for name in names], indirect=True, ids=names)


@servers(PAIR.gateway, DRAIN_SECONDS=1)
async def test_a_drain_loses_nothing(server: Server) -> None:
    """Keep-alive clients are served until an answer asks them to close; meanwhile, new clients are served."""
    path = PAIR.path(server.name)
    told_to_go = 0

    async def keep_asking(client: Connection) -> None:
        nonlocal told_to_go
        while True:
            answer = await client.get(path)
            assert answer.status == 200
            if answer.headers.get("Connection") == "close":
                assert await client.reader.read() == b""  # and then it is closed
                told_to_go += 1
                return
            await asyncio.sleep(0.01)

    async def ask_once_in_the_drain(client: Connection) -> None:
        await eventually(lambda: server.logged(message="draining"))
        await asyncio.sleep(0.5)
        assert (await client.get(path)).headers["Connection"] == "close"

    async with contextlib.AsyncExitStack() as stack:
        idle, fresh, *busy = [await stack.enter_async_context(connection(server.url)) for _ in range(6)]
        assert (await idle.get(path)).status == 200
        tasks = [asyncio.create_task(keep_asking(client)) for client in busy]
        tasks += [asyncio.create_task(ask_once_in_the_drain(client)) for client in (idle, fresh)]
        await asyncio.sleep(0.2)
        server.terminate()
        await eventually(lambda: server.logged(message="draining"))
        readiness = await get(server.url + "/readyz")
        assert (readiness.status, readiness.json()["status"]) == (503, 503)
        assert readiness.headers["Connection"] == "close"
        assert (await get(server.url + "/healthz")).status == 200
        assert (await get(server.url + path)).status == 200
        await asyncio.gather(*tasks)
    assert told_to_go == 4
    assert not server.logged(message="request failed")  # probes that see the drain are no news
    assert await server.exit_status() == 0


@servers(*PAIR.servers)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_it_ends_within_a_second(server: Server, number: signal.Signals) -> None:
    """With exit status 0, whatever connections are open: unused, kept alive, or with half a request."""
    async with connection(server.url) as kept, connection(server.url), connection(server.url) as half:
        assert (await kept.get("/healthz")).status == 200
        assert (await kept.get(PAIR.path(server.name))).status == 200
        half.writer.write(b"GET /healthz HTT")
        await half.writer.drain()
        server.terminate(number)
        assert await server.exit_status(within=1) == 0
    assert server.log[-1]["message"] == "stopped"


@servers(*PAIR.servers)
async def test_signals_to_the_very_end(server: Server) -> None:
    """However often an impatient person sends a signal, the exit status is 0, without noise."""
    async with asyncio.timeout(5):
        while server.process.poll() is None:
            server.terminate(signal.SIGINT)
            await asyncio.sleep(0.0005)
    assert await server.exit_status() == 0


@servers(PAIR.gateway, SHUTDOWN_SECONDS=5)
async def test_what_is_in_flight_is_finished(server: Server, system: System) -> None:
    """A long request gets its answer, while new connections are refused."""
    with system.database.locked():
        waiting = asyncio.create_task(get(server.url + PAIR.path(server.name)))
        await eventually(lambda: system.database.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        server.terminate()
        await eventually(lambda: refuses(server))
        await asyncio.sleep(0.5)
    answer = await waiting
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert await server.exit_status(within=1) == 0


async def test_a_request_that_never_ends_costs_the_shutdown_time_once(start: Start, make_peer: MakePeer) -> None:
    """Not twice, as with aiohttp alone; and with 0 it costs nothing, instead of waiting for ever."""
    peer = await make_peer(says_nothing)
    for seconds in (1, 0):
        gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=60, SHUTDOWN_SECONDS=seconds)
        async with connection(gateway.url) as client:
            await client.send(PAIR.read_path)
            await eventually(lambda: peer.requests)
            peer.requests.clear()
            begin = time.monotonic()
            gateway.terminate()
            assert await gateway.exit_status() == 0
            assert seconds <= time.monotonic() - begin < seconds + 1.5


async def test_a_frozen_database_does_not_hold_up_the_end(cluster: Cluster, start: Start) -> None:
    """Nor does a connection that is being opened: aiopg would wait for either for ever."""
    settings = cluster.database().settings() | {"DB_TIMEOUT": 60, "SHUTDOWN_SECONDS": 1}
    service = await start(PAIR.service, **settings)
    assert (await get(service.url + PAIR.service_path)).status == 200
    cluster.freeze()
    async with connection(service.url) as first, connection(service.url) as second:
        await first.send(PAIR.service_path)
        await asyncio.sleep(0.1)
        await second.send(PAIR.service_path)
        await asyncio.sleep(0.1)
        service.terminate()
        assert await service.exit_status(within=3) == 0


@pytest.mark.parametrize("waiting_for", ["the drain", "a request"])
async def test_a_second_signal_skips_the_waiting(start: Start, make_peer: MakePeer, waiting_for: str) -> None:
    """Whatever the server was waiting for, it exits within a second, with status 0."""
    peer = await make_peer(says_nothing)
    drain = 60 if waiting_for == "the drain" else 0
    settings = {"DOWNSTREAM_URL": peer.url, "DOWNSTREAM_TIMEOUT": 60}
    gateway = await start(PAIR.gateway, **settings, DRAIN_SECONDS=drain, SHUTDOWN_SECONDS=60)
    async with connection(gateway.url) as client:
        await client.send(PAIR.read_path)
        await eventually(lambda: peer.requests)
        gateway.terminate()
        await gateway.wait_for_log(message="draining")
        if waiting_for == "a request":
            await eventually(lambda: refuses(gateway))
        gateway.terminate()
        assert await gateway.exit_status(within=1) == 0


async def test_a_port_in_use_is_one_line() -> None:
    """On stderr, with exit status 1."""
    with reserve_port() as taken:
        taken.listen()
        port = taken.getsockname()[1]
        ended = await asyncio.to_thread(run, "-m", PAIR.gateway, PORT=port)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert str(port) in ended.stderr


async def test_an_application_that_cannot_start_is_logged() -> None:
    """As a line like any other, with the exit status 1."""
    program = """
from aiohttp import web
from chassis import lifecycle
async def fails(app):
    raise RuntimeError("no such thing")
    yield
def application(options):
    app = web.Application()
    app.cleanup_ctx.append(fails)
    return app
lifecycle.main("any", "", lifecycle.Settings, application)
"""
    ended = await asyncio.to_thread(run, "-c", program)
    (line,) = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert json.loads(line)["cause"] == "RuntimeError: no such thing"


@pytest.mark.skipif(not isinstance(PAIR.sample, str), reason="this application serves no long texts")
async def test_a_whole_response_goes_out_before_the_end(start: Start, make_peer: MakePeer) -> None:
    """A client that reads slowly gets all of a large answer, although the server has been told to stop."""
    body = PAIR.body("x" * 1_000_000)
    peer = await make_peer(response(body))
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url)
    async with connection(gateway.url, buffer=32768) as client:
        await client.send(PAIR.read_path)
        await eventually(lambda: peer.requests)
        gateway.terminate()
        await eventually(lambda: refuses(gateway))
        await asyncio.sleep(0.5)
        assert len((await client.receive()).body) >= 1_000_000
    assert await gateway.exit_status(within=2) == 0
