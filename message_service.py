"""Service 2, the message service: answers `/api/message` with the string stored in PostgreSQL.

Rules kept here: a database that is away, slow or changed never takes longer than `DB_TIMEOUT` and heals by itself;
nothing blocks the event loop; the password is read for each new connection, and appears nowhere.
"""

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import math
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiopg
import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import make_dsn

import lifecycle
import logs
import metrics
import responses
import server
import settings
import threads
from coalescing import Coalescer, RunTimeoutError
from responses import DATABASE, Answer, Problem
from server import Route
from settings import setting

# Prepared, since planning takes a third of the time of a query so small.
QUERY = "SELECT content FROM messages ORDER BY id LIMIT 1"
PREPARE = f"PREPARE message AS {QUERY}"
EXECUTE = "EXECUTE message"
SSL_MODES = settings.one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
READINESS_REUSE = 1.0  # seconds that the database's last answer counts for `/readyz`
CLOSE_TIMEOUT = 1.0  # seconds to close a connection in
MAX_FILES = 1024  # open files: aiopg calls select(), which fails for a socket whose number is higher
FAILURES = (psycopg2.Error, OSError, RuntimeError)  # by family: psycopg2's codes are missing where it matters


@dataclasses.dataclass(frozen=True)
class Settings(lifecycle.CommonSettings):
    port: int = setting(8001, settings.PORT, "where to listen")
    db_host: str = setting("localhost", settings.TEXT, "PostgreSQL's name or address; /… is a socket folder")
    db_port: int = setting(5432, settings.PORT, "PostgreSQL's port")
    db_name: str = setting("mydb", settings.TEXT, "database")
    db_user: str = setting("postgres", settings.TEXT, "role")
    db_password: str | None = setting(None, settings.TEXT, "its password, or", secret=True, shown="none")
    db_password_file: str | None = setting(
        None, settings.READABLE_FILE, "file with its password, read for each new connection", shown="none"
    )
    db_sslmode: str | None = setting(None, SSL_MODES, "TLS to the database", shown="libpq's own, prefer")
    db_sslrootcert: str | None = setting(
        None, settings.READABLE_FILE, "certificates that the database's is checked against", shown="libpq's own"
    )
    db_pool_size: int = setting(4, settings.whole_number(1, 100), "connections")
    db_timeout: float = setting(2.0, settings.seconds(), "for connecting plus query")

    def __post_init__(self) -> None:
        if self.db_password and self.db_password_file:
            raise settings.SettingsError(["DB_PASSWORD_FILE: expected only one of it and DB_PASSWORD"])

    def dsn(self, **more: Any) -> str:
        """libpq's connection string, without host address and password, which each new connection gets anew."""
        dsn: str = make_dsn(
            host=self.db_host,
            port=self.db_port,
            dbname=self.db_name,
            user=self.db_user,
            sslmode=self.db_sslmode,
            sslrootcert=self.db_sslrootcert,
            application_name=f"message_service/{server.VERSION}",
            client_encoding="UTF8",
            **more,
        )
        return dsn

    def password(self) -> str | None:
        """The password as it is now. Raises `OSError`."""
        if self.db_password_file:
            return Path(self.db_password_file).read_text().rstrip("\r\n")
        return self.db_password


class Slot:
    """One connection to the database, made when it is needed and kept while it is good: an aiopg pool of one.

    One for each, since aiopg holds a pool's lock while it connects: in a pool of several, one slow connect would
    hold up everybody, those included for whom a live connection is free.
    """

    def __init__(self, options: Settings, resolver: threads.Resolver) -> None:
        self._options = options
        self._resolver = resolver
        self._connect_with: dict[str, str | None] = {}
        self._connection: aiopg.Connection | None = None  # the one that was made last
        self._prepared = False  # whether it has the prepared statement
        self._pool: aiopg.Pool

    async def open(self) -> None:
        """Prepare; this connects to nothing yet."""
        # Ends on the server what nobody here waits for any more. Clearly later than the time limit here, since
        # aiopg turns the server's "statement timeout" into a cancellation.
        statement_timeout = round((self._options.db_timeout + 1) * 1000)
        self._pool = await aiopg.create_pool(
            self._options.dsn(
                # The kernel gives up a host that acknowledges nothing, a little later than TCP first repeats a SYN.
                # Otherwise all connections can wait for a host that is gone, or for TCP's ever rarer repeats.
                tcp_user_timeout=1500,  # milliseconds
                keepalives_idle=1,  # seconds
                keepalives_interval=1,
                gssencmode="disable",  # libpq may fall back from GSS to another socket; aiopg would not notice
                options=f"-c statement_timeout={statement_timeout} -c client_connection_check_interval=1000",
            ),
            minsize=0,
            maxsize=1,
            timeout=None,  # type: ignore[arg-type]  # a query ends when nobody waits for it any more, see `coalescing`
            enable_json=False,
            enable_hstore=False,
            enable_uuid=False,
            connection_factory=lambda dsn, async_: Connection(make_dsn(dsn, **self._connect_with), async_),
        )

    @property
    def connected(self) -> bool:
        """Whether there is a connection; not the pool's word, which counts one that has died while idle."""
        return self._connection is not None and not self._connection.closed

    async def first_row(self) -> tuple[object] | None:
        """Return what the query finds, on a new connection where there is none or the old one is of no use.

        Raises `psycopg2.Error`, `OSError` or (aiopg's own) `RuntimeError`.
        """
        if self.connected:
            connection = await self._pool.acquire()
            try:
                return await self._query(connection)
            except FAILURES:
                # It has died while idle, or its statement was prepared for a table that has changed since.
                if not connection.closed and not self._prepared:
                    raise
                connection.close()
        return await self._query(await self._connect())

    async def _query(self, connection: aiopg.Connection) -> tuple[object] | None:
        try:
            async with connection.cursor() as cursor:
                if not self._prepared:  # so late, since it needs the table
                    await cursor.execute(PREPARE)
                    self._prepared = True
                await cursor.execute(EXECUTE)
                row: tuple[object] | None = await cursor.fetchone()
                if row is None:
                    # EXECUTE's snapshot is older than its lock: when it had to wait for a table that was rewritten or
                    # made again, it sees none of the rows. A plain statement's snapshot is taken after the lock.
                    await cursor.execute(QUERY)
                    row = await cursor.fetchone()
                return row
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            # Nobody cancelled this task: it is aiopg's name for a query that was cancelled on the server.
            raise psycopg2.OperationalError("the query was cancelled on the server") from None
        finally:
            self._pool.release(connection)

    async def _connect(self) -> aiopg.Connection:
        """Look up the address and the password, since both may have changed, and try one address after the other.

        libpq itself would do all that in the event loop, and try the addresses on sockets that aiopg does not watch.
        """
        password = (
            await threads.call(self._options.password) if self._options.db_password_file else self._options.db_password
        )
        addresses: list[str | None] = [None]  # a socket folder has none
        if not self._options.db_host.startswith("/"):
            found = await self._resolver.resolve(self._options.db_host, self._options.db_port)
            addresses = [address["host"] for address in found]
        self._prepared = False
        for address in addresses:
            self._connect_with = {"hostaddr": address, "password": password}
            try:
                async with asyncio.timeout(self._options.db_timeout / len(addresses)):
                    self._connection = await self._pool.acquire()
                    return self._connection
            except FAILURES:
                metrics.CONNECT_FAILURES.inc()
                if address == addresses[-1]:
                    raise
        raise OSError("the database's name has no address")

    async def close(self) -> None:
        self._pool.terminate()
        # aiopg would wait for ever for a connection that is being made.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._pool.wait_closed()


class Database:
    """The database as the message service sees it: the query, over at most `DB_POOL_SIZE` connections."""

    def __init__(self, options: Settings) -> None:
        resolver = threads.Resolver()
        self._slots = [Slot(options, resolver) for _ in range(options.db_pool_size)]
        self._idle = deque(self._slots)  # connected ones at the right, where they are taken from
        self._outage = logs.Outage("the database")
        self._queries = itertools.count(1)
        self._name = secrets.token_hex(3)
        self.answered_at = -math.inf  # event loop's time of the last answer or failure
        self.failure: Problem | None = None  # None if the last one was an answer

    async def __aenter__(self) -> "Database":
        for slot in self._slots:
            await slot.open()
        metrics.MAX_CONNECTIONS.set(len(self._slots))
        metrics.CONNECTIONS.labels("idle").set_function(lambda: sum(slot.connected for slot in self._idle))
        metrics.CONNECTIONS.labels("used").set_function(lambda: len(self._slots) - len(self._idle))
        return self

    async def __aexit__(self, *_: object) -> None:
        for slot in self._slots:
            await slot.close()

    async def ask(self) -> Answer:
        """Run the query once. Raises `Problem`. Not more than `DB_POOL_SIZE` at a time: nobody waits in a pool."""
        started = time.perf_counter()
        slot = self._idle.pop()
        try:
            row = await slot.first_row()
        except FAILURES as error:
            raise self.failed(to_problem(error)) from error
        finally:
            if slot.connected:
                self._idle.append(slot)
            else:
                self._idle.appendleft(slot)
        queried = time.perf_counter()
        self._outage.succeeded()
        self.answered_at = asyncio.get_running_loop().time()
        self.failure = None
        content = content_of(row)
        timing = (
            f"service;dur={(time.perf_counter() - started) * 1000:.2f}, "
            f'database;dur={(queried - started) * 1000:.2f};desc="{self._name}-{next(self._queries)}"'
        )
        return responses.json_answer("message", content, {"Server-Timing": timing})

    def failed(self, problem: Problem) -> Problem:
        """Remember a failure of the database, and return it."""
        self._outage.failed()
        metrics.DEPENDENCY_ERRORS.labels(problem.kind).inc()
        self.answered_at = asyncio.get_running_loop().time()
        self.failure = problem
        return problem


def content_of(row: tuple[object] | None) -> str:
    """The message in a row of the table. Raises `Problem` when there is no row, or no text in it."""
    if row is None:
        raise responses.no_message()
    if not isinstance(row[0], str):
        raise responses.unavailable(DATABASE, "The database holds no text.", f"content is a {type(row[0]).__name__}")
    return row[0]


def to_problem(error: Exception) -> Problem:
    """What a client sees of a failure of the database."""
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, TimeoutError) or os.strerror(errno.ETIMEDOUT) in cause:  # the kernel's, told by libpq
        return responses.timed_out(DATABASE, "The database did not answer in time.", cause)
    return responses.unavailable(DATABASE, "The database is not available.", cause)


def _ignore_cancelled_queries(loop: asyncio.AbstractEventLoop) -> None:
    """aiopg tells the event loop of a query that the server cancelled, besides raising for it; once is enough."""
    handle = loop.get_exception_handler()

    def handle_others(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if handle and not isinstance(context.get("exception"), psycopg2.extensions.QueryCanceledError):
            handle(loop, context)

    loop.set_exception_handler(handle_others)


@contextlib.asynccontextmanager
async def start(options: Settings) -> AsyncIterator[Mapping[str, Route]]:
    _ignore_cancelled_queries(asyncio.get_running_loop())
    async with Database(options) as database:
        ask = Coalescer(
            database.ask, limit=options.db_pool_size, timeout=options.db_timeout, observe=metrics.observe_run
        )

        async def message() -> Answer:
            try:
                return await ask()
            except RunTimeoutError as error:
                raise database.failed(to_problem(error)) from error

        async def ready() -> Answer:
            if asyncio.get_running_loop().time() - database.answered_at > READINESS_REUSE:
                with contextlib.suppress(Problem):  # an empty table is ready; failures are remembered
                    await message()
            if database.failure:
                raise responses.not_ready(database.failure.detail, database.failure.cause)
            return server.READY

        yield {"/api/message": message, "/readyz": ready}


def apply_schema(options: Settings) -> str:
    """Apply schema.sql. Raises `psycopg2.Error` or `OSError`. Blocks: this is a command of its own, not the server."""
    statements = Path(__file__).with_name("schema.sql").read_text()
    connect_timeout = max(2, math.ceil(options.db_timeout))  # libpq takes whole seconds, 2 at least
    dsn = options.dsn(connect_timeout=connect_timeout, options="-c statement_timeout=60000")
    with contextlib.closing(psycopg2.connect(dsn, password=options.password())) as connection:
        connection.autocommit = True  # the file has its own transaction
        with connection.cursor() as cursor:
            cursor.execute(statements)
    return f"applied schema.sql to the database {options.db_name}"


if __name__ == "__main__":
    lifecycle.main(
        "message_service",
        "Answers /api/message with the string stored in PostgreSQL.",
        Settings,
        start,
        max_files=MAX_FILES,
        actions={"--apply-schema": (apply_schema, "apply schema.sql to the database, and exit")},
    )
