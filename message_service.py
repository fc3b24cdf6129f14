"""Service 2, the message service: answers `/api/message` with the string stored in PostgreSQL.

Rules kept here: a database that is away, slow or changed never takes longer than `DB_TIMEOUT` and heals by itself;
nothing blocks the event loop; the password is read for each new connection, and appears nowhere; a pooler between
this service and PostgreSQL may give each statement another backend.
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
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import aiopg
import psycopg2
from aiohttp import web
from psycopg2.extensions import STATUS_READY, QueryCanceledError, make_dsn
from psycopg2.extensions import connection as psycopg2_connection

import lifecycle
import logs
import metrics
import responses
import schema
import server
import settings
import threads
from coalescing import Coalescer, RunTimeoutError
from responses import DATABASE, Problem, Representation, RepresentationResponse
from settings import setting

QUERY = "SELECT content FROM messages ORDER BY id LIMIT 1"
PATIENCE = 0.05  # seconds without an answer after which the query is sent once more, on another connection
READINESS_REUSE = 1.0  # seconds that the database's last answer counts for `/readyz`
CLIENT_CHECK_INTERVAL = 0.1  # seconds in which PostgreSQL sees that nobody waits for a query any more, and ends it
MAX_FILES = 1024  # open files: aiopg calls select(), which fails for a socket whose number is higher
FAILURES = (psycopg2.Error, OSError, RuntimeError)  # by family: psycopg2's codes are missing where it matters
SSL_MODES = settings.one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# What to do in place of libpq's second try: connect as it would have, and if that fails, too, find out why the first did.
SECOND_TRIES = {"prefer": ("disable", "require"), "allow": ("require", "disable")}

Row = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Settings(lifecycle.CommonSettings):
    port: int = setting(8001, settings.PORT, "where to listen")
    db_host: str = setting("localhost", settings.HOST, "PostgreSQL's name or address; /… is a socket folder")
    db_port: int = setting(5432, settings.PEER_PORT, "PostgreSQL's port")
    db_name: str = setting("mydb", settings.TEXT, "database")
    db_user: str = setting("postgres", settings.TEXT, "role")
    db_password: str | None = setting(None, settings.TEXT, "its password, or", secret=True, shown="none")
    db_password_file: str | None = setting(
        None, settings.READABLE_FILE, "file with its password, read for each new connection", shown="none"
    )
    db_sslmode: str = setting("prefer", SSL_MODES, "TLS to the database")
    db_sslrootcert: str | None = setting(
        None, settings.READABLE_FILE, "certificates that the database's is checked against", shown="libpq's own"
    )
    db_pool_size: int = setting(4, settings.whole_number(1, 100), "connections")
    db_timeout: float = setting(2.0, settings.seconds(), "for connecting plus query")
    db_owner: str | None = setting(None, settings.TEXT, "role that --apply-schema uses", shown="DB_USER")
    db_owner_password: str | None = setting(None, settings.TEXT, "its password", secret=True, shown="none")

    def __post_init__(self) -> None:
        if self.db_password and self.db_password_file:
            raise settings.SettingsError(["DB_PASSWORD_FILE: expected only one of it and DB_PASSWORD"])

    def dsn(self, **more: Any) -> str:
        """libpq's connection string, without what each new connection gets anew."""
        dsn: str = make_dsn(
            host=self.db_host,
            port=self.db_port,
            dbname=self.db_name,
            sslrootcert=self.db_sslrootcert,
            application_name=f"message_service/{server.VERSION}",
            client_encoding="UTF8",
            **more,
        )
        return dsn

    def password(self) -> str:
        """The password as it is now, "" if there is none. Raises `OSError`, which holds nothing of it."""
        if not self.db_password_file:
            return self.db_password or ""
        try:
            password = Path(self.db_password_file).read_text("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise OSError("DB_PASSWORD_FILE holds no UTF-8 text") from None
        if "\0" in password:
            raise OSError("DB_PASSWORD_FILE holds a NUL character")
        return password


# ---- the database ----------------------------------------------------------------------------------------------


class SocketChangedError(psycopg2.OperationalError):  # type: ignore[misc]  # psycopg2 has no types
    """libpq goes on connecting on another socket."""


class Connection(psycopg2_connection):  # type: ignore[misc]
    """What psycopg2 makes for aiopg: it fails where aiopg would wait for ever, or leave a request without an answer."""

    _inode: int | None = None  # of its socket

    def poll(self) -> int:
        try:
            state: int = super().poll()
        except QueryCanceledError as error:  # aiopg would raise CancelledError, as if the client had left
            raise psycopg2.OperationalError(str(error)) from None
        if self.status != STATUS_READY:
            watched, self._inode = self._inode, os.fstat(self.fileno()).st_ino
            if watched not in (None, self._inode):  # aiopg would go on watching the other one
                raise SocketChangedError("libpq went on on another socket")
        return state


class Slot:
    """One connection to the database, made when it is needed and kept while it is good: an aiopg pool of one.

    One for each, since aiopg holds a pool's lock while it connects: in a pool of several, one slow connect would
    hold up all others.
    """

    def __init__(self, settings: Settings, resolver: threads.Resolver) -> None:
        self._settings = settings
        self._resolver = resolver
        self._pool: aiopg.Pool
        self._connect_with: dict[str, Any] = {}
        self._connection: aiopg.Connection | None = None
        self._cursor: aiopg.Cursor
        self._owns_backend = False  # whether each statement meets the same backend, and nobody else's do
        self._prepared: dict[str, str] = {}  # statements that the backend has prepared, and their names

    async def open(self) -> None:
        """Prepare; this connects to nothing yet."""
        self._pool = await aiopg.create_pool(
            self._settings.dsn(
                user=self._settings.db_user,
                # The kernel gives up a host that acknowledges nothing, a little later than TCP first repeats a SYN.
                # Otherwise all connections can wait for a host that is gone, or for TCP's ever rarer repeats.
                tcp_user_timeout=1500,  # milliseconds
                keepalives_idle=1,  # seconds
                keepalives_interval=1,
                gssencmode="disable",  # one try less that would need another socket
            ),
            minsize=0,
            maxsize=1,
            timeout=None,  # type: ignore[arg-type]  # a query ends when nobody waits for it any more, see `coalescing`
            enable_json=False,
            enable_hstore=False,
            enable_uuid=False,
            connection_factory=lambda dsn, async_: Connection(make_dsn(dsn, **self._connect_with), async_),
        )

    def close(self) -> None:
        self._pool.terminate()  # not `wait_closed`, which waits for ever for a connection that is being made

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.closed

    async def fetch(self, statement: str, args: tuple[object, ...] = (), *, once: bool = False) -> list[Row]:
        """Return the rows that a statement yields, on a new connection where there is none or the old one is no good.

        The statement may run twice, unless it is to run `once`. Raises `psycopg2.Error`, `OSError` or (aiopg's own)
        `RuntimeError`.
        """
        if once:
            await self.fetch("SELECT 1")  # finds out whether the connection is still good
        if self.connected:
            try:
                return await self._execute(statement, args)
            except FAILURES:
                # The connection died while idle, or the statement was prepared for a table that has changed since.
                if once or (self.connected and statement not in self._prepared):
                    raise
        await self._connect()
        return await self._execute(statement, args)

    async def _execute(self, statement: str, args: tuple[object, ...]) -> list[Row]:
        cursor = self._cursor
        try:
            if args or not self._owns_backend:
                await cursor.execute(statement, args or None)
            else:
                await self._execute_prepared(statement)
        except asyncio.CancelledError:
            # aiopg has closed the connection. This slot is taken until the server has noticed, lest the database work
            # on more queries than there are slots.
            await asyncio.sleep(CLIENT_CHECK_INTERVAL)
            raise
        return await cursor.fetchall() if cursor.description else []

    async def _execute_prepared(self, statement: str) -> None:
        """Planning takes a third of the time of a query as small as ours, so it is done once for each connection."""
        name = self._prepared.get(statement)
        if name is None:  # so late, since it needs the table
            # Named by its text, so that no other statement can ever be executed in its place.
            name = f"messages_{hashlib.sha256(statement.encode()).hexdigest()[:16]}"
            await self._cursor.execute(f"PREPARE {name} AS {statement}")
            self._prepared[statement] = name
        await self._cursor.execute(f"EXECUTE {name}")
        if not self._cursor.rowcount:
            # EXECUTE's snapshot is older than its lock: when it had to wait for a table that was rewritten or made
            # again, it sees none of the rows. A plain statement's snapshot is taken after the lock.
            await self._cursor.execute(statement)

    async def _connect(self) -> None:
        """Look up the address and the password, since both may have changed, and try one address after the other.

        libpq itself would do all that in the event loop, and try the addresses on sockets that aiopg does not watch.
        """
        password = await threads.call(self._settings.password)
        addresses = await self._addresses()
        for address in addresses:
            try:
                async with asyncio.timeout(self._settings.db_timeout / len(addresses)):
                    return await self._connect_to(hostaddr=address, password=password)
            except FAILURES:
                self._drop()
                metrics.CONNECT_FAILURES.inc()
                if address == addresses[-1]:
                    raise

    async def _addresses(self) -> list[str | None]:
        host = self._settings.db_host
        if host.startswith("/"):
            return [None]  # a socket folder has none
        try:
            found = await self._resolver.resolve(host, self._settings.db_port)
        except OSError as error:
            raise OSError(f"could not look up {host}: {error.strerror}") from error
        return [address["host"] for address in found]

    async def _connect_to(self, **target: str | None) -> None:
        """Connect as libpq would. What it does on a second socket, with or without TLS, is a connection of its own."""
        mode = self._settings.db_sslmode
        try:
            return await self._acquire(**target, sslmode=mode)
        except SocketChangedError:
            causes: list[str] = []
        for sslmode in SECOND_TRIES.get(mode, (mode,)):
            try:
                return await self._acquire(**target, sslmode=sslmode)
            except psycopg2.OperationalError as error:
                causes.insert(0, str(error).strip())
        raise psycopg2.OperationalError("; ".join(dict.fromkeys(causes)))

    async def _acquire(self, **connect_with: str | None) -> None:
        self._drop()
        self._connect_with = connect_with
        self._connection = await self._pool.acquire()
        self._cursor = await self._connection.cursor()
        # A pooler has told another number, and may hand on its backends with all that is set and prepared there. Where
        # the backend is this connection's own, it ends what nobody here waits for any more; clearly later than here,
        # where the time limit is the better answer.
        await self._cursor.execute(
            "SELECT set_config('statement_timeout', %s, false), set_config('client_connection_check_interval', %s, false)"
            " WHERE pg_backend_pid() = %s",
            (
                f"{self._settings.db_timeout + 1}s",
                f"{CLIENT_CHECK_INTERVAL}s",
                self._connection.raw.get_backend_pid(),
            ),
        )
        self._owns_backend = self._cursor.rowcount == 1

    def _drop(self) -> None:
        self._prepared.clear()
        self._owns_backend = False
        if self._connection:
            if not self._connection.closed:  # aiopg would stop watching a socket that others may have got since
                self._connection.close()
            self._pool.release(self._connection)
            self._connection = None


class Database:
    """The database as the message service sees it: a context that holds at most `DB_POOL_SIZE` connections, and the
    coalesced query.
    """

    def __init__(self, settings: Settings) -> None:
        resolver = threads.Resolver()
        self._slots = [Slot(settings, resolver) for _ in range(settings.db_pool_size)]
        self._idle = deque(self._slots)  # connected ones at the right, where they are taken from
        self._free = asyncio.Semaphore(len(self._slots))
        self._timeout = settings.db_timeout
        self._dependency = metrics.Dependency("the database")
        self._shared_query = Coalescer(
            self._query_message,
            limit=settings.db_pool_size,
            timeout=settings.db_timeout,
            patience=PATIENCE,
            observe=self._dependency.observe_run,
        )
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
            slot.close()

    async def message(self) -> Representation:
        """What the message service answers, from a query that starts after this call. Raises `Problem`."""
        try:
            message = await self._shared_query()
        except RunTimeoutError as error:
            self._dependency.failed(problem := self._remember(error))
            raise problem from error
        except Problem as problem:
            raise problem.copy() from problem.__cause__
        if message is None:
            raise responses.no_message()
        return message

    async def fetch(self, statement: str, *args: object, once: bool = False) -> list[Row]:
        """Return the rows that a statement yields, with `args` for its `%s`, in `DB_TIMEOUT` seconds.

        A statement that changes something has to run at most `once`; others may run twice. Raises `Problem`, and
        `psycopg2.DataError` or `psycopg2.IntegrityError` for values that PostgreSQL or the table refuses.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await self._fetch(statement, args, once=once)
        except TimeoutError as error:
            self._dependency.failed(problem := self._remember(error))
            raise problem from error
        except Problem as problem:
            self._dependency.failed(problem)
            raise

    async def check(self) -> None:
        """Raise `Problem` unless the database answers, or did so in the last `READINESS_REUSE` seconds."""
        if asyncio.get_running_loop().time() - self._checked_at > READINESS_REUSE:
            with contextlib.suppress(Problem):  # an empty table is fine; failures are remembered
                await self.message()
        if self._failure:
            raise responses.not_ready(self._failure.detail, self._failure.cause)

    async def _query_message(self) -> Representation | None:
        started = time.perf_counter()
        rows = await self._fetch(QUERY)
        queried = time.perf_counter()
        if not rows:
            return None
        content = text_of(rows[0])
        timing = (
            f"service;dur={(time.perf_counter() - started) * 1000:.2f}, "
            f'database;dur={(queried - started) * 1000:.2f};desc="{self._name}-{next(self._queries)}"'
        )
        return responses.json_representation("message", content, {"Server-Timing": timing})

    async def _fetch(self, statement: str, args: tuple[object, ...] = (), *, once: bool = False) -> list[Row]:
        """Fetch on a connection as soon as one is free. Raises as `fetch`, but knows no time limit."""
        async with self._free:
            slot = self._idle.pop()
            try:
                rows = await slot.fetch(statement, args, once=once)
            except (psycopg2.DataError, psycopg2.IntegrityError):
                raise
            except FAILURES as error:
                raise self._remember(error) from error
            finally:
                if slot.connected:
                    self._idle.append(slot)
                else:
                    self._idle.appendleft(slot)
        self._checked_at = asyncio.get_running_loop().time()
        self._failure = None
        return rows

    def _remember(self, error: Exception) -> Problem:
        """Remember a failure of the database for `check`, and return what a client sees of it."""
        problem = to_problem(error)
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
    cause = logs.describe(error)
    if isinstance(error, TimeoutError) or os.strerror(errno.ETIMEDOUT) in cause:  # the kernel's, told by libpq
        return responses.timed_out(DATABASE, "The database did not answer in time.", cause)
    return responses.unavailable(DATABASE, "The database is not available.", cause)


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


async def end_failed_connection(_request: web.Request, response: web.StreamResponse) -> None:
    """Let the next call of a service that was told 5xx reach another replica, since Kubernetes balances connections.

    Here, where the clients are services. A gateway keeps its browsers' connections: an outage must not cost each of
    them a new one, and behind a load balancer it would not lead elsewhere.
    """
    if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        responses.end_connection(response)


def application(settings: Settings) -> web.Application:
    app = web.Application()

    async def database(app: web.Application) -> AsyncIterator[None]:
        async with Database(settings) as app[DATABASE_KEY]:
            yield

    app.cleanup_ctx.append(database)
    app.on_response_prepare.append(end_failed_connection)
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


def apply_schema(settings: Settings) -> str:
    """What `--apply-schema` does: see `schema`. Raises `psycopg2.Error` or `OSError`."""
    reader = schema.Login(settings.db_user, settings.password())
    owner = schema.Login(settings.db_owner, settings.db_owner_password or "") if settings.db_owner else reader
    connect_timeout = max(2, math.ceil(settings.db_timeout))  # libpq takes whole seconds, 2 at least
    return schema.apply(settings.dsn(sslmode=settings.db_sslmode, connect_timeout=connect_timeout), owner, reader)


if __name__ == "__main__":
    # libpq would take from them what the settings leave to its defaults, such as PGOPTIONS or PGTARGETSESSIONATTRS.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    lifecycle.main(
        "message_service",
        "Answers /api/message with the string stored in PostgreSQL.",
        Settings,
        application,
        max_files=MAX_FILES,
        actions={"--apply-schema": (apply_schema, "apply schema.sql to the database, and exit")},
    )
