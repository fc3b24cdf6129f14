"""Connections to PostgreSQL: made when they are needed, replaced when they are broken.

Rules kept here: nothing blocks the event loop; address and password are read for each new connection, since both may
have changed; a pooler may give one backend to several clients, so nothing is set or prepared on a backend that this
connection shares.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable
from typing import Any

import aiopg
import psycopg2
from psycopg2.extensions import STATUS_READY, QueryCanceledError, make_dsn, parse_dsn
from psycopg2.extensions import connection as psycopg2_connection

import metrics
import threads

FAILURES = (psycopg2.Error, OSError, RuntimeError)  # by class: psycopg2 has no code for a lost connection
CLIENT_CHECK_INTERVAL = 0.1  # seconds in which PostgreSQL notices that nobody waits for a query any more, and ends it
# Sets the session's time limits if the backend is its own. A pooler makes up the number that a client gets at login.
LIMIT = (
    "SELECT set_config('statement_timeout', %s, false), set_config('client_connection_check_interval', %s, false)"
    " WHERE pg_backend_pid() = %s"
)
# The mode that libpq tries next, on another socket; then, if that fails too, the one it began with, to learn why.
SECOND_TRIES = {"prefer": ("disable", "require"), "allow": ("require", "disable")}

Row = tuple[Any, ...]


class Connection(psycopg2_connection):  # type: ignore[misc]  # psycopg2 has no types
    """The psycopg2 connection that aiopg drives. It fails where aiopg would hang or leave a request unanswered."""

    _inode: int | None = None  # of its socket

    def poll(self) -> int:
        """Raises `psycopg2.NotSupportedError` when libpq goes on with a socket that aiopg does not watch."""
        socket = self.fileno()
        try:
            state: int = super().poll()
        except psycopg2.Error as error:
            # libpq may have closed its socket. aiopg then stops reading from it, but not writing: the event loop would
            # go on watching a number that is another socket's next.
            asyncio.get_running_loop().remove_writer(socket)
            if isinstance(error, QueryCanceledError):  # aiopg would raise CancelledError, as if the client had left
                raise psycopg2.OperationalError(str(error)) from None
            raise
        if self.status != STATUS_READY:
            watched, self._inode = self._inode, os.fstat(self.fileno()).st_ino
            if watched not in (None, self._inode):
                raise psycopg2.NotSupportedError("libpq went on with another socket")
        return state


class Slot:
    """One connection, kept while it works: an aiopg pool of one.

    aiopg holds a pool's lock while it connects. In a pool of several, one slow connect would hold up all the others.
    """

    def __init__(self, dsn: str, password: Callable[[], str], timeout: float, resolver: threads.Resolver) -> None:
        """`password` reads the password, and may block; `timeout` is for connecting, in seconds."""
        self._dsn = dsn
        self._password = password
        self._timeout = timeout
        self._resolver = resolver
        self._pool: aiopg.Pool
        self._connect_with: dict[str, str | None] = {}
        self._connection: aiopg.Connection | None = None
        self._cursor: aiopg.Cursor
        self._owns_backend = False  # whether each statement meets the same backend, and nobody else's do
        self._prepared: dict[str, str] = {}  # statements that the backend has prepared, and their names

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

    async def fetch(self, statement: str, args: tuple[object, ...] = (), *, once: bool = False) -> list[Row]:
        """Return the rows that a statement yields, on a new connection if there is none or the old one is broken.

        The statement may run twice, unless it is to run `once`. Raises `psycopg2.Error`, `OSError` or (aiopg's own)
        `RuntimeError`.
        """
        if once:
            await self.fetch("SELECT 1")  # finds out whether the connection still works
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
            # aiopg has closed the connection. Keep this slot until the server notices, or the database would work on
            # more queries than there are slots.
            await asyncio.sleep(CLIENT_CHECK_INTERVAL)
            raise
        return await cursor.fetchall() if cursor.description else []

    async def _execute_prepared(self, statement: str) -> None:
        """Planning takes a third of so small a query's time, so each connection does it once."""
        name = self._prepared.get(statement)
        if name is None:  # not when connecting, since it needs the table
            # Named after its text, so that no other statement can ever be executed in its place.
            name = f"messages_{hashlib.sha256(statement.encode()).hexdigest()[:16]}"
            await self._cursor.execute(f"PREPARE {name} AS {statement}")
            self._prepared[statement] = name
        await self._cursor.execute(f"EXECUTE {name}")
        if not self._cursor.rowcount:
            # EXECUTE takes its snapshot before its lock: if it had to wait while the table was rewritten or replaced,
            # it sees no rows. A plain statement takes its snapshot after the lock.
            await self._cursor.execute(statement)

    # ---- connecting --------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Try one address after another. libpq's own loop blocks for the look-up, and limits no single try."""
        password = await threads.call(self._password)
        addresses = await self._addresses()
        causes = []
        for address in addresses:
            try:
                async with asyncio.timeout(self._timeout / len(addresses)):
                    await self._connect_to(hostaddr=address, password=password)
                return
            except FAILURES as error:
                self._drop()
                metrics.CONNECT_FAILURES.inc()
                causes.append(str(error).strip() or "no answer in time")
                if address == addresses[-1]:
                    raise type(error)("; ".join(causes)) from error

    async def _addresses(self) -> list[str | None]:
        target = parse_dsn(self._dsn)
        if target["host"].startswith("/"):
            return [None]  # a socket's folder has none
        try:
            found = await self._resolver.resolve(target["host"], int(target["port"]))
        except OSError as error:
            raise OSError(f"could not look up {target['host']}: {error.strerror}") from error
        return [address["host"] for address in found]

    async def _connect_to(self, **target: str | None) -> None:
        """Connect as libpq does, with TLS or without; a try on another socket becomes a connection of its own."""
        try:
            return await self._acquire(**target)
        except psycopg2.NotSupportedError:
            causes: list[str] = []
        mode = parse_dsn(self._dsn)["sslmode"]
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
        # The server's limits are longer than this service's, whose error is clearer.
        limits = f"{self._timeout + 1}s", f"{CLIENT_CHECK_INTERVAL}s"
        await self._cursor.execute(LIMIT, (*limits, self._connection.raw.get_backend_pid()))
        self._owns_backend = self._cursor.rowcount == 1

    def _drop(self) -> None:
        self._prepared.clear()
        if self._connection:
            if not self._connection.closed:  # or aiopg would stop watching a socket that is another's now
                self._connection.close()
            self._pool.release(self._connection)
            self._connection = None
