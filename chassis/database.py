"""PostgreSQL through aiopg: connections, reads that are shared, reads that are not, and transactions.

Rules kept here: whatever state the database is in, nothing takes longer than `DB_TIMEOUT`, and no failure outlasts its
cause; nothing blocks the event loop; address and password are read for each new connection, since both may have
changed, and the password appears nowhere; a pooler may give one backend to several clients, so nothing is set or
prepared on a backend that is not this connection's own; a read may be tried again, a transaction never, and only its
COMMIT can have an unknown outcome. Tests: tests/chassis/test_database.py.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import aiopg
import psycopg2
from psycopg2.extensions import QueryCanceledError, TransactionRollbackError, make_dsn
from psycopg2.extensions import connection as psycopg2_connection

from chassis import logs, metrics, settings, threads
from chassis.coalescing import Coalescer
from chassis.responses import Problem, invalid, problem_of_failure
from chassis.settings import setting

PART = "database"
PATIENCE = 0.05  # seconds without an answer after which a read is tried once more, on another connection
CONNECTING = 0.9  # of `DB_TIMEOUT`, for connecting: less than a caller's time, so that a failure is seen as such
CLIENT_CHECK_INTERVAL = 0.1  # seconds in which PostgreSQL notices that nobody waits for a query any more, and ends it
TCP_USER_TIMEOUT = 1.5  # seconds after which the kernel gives up on a host that acknowledges nothing
MAX_RESULT = 1024 * 1024  # characters and bytes of a result: no more than another service reads of an answer
MAX_PREPARED = 100  # statements that a connection prepares: more than an application has, unless it makes them up
SELECT_LIMIT = 1024  # open files of the process: aiopg calls select(), which fails for a socket whose number is higher
FAILURES = (psycopg2.Error, OSError, RuntimeError, ValueError, OverflowError)  # the last two: values no type can hold
REFUSED = (psycopg2.DataError, psycopg2.IntegrityError)  # values that PostgreSQL or a table refuses
OUTDATED = {"0A000", "26000"}  # SQLSTATE: a table has changed since the statement was prepared; it was deallocated
# Sets up the session if the backend is its own. A pooler makes up the number that a client gets at login.
SET_UP = "SELECT {} WHERE pg_backend_pid() = %(pid)s"
LIMITS = "set_config('statement_timeout', %(limit)s, false), set_config('default_transaction_read_only', 'on', false)"
CHECK = ", set_config('client_connection_check_interval', %(interval)s, false)"  # only where the system can do it
# If this host or the network is gone, PostgreSQL notices after hours, and the locks of a transaction stay until then.
BEGIN = "BEGIN READ WRITE; SET LOCAL idle_in_transaction_session_timeout = %s"
# What libpq does in one connection, on another socket, which aiopg would not watch, becomes a connection of its own.
MODES = {"prefer": ("require", "disable"), "allow": ("disable", "require")}

_SSL_MODES = settings.one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

T = TypeVar("T")
Row = tuple[Any, ...]


class Rows(list[Row]):
    """The rows that a statement yielded. `timing` is a `Server-Timing` field for the answer made of them."""

    timing: dict[str, str]


Read = Callable[[Rows], T]
"""Makes something of rows. Raises `ValueError` or the like for what cannot be sent, or `Problem`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a server that has a database."""

    db_host: str = setting("localhost", settings.HOST, "PostgreSQL's name or address, or its socket's folder")
    db_port: int = setting(5432, settings.PEER_PORT, "PostgreSQL's port")
    db_name: str = setting("postgres", settings.TEXT, "database")
    db_user: str = setting("postgres", settings.TEXT, "role")
    db_password: str | None = setting(None, settings.TEXT, "its password, or", secret=True, shown="none")
    db_password_file: str | None = setting(
        None, settings.READABLE_FILE, "file with its password, read for each new connection", shown="none"
    )
    db_sslmode: str = setting("prefer", _SSL_MODES, "TLS to the database")
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

    def dsn(self, application_name: str) -> str:
        """libpq's connection string, without the address and the password, which each new connection looks up."""
        # libpq would read from them what is left to its defaults, such as PGOPTIONS or PGTARGETSESSIONATTRS.
        for variable in [name for name in os.environ if name.startswith("PG")]:
            del os.environ[variable]
        dsn: str = make_dsn(
            host=self.db_host,
            port=self.db_port,
            dbname=self.db_name,
            user=self.db_user,
            sslmode=self.db_sslmode,
            sslrootcert=self.db_sslrootcert,
            gssencmode="disable",  # or it would be tried first, on a socket of its own
            application_name=application_name,
            client_encoding="UTF8",
            connect_timeout=max(2, math.ceil(self.db_timeout)),  # for `--apply-schema`; 2 is the minimum
            # Otherwise all connections can wait for a host that is gone, or for TCP's ever rarer repeats. A SYN is
            # first repeated after one second.
            tcp_user_timeout=round(TCP_USER_TIMEOUT * 1000),  # milliseconds
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
    """The database: a context that holds at most `DB_POOL_SIZE` connections. `name` is what PostgreSQL calls them."""

    def __init__(self, options: Settings, name: str) -> None:
        self._slots = [Slot(options, name) for _ in range(options.db_pool_size)]
        self._idle = deque(self._slots)  # connected ones on the right, and taken from there
        self._timeout = options.db_timeout
        self._dependency = metrics.Dependency(PART)
        self._coalescer = Coalescer(
            limit=options.db_pool_size,  # so that no run waits for a connection
            timeout=options.db_timeout,
            patience=PATIENCE,
            is_failure=lambda error: not isinstance(error, Problem) or error.part == PART,
            observe=self._dependency.observe_run,
        )
        self._name = secrets.token_hex(3)
        self._queries = itertools.count(1)

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

    def shared(self, statement: str, *args: object, read: Read[T]) -> Awaitable[T]:
        """Return what `read` makes of the rows that a statement yields, from a query that starts after this call.

        `args` stand for the statement's `%s`. Calls with the same statement, arguments and `read` share queries (see
        `coalescing`). Raises `Problem`.
        """
        return self._read((statement, args, read), statement, args, read)

    def fetch(self, statement: str, *args: object, read: Read[T]) -> Awaitable[T]:
        """The same, from a query of this call's own. The statement must change nothing: it may be tried again."""
        return self._read(object(), statement, args, read)

    async def _read(self, key: object, statement: str, args: tuple[object, ...], read: Read[T]) -> T:
        async def run() -> T:
            started = time.perf_counter()
            slot = self._idle.pop()
            try:
                rows = Rows(await slot.fetch(statement, args))
                now = time.perf_counter()
                service, database = (now - started) * 1000, (now - slot.sent_at) * 1000
                query = f"{self._name}-{next(self._queries)}"
                timing = f'service;dur={service:.2f}, database;dur={database:.2f};desc="{query}"'
                rows.timing = {"Server-Timing": timing}
                return read(rows)
            except asyncio.CancelledError:
                await asyncio.sleep(CLIENT_CHECK_INTERVAL)  # until then, the server may still work on the query
                raise
            except FAILURES as error:
                raise problem_of_failure(PART, error) from error
            finally:
                self._put_back(slot)

        try:
            return await self._coalescer(key, run, statement)
        except TimeoutError as error:
            raise problem_of_failure(PART, error) from error
        except Problem as problem:
            raise problem.copy() from problem.__cause__

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator["Transaction"]:
        """A transaction on one connection, within `DB_TIMEOUT` seconds: `async with database.transaction() as t`.

        It is committed when the block ends, and rolled back when the block raises, or is cancelled because the client
        has left. Nothing in it is tried again. Raises `Problem`: `outcome-unknown` if there was no answer to the
        COMMIT; otherwise nothing was changed.
        """
        kind, committing = "transaction", False
        try:
            async with asyncio.timeout(self._timeout):
                await self._coalescer.turn(kind)
                slot = self._idle.pop()
                try:
                    await slot.fetch(BEGIN, (f"{self._timeout + 1}s",), prepare=False)
                    yield Transaction(slot)
                    committing = True
                    if await slot.execute("COMMIT") != "COMMIT":
                        raise RuntimeError("a statement had failed, so that PostgreSQL rolled back instead")
                except BaseException as error:
                    await slot.roll_back(abandon=not isinstance(error, Exception))
                    raise
                finally:
                    self._put_back(slot)
                    # Until then, the server may still work on a statement of a connection that was given up.
                    delay = 0 if slot.connected else CLIENT_CHECK_INTERVAL
                    asyncio.get_running_loop().call_later(delay, self._coalescer.end_turn, kind)
        except (psycopg2.Error, OSError) as error:
            if isinstance(error, REFUSED):
                raise
            unknown = committing and not isinstance(error, TransactionRollbackError)
            problem = problem_of_failure(PART, error, outcome_unknown=unknown, is_write=True)
            self._dependency.failed(kind, problem.kind)
            raise problem from error
        self._dependency.answered(kind)

    def _put_back(self, slot: "Slot") -> None:
        if slot.connected:
            self._idle.append(slot)
        else:
            self._idle.appendleft(slot)


class Transaction:
    """What is done in one transaction."""

    def __init__(self, slot: "Slot") -> None:
        self._slot = slot

    async def execute(self, statement: str, *args: object) -> list[Row]:
        """Return the rows that a statement yields, with `args` for its `%s`.

        Raises `psycopg2.DataError` and `psycopg2.IntegrityError` for values that PostgreSQL or a table refuses.
        """
        await self._slot.execute(statement, args)
        return await self._slot.rows()


# ---- connections -----------------------------------------------------------------------------------------------


class Connection(psycopg2_connection):  # type: ignore[misc]  # psycopg2 has no types
    """The psycopg2 connection that aiopg drives. It fails where aiopg would hang, or call it again and again."""

    def poll(self) -> int:
        """Raises `psycopg2.Error`, whatever happens; the connection is closed unless a statement alone has failed."""
        socket, loop = self.fileno(), asyncio.get_running_loop()
        try:
            state: int = super().poll()
        except Exception as error:
            # libpq may have closed its socket: the event loop would go on watching what is another one's number next.
            loop.remove_writer(socket)
            if isinstance(error, QueryCanceledError):  # aiopg would raise CancelledError, as if the client had left
                raise psycopg2.OperationalError(str(error)) from None
            if isinstance(error, psycopg2.Error) and error.pgcode and not self.closed:
                raise
            loop.remove_reader(socket)
            self.close()
            if isinstance(error, psycopg2.Error):
                raise
            # Before it knows the client's encoding, the server writes in its own.
            text = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
            raise psycopg2.OperationalError(text) from None
        return state


class Slot:
    """One connection, kept while it works: an aiopg pool of one.

    aiopg holds a pool's lock while it connects. In a pool of several, one slow connect would hold up all the others.
    """

    def __init__(self, options: Settings, name: str) -> None:
        self._options = options
        self._dsn = options.dsn(name)
        self._resolver = threads.Resolver()
        self._pool: aiopg.Pool
        self._connect_with: dict[str, str | None] = {}
        self._connection: aiopg.Connection | None = None
        self._cursor: aiopg.Cursor
        self._owns_backend = False  # whether each statement meets the same backend, and nobody else's do
        self._prepared: dict[str, str] = {}  # statements that the backend has prepared, and their names
        self._names = itertools.count()
        self.sent_at = 0.0  # when a statement was last sent, by `time.perf_counter`

    async def open(self) -> None:
        """Prepare; this connects to nothing yet."""
        self._pool = await aiopg.create_pool(
            self._dsn,
            minsize=0,
            maxsize=1,
            timeout=None,  # type: ignore[arg-type]  # queries end when nobody waits for them, see `coalescing`
            enable_hstore=False,  # which would query its types
            connection_factory=lambda dsn, async_: Connection(make_dsn(dsn, **self._connect_with), async_),
        )

    def close(self) -> None:
        self._pool.terminate()  # `wait_closed` would wait for ever for a connection that is being made

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.closed

    async def fetch(self, statement: str, args: tuple[object, ...] = (), *, prepare: bool = True) -> list[Row]:
        """Return the rows that a statement yields, on a new connection if there is none or the old one has ended.

        The statement may run twice. Raises `FAILURES`.
        """
        if self.connected:
            try:
                return await self._fetch(statement, args, prepare=prepare)
            except FAILURES:
                if self.connected:  # the statement failed, not the connection, which may have died while idle
                    raise
        await self._connect()
        return await self._fetch(statement, args, prepare=prepare)

    async def _fetch(self, statement: str, args: tuple[object, ...], *, prepare: bool) -> list[Row]:
        if not (prepare and self._owns_backend and await self._execute_prepared(statement, args)):
            await self.execute(statement, args)
        return await self.rows()

    async def execute(self, statement: str, args: tuple[object, ...] = ()) -> str:
        """Run a statement once; return its command tag. Raises `FAILURES`, and `Problem` for an impossible argument."""
        self.sent_at = time.perf_counter()
        try:
            await self._cursor.execute(statement, args or None)
        except ValueError as error:  # such as a NUL character: nothing was sent
            raise invalid(f"A value cannot be stored: {logs.describe(error)}.") from error
        except psycopg2.Error as error:
            if not self.connected and time.perf_counter() - self.sent_at > TCP_USER_TIMEOUT:
                raise TimeoutError(logs.describe(error)) from error
            raise
        tag: str = self._cursor.raw.statusmessage
        return tag

    async def rows(self) -> list[Row]:
        """The last statement's rows. Raises `ValueError` or `OverflowError` for a value that Python cannot hold."""
        rows: list[Row] = await self._cursor.fetchall() if self._cursor.description else []
        if sum(len(value) for row in rows for value in row if isinstance(value, str | bytes | memoryview)) > MAX_RESULT:
            rows.clear()  # which the error's traceback would keep
            self._cursor.close()
            self._drop()  # libpq keeps the memory for a result as long as its connection
            raise problem_of_failure(PART, ValueError(f"a result has more than {MAX_RESULT} characters"))
        return rows

    async def _execute_prepared(self, statement: str, args: tuple[object, ...]) -> bool:
        """Planning takes a third of so small a query's time, so each connection does it once.

        Returns whether the result is the statement's.
        """
        name = self._prepared.get(statement)
        if name is None:  # not when connecting, since it needs the table
            if len(self._prepared) >= MAX_PREPARED:
                return False
            # Named after its text, so that no other statement can ever be executed in its place.
            name = f"s{next(self._names)}_{hashlib.sha256(statement.encode()).hexdigest()[:16]}"
            numbers = map("${}".format, itertools.count(1))
            text = re.sub("%[s%]", lambda found: next(numbers) if found[0] == "%s" else "%", statement)
            await self.execute(f"PREPARE {name} AS {text if args else statement}")
            self._prepared[statement] = name
        try:
            await self.execute(f"EXECUTE {name}({', '.join(['%s'] * len(args))})" if args else f"EXECUTE {name}", args)
        except psycopg2.Error as error:
            if error.pgcode not in OUTDATED:
                raise
            del self._prepared[statement]
            return False
        # EXECUTE takes its snapshot before its lock: if it had to wait while the table was rewritten or replaced, it
        # sees no rows. A plain statement takes its snapshot after the lock.
        return bool(self._cursor.rowcount)

    async def roll_back(self, *, abandon: bool) -> None:
        """End a transaction that has failed; with its connection if it is to be abandoned, or does not answer."""
        try:
            if not abandon and self.connected:
                await self.execute("ROLLBACK")
                return
        except FAILURES:
            pass
        self._drop()

    # ---- connecting --------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Raises `TimeoutError` or another of `FAILURES`, which counts as one failure, whatever the addresses were."""
        try:
            await self._connect_to_any()
        except BaseException as error:
            self._drop()
            if isinstance(error, Exception):  # not if it was no longer needed, since another run had an answer first
                metrics.CONNECT_FAILURES.inc()
            raise

    async def _connect_to_any(self) -> None:
        """Try one address after another. libpq's own loop blocks for the look-up, and limits no single try."""
        loop, causes, late = asyncio.get_running_loop(), [], False
        started = loop.time()
        deadline = started + self._options.db_timeout * CONNECTING
        async with asyncio.timeout_at(deadline):
            password = await threads.call(self._options.password)
            addresses = await self._addresses()
        for number, address in enumerate(addresses):
            now = loop.time()
            try:
                async with asyncio.timeout_at(now + (deadline - now) / (len(addresses) - number)):
                    return await self._connect_to(address, password)
            except FAILURES as error:
                causes.append(str(error).strip() or "no answer in time")
                late = isinstance(error, TimeoutError) or loop.time() - started > TCP_USER_TIMEOUT
        raise (TimeoutError if late else psycopg2.OperationalError)("; ".join(causes))

    async def _addresses(self) -> list[str | None]:
        host = self._options.db_host
        if host.startswith("/"):
            return [None]  # a socket's folder has none
        try:
            found = await self._resolver.resolve(host, self._options.db_port)
        except OSError as error:
            raise OSError(f"could not look up {host}: {error.strerror}") from error
        return [address["host"] for address in found]

    async def _connect_to(self, address: str | None, password: str) -> None:
        """Connect with or without TLS, as DB_SSLMODE says, each try on a connection of its own."""
        mode, causes = self._options.db_sslmode, []
        for sslmode in MODES.get(mode, (mode,)) if address else ("disable",):
            self._drop()
            self._connect_with = {"hostaddr": address, "password": password, "sslmode": sslmode}
            try:
                self._connection = await self._pool.acquire()
                return await self._set_up()
            except psycopg2.OperationalError as error:
                causes.append(str(error).strip())
        raise psycopg2.OperationalError("; ".join(dict.fromkeys(causes)))

    async def _set_up(self) -> None:
        assert self._connection  # noqa: S101  # just made
        self._cursor = await self._connection.cursor()
        values = {
            "limit": f"{self._options.db_timeout + 1}s",  # later than this service's own, whose error is clearer
            "interval": f"{CLIENT_CHECK_INTERVAL}s",
            "pid": self._connection.raw.get_backend_pid(),
        }
        try:
            await self._cursor.execute(SET_UP.format(LIMITS + CHECK), values)
        except (psycopg2.DataError, psycopg2.ProgrammingError):
            await self._cursor.execute(SET_UP.format(LIMITS), values)
        self._owns_backend = self._cursor.rowcount == 1

    def _drop(self) -> None:
        self._prepared.clear()
        if self._connection:
            if not self._connection.closed:  # or aiopg would stop watching a socket that is another's now
                self._connection.close()
            self._pool.release(self._connection)
            self._connection = None
