"""Host names: a look-up never blocks the event loop, and a changed address is found at once.

Each server gets its own /etc/resolv.conf, in a mount namespace, which points to the test's name server.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import MakePeer, MakeProxy, Start, System
from kit import eventually
from kit.application import PAIR
from kit.client import get
from kit.network import NameServer, name_server, response, unanswered_port
from kit.postgres import Database


@pytest.fixture
def database(system: System) -> Database:
    """The shared one, since it is only read here."""
    return system.database


class Names:
    """A name server, and the command that starts a server that uses it."""

    def __init__(self, server: NameServer, wrapper: list[str]):
        self.server, self.wrapper = server, wrapper


@pytest.fixture
async def names(tmp_path: Path) -> AsyncIterator[Names]:
    """Names that the test chooses; skips if the test may not set them."""
    address = f"127.53.{os.getpid() % 256}.{os.getpid() // 256 % 254 + 1}"  # port 53 is fixed, so not the address
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {address}\noptions timeout:5 attempts:1\n")
    mount = ["sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(resolv_conf)]
    wrapper = ["unshare", "--mount", *mount]
    try:
        await asyncio.to_thread(subprocess.run, [*wrapper, "true"], capture_output=True, check=True)
        async with name_server(address) as server:
            yield Names(server, wrapper)
    except (subprocess.CalledProcessError, PermissionError, FileNotFoundError):
        pytest.skip("needs root's right to mount a file and to use port 53")


@pytest.mark.parametrize("name", PAIR.servers)
async def test_a_slow_name_holds_up_nobody(
    names: Names, start: Start, make_peer: MakePeer, database: Database, name: str
) -> None:
    """During a look-up, probes are answered at once; then the request succeeds."""
    peer = await make_peer(response(PAIR.good))
    names.server.names["slow.test"] = "127.0.0.1"
    names.server.answering.clear()
    settings = database.settings(DB_HOST="slow.test") if name == PAIR.service else {}
    settings |= {"DOWNSTREAM_URL": f"http://slow.test:{peer.port}", "DB_TIMEOUT": 10, "DOWNSTREAM_TIMEOUT": 10}
    server = await start(name, wrapper=names.wrapper, **settings)
    waiting = asyncio.create_task(get(server.url + PAIR.path(name)))
    await eventually(lambda: names.server.questions)
    for _ in range(5):
        assert (await get(server.url + "/healthz", within=2)).status == 200
    assert not waiting.done()
    names.server.answering.set()
    assert (await waiting).status == 200


@pytest.mark.parametrize("name", PAIR.servers)
async def test_a_name_server_that_is_gone_is_a_clear_answer(names: Names, start: Start, name: str) -> None:
    """In time, for any number of clients; and neither the probes nor the shutdown are held up."""
    names.server.answering.clear()
    limits = {"DB_TIMEOUT": 0.5, "DOWNSTREAM_TIMEOUT": 0.5}
    settings = {"DB_HOST": "gone.test", "DOWNSTREAM_URL": "http://gone.test", **limits}
    server = await start(name, wrapper=names.wrapper, **settings)
    for _ in range(2):
        answers = await asyncio.gather(*(get(server.url + PAIR.path(name), within=3) for _ in range(20)))
        assert {answer.status for answer in answers} == {504}
        assert (await get(server.url + "/healthz", within=3)).status == 200  # a look-up that hangs takes five seconds
    server.terminate()
    assert await server.exit_status(within=3) == 0


@pytest.mark.parametrize("name", PAIR.servers)
async def test_an_unknown_name_is_a_clear_answer(names: Names, start: Start, name: str) -> None:
    """503, as for anything unreachable; the name appears only in the log."""
    settings = {"DB_HOST": "unknown.test", "DOWNSTREAM_URL": "http://unknown.test"}
    server = await start(name, wrapper=names.wrapper, **settings)
    answer = await get(server.url + PAIR.path(name))
    assert answer.status == 503
    assert "unknown" not in answer.body.decode()
    assert "unknown.test" in (await server.wait_for_log(status=503))["cause"]


async def test_a_name_is_looked_up_once_for_a_connection(names: Names, start: Start, database: Database) -> None:
    """libpq does not look it up again, which would block the event loop."""
    names.server.names["db.test"] = "127.0.0.1"
    settings = database.settings(DB_HOST="db.test", DB_POOL_SIZE=1)
    service = await start(PAIR.service, wrapper=names.wrapper, **settings)
    for _ in range(2):
        assert (await get(service.url + PAIR.service_path)).status == 200
    assert names.server.questions.count("db.test") == 2  # for IPv4 and IPv6


@pytest.mark.parametrize("addresses", ["127.0.0.2 127.0.0.1", "127.0.0.1 127.0.0.2"])
async def test_one_address_of_several_is_enough(names: Names, start: Start, database: Database, addresses: str) -> None:
    """One does not answer, so libpq changes to the other's socket, which aiopg would not notice."""
    names.server.names["db.test"] = addresses
    settings = database.settings(DB_HOST="db.test")
    service = await start(PAIR.service, wrapper=names.wrapper, **settings, DB_TIMEOUT=1)
    with unanswered_port("127.0.0.2", database.port):
        assert (await get(service.url + PAIR.service_path, within=2)).status == 200


@pytest.mark.parametrize("asked", [True, False], ids=["asked while it was away", "not asked"])
async def test_a_database_that_moved_is_found(
    names: Names, start: Start, make_proxy: MakeProxy, database: Database, asked: bool
) -> None:
    """After a failover to another address, the next request after the name's change succeeds."""
    old = await make_proxy(database.port, "127.0.0.2")
    await make_proxy(database.port, "127.0.0.3", old.port)
    names.server.names["db.test"] = "127.0.0.2"
    settings = database.settings(DB_HOST="db.test", DB_PORT=old.port)
    service = await start(PAIR.service, wrapper=names.wrapper, **settings)
    assert (await get(service.url + PAIR.service_path)).status == 200
    old.refuse()
    old.cut()
    if asked:
        assert (await get(service.url + PAIR.service_path)).status == 503
    names.server.names["db.test"] = "127.0.0.3"
    assert (await get(service.url + PAIR.service_path)).status == 200


async def test_a_service_that_moved_is_found(
    names: Names, start: Start, make_proxy: MakeProxy, make_peer: MakePeer
) -> None:
    """aiohttp's client alone would keep the old address for ten seconds."""
    peer = await make_peer(response(PAIR.good), keep_alive=True)
    old = await make_proxy(peer.port, "127.0.0.2")
    await make_proxy(peer.port, "127.0.0.3", old.port)
    names.server.names["service.test"] = "127.0.0.2"
    gateway = await start(PAIR.gateway, wrapper=names.wrapper, DOWNSTREAM_URL=f"http://service.test:{old.port}")
    assert (await get(gateway.url + PAIR.read_path)).status == 200
    old.refuse()
    old.cut()
    assert (await get(gateway.url + PAIR.read_path)).status == 503
    names.server.names["service.test"] = "127.0.0.3"
    assert (await get(gateway.url + PAIR.read_path)).status == 200
