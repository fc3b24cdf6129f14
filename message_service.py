"""Service 2, the message service: answers `/api/message` with the string stored in PostgreSQL.

Rules kept here: a database that is away, slow or changed never takes longer than `DB_TIMEOUT` and heals by itself;
nothing blocks the event loop; the password is read for each new connection, and appears nowhere.
"""

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import math
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import aiopg
import psycopg2
from aiohttp import web
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
from responses import DATABASE, Problem, Representation, RepresentationResponse
from settings import setting

QUERY = "SELECT content FROM messages ORDER BY id LIMIT 1"
SSL_MODES = settings.one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
READINESS_REUSE = 1.0  # seconds that the database's last answer counts for `/readyz`
CLOSE_TIMEOUT = 1.0  # seconds to close a connection in
MAX_FILES = 1024  # open files: aiopg calls select(), which fails for a socket whose number is higher
Row = tuple[Any, ...]
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
    hold up all requests, those included for which a live connection is free.
    """

    def __init__(self, options: Settings, resolver: threads.Resolver) -> None:
        self._options = options
        self._resolver = resolver
        self._connect_with: dict[str, str | None] = {}
        self._connection: aiopg.Connection | None = None  # the one that was made last
        self._prepared: dict[str, str] = {}  # the statements that it has prepared, and their names
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

    async def fetch(self, statement: str, args: tuple[object, ...]) -> list[Row]:
        """Return what the statement yields, on a new connection where there is none or the old one is of no use.

        The statement may run twice. Raises `psycopg2.Error`, `OSError` or (aiopg's own) `RuntimeError`.
        """
        if self.connected:
            connection = await self._pool.acquire()
            try:
                return await self._execute(connection, statement, args)
            except FAILURES:
                # It has died while idle, or its statement was prepared for a table that has changed since.
                if not connection.closed and statement not in self._prepared:
                    raise
                connection.close()
        return await self._execute(await self._connect(), statement, args)

    async def execute(self, statement: str, args: tuple[object, ...]) -> list[Row]:
        """As `fetch`, but the statement runs at most once: a connection is tried before it is used."""
        await self.fetch("SELECT 1", ())
        return await self._execute(await self._pool.acquire(), statement, args)

    async def _execute(self, connection: aiopg.Connection, statement: str, args: tuple[object, ...]) -> list[Row]:
        try:
            async with connection.cursor() as cursor:
                if args:
                    await cursor.execute(statement, args)
                else:
                    await self._execute_prepared(cursor, statement)
                return await cursor.fetchall() if cursor.description else []
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            # Nobody cancelled this task: it is aiopg's name for a query that was cancelled on the server.
            raise psycopg2.OperationalError("the query was cancelled on the server") from None
        finally:
            self._pool.release(connection)

    async def _execute_prepared(self, cursor: aiopg.Cursor, statement: str) -> None:
        """Planning takes a third of the time of a query as small as ours, so it is done once for each connection."""
        name = self._prepared.get(statement)
        if name is None:  # so late, since it needs the table
            name = f"messages_{hashlib.sha256(statement.encode()).hexdigest()[:16]}"
            await cursor.execute(f"PREPARE {name} AS {statement}")
            self._prepared[statement] = name
        await cursor.execute(f"EXECUTE {name}")
        if not cursor.rowcount:
            # EXECUTE's snapshot is older than its lock: when it had to wait for a table that was rewritten or made
            # again, it sees none of the rows. A plain statement's snapshot is taken after the lock.
            await cursor.execute(statement)

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
        self._prepared.clear()
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
    """The database as the message service sees it: a context that holds at most `DB_POOL_SIZE` connections, and the
    coalesced query.
    """

    def __init__(self, settings: Settings) -> None:
        resolver = threads.Resolver()
        self._slots = [Slot(settings, resolver) for _ in range(settings.db_pool_size)]
        self._idle = deque(self._slots)  # connected ones at the right, where they are taken from
        self._free = asyncio.Semaphore(settings.db_pool_size)
        self._timeout = settings.db_timeout
        self._shared_query = Coalescer(
            self._query_message, limit=settings.db_pool_size, timeout=settings.db_timeout, observe=metrics.observe_run
        )
        self._outage = logs.Outage("the database")
        self._name = secrets.token_hex(3)
        self._queries = itertools.count(1)
        self._checked_at = -math.inf  # event loop's time of the last answer or failure
        self._failure: Problem | None = None  # None if the last one was an answer

    async def __aenter__(self) -> Self:
        for slot in self._slots:
            await slot.open()
        metrics.MAX_CONNECTIONS.set(len(self._slots))
        metrics.CONNECTIONS.labels("idle").set_function(lambda: sum(slot.connected for slot in self._idle))
        metrics.CONNECTIONS.labels("used").set_function(lambda: len(self._slots) - len(self._idle))
        return self

    async def __aexit__(self, *_: object) -> None:
        for slot in self._slots:
            await slot.close()

    async def message(self) -> Representation:
        """What the message service answers, from a query that starts after this call. Raises `Problem`."""
        try:
            message = await self._shared_query()
        except RunTimeoutError as error:
            raise self._failed(error) from error
        except Problem as problem:
            raise problem.copy() from problem.__cause__
        if message is None:
            raise responses.no_message()
        return message

    async def fetch(self, statement: str, *args: object) -> list[Row]:
        """Return the rows that a statement yields, with `args` for its `%s`, in `DB_TIMEOUT` seconds.

        Only for statements that change nothing, since one may run twice. Raises `Problem`, and `psycopg2.DataError`
        for arguments that PostgreSQL refuses.
        """
        return await self._in_time(self._with_slot(Slot.fetch, statement, args))

    async def execute(self, statement: str, *args: object) -> list[Row]:
        """As `fetch`, for statements that change something: it runs at most once.

        Raises `psycopg2.IntegrityError` as well, when a constraint of the table refuses the change.
        """
        return await self._in_time(self._with_slot(Slot.execute, statement, args))

    async def check(self) -> None:
        """Raise `Problem` unless the database answers, or did so in the last `READINESS_REUSE` seconds."""
        if asyncio.get_running_loop().time() - self._checked_at > READINESS_REUSE:
            with contextlib.suppress(Problem):  # an empty table is fine; failures are remembered
                await self.message()
        if self._failure:
            raise responses.not_ready(self._failure.detail, self._failure.cause)

    async def _query_message(self) -> Representation | None:
        started = time.perf_counter()
        rows = await self._with_slot(Slot.fetch, QUERY, ())
        queried = time.perf_counter()
        if not rows:
            return None
        content = text_of(rows[0])
        timing = (
            f"service;dur={(time.perf_counter() - started) * 1000:.2f}, "
            f'database;dur={(queried - started) * 1000:.2f};desc="{self._name}-{next(self._queries)}"'
        )
        return responses.json_representation("message", content, {"Server-Timing": timing})

    async def _with_slot(
        self,
        function: Callable[[Slot, str, tuple[object, ...]], Awaitable[list[Row]]],
        statement: str,
        args: tuple[object, ...],
    ) -> list[Row]:
        """Call `function` with a slot, as soon as one is free. Raises `Problem` and what `fetch` raises."""
        async with self._free:
            slot = self._idle.pop()
            try:
                rows = await function(slot, statement, args)
            except (psycopg2.DataError, psycopg2.IntegrityError):
                raise
            except FAILURES as error:
                raise self._failed(error) from error
            finally:
                if slot.connected:
                    self._idle.append(slot)
                else:
                    self._idle.appendleft(slot)
        self._outage.succeeded()
        self._checked_at = asyncio.get_running_loop().time()
        self._failure = None
        return rows

    async def _in_time(self, rows: Awaitable[list[Row]]) -> list[Row]:
        try:
            async with asyncio.timeout(self._timeout):
                return await rows
        except TimeoutError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> Problem:
        """Remember a failure of the database, and return what a client sees of it."""
        problem = to_problem(error)
        self._outage.failed()
        metrics.DEPENDENCY_ERRORS.labels(problem.kind).inc()
        self._checked_at = asyncio.get_running_loop().time()
        self._failure = problem
        return problem


def text_of(row: Row) -> str:
    """The message in a row of the table. Raises `Problem` when it is no text."""
    content = row[0]
    if not isinstance(content, str):
        raise responses.unavailable(DATABASE, "The database holds no text.", f"content is a {type(content).__name__}")
    return content


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


# ---- the application -------------------------------------------------------------------------------------------

DATABASE_KEY = web.AppKey("database", Database)


async def message(request: web.Request) -> web.StreamResponse:
    """`GET /api/message`: the string that the database holds."""
    return RepresentationResponse(request, await request.app[DATABASE_KEY].message())


async def ready(request: web.Request) -> web.StreamResponse:
    """`/readyz`: the database answers."""
    response = await server.ready(request)
    await request.app[DATABASE_KEY].check()
    return response


def application(settings: Settings) -> web.Application:
    app = web.Application()

    async def database(app: web.Application) -> AsyncIterator[None]:
        _ignore_cancelled_queries(asyncio.get_running_loop())
        async with Database(settings) as app[DATABASE_KEY]:
            yield

    app.cleanup_ctx.append(database)
    app.add_routes(
        [
            web.get("/api/message", message),
            web.get("/healthz", server.alive),
            web.get("/readyz", ready),
            web.get("/metrics", metrics.metrics),
        ]
    )
    return app


# ---- the command line ------------------------------------------------------------------------------------------


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
        application,
        max_files=MAX_FILES,
        actions={"--apply-schema": (apply_schema, "apply schema.sql to the database, and exit")},
    )
