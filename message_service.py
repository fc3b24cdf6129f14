"""Service 2, the message service: answers `/api/message` with the string stored in PostgreSQL.

Rules kept here: whatever state the database is in, no request takes longer than `DB_TIMEOUT`, and no failure outlasts
its cause; nothing blocks the event loop; the password is read for each new connection, and appears nowhere; a pooler
may give each statement another backend.
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
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Self

import psycopg2
from aiohttp import web
from psycopg2.extensions import make_dsn

import lifecycle
import logs
import metrics
import responses
import schema
import server
import settings
import threads
from coalescing import Coalescer, RunTimeoutError
from connections import FAILURES, Row, Slot
from responses import DATABASE, Problem, Representation, RepresentationResponse
from settings import setting

QUERY = "SELECT content FROM messages ORDER BY id LIMIT 1"
PATIENCE = 0.05  # seconds without an answer after which the query is sent once more, on another connection
READINESS_REUSE = 1.0  # seconds that the database's last answer counts for `/readyz`
MAX_FILES = 1024  # open files: aiopg calls select(), which fails for a socket whose number is higher
SSL_MODES = settings.one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@dataclasses.dataclass(frozen=True)
class Settings(lifecycle.CommonSettings):
    port: int = setting(8001, settings.PORT, "port to listen on")
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

    def dsn(self) -> str:
        """libpq's connection string, without the address and the password, which each new connection looks up."""
        dsn: str = make_dsn(
            host=self.db_host,
            port=self.db_port,
            dbname=self.db_name,
            user=self.db_user,
            sslmode=self.db_sslmode,
            sslrootcert=self.db_sslrootcert,
            gssencmode="disable",  # or it would be tried first, on a socket of its own
            application_name=f"message_service/{server.VERSION}",
            client_encoding="UTF8",
            connect_timeout=max(2, math.ceil(self.db_timeout)),  # for `--apply-schema`; 2 is the minimum
            # The kernel gives up on a host that acknowledges nothing, soon after TCP has repeated its SYN once.
            # Otherwise all connections can wait for a host that is gone, or for TCP's ever rarer repeats.
            tcp_user_timeout=1500,  # milliseconds
            keepalives_idle=1,  # seconds
            keepalives_interval=1,
        )
        return dsn

    def password(self) -> str:
        """The current password, "" if there is none. Raises `OSError`, which repeats nothing of it."""
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


class Database:
    """The database: a context that holds at most `DB_POOL_SIZE` connections, and the coalesced query."""

    def __init__(self, settings: Settings) -> None:
        connecting = settings.dsn(), settings.password, settings.db_timeout, threads.Resolver()
        self._slots = [Slot(*connecting) for _ in range(settings.db_pool_size)]
        self._idle = deque(self._slots)  # connected ones on the right, and taken from there
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
        self._checked_at = -math.inf  # when the database last answered or failed, in the event loop's time
        self._failure: Problem | None = None  # None if it answered

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
        """The message as this service sends it, from a query that starts after this call. Raises `Problem`."""
        try:
            message = await self._shared_query()
        except RunTimeoutError as error:
            self._dependency.failed(problem := self._remember(error))
            raise problem from error
        except Problem as problem:
            self._dependency.reached_client(problem)
            raise problem.copy() from problem.__cause__
        if message is None:
            raise responses.no_message()
        return message

    async def fetch(self, statement: str, *args: object, once: bool = False) -> list[Row]:
        """Return the rows that a statement yields, with `args` for its `%s`, within `DB_TIMEOUT` seconds.

        A statement that changes something must not run twice: pass `once`. Raises `Problem`, and
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
        content = rows[0][0]
        if not isinstance(content, str):
            cause = f"content is a {type(content).__name__}"
            raise responses.unavailable(DATABASE, "The database holds no text.", cause)
        timing = (
            f"service;dur={(time.perf_counter() - started) * 1000:.2f}, "
            f'database;dur={(queried - started) * 1000:.2f};desc="{self._name}-{next(self._queries)}"'
        )
        return responses.json_representation("message", content, {"Server-Timing": timing})

    async def _fetch(self, statement: str, args: tuple[object, ...] = (), *, once: bool = False) -> list[Row]:
        """Fetch on the first free connection, with no time limit. Raises what `fetch` raises."""
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
        """Remember a failure of the database for `check`, and return the problem that a client gets."""
        problem = to_problem(error)
        self._checked_at = asyncio.get_running_loop().time()
        self._failure = problem
        return problem


def to_problem(error: Exception) -> Problem:
    """The problem that a client gets when the database fails."""
    cause = logs.describe(error)
    if isinstance(error, TimeoutError) or os.strerror(errno.ETIMEDOUT) in cause:  # the kernel's, reported by libpq
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
    """End a connection after a 5xx, so that the client's next call can reach another replica: Kubernetes balances
    connections, not requests.

    This is for clients that are services. The gateway keeps its connections: an outage must not cost each browser a new
    one, which would not lead elsewhere behind a load balancer.
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
    return schema.apply(settings.dsn(), owner, reader)


if __name__ == "__main__":
    # libpq would read from them what the settings leave to its defaults, such as PGOPTIONS or PGTARGETSESSIONATTRS.
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
