"""What clients see of coalescing through both servers: no answer is older than its question."""

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterator

import pytest
from conftest import MakeProxy, Start
from kit.application import Pair
from kit.client import Answer, connection
from kit.postgres import Database
from kit.processes import Server

READERS = 200
READS = 10  # by each reader
PAUSE = 0.1  # seconds that a reader waits between an answer and its next request, at most
WRITERS = 3
SLOWNESS = 0.015  # seconds that a slow connection takes for each direction


class History:
    """A number in the database that only grows, as its writers and readers see it, and the bounds on what they may see.

    As it only grows, linearizability is two bounds: an answer is not below what was committed, or answered to
    anybody, before its request was sent; nor above what writers had begun to write when it came.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
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
            cursor.execute(self.pair.increase)
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
                self._check(oldest, await client.get(self.pair.read_path))
                await asyncio.sleep(pause)

    def _check(self, oldest: int, answer: Answer) -> None:
        assert answer.status == 200, answer
        value, newest = int(answer.json()[self.pair.result_key]), self.begun
        if not oldest <= value <= newest:
            self.violations.append(f"{value} is not in {oldest}…{newest}")
        self.received = max(self.received, value)
        self.answers += 1
        self.values.add(value)
        self.queries.update(re.findall('desc="(.*?)"', answer.headers["Server-Timing"]))


@contextlib.contextmanager
def written(database: Database, history: History) -> Iterator[None]:
    """Inside, the value changes all the time."""
    database.store(0, history.pair)
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


async def observe(pair: Pair, database: Database, gateway: Server) -> History:
    """The observations of hundreds of readers while the value changes all the time."""
    history = History(pair)
    with written(database, history):
        await asyncio.gather(*(history.read(gateway.url, number / READERS * PAUSE) for number in range(READERS)))
    return history


async def start_system(
    pair: Pair, start: Start, database: Database, make_proxy: MakeProxy, *, slow: str, broken: str = ""
) -> Server:
    """Start both servers and return the gateway; the `slow` one's dependency is slow, `broken` uses single-flight."""

    async def reach(port: int, server: str) -> int:
        if server != slow:
            return port
        proxy = await make_proxy(port)
        proxy.delay = SLOWNESS
        return proxy.port

    def program(name: str, server: str) -> tuple[str, ...]:
        return ("-m", "tests.kit.single_flight", name) if server == broken else ()

    options = database.settings(DB_PORT=await reach(database.port, "service"))
    service = await start(pair.service, program=program(pair.service, "service"), **options)
    url = f"http://127.0.0.1:{await reach(service.port, 'gateway')}"
    return await start(pair.gateway, program=program(pair.gateway, "gateway"), DOWNSTREAM_URL=url)


SERVERS = pytest.mark.parametrize("slow", ["gateway", "service"])


@pytest.mark.every_pair
@SERVERS
async def test_no_answer_is_older_than_its_question(
    pair: Pair, start: Start, database: Database, make_proxy: MakeProxy, slow: str
) -> None:
    """A client that knows of a change gets it, or a newer one, however many share a query and however slow it is."""
    history = await observe(pair, database, await start_system(pair, start, database, make_proxy, slow=slow))
    assert not history.violations
    assert history.answers == READERS * READS
    assert len(history.values) > 10
    assert len(history.queries) < history.answers / 2


@SERVERS
async def test_single_flight_in_one_server_is_found_out(
    pair: Pair, start: Start, database: Database, make_proxy: MakeProxy, slow: str
) -> None:
    """The test above notices if callers join a running call in either server."""
    gateway = await start_system(pair, start, database, make_proxy, slow=slow, broken=slow)
    assert (await observe(pair, database, gateway)).violations
