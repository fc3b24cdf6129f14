"""A process exits, is killed, or lacks system resources, while clients keep asking."""

import asyncio
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import System
from kit import eventually, reserve_port
from kit.application import PAIR, PAIRS
from kit.client import connection, get
from kit.faults import Chain, MakeChain, RowOf, StartObserved, back_to, footprint, open_files
from kit.load import Clients
from kit.postgres import Database
from kit.processes import Server


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Process", fault, sees)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A port that a server keeps across restarts."""
    with reserve_port() as reserved:
        yield reserved.getsockname()[1]


@pytest.mark.matrix
@row("gateway SIGKILLed, started again", "reset, refused while away")
async def test_the_gateway_restarts(observed: StartObserved, system: System, port: int, note: RowOf) -> None:
    """Every answer is a good one; it serves again as soon as it listens."""
    gateway = await observed(PAIR.gateway, DOWNSTREAM_URL=system.service.url, PORT=port)
    chain = Chain(PAIR, gateway, gateway, 5, note)
    async with chain.endures(lost=True, logs=False) as clients:
        await asyncio.to_thread(gateway.kill)
        await clients.see(0)
        chain.servers = []
        await observed(PAIR.gateway, DOWNSTREAM_URL=system.service.url, PORT=port)


def limit(server: Server, kind: int, value: int) -> int:
    """Set a soft limit of a running process; return the previous one."""
    before, hard = resource.prlimit(server.pid, kind)
    resource.prlimit(server.pid, kind, (value, hard))
    return before


@pytest.mark.matrix
@row("no file descriptor left, then some again", "closed, or late by a second at most")
async def test_no_open_file_left(observed: StartObserved, system: System, note: RowOf) -> None:
    """Clients that connect meanwhile are refused or wait; the log stays short, and recovery is immediate."""
    server = await observed(PAIR.service, **system.database.settings())
    assert (await get(server.url + PAIR.service_path)).status == 200
    before = await footprint(server)
    usual = limit(server, resource.RLIMIT_NOFILE, open_files(server.pid))
    server.expected_tracebacks = True

    async def ask() -> int:
        try:
            return (await get(server.url + PAIR.service_path, within=2)).status
        except (OSError, EOFError):
            return 0

    waiting = [asyncio.create_task(ask()) for _ in range(20)]
    await asyncio.sleep(1.2)
    limit(server, resource.RLIMIT_NOFILE, usual)
    began = asyncio.get_running_loop().time()
    assert (await get(server.url + PAIR.service_path, within=1.1)).status == 200
    note(asyncio.get_running_loop().time() - began)
    assert set(await asyncio.gather(*waiting)) <= {0, 200}
    await back_to(server, before, spare=4)
    assert len(server.log) < 10


def address_space(pid: int) -> int:
    """Bytes that a process has mapped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmSize:")[2].split()[0]) * 1024


@pytest.mark.matrix
@row("no memory for a long value (RLIMIT_AS), then a short one", "503")
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if isinstance(pair.sample, str)], ids=lambda pair: pair.name)
async def test_no_memory_for_a_value(database: Database, make_chain: MakeChain) -> None:
    """The log says why; the server survives, and recovers at once.

    With no memory at all, not even for an exception, CPython and libuv end the process: see the tests that kill it.
    """
    chain = await make_chain(**database.settings())
    async with chain.endures(503) as clients:
        limit(chain.service, resource.RLIMIT_AS, address_space(chain.service.pid) + 2**26)
        await asyncio.to_thread(database.store, "x" * 10**8)
        await clients.see(503)
        await asyncio.to_thread(database.store, "short")
        await clients.see(200)
    causes = {line.get("cause") or "" for line in chain.service.log}
    assert any("cannot allocate memory" in cause for cause in causes), causes


@row("no thread can be started", "503")
async def test_no_thread_left(observed: StartObserved, system: System, note: RowOf) -> None:
    """Names cannot be looked up then, but the server reports no mistake of its own."""
    settings = system.database.settings(DB_HOST="localhost")
    broken = "import threading; start = threading.Thread.start; threading.Thread.start = lambda thread: start(thread) "
    broken += "if not thread.name.startswith('blocking') else (_ for _ in ()).throw(RuntimeError('no thread'))"
    server = await observed(PAIR.service, broken, **settings)
    answer = await get(server.url + PAIR.service_path)
    assert answer.status == 503
    note("-")


@row("the clock jumps by a day, ahead and back", "200")
async def test_the_clock_jumps(observed: StartObserved, system: System, note: RowOf, tmp_path: Path) -> None:
    """Only dates follow it: no time limit, no connection, no extra log line."""
    ahead = tmp_path / "ahead"
    jumping = f"import os, time; real = time.time; time.time = lambda: real() + 86400 * os.path.exists({str(ahead)!r})"
    server = await observed(PAIR.service, jumping, **system.database.settings())
    async with connection(server.url) as client:
        dates = []
        for jumped in (False, True, False):
            if jumped:
                ahead.touch()
            else:
                ahead.unlink(missing_ok=True)
            for _ in range(3):
                answer = await client.get(PAIR.service_path)
                assert answer.status == 200
            dates.append(answer.headers["Date"])
    assert dates[0][:16] == dates[2][:16] != dates[1][:16]
    assert len(server.log) == 1
    note("-")


STDERR = {"closed": "2>&-", "full (`/dev/full`)": "2>/dev/full", "a pipe without a reader": "2> >(true)"}


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=row(f"stderr {name}", "200")) for name, where in STDERR.items()]
)
async def test_stderr_is_gone(observed: StartObserved, system: System, port: int, note: RowOf, where: str) -> None:
    """It still serves, writes nothing elsewhere, and exits as usual."""
    settings = {"DOWNSTREAM_URL": system.service.url, "ACCESS_LOG": "all"}
    wrapper = ["bash", "-c", f'exec "$@" {where}', "bash"]
    server = await observed(PAIR.gateway, wrapper=wrapper, PORT=port, **settings)
    for path in (PAIR.read_path, "/nowhere", PAIR.read_path):
        async with connection(server.url) as client:
            await client.send(path)
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 ")
            await client.reader.readuntil(b"}")
    server.terminate()
    assert await server.exit_status(within=3) == 0
    assert server.noise == []
    note("-")


@pytest.mark.matrix
@row("log reader blocks", "200")
async def test_a_log_reader_that_blocks(observed: StartObserved, port: int, note: RowOf, tmp_path: Path) -> None:
    """Lines are lost, requests are not, and the exit is not delayed."""
    stuck = tmp_path / "stderr"
    os.mkfifo(stuck)
    wrapper = ["sh", "-c", 'exec "$@" 2<>"$0"', str(stuck)]  # open for reading, too
    server = await observed(PAIR.gateway, wrapper=wrapper, PORT=port, ACCESS_LOG="all")
    async with connection(server.url) as client:
        for _ in range(1000):  # far more than a pipe holds
            async with asyncio.timeout(1):
                assert (await client.get("/healthz")).status == 200
    server.terminate()
    assert await server.exit_status(within=4) == 0
    note("-")


# ---- a rolling restart -----------------------------------------------------------------------------------------

HAPROXY = """
global
    maxconn 1000
defaults
    mode http
    timeout connect 1s
    timeout client 30s
    timeout server 30s
    retries 0
    default-server check inter 500ms fall 1 rise 1
{sections}
"""
SECTION = """
listen {name}
    bind 127.0.0.1:{front}
    option httpchk GET /readyz
    server a 127.0.0.1:{a}
    server b 127.0.0.1:{b}
"""


@dataclass
class Balanced:
    """Two servers of one kind behind one port."""

    name: str
    front: int
    ports: Sequence[int]


@pytest.mark.matrix
@row("rolling restart of both gateways and both services behind haproxy, under load", "200, none lost")
async def test_a_rolling_restart(observed: StartObserved, database: Database, note: RowOf, tmp_path: Path) -> None:
    """No request fails, with a drain longer than haproxy's interval between two checks.

    haproxy's usual retries are off: they would hide a refused connection.
    """
    if not shutil.which("haproxy"):
        pytest.skip("needs haproxy")
    reserved = [reserve_port() for _ in range(6)]
    numbers = [each.getsockname()[1] for each in reserved]
    services = Balanced(PAIR.service, numbers[0], numbers[1:3])
    gateways = Balanced(PAIR.gateway, numbers[3], numbers[4:])
    sections = [
        SECTION.format(name=each.name, front=each.front, a=each.ports[0], b=each.ports[1])
        for each in (services, gateways)
    ]
    file = tmp_path / "haproxy.cfg"
    file.write_text(HAPROXY.format(sections="".join(sections)))
    settings = {**database.settings(), "DOWNSTREAM_URL": f"http://127.0.0.1:{services.front}", "DRAIN_SECONDS": 1}
    servers = {}
    for kind in (services, gateways):
        for port in kind.ports:
            servers[port] = await observed(kind.name, PORT=port, **settings)
    haproxy = subprocess.Popen(["haproxy", "-db", "-f", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220
    url = f"http://127.0.0.1:{gateways.front}{PAIR.read_path}"
    try:
        await eventually(lambda: good(url))
        async with Clients(url, count=16, pause=0.005) as clients:
            for kind in (gateways, services):
                for port in kind.ports:
                    servers[port].terminate(signal.SIGTERM)
                    assert await servers[port].exit_status() == 0
                    servers[port] = await observed(kind.name, PORT=port, **settings)
                    await asyncio.sleep(0.8)  # haproxy finds it
            assert len(clients.replies) > 1000
            assert [reply for reply in clients.replies if reply.status != 200] == []
            note(f"all {len(clients.replies)} answered")
    finally:
        haproxy.terminate()
        haproxy.wait(5)
        for each in reserved:
            each.close()


async def good(url: str) -> bool:
    try:
        return (await get(url)).status == 200
    except (OSError, EOFError):
        return False
