"""The kit breaks what it claims to break; otherwise the tests that use it would prove nothing."""

import asyncio

import psycopg2
import pytest
from conftest import MakeCluster, MakePeer, MakeProxy

from kit import eventually
from kit.application import PAIR
from kit.client import get
from kit.network import name_server, response, unanswered_port
from kit.postgres import Cluster, Database, Provider

COUNT = f"SELECT count(*) FROM {PAIR.table}"


def test_each_test_has_a_database_of_its_own(database: Database, empty_database: Database) -> None:
    """It has the samples, and no other test sees a change."""
    assert database.sql(COUNT)[0][0] > 0
    with pytest.raises(psycopg2.errors.UndefinedTable):
        empty_database.sql(COUNT)


def test_a_database_that_was_used_is_as_new(provider: Provider) -> None:
    """Whatever the test before has done to it, and whoever is still connected."""
    own = Provider(provider.maintenance)
    used, new = own.create(), own.create()
    used.store(PAIR.other)
    used.sql(f"ALTER TABLE {PAIR.table} RENAME TO elsewhere")
    used.sql(f"CREATE VIEW {PAIR.table} AS SELECT * FROM elsewhere")
    used.sql(f"ALTER DATABASE {used.name} SET default_transaction_read_only = on")
    connected = Database(used.name, used.user, used.password, used.host, used.port, used.admin_host).connect()
    connected.cursor().execute("LOCK TABLE elsewhere")
    own.take_back(used)
    again = own.create()
    assert again.name == used.name
    for query in (
        f"SELECT * FROM {PAIR.table} ORDER BY 1",
        "SELECT relname, relkind, relowner, relacl FROM pg_class WHERE relnamespace = 'public'::regnamespace",
        "SELECT nspname, nspowner::regrole, nspacl FROM pg_namespace WHERE nspname !~ '^pg_' ORDER BY 1",
        "SHOW default_transaction_read_only",
    ):
        assert sorted(again.sql(query), key=str) == sorted(new.sql(query), key=str)
    with pytest.raises(psycopg2.OperationalError):
        connected.cursor().execute("SELECT 1")
    for database in (again, new):
        own.take_back(database)
    own.close()


@pytest.mark.parametrize("end", [Cluster.stop, Cluster.kill])
def test_a_cluster_that_ended_refuses_and_comes_back(cluster: Cluster, end: object) -> None:
    """Connecting is refused while it is down; the data and the port are kept."""
    database = cluster.database()
    end(cluster)  # type: ignore[operator]
    with pytest.raises(psycopg2.OperationalError):
        database.connect()
    cluster.start()
    assert database.sql(COUNT)[0][0] > 0


async def test_a_frozen_cluster_says_nothing(cluster: Cluster) -> None:
    """The kernel accepts connections, and then nothing comes."""
    database = cluster.database()
    cluster.freeze()
    waiting = asyncio.create_task(asyncio.to_thread(database.sql, "SELECT 1"))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    cluster.resume()
    assert await waiting == [(1,)]


def test_a_password_is_asked_for_over_tcp(make_cluster: MakeCluster) -> None:
    """A wrong one is rejected; settings reach the server."""
    cluster = make_cluster(max_connections="7")
    database = cluster.database()
    assert database.sql("SHOW max_connections") == [("7",)]
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(host="127.0.0.1", port=cluster.port, user="postgres", password="wrong")


async def test_the_proxy_misbehaves(make_peer: MakePeer, make_proxy: MakeProxy) -> None:
    """It passes, delays, holds, cuts, refuses and passes again."""
    peer = await make_peer(response("ok"))
    proxy = await make_proxy(peer.port)
    assert (await get(proxy.url)).body == b"ok"
    proxy.delay = 0.1
    assert (await get(proxy.url)).seconds > 0.2
    proxy.delay = 0
    proxy.freeze()
    with pytest.raises(asyncio.TimeoutError):
        await get(proxy.url, within=0.2)
    waiting = asyncio.create_task(get(proxy.url))
    await eventually(lambda: proxy.accepted == 4)
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await waiting
    proxy.resume()
    proxy.refuse()
    with pytest.raises(OSError, match="Connect call failed"):
        await get(proxy.url)
    await proxy.accept()
    assert (await get(proxy.url)).body == b"ok"


async def test_a_port_that_nobody_answers() -> None:
    """A connection attempt to a vanished host lasts as long as the client waits."""
    with unanswered_port() as port, pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(0.3):
            await asyncio.open_connection("127.0.0.1", port)


async def test_the_name_server_answers_when_it_may() -> None:
    """A name resolves once it answers."""
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    class Receiver(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, _address: object) -> None:
            received.set_result(data)

    try:
        async with name_server("127.53.0.1") as server:
            server.names["db.test"] = "127.0.0.2"
            server.answering.clear()
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_datagram_endpoint(Receiver, remote_addr=("127.53.0.1", 53))
            transport.sendto(b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x02db\x04test\0\0\x01\0\x01")
            await eventually(lambda: server.questions == ["db.test"])
            assert not received.done()
            server.answering.set()
            assert (await received).endswith(b"\x7f\0\0\x02")
            transport.close()
    except PermissionError:
        pytest.skip("needs the right to use port 53")
