"""What clients see of coalescing through both services: answers are fresh, and faults stay contained."""

import asyncio
import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator

import pytest
from conftest import MakePeer, MakeProxy, Start
from kit.client import Answer, connection, get
from kit.network import response
from kit.postgres import Cluster, Database
from kit.processes import Server

READERS = 200
READS = 10  # by each reader
PAUSE = 0.1  # seconds that a reader waits between an answer and its next request, at most
WRITERS = 3
SLOWNESS = 0.015  # seconds that a slow connection takes for each direction
LIMIT = 1.5  # seconds; for calls that meet a frozen part


class History:
    """A number in the database that only grows, as its writers and readers see it, and the bounds on what they may see.

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
        """Until `stop`, write a number one higher than the present one."""
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
        """Ask repeatedly on one connection, until enough is seen."""
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
    """Inside, the message changes all the time."""
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
    """The observations of hundreds of readers while the message changes all the time."""
    history = History()
    with written(database, history):
        await asyncio.gather(*(history.read(gateway.url, number / READERS * PAUSE) for number in range(READERS)))
    return history


async def start_system(start: Start, database: Database, make_proxy: MakeProxy, *, slow: str, broken: str) -> Server:
    """Start both services and return the gateway; the `slow` one's dependency is slow, `broken` uses single-flight."""
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
    """A client that knows of a change gets it, or a newer one, however many share a query and however slow it is."""
    history = await observe(database, await start_system(start, database, make_proxy, slow=slow, broken=""))
    assert not history.violations
    assert history.answers == READERS * READS
    assert len(history.values) > 10
    assert len(history.queries) < history.answers / 2


@pytest.mark.parametrize("name", ["gateway", "message_service"])
async def test_single_flight_in_one_service_is_found_out(
    start: Start, database: Database, make_proxy: MakeProxy, name: str
) -> None:
    """The test above notices if callers join a running call in either service."""
    history = await observe(database, await start_system(start, database, make_proxy, slow=name, broken=name))
    assert history.violations


async def check_that_nobody_waits_long(gateway: Server) -> None:
    """Send requests while the only open connection behind the gateway is frozen: all get a fresh answer in time."""
    url = gateway.url + "/api/string"
    tasks = [asyncio.create_task(get(url)) for _ in range(20)]
    for task in tasks:
        answer = await task
        assert answer.status == 200
        assert answer.seconds < LIMIT
    for _ in range(5):
        assert (await get(url)).status == 200


async def test_a_frozen_database_connection_costs_nobody_a_request(cluster: Cluster, start: Start) -> None:
    """The query is sent again on another connection."""
    database = cluster.database()
    service = await start("message_service", **database.settings(), DB_TIMEOUT=2 * LIMIT)
    gateway = await start("gateway", DOWNSTREAM_URL=service.url)
    assert (await get(gateway.url + "/api/string")).status == 200
    (backend,) = database.backends()
    os.kill(backend, signal.SIGSTOP)
    await check_that_nobody_waits_long(gateway)


async def test_a_frozen_message_service_costs_nobody_a_request(
    start: Start, database: Database, make_proxy: MakeProxy
) -> None:
    """One of several behind the same address: the call is repeated on another connection."""
    service = await start("message_service", **database.settings())
    proxy = await make_proxy(service.port)
    gateway = await start("gateway", DOWNSTREAM_URL=proxy.url, DOWNSTREAM_TIMEOUT=2 * LIMIT)
    assert (await get(gateway.url + "/api/string")).status == 200
    assert proxy.open == 1
    proxy.freeze(new=False)
    await check_that_nobody_waits_long(gateway)


@pytest.mark.parametrize("status", [502, 504])
async def test_a_shared_error_is_logged_with_a_request_that_was_sent(
    start: Start, make_peer: MakePeer, status: int
) -> None:
    """Each caller's log line leads to the message service's: by its own id, or by downstream_request_id."""

    async def says_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    peer = await make_peer(response("nonsense") if status == 502 else says_nothing)
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=LIMIT, ACCESS_LOG="all")
    url = gateway.url + "/api/string"
    answers = await asyncio.gather(*(get(url, headers={"X-Request-ID": f"number-{each}"}) for each in range(20)))
    sent = re.findall(r"(?i)^x-request-id: (\S+)\r", "".join(peer.requests), re.MULTILINE)
    assert len(set(sent)) < 10
    for answer in answers:
        assert answer.status == status
        line = await gateway.wait_for_log(request_id=answer.request_id)
        assert line.get("downstream_request_id", answer.request_id) in sent
