"""What clients see of coalescing through both services: answers are fresh, and faults stay where they are."""

import asyncio
import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator

import pytest
from conftest import MakePeer, MakeProxy, Start
from kit import eventually
from kit.client import Answer, connection, get
from kit.network import response
from kit.postgres import Cluster, Database
from kit.processes import Server

from gateway import MAX_CALLS

READERS = 200
READS = 10  # by each reader
PAUSE = 0.1  # seconds that a reader waits between an answer and its next request, at most
WRITERS = 3
SLOWNESS = 0.015  # seconds that a slow connection takes for each direction
LIMIT = 1.5  # seconds; of the calls that meet something frozen


class History:
    """A number in the database that only grows, as its writers and readers see it, and what they may not see.

    As it only grows, linearizability is two bounds: an answer is not below what was committed, or answered to
    anybody, before its request was sent; nor above what writers had begun to write when it came.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.committed = 0
        self.received = 0
        self.values: set[int] = set()
        self.queries: set[str] = set()
        self.answers = 0
        self.violations: list[str] = []
        self._lock = threading.Lock()

    def write(self, database: Database, stop: threading.Event) -> None:
        """Write until `stop`, each time one more than what is there."""
        connection = database.connect()
        connection.autocommit = True
        cursor = connection.cursor()
        while not stop.wait(0.001):
            with self._lock:
                self.begun += 1
            cursor.execute(
                "UPDATE messages SET content = content::int + 1"
                " WHERE id = (SELECT min(id) FROM messages) RETURNING content::int"
            )
            (value,) = cursor.fetchone()
            with self._lock:
                self.committed = max(self.committed, value)

    async def read(self, url: str, pause: float) -> None:
        """Ask again and again on one connection, until enough is seen."""
        async with connection(url) as client:
            for _ in range(READS):
                if self.violations:
                    return
                oldest = max(self.committed, self.received)
                self._check(oldest, await client.get("/api/string"))
                await asyncio.sleep(pause)

    def _check(self, oldest: int, answer: Answer) -> None:
        assert answer.status == 200, answer
        value, newest = int(answer.json()["result"]), self.begun
        if not oldest <= value <= newest:
            self.violations.append(f"{value} is not in {oldest}…{newest}")
        self.received = max(self.received, value)
        self.answers += 1
        self.values.add(value)
        self.queries.update(re.findall('desc="(.*?)"', answer.headers["Server-Timing"]))


@contextlib.contextmanager
def written(database: Database, history: History) -> Iterator[None]:
    """While it lasts, the message changes all the time."""
    database.set_message("0")
    stop = threading.Event()
    writers = [threading.Thread(target=history.write, args=(database, stop)) for _ in range(WRITERS)]
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        stop.set()
        for writer in writers:
            writer.join()


async def observe(database: Database, gateway: Server) -> History:
    """What hundreds of readers see while the message changes all the time."""
    history = History()
    with written(database, history):
        await asyncio.gather(*(history.read(gateway.url, number / READERS * PAUSE) for number in range(READERS)))
    return history


async def start_system(start: Start, database: Database, make_proxy: MakeProxy, *, slow: str, broken: str) -> Server:
    """Start both services and return the gateway; `slow` is what lies behind one, `broken` by single-flight another."""
    program = ("-m", "tests.single_flight", broken)

    async def reach(port: int, service: str) -> int:
        if service != slow:
            return port
        proxy = await make_proxy(port)
        proxy.delay = SLOWNESS
        return proxy.port

    options = database.settings(DB_PORT=await reach(database.port, "message_service"))
    service = await start("message_service", program=program * (broken == "message_service"), **options)
    url = f"http://127.0.0.1:{await reach(service.port, 'gateway')}"
    return await start("gateway", program=program * (broken == "gateway"), DOWNSTREAM_URL=url)


@pytest.mark.parametrize("slow", ["gateway", "message_service"])
async def test_no_answer_is_older_than_its_question(
    start: Start, database: Database, make_proxy: MakeProxy, slow: str
) -> None:
    """Whoever knows of a change gets it, or a newer one, however many share a query and however slow that is."""
    history = await observe(database, await start_system(start, database, make_proxy, slow=slow, broken=""))
    assert not history.violations
    assert history.answers == READERS * READS
    assert len(history.values) > 10
    assert len(history.queries) < history.answers / 2


@pytest.mark.parametrize("name", ["gateway", "message_service"])
async def test_single_flight_in_one_service_is_found_out(
    start: Start, database: Database, make_proxy: MakeProxy, name: str
) -> None:
    """The test above notices when callers join a run that is under way, be it in one of the services only."""
    history = await observe(database, await start_system(start, database, make_proxy, slow=name, broken=name))
    assert history.violations


async def check_that_one_batch_is_delayed(gateway: Server) -> None:
    """Ask while the one connection behind the gateway that is up is frozen."""
    url = gateway.url + "/api/string"
    tasks = [asyncio.create_task(get(url)) for _ in range(20)]
    answered, stuck = await asyncio.wait(tasks, timeout=LIMIT / 2)
    assert stuck
    for _ in range(5):
        assert (await get(url)).status == 200
    assert not any(task.done() for task in stuck)
    assert {task.result().status for task in answered} <= {200}
    late = await asyncio.gather(*stuck)
    assert {answer.status for answer in late} == {504}
    assert all(LIMIT - 0.01 < answer.seconds < LIMIT + 1 for answer in late)
    lines = [await gateway.wait_for_log(request_id=answer.request_id) for answer in late]
    assert len({line.get("downstream_request_id", line["request_id"]) for line in lines}) == 1
    assert (await get(url)).status == 200


async def test_a_frozen_database_connection_delays_only_its_own_batch(cluster: Cluster, start: Start) -> None:
    """Its callers get 504 when their time is up, all others are answered as usual."""
    database = cluster.database()
    service = await start("message_service", **database.settings(), DB_TIMEOUT=LIMIT)
    gateway = await start("gateway", DOWNSTREAM_URL=service.url, ACCESS_LOG="all")
    assert (await get(gateway.url + "/api/string")).status == 200
    (backend,) = database.backends()
    os.kill(backend, signal.SIGSTOP)
    await check_that_one_batch_is_delayed(gateway)


async def test_a_frozen_message_service_delays_only_its_own_batch(
    start: Start, database: Database, make_proxy: MakeProxy
) -> None:
    """One of several behind the same address: its callers get 504 when their time is up, all others are answered."""
    service = await start("message_service", **database.settings())
    proxy = await make_proxy(service.port)
    gateway = await start("gateway", DOWNSTREAM_URL=proxy.url, DOWNSTREAM_TIMEOUT=LIMIT, ACCESS_LOG="all")
    assert (await get(gateway.url + "/api/string")).status == 200
    assert proxy.open == 1
    proxy.freeze(new=False)
    await check_that_one_batch_is_delayed(gateway)


async def active_requests(server: Server) -> int:
    """How many requests a server is answering, the asking one left out."""
    text = (await get(server.url + "/metrics")).body.decode()
    (count,) = re.findall(r"^http_server_active_requests (\S+)", text, re.MULTILINE)
    return int(float(count)) - 1


@pytest.mark.parametrize("status", [502, 504])
async def test_a_shared_error_is_logged_with_the_request_that_was_sent(
    start: Start, make_peer: MakePeer, status: int
) -> None:
    """Each caller's log line leads to what the message service logged: by its own id, or by downstream_request_id."""
    release = asyncio.Event()

    async def nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(response("nonsense"))

    peer = await make_peer(nonsense, keep_alive=True)
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=LIMIT, ACCESS_LOG="all")

    def ask(name: str) -> asyncio.Task[Answer]:
        return asyncio.create_task(get(gateway.url + "/api/string", headers={"X-Request-ID": name}))

    first = []
    for number in range(MAX_CALLS):
        first.append(ask(f"first-{number}"))
        await eventually(lambda: len(peer.requests) == len(first))
    second = [ask(f"second-{number}") for number in range(10)]  # they wait, and come in one batch

    async def all_wait() -> bool:
        return await active_requests(gateway) == len(first) + len(second)

    await eventually(all_wait)
    if status == 502:
        release.set()
    await asyncio.wait([*first, *second])
    assert len(peer.requests) == len(first) + 1
    (sent,) = re.findall(r"(?i)^x-request-id: (\S+)\r", peer.requests[-1], re.MULTILINE)
    for task in [*first, *second]:
        answer = task.result()
        assert answer.status == status
        line = await gateway.wait_for_log(request_id=answer.request_id)
        other = sent if task in second and answer.request_id != sent else None
        assert line.get("downstream_request_id") == other
