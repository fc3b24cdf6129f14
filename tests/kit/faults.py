"""The assertions that apply to each fault: time, statuses, recovery, footprint, log lines. And the table.

conftest.py imports the fixtures and hooks; each test is beside the others of what it breaks. The quick ones run with
all others, the whole matrix with `make faults`, which also writes the table in docs/faults.md. Each test's marker
`fault` has its row in the table: the area, the fault, and what a client sees.
"""

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit import ROOT, eventually, memory
from kit.application import Pair
from kit.client import get
from kit.load import Clients, Reply
from kit.postgres import Cluster
from kit.processes import Server
from kit.table import REFERENCES, Row, render

RECOVERY = 1.0  # seconds within which the first good answer comes, once the cause is gone
SLACK = 0.2  # seconds that an answer may come after its time limit
MEMORY = 24 * 1024 * 1024  # bytes that a process may keep after a fault, including the allocator's spare

# The real server, started as a user does, which also serves its number of asyncio tasks at /tasks.
OBSERVED = """
import asyncio, runpy, sys
from aiohttp import web
name, *changes = sys.argv[1:]
del sys.argv[1:]
for change in changes:
    exec(change)
async def tasks(request):
    return web.json_response(len(asyncio.all_tasks()))
add_routes = web.Application.add_routes
def observed(app, routes):
    web.Application.add_routes = add_routes
    return app.add_routes([*routes, web.get("/tasks", tasks)])
web.Application.add_routes = observed
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""

Start = Callable[..., Awaitable[Server]]
StartObserved = Callable[..., Awaitable[Server]]


@pytest.fixture
def observed(start: Start) -> StartObserved:
    """Starts a server that reports its tasks; `changes` are statements to run first, such as shorter time limits."""

    async def begin(name: str, *changes: str, **settings: Any) -> Server:
        return await start(name, program=("-c", OBSERVED, name, *changes), **settings)

    return begin


@dataclass
class Footprint:
    """What a process holds."""

    files: int
    tasks: int
    memory: int


def open_files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def footprint(server: Server) -> Footprint:
    """The present footprint, without the request that asks for it."""
    tasks = int((await get(server.url + "/tasks")).body)
    return Footprint(open_files(server.pid), tasks, memory(server.pid))


async def back_to(server: Server, before: Footprint, spare: int = 0) -> None:
    """Return when it holds no more than before; `spare`: connections that it may keep for later."""

    async def look() -> bool:
        now = await footprint(server)
        assert now.files <= before.files + spare, f"{server.name}: {now}, before {before}"
        assert now.tasks <= before.tasks + spare, f"{server.name}: {now}, before {before}"
        assert now.memory <= before.memory + MEMORY, f"{server.name}: {now}, before {before}"
        return True

    await eventually(look, within=4)


RowOf = Callable[..., None]


@pytest.fixture
def note(request: pytest.FixtureRequest) -> RowOf:
    """Records the recovery time for the table: `note(seconds)`, or words if nothing had to recover."""

    def tell(back: float | str) -> None:
        request.node.user_properties.append(("back", back if isinstance(back, str) else f"{back:.2f} s"))

    return tell


class Chain:
    """Gateway, service and database; a test breaks one of them while clients keep asking the gateway."""

    def __init__(self, pair: Pair, gateway: Server, service: Server, limit: float, note: RowOf):
        self.pair, self.gateway, self.service, self.limit, self.note = pair, gateway, service, limit, note
        self.servers = [gateway, service]

    @contextlib.asynccontextmanager
    async def endures(
        self, *statuses: int, recovery: float = RECOVERY, lost: bool = False, logs: bool = True
    ) -> AsyncIterator[Clients]:
        """Inside, break something, and repair it before leaving; then everything that must hold is asserted.

        `statuses` are allowed besides 200. `lost`: requests in flight may end without an answer.
        """
        before = {server.pid: await footprint(server) for server in self.servers}
        began = time.monotonic()
        async with Clients(self.gateway.url + self.pair.read_path) as clients:
            yield clients
            gone = time.monotonic()
            await eventually(lambda: clients.good(gone), within=self.limit + 2 + recovery)
            back = clients.good(gone)[0].ended - gone
            await eventually(lambda: len(clients.good(gone + recovery)) > clients.count, within=self.limit + 2)
        replies = clients.replies
        allowed = {200, *statuses, *([0] if lost else [])}
        wrong = [reply for reply in replies if reply.status not in allowed]
        assert not wrong, wrong[:3]
        late = [reply for reply in replies if reply.seconds > self.limit + SLACK]
        assert not late, late[:3]
        assert back <= recovery, f"the first good answer came after {back:.2f} s"
        relapsed = [reply for reply in replies if reply.began > gone + recovery and reply.status != 200]
        assert not relapsed, relapsed[:3]
        for server in self.servers:
            if server.pid in before and server.process.poll() is None:
                await back_to(server, before[server.pid], spare=4 if server is self.gateway else 8)
        if logs:
            self._check_logs(replies, time.monotonic() - began)
        self.note(back)

    def _check_logs(self, replies: list[Reply], seconds: float) -> None:
        """A line when it went away, one a second at most while it lasted, and one when it was back."""
        failed = {reply.status for reply in replies if reply.status >= 500}
        for status in failed:
            lines = self.gateway.logged(status=status, path=self.pair.read_path)
            assert lines, f"no line about {status}"
            assert all(line["cause"] for line in lines)
        for server in self.servers:
            kinds: dict[Any, int] = {}
            for line in server.log:
                # Requests are equal whatever their cause; other failures are when they have the same one.
                cause = line.get("cause") if "status" not in line else None
                kind = line["message"], line.get("status"), line.get("path"), cause
                kinds[kind] = kinds.get(kind, 0) + 1
            often = {kind: count for kind, count in kinds.items() if count > seconds + 2}
            assert not often, often
        if failed:
            assert self.gateway.logged(message=f"{self.pair.called} answers again")


MakeChain = Callable[..., Awaitable[Chain]]


@pytest.fixture
def make_chain(pair: Pair, observed: StartObserved, note: RowOf) -> MakeChain:
    """Starts a chain; the arguments are settings. Short time limits unless told otherwise."""

    async def make(**settings: Any) -> Chain:
        settings = {"DB_TIMEOUT": 1, "DOWNSTREAM_TIMEOUT": 3} | settings
        url = settings.pop("DOWNSTREAM_URL", None)
        service = await observed(pair.service, **settings)
        gateway = await observed(pair.gateway, **(settings | {"DOWNSTREAM_URL": url or service.url, "PORT": 0}))
        return Chain(pair, gateway, service, settings["DOWNSTREAM_TIMEOUT"], note)

    return make


@pytest.fixture
async def chain(cluster: Cluster, make_chain: MakeChain) -> Chain:
    """A chain whose database the test may break."""
    return await make_chain(**cluster.database().settings())


CLONE_NEWNET = 0x40000000


IPTables = Callable[..., None]


@pytest.fixture
def network_if_permitted() -> Iterator[IPTables | None]:
    """A network namespace for this test alone: yields an executor of `iptables` in it. Ask for it before anything else.

    Yields None if the test may not create one.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def iptables(*arguments: str) -> None:
        subprocess.run(["iptables", "-w", *arguments], check=True, capture_output=True)

    with Path("/proc/thread-self/ns/net").open() as home:
        if libc.unshare(CLONE_NEWNET):
            yield None
            return
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, capture_output=True)
            iptables("-S")
            # Since Linux 6.5 the first SYNs are repeated once a second; before, at growing intervals.
            with contextlib.suppress(OSError):
                Path("/proc/sys/net/ipv4/tcp_syn_linear_timeouts").write_text("0")
        except (OSError, subprocess.CalledProcessError):
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            yield None
            return
        yield iptables
        assert libc.setns(home.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def own_network(network_if_permitted: IPTables | None) -> IPTables:
    """The same; skips if the test may not create one."""
    if network_if_permitted is None:
        pytest.skip("needs root's right to make a network namespace, ip and iptables")
    return network_if_permitted


# ---- the table -------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write the table between the markers of the file that FAULTS_TABLE names, if it is set."""
    target = os.environ.get("FAULTS_TABLE")
    if not target:
        return
    reports = [report for kind in ("passed", "failed", "skipped") for report in terminalreporter.stats.get(kind, [])]
    reports = [report for report in reports if isinstance(report, pytest.TestReport)]  # not of a file that was skipped
    reports.sort(key=lambda report: report.start)
    rows = list(REFERENCES)
    for report in reports:
        properties = dict(report.user_properties)
        if "fault" in properties:
            back = properties.get("back", "-") if report.passed else f"**{report.outcome}**"
            area, fault, sees = properties["fault"]
            rows.append(Row(area, fault, sees, back, f"../{report.nodeid.partition('::')[0]}"))
    file = ROOT / target
    file.write_text(render(file.read_text() if file.exists() else "", rows))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Attach a test's row to its report."""
    if marker := item.get_closest_marker("fault"):
        item.user_properties.append(("fault", marker.args))
